"""ACT_QUANT bytes in registers: uint8 -> two int8 weights, and weights -> an operand of tl.dot.

Byte j of a slice of 32 k holds k = j in its low nibble and k = 16 + j in its high one, as q - 8 in
two's complement (layout.py). In the high half of an int8 either nibble is UNIT * (q - 8):

    high   b & 0xF0          low   (b << 4) & 0xF0

so three operations on a 32-bit word unpack eight weights. Sums of products are divided by UNIT at
the end, which is exact.

The order of k within an operand must be the one in which the matrix unit takes its registers, or
Triton carries the weights through shared memory: slower, never wrong. A thread t of four holds the
four bytes 4t..4t+3 of a slice, that is k = 16 h + 4 t + b. KWIDTH 4 keeps k as it is; KWIDTH 8
exchanges h and t, in the weights and, by permute_codes, in the activations.

Word order is for kernels that read these words as if they were COALESCED (layout.py). Word 4t + i
of a block holds k = 32t + 16h + 4i + b at nibble 2b + h; with b = 2r + p and h = q', that is the
place of k = 32i + 16p + 8q' + 2t + r. word_order puts activations there.
"""

from __future__ import annotations

import triton
import triton.language as tl

# weights leave unpack_bytes as UNIT * (q - 8)
UNIT = tl.constexpr(16)


@triton.jit
def unpack_bytes(w, ASM: tl.constexpr):
    """uint8 bytes of any shape -> int8 weights of the low and of the high nibbles."""
    if ASM:
        # four bytes at a time, whichever four: each byte is on its own once the mask is on
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $0, t, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }""",
            "=r,=r,r",
            [w],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((w & 15) << 4).to(tl.int8, bitcast=True)
        return low, (w & 240).to(tl.int8, bitcast=True)


@triton.jit
def join_halves(low, high, KWIDTH: tl.constexpr):
    """int8 [R, W / 2] of low and of high nibbles -> an operand [R, W], k in KWIDTH's order."""
    R: tl.constexpr = low.shape[0]
    W: tl.constexpr = low.shape[1] * 2
    z = tl.join(low, high)
    if KWIDTH == 4:
        z = z.reshape(R, W // 32, 16, 2).trans(0, 1, 3, 2)
    else:
        z = z.reshape(R, W // 32, 4, 4, 2).trans(0, 1, 2, 4, 3)
    return z.reshape(R, W)


@triton.jit
def permute_codes(x, KWIDTH: tl.constexpr):
    """Activation codes [R, W] with k in the order that join_halves gives the weights."""
    if KWIDTH == 4:
        return x
    else:
        R: tl.constexpr = x.shape[0]
        W: tl.constexpr = x.shape[1]
        return x.reshape(R, W // 32, 2, 4, 4).trans(0, 1, 3, 2, 4).reshape(R, W)


@triton.jit
def word_order(x):
    """Activations [BK], a multiple of 128, in the order that COALESCED readers give ACT_QUANT."""
    BK: tl.constexpr = x.shape[0]
    # [block, t, q', i, r, p] -> [block, i, p, q', t, r]
    return x.reshape(BK // 128, 4, 2, 4, 2, 2).trans(0, 3, 5, 2, 1, 4).reshape(BK)
