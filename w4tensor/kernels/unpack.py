"""COALESCED words in registers: int32 -> eight weights, and weights -> an operand of tl.dot.

A word (layout.py) holds eight codes q; element e = 4p + 2q' + r stands at nibble 4r + 2p + q':

    nibble    7   6   5   4 | 3   2   1   0
    element   7   5   3   1 | 6   4   2   0        k = 16p + 8q' + 2t + r within a 32-wide slice

Elements leave unpack() as CODE_UNIT * (q - 8) in bf16 or fp16, exactly: the unit is what lets two
nibbles of a 16-bit lane be read without a shift between them. Who multiplies by a scale after the
dot divides the sum by CODE_UNIT.

    bf16   low nibble   (w & 0x000F) | 0x0280 = 2**-122 + q * 2**-129   * 2**127 - 34
           high nibble   w & 0x00F0           = q * 2**-129, subnormal  * 2**127 - 2
    fp16   low nibble   (w & 0x000F) | 0x7400 = 16384 + 16 q            * 2**-6 - 258
           high nibble  (w & 0x00F0) | 0x6400 = 1024 + 16 q             * 2**-6 - 18

The order of k within an operand must be the one in which the matrix unit takes its registers, or
Triton carries the weights through shared memory: slower, never wrong. KWIDTH 2 keeps k as it is;
KWIDTH 4 exchanges q' and t within each 16 k, in the weights and, by permute_x, in x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# weights leave unpack() as CODE_UNIT * (q - 8)
CODE_UNIT = tl.constexpr(0.25)
SYMMETRIC_ZERO_POINT = tl.constexpr(8.0)
# what unpack_scaled multiplies by, so that small scales times codes are normal numbers of fp16
FP16_LIFT = tl.constexpr(64.0)

# one word $8 -> pairs a, b (p = 0) and c, d (p = 1) of (q - 8) / 4; one factor for both nibbles, as
# an instruction has room for one constant, and the other takes a register
_BF16_CODES = """
    .reg .b32 s, a, b, c, d, factor, low, high;
    mov.b32 factor, 0x7F007F00;                    // 2**127
    mov.b32 low, 0xC208C208;                       // -34
    mov.b32 high, 0xC000C000;                      // -2
    shr.u32 s, $8, 8;
    lop3.b32 a, $8, 0x000F000F, 0x02800280, 0xEA;  // (w & mask) | 2**-122
    and.b32 b, $8, 0x00F000F0;
    lop3.b32 c, s, 0x000F000F, 0x02800280, 0xEA;
    and.b32 d, s, 0x00F000F0;
    fma.rn.bf16x2 a, a, factor, low;
    fma.rn.bf16x2 b, b, factor, high;
    fma.rn.bf16x2 c, c, factor, low;
    fma.rn.bf16x2 d, d, factor, high;
"""
_FP16_CODES = """
    .reg .b32 s, a, b, c, d, factor, low, high;
    mov.b32 factor, 0x24002400;                    // 2**-6
    mov.b32 low, 0xDC08DC08;                       // -258
    mov.b32 high, 0xCC80CC80;                      // -18
    shr.u32 s, $8, 8;
    lop3.b32 a, $8, 0x000F000F, 0x74007400, 0xEA;  // (w & mask) | 16384
    lop3.b32 b, $8, 0x00F000F0, 0x64006400, 0xEA;  // (w & mask) | 1024
    lop3.b32 c, s, 0x000F000F, 0x74007400, 0xEA;
    lop3.b32 d, s, 0x00F000F0, 0x64006400, 0xEA;
    fma.rn.f16x2 a, a, factor, low;
    fma.rn.f16x2 b, b, factor, high;
    fma.rn.f16x2 c, c, factor, low;
    fma.rn.f16x2 d, d, factor, high;
"""
# scale and shift
_SCALED = """
    fma.rn.{x2} a, a, $9, $10;
    fma.rn.{x2} b, b, $9, $10;
    fma.rn.{x2} c, c, $11, $12;
    fma.rn.{x2} d, d, $11, $12;
"""
_OUT = "mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;"


def _asm(*parts: str) -> tl.constexpr:
    return tl.constexpr("{" + "".join(parts) + _OUT + "}")


_BF16 = _asm(_BF16_CODES)
_FP16 = _asm(_FP16_CODES)
_BF16_SCALED = _asm(_BF16_CODES, _SCALED.format(x2="bf16x2"))
_FP16_SCALED = _asm(_FP16_CODES, _SCALED.format(x2="f16x2"))
_REGISTERS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")
_SCALED_REGISTERS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r")


def use_asm() -> bool:
    """Whether kernels may use inline assembly: Triton's CPU interpreter refuses it."""
    return not knobs.runtime.interpret


@triton.jit
def unpack(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """int32 words of any shape -> the eight tensors of elements 0..7, as DTYPE (bf16 or fp16)."""
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16, _REGISTERS, [w], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            _FP16, _REGISTERS, [w], dtype=(tl.float16,) * 8, is_pure=True, pack=1
        )
    else:
        return (
            _code(w, 0, DTYPE),
            _code(w, 16, DTYPE),
            _code(w, 4, DTYPE),
            _code(w, 20, DTYPE),
            _code(w, 8, DTYPE),
            _code(w, 24, DTYPE),
            _code(w, 12, DTYPE),
            _code(w, 28, DTYPE),
        )


