"""16-bit activations as integers of 16 bits, in two planes of bytes, which dp4a can multiply.

For each 128 k, with a scale that is a power of two, x = (256 * high + low) * unit, high signed and
low unsigned: numbers down to 1 / 128 of the largest among the 128 (of fp16: 1 / 16) are exact,
others lose at most 2**-15 of that largest. That is less than tiles lose by rounding weights to 16
bits. Where a number is Inf or NaN, so is the unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# what makes the low bits of an fp32 those of the integer that is added to it, in [-2**22, 2**22)
ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def _split_bytes(a, b, c, d, ASM: tl.constexpr):
    """Bytes 1 of four int32, as a word, and bytes 0."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 l, h;
                prmt.b32 l, $2, $3, 0x5410;
                prmt.b32 h, $4, $5, 0x5410;
                prmt.b32 $0, l, h, 0x7531;
                prmt.b32 $1, l, h, 0x6420;
            }""",
            "=r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        high = (a >> 8 & 255) | (b >> 8 & 255) << 8 | (c >> 8 & 255) << 16 | (d >> 8 & 255) << 24
        low = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
        return high, low


@triton.jit
def larger_bf16(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def larger_fp16(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def numbers(pairs, DTYPE: tl.constexpr):
    """The two numbers of each pair, as fp32."""
    if DTYPE == tl.bfloat16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _exponents(pairs, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Pairs [16, T] -> exponents [T] with 2**(e - 127) <= the largest number that four threads, a
    block of 128 k, have: 255 where one is not finite, and at least 15."""
    T: tl.constexpr = pairs.shape[1]
    sizes = pairs & 0x7FFF7FFF
    if ASM and DTYPE == tl.bfloat16:
        sizes = tl.reduce(sizes, 0, larger_bf16)
    elif ASM:
        sizes = tl.reduce(sizes, 0, larger_fp16)
    a, b = numbers(sizes, DTYPE)
    # of numbers without a sign, the order of bits is theirs; NaN is the largest
    largest = tl.maximum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True))
    if not ASM:
        largest = tl.max(largest, 0)
    largest = tl.max(largest.reshape(T // 4, 4), 1)
    e = tl.maximum(largest >> 23, 15)
    return (e[:, None] + tl.zeros([1, 4], tl.int32)).reshape(T)


@triton.jit
def four(v):
    """[T, 4] -> four tensors [T]."""
    even, odd = v.reshape(v.shape[0], 2, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0, v1, v2, v3


@triton.jit
def as_planes(pairs, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Pairs of x [(i, p, q', thread)] -> two planes, and unit [T].

    A plane has, for the low nibbles of words and for the high ones, four words [T] of bytes of x:
    those that belong to word i of a thread's chunk (layout.py).
    """
    T: tl.constexpr = pairs.shape[0] // 16
    e = _exponents(pairs.reshape(16, T), DTYPE, ASM)
    scale = ((268 - e) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(e < 255, (e - 14) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    # k = 32i + 16p + 8q' + 2t + r, of r = 0 and of r = 1
    even, odd = numbers(pairs, DTYPE)
    even = (even.reshape(16, T) * scale[None, :] + ROUND).to(tl.int32, bitcast=True)
    odd = (odd.reshape(16, T) * scale[None, :] + ROUND).to(tl.int32, bitcast=True)
    # -> [i, q', T] of p = 0 and p = 1; bytes of a word are r, then p
    a, b = even.reshape(4, 2, 2, T).trans(0, 2, 3, 1).split()
    c, d = odd.reshape(4, 2, 2, T).trans(0, 2, 3, 1).split()
    high, low = _split_bytes(a, b, c, d, ASM)
    # q' is whether a nibble is the high one
    high_0, high_1 = high.trans(0, 2, 1).split()
    low_0, low_1 = low.trans(0, 2, 1).split()
    high_x = four(high_0.trans(1, 0)), four(high_1.trans(1, 0))
    low_x = four(low_0.trans(1, 0)), four(low_1.trans(1, 0))
    return (high_x, low_x), unit
