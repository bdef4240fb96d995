"""ACT_QUANT words times int8 activations, for kernels/gemv.py: what a thread adds up.

A thread has chunks of 16 bytes of a row, which are slices of 32 k (layout.py), and those of x as
codes (codes.py). Products are summed in integers over the slice, for which weights and activations
have one scale each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from w4tensor.kernels.dp4a import S8_S8, U8_S8, dp4a
from w4tensor.kernels.gemv_coalesced import HIGH_NIBBLES, LOW_NIBBLES, UNIT
from w4tensor.kernels.planes import four
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT


@triton.jit
def _low_codes(w, ASM: tl.constexpr):
    """q of the lower nibbles of a word, which hold q - 8 in two's complement, in its bytes."""
    if ASM:
        # one instruction; Triton's own expression becomes two
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x0F0F0F0F, 0x08080808, 0x6A;  // (w & mask) ^ 8",
            "=r,r",
            [w],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (w & LOW_NIBBLES) ^ 0x08080808


@triton.jit
def scales_of_slices(
    ptr,
    row,
    slice,
    ok,
    n_groups,
    K,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """Scales or zero points of a row's slices [T]."""
    if not WHOLE_BLOCKS:
        ok = ok & (slice * 32 < K)
    group = slice * 0 if GROUP == 0 else slice // (GROUP // 32)
    return tl.load(ptr + (row * n_groups + group), mask=ok, other=0.0)


@triton.jit
def step_of_slices(
    acc,
    words,
    scale,
    zero,
    # what as_codes() made of x
    codes,
    first_sum,
    second_sum,
    unit,
    ASM: tl.constexpr,
):
    """acc [T] + one row's slices, in units of 1 / UNIT."""
    w = four(words)
    # low nibbles are taken as q, and high ones, where they stand, as 16 * (q - 8)
    d = first_sum * -8
    for i in tl.static_range(4):
        d = dp4a(_low_codes(w[i], ASM), codes[i], d, U8_S8, ASM)
    d *= UNIT
    for i in tl.static_range(4):
        d = dp4a(w[i] & HIGH_NIBBLES, codes[4 + i], d, S8_S8, ASM)
    d = d.to(tl.float32)
    if zero is not None:
        sums = ((first_sum + second_sum) * UNIT).to(tl.float32)
        d -= (zero.to(tl.float32) - SYMMETRIC_ZERO_POINT) * sums
    return acc + d * unit * scale.to(tl.float32)