@triton.jit
def _code(w, NIBBLE: tl.constexpr, DTYPE: tl.constexpr):
    q = w.to(tl.uint32, bitcast=True) >> NIBBLE & 15
    return ((q.to(tl.float32) - SYMMETRIC_ZERO_POINT) * CODE_UNIT).to(DTYPE)


@triton.jit
def unpack_scaled(w, scale0, scale1, zero0, zero1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Words -> elements (q - zero) * scale in DTYPE, times FP16_LIFT in fp16.

    scale and zero are fp32 in the words' shape; 0 goes with p = 0 (elements 0..3), 1 with p = 1.
    zero0 and zero1 may be None, for 8: then an element is rounded once. Otherwise
    (8 - zero) * scale is rounded too, before (q - 8) * scale is added to it.
    """
    terms0 = scaling_terms(scale0, zero0, DTYPE, ASM)
    terms1 = scaling_terms(scale1, zero1, DTYPE, ASM)
    return unpack_by_terms(w, terms0, terms1, DTYPE, ASM)


@triton.jit
def scaling_terms(scale, zero, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """What unpack_by_terms() needs of scales and zero points (None: 8), fp32 of one shape: int32 of
    that shape, each twice a DTYPE: a factor for CODE_UNIT * (q - 8), and what is added.
    """
    LIFT: tl.constexpr = FP16_LIFT if DTYPE == tl.float16 else 1.0
    factor = _pair(scale * (LIFT / CODE_UNIT), DTYPE, ASM)
    if zero is None:
        # -0, in the shape and layout of the scales: adding it does not even change the sign of 0
        shift = (factor & 0) | -0x7FFF8000
    else:
        shift = _pair((zero * -LIFT + SYMMETRIC_ZERO_POINT * LIFT) * scale, DTYPE, ASM)
    return factor, shift


@triton.jit
def unpack_by_terms(w, terms0, terms1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """unpack_scaled() of what scaling_terms() made for p = 0 and for p = 1, in the words' shape."""
    s0, shift0 = terms0
    s1, shift1 = terms1
    args = [w, s0, shift0, s1, shift1]
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_SCALED, _SCALED_REGISTERS, args, dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            _FP16_SCALED, _SCALED_REGISTERS, args, dtype=(tl.float16,) * 8, is_pure=True, pack=1
        )
    else:
        return (
            _scaled(w, 0, s0, shift0, DTYPE),
            _scaled(w, 16, s0, shift0, DTYPE),
            _scaled(w, 4, s0, shift0, DTYPE),
            _scaled(w, 20, s0, shift0, DTYPE),
            _scaled(w, 8, s1, shift1, DTYPE),
            _scaled(w, 24, s1, shift1, DTYPE),
            _scaled(w, 12, s1, shift1, DTYPE),
            _scaled(w, 28, s1, shift1, DTYPE),
        )


@triton.jit
def _pair(value, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """fp32 -> DTYPE, twice in an int32."""
    # a conversion to one 16-bit number is sixteen times slower than one to two
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [value], tl.int32, is_pure=True, pack=1
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [value], tl.int32, is_pure=True, pack=1
        )
    else:
        bits = value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        return (bits & 0xFFFF) | (bits << 16)


@triton.jit
def _low_half(pair, DTYPE: tl.constexpr):
    """The lower of two DTYPE numbers in an int32, as fp32."""
    return pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _scaled(w, NIBBLE: tl.constexpr, scale, shift, DTYPE: tl.constexpr):
    code = _code(w, NIBBLE, DTYPE).to(tl.float32)
    return (code * _low_half(scale, DTYPE) + _low_half(shift, DTYPE)).to(DTYPE)


@triton.jit
def join8(e0, e1, e2, e3, e4, e5, e6, e7):
    """Elements of words [..] -> [.., p, q', r]."""
    return tl.join(
        tl.join(tl.join(e0, e4), tl.join(e2, e6)),
        tl.join(tl.join(e1, e5), tl.join(e3, e7)),
    )


@triton.jit
def unpack_operand(w, KWIDTH: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Words [R, BK / 8] -> weights [R, BK] of CODE_UNIT * (q - 8), k in KWIDTH's order."""
    R: tl.constexpr = w.shape[0]
    BK: tl.constexpr = w.shape[1] * 8
    e0, e1, e2, e3, e4, e5, e6, e7 = unpack(w, DTYPE, ASM)
    # [R, (block, t, i), p, q', r]
    z = join8(e0, e1, e2, e3, e4, e5, e6, e7)
    if KWIDTH == 2:
        z = z.reshape(R, BK // 128, 4, 4, 2, 2, 2).trans(0, 1, 3, 4, 5, 2, 6)
    else:
        z = z.reshape(R, BK // 128, 4, 4, 2, 4).trans(0, 1, 3, 4, 2, 5)
    return z.reshape(R, BK)


@triton.jit
def permute_x(x, KWIDTH: tl.constexpr):
    """x [R, BK] with k in the order that unpack_operand gives the weights."""
    if KWIDTH == 2:
        return x
    else:
        R: tl.constexpr = x.shape[0]
        BK: tl.constexpr = x.shape[1]
        return x.reshape(R, BK // 128, 4, 2, 2, 4, 2).trans(0, 1, 2, 3, 5, 4, 6).reshape(R, BK)
