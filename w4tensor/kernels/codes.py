"""Activations of a thread as int8 codes for dp4a: scale = absmax / 127, round_half_even(x / scale).

A thread has the 32 k of a slice, whose codes become eight words in the order of ACT_QUANT's bytes
(layout.py). The bits are those of reference.quantize_activation, but for a group that holds Inf or
NaN: its scale is NaN, so that its codes do not matter.

Quotients. 1 / scale is carried as r + rest, r = RN(1 / scale). For an x of 11 bits or fewer,
RN(x * r + RN(x * rest)) rounds to the same integer as RN(x / scale): the two differ by less than
2**-46 of x / scale beside their last rounding, which would have to carry it over the border of what
rounds to an integer and a half, and no x / scale is nearer to such a border than 2**-40 of its size
(tests/kernels/test_codes.py goes through them all). An fp32 x takes two corrections by the
remainder instead, as in quantize_activation.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from w4tensor.kernels.dp4a import S8_S8, dp4a
from w4tensor.kernels.planes import four, larger_bf16, larger_fp16, numbers
from w4tensor.kernels.quantize_activation import ROUNDING

ONES = tl.constexpr(0x01010101)


@triton.jit
def load_slices(
    x_ptr,
    stride_x,
    slot,
    slice,
    ok,
    K,
    # whether K is a multiple of 32
    WHOLE_SLICES: tl.constexpr,
):
    """Of rows `slot` of x, 16-byte aligned, the 32 k of `slice` [T]: 32-bit words, each [T]."""
    NUMBERS: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    WORDS: tl.constexpr = 32 // NUMBERS
    # in 32-bit words
    at = slot * (stride_x // NUMBERS * 4) + slice * (4 * WORDS)
    ptr = x_ptr.to(tl.pointer_type(tl.int32)) + at[:, None] + tl.arange(0, 4)[None, :]
    words = ()
    for i in tl.static_range(WORDS):
        there = ok
        if not WHOLE_SLICES:
            # K is a multiple of NUMBERS
            there = ok & (slice * 32 + i * NUMBERS < K)
        words += four(tl.load(ptr + 4 * i, mask=there[:, None], other=0))
    return words


@triton.jit
def _bits(a):
    return a.to(tl.int32, bitcast=True)


@triton.jit
def _absmax(words, DTYPE: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr):
    """Of an activation group, in which GROUP / 32 threads have a slice each; fp32 [T]."""
    T: tl.constexpr = words[0].shape[0]
    if DTYPE == tl.float32:
        largest = words[0] & 0x7FFFFFFF
        for i in tl.static_range(1, len(words)):
            largest = tl.maximum(largest, words[i] & 0x7FFFFFFF)
    elif ASM:
        sizes = words[0] & 0x7FFF7FFF
        for i in tl.static_range(1, len(words)):
            if DTYPE == tl.bfloat16:
                sizes = larger_bf16(sizes, words[i] & 0x7FFF7FFF)
            else:
                sizes = larger_fp16(sizes, words[i] & 0x7FFF7FFF)
        a, b = numbers(sizes, DTYPE)
        # of numbers without a sign, the order of bits is theirs; NaN is the largest
        largest = tl.maximum(_bits(a), _bits(b))
    else:
        largest = tl.zeros([T], tl.int32)
        for i in tl.static_range(len(words)):
            a, b = numbers(words[i] & 0x7FFF7FFF, DTYPE)
            largest = tl.maximum(largest, tl.maximum(_bits(a), _bits(b)))
    THREADS: tl.constexpr = GROUP // 32
    if THREADS > 1:
        largest = tl.max(largest.reshape(T // THREADS, THREADS), 1)
        largest = (largest[:, None] + tl.zeros([1, THREADS], tl.int32)).reshape(T)
    return largest.to(tl.float32, bitcast=True)


@triton.jit
def _divisor(absmax, scale, DTYPE: tl.constexpr):
    """What _code() needs: a power of two for x, scale times that, and its r and rest."""
    lift = tl.full(scale.shape, 1.0, tl.float32)
    if DTYPE != tl.float16:
        # neither r nor rest nor a remainder may leave the normal numbers
        lift = tl.where(absmax < 2.0**-60, 2.0**100, lift)
        lift = tl.where(absmax > 2.0**60, 2.0**-100, lift)
    divisor = tl.where(scale > 0, scale * lift, 1.0)
    r = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    return lift, divisor, r, tl.fma(-divisor, r, 1.0) * r


@triton.jit
def _code(x, terms, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The code of each x [T], in the lowest byte of an int32."""
    lift, divisor, r, rest = terms
    if DTYPE != tl.float16:
        x *= lift
    if not ASM:
        # Triton's interpreter rounds the product of a multiply-add
        q = tl.div_rn(x, divisor)
    elif DTYPE == tl.float32:
        q = x * r
        for _ in tl.static_range(2):
            q = tl.fma(tl.fma(q, -divisor, x), r, q)
    else:
        q = tl.fma(x, r, x * rest)
    if DTYPE == tl.float32:
        # subnormal scales of few bits let quotients pass 127; those of bf16, from 2**-133 on, have
        # ten, which keep them below 127.2
        q = tl.clamp(q, -127.0, 127.0)
    return _bits(q + ROUNDING)


@triton.jit
def _word(a, b, c, d, ASM: tl.constexpr):
    """The lowest bytes of four int32, the first of them lowest."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 l, h;
                prmt.b32 l, $1, $2, 0x0040;
                prmt.b32 h, $3, $4, 0x0040;
                prmt.b32 $0, l, h, 0x5410;
            }""",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24


@triton.jit
def as_codes(words, DTYPE: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr):
    """What load_slices() gave -> codes, as eight words [T] of k 0..3, 4..7, ..; sums of those of
    k 0..15 and of k 16..31; and their scale [T]."""
    absmax = _absmax(words, DTYPE, GROUP, ASM)
    scale = tl.div_rn(absmax, tl.full(absmax.shape, 127.0, tl.float32))
    terms = _divisor(absmax, scale, DTYPE)
    codes = ()
    for i in tl.static_range(8):
        if DTYPE == tl.float32:
            a = words[4 * i].to(tl.float32, bitcast=True)
            b = words[4 * i + 1].to(tl.float32, bitcast=True)
            c = words[4 * i + 2].to(tl.float32, bitcast=True)
            d = words[4 * i + 3].to(tl.float32, bitcast=True)
        else:
            a, b = numbers(words[2 * i], DTYPE)
            c, d = numbers(words[2 * i + 1], DTYPE)
        a = _code(a, terms, DTYPE, ASM)
        b = _code(b, terms, DTYPE, ASM)
        c = _code(c, terms, DTYPE, ASM)
        d = _code(d, terms, DTYPE, ASM)
        codes += (_word(a, b, c, d, ASM),)
    none = tl.zeros(absmax.shape, tl.int32)
    first = none
    second = none
    for i in tl.static_range(4):
        first = dp4a(none + ONES, codes[i], first, S8_S8, ASM)
        second = dp4a(none + ONES, codes[i + 4], second, S8_S8, ASM)
    scale = tl.where(absmax < float("inf"), scale, float("nan"))
    return codes, first, second, scale
