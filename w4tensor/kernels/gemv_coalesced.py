"""COALESCED words times 16-bit activations, for kernels/gemv.py: what a thread loads and adds up.

A thread has chunks of 16 bytes of a row, the 32 k of one lane of a block of 128 (layout.py), and
those of x as planes of bytes (planes.py). Products are summed in integers over a group of weights,
or the 128 k at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from w4tensor.kernels.dp4a import U8_S8, U8_U8, dp4a
from w4tensor.kernels.planes import four
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT

LOW_NIBBLES = tl.constexpr(0x0F0F0F0F)
HIGH_NIBBLES = tl.constexpr(-0x0F0F0F10)
ONES = tl.constexpr(0x01010101)
# high nibbles stand for 16 times their codes: sums are in units of 1 / UNIT
UNIT = tl.constexpr(16)


@triton.jit
def load_pairs(
    x_ptr,
    stride_x,
    # of f % THREADS, the thread of each of the 16 * THREADS pairs
    slot,
    chunk,
    ok,
    K,
    THREADS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """Pairs of x [(i, p, q', thread)], in the order in which Triton deals them to registers."""
    f = tl.arange(0, 16 * THREADS)
    # t, in a form that keeps neighbours from being taken for one load of 16 bytes
    t = (3 - chunk % 4) ^ 3
    pair = chunk // 4 * 64 + t
    of_thread = f // THREADS * 4
    if not WHOLE_BLOCKS:
        ok = ok & (of_thread < K // 2 - pair)
    # added last, for one address to serve all of a thread's loads
    at = x_ptr.to(tl.pointer_type(tl.int32)) + (slot * (stride_x // 2) + pair) + of_thread
    return tl.load(at, mask=ok, other=0)


@triton.jit
def sums_of_words(planes, ASM: tl.constexpr):
    """UNIT times the sums of x of each of four words, and of all of them; in two planes."""
    high_x, low_x = planes
    none = tl.zeros(high_x[0][0].shape, tl.int32)
    high_sums = ()
    low_sums = ()
    high_all = none
    low_all = none
    for i in tl.static_range(4):
        high = dp4a(none + ONES, high_x[0][i], none, U8_S8, ASM)
        low = dp4a(none + ONES, low_x[0][i], none, U8_U8, ASM)
        high = dp4a(none + ONES, high_x[1][i], high, U8_S8, ASM) * UNIT
        low = dp4a(none + ONES, low_x[1][i], low, U8_U8, ASM) * UNIT
        high_sums += (high,)
        low_sums += (low,)
        high_all += high
        low_all += low
    return high_sums + (high_all,), low_sums + (low_all,)


@triton.jit
def _sum(high, low):
    """Of sums of the two planes; fp32."""
    return (high * 256 + low).to(tl.float32)


@triton.jit
def step(
    acc,
    words,
    scale,
    zero,
    # what as_planes() and sums_of_words() made of x
    planes,
    sums,
    unit,
    FINE: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc [T] + one row's chunks."""
    high_x, low_x = planes
    high_sums, low_sums = sums
    w = four(words)
    none = tl.zeros(acc.shape, tl.int32)
    if FINE:
        s = four(scale.to(tl.float32))
        part = tl.zeros(acc.shape, tl.float32)
        for i in tl.static_range(4):
            low_w = w[i] & LOW_NIBBLES
            high_w = w[i] & HIGH_NIBBLES
            high = dp4a(low_w, high_x[0][i], none, U8_S8, ASM) * UNIT
            low = dp4a(low_w, low_x[0][i], none, U8_U8, ASM) * UNIT
            high += dp4a(high_w, high_x[1][i], high_sums[i] * -8, U8_S8, ASM)
            low += dp4a(high_w, low_x[1][i], low_sums[i] * -8, U8_U8, ASM)
            d = _sum(high, low)
            if zero is not None:
                z = four(zero.to(tl.float32))
                d -= (z[i] - SYMMETRIC_ZERO_POINT) * _sum(high_sums[i], low_sums[i])
            part += d * s[i]
        return acc + part * unit
    else:
        high_0 = none
        low_0 = none
        high_1 = high_sums[4] * -8
        low_1 = low_sums[4] * -8
        for i in tl.static_range(4):
            low_w = w[i] & LOW_NIBBLES
            high_w = w[i] & HIGH_NIBBLES
            high_0 = dp4a(low_w, high_x[0][i], high_0, U8_S8, ASM)
            low_0 = dp4a(low_w, low_x[0][i], low_0, U8_U8, ASM)
            high_1 = dp4a(high_w, high_x[1][i], high_1, U8_S8, ASM)
            low_1 = dp4a(high_w, low_x[1][i], low_1, U8_U8, ASM)
        d = _sum(high_0 * UNIT + high_1, low_0 * UNIT + low_1)
        if zero is not None:
            d -= (zero.to(tl.float32) - SYMMETRIC_ZERO_POINT) * _sum(high_sums[4], low_sums[4])
        return acc + d * unit * scale.to(tl.float32)


@triton.jit
def groups(
    ptr,
    row,
    chunk,
    ok,
    n_groups,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """Scales or zero points of a row's chunks: [T], or of each word where a block has several."""
    if GROUP == 0 or GROUP >= 128:
        group = chunk * 0 if GROUP == 0 else chunk // 4 // (GROUP // 128)
        return tl.load(ptr + (row * n_groups + group), mask=ok, other=0.0)
    else:
        PARTS: tl.constexpr = 128 // GROUP
        first = chunk // 4 * PARTS
        ok = ok[:, None]
        part = (tl.arange(0, 4) // (GROUP // 32))[None, :]
        if WHOLE_BLOCKS:
            # one load of neighbours
            at = tl.multiple_of(row * n_groups + first, [PARTS])
        else:
            at = row * n_groups + first
            ok = ok & (first[:, None] + part < n_groups)
        return tl.load((ptr + at)[:, None] + part, mask=ok, other=0.0)
