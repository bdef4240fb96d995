"""Words and scales of a step as the operand of Hopper's matrix unit, in Gluon.

A step has 128 k, unpacked as two halves. A thread has the words in shared memory whose weights the
matrix unit wants of it, so that nothing moves between threads.

W is in the COALESCED format, or in ACT_QUANT with x in word order (kernels/unpack_act_quant.py):
then word (t, i) of a step is of slice t, not i, and so are its scales; and nibbles are q ^ 8.

Scales of bf16 weights without zero points must be below 2**26: codes enter the multiplication as
subnormal numbers, whose unit goes into the scale.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.act_quant_words import EIGHTS
from w4tensor.kernels.hopper_memory import in_turn, rows_in_memory
from w4tensor.kernels.hopper_multiples import (
    halves_of_slices,
    layout_of_slices,
    load_slices,
    terms_of_multiples,
    unpack_multiples,
)
from w4tensor.kernels.unpack import join8, scaling_terms, unpack_by_terms

# a word $8, and pairs of scale * 2**101 for nibbles in bits 0..3 of their 16, of scale * 2**97 for
# those in bits 4..7, and of scale * -2**-29: (q - 8) * scale * 2**-32, rounded once. As it stands
# there, a nibble is the subnormal q * 2**-133 or q * 2**-129.
_UNPACK_TEXT = """{
    .reg .b32 s, a, b, c, d;
    shr.u32 s, $8, 8;
    lop3.b32 a, $8, 0x000F000F, MINUS_8_LOW, 0x6A;  // (a & mask) ^ MINUS_8
    lop3.b32 b, $8, 0x00F000F0, MINUS_8_HIGH, 0x6A;
    lop3.b32 c, s, 0x000F000F, MINUS_8_LOW, 0x6A;
    lop3.b32 d, s, 0x00F000F0, MINUS_8_HIGH, 0x6A;
    fma.rn.bf16x2 a, a, $9, $11;
    fma.rn.bf16x2 b, b, $10, $11;
    fma.rn.bf16x2 c, c, $9, $11;
    fma.rn.bf16x2 d, d, $10, $11;
    mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
}"""


def _unpacking(low: str, high: str) -> gl.constexpr:
    return gl.constexpr(_UNPACK_TEXT.replace("MINUS_8_LOW", low).replace("MINUS_8_HIGH", high))


_UNPACK = _unpacking("0", "0")
_UNPACK_MINUS_8 = _unpacking("0x00080008", "0x00800080")
_UNPACK_REGISTERS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r")
_SCALES = gl.constexpr("""{
    .reg .b32 s, low, high, minus_8;
    mov.b32 s, {$3, $3};
    mov.b32 low, 0x72007200;
    mov.b32 high, 0x70007000;
    mov.b32 minus_8, 0xB100B100;
    mul.rn.bf16x2 $0, s, low;
    mul.rn.bf16x2 $1, s, high;
    mul.rn.bf16x2 $2, s, minus_8;
}""")
# what sums of weights that were unpacked so are multiplied by
BF16_UNIT = gl.constexpr(2.0**32)


@gluon.constexpr_function
def _layout_in_memory(rows, warps, gate):
    """Words [BN, (t, i)] as they stand in shared memory: lane l of warp w has t = l % 4 of row
    16 w + l / 4 of the operand, and of the one 8 below."""
    below, lane, warp = rows_in_memory(rows, gate)
    more = [[warp * warps, 0]] if rows > 16 * warps else []
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [below, 0]] + more,
        lane_bases=[[0, 4], [0, 8], [lane, 0], [2 * lane, 0], [4 * lane, 0]],
        warp_bases=[[warp * w, 0] for w in (1, 2, 4) if w < warps],
        block_bases=[],
        shape=[rows, 16],
    )


@gluon.constexpr_function
def _layout_of_words(rows, warps):
    """Words [BN, t, i], BN in the order of the operand."""

    def apart(bases):
        return [[n, word // 4, word % 4] for n, word in bases]

    whole = _layout_in_memory(rows, warps, "none")
    return gl.DistributedLinearLayout(
        apart(whole.reg_bases), apart(whole.lane_bases), apart(whole.warp_bases), [], [rows, 4, 4]
    )


@gluon.constexpr_function
def _across(act_quant):
    """Of a step's words [BN, t, i], the dimension that groups do not run along."""
    return 2 if act_quant else 1


@gluon.constexpr_function
def _layout_of_step(rows, warps, dtype):
    return layout_of_slices(rows, warps) if dtype == gl.int8 else _layout_of_words(rows, warps)


@gluon.constexpr_function
def layout_of_rows(rows, warps, act_quant, dtype):
    """Of the row numbers [BN] that accumulate() takes, for x of a dtype."""
    words = _layout_of_step(rows, warps, dtype)
    return gl.SliceLayout(1, gl.SliceLayout(_across(act_quant), words))


@gluon.jit
def load_words(stage, WARPS: gl.constexpr, GATE: gl.constexpr, DTYPE: gl.constexpr):
    """Words [BN, t, i] of a step; for int8 x, of slices [BN, s, t] (hopper_multiples.py)."""
    BN: gl.constexpr = stage.shape[0]
    if DTYPE == gl.int8:
        return load_slices(stage, WARPS, GATE)
    else:
        words = in_turn(stage.load(_layout_in_memory(BN, WARPS, GATE)), GATE).reshape(BN, 4, 4)
        return gl.convert_layout(words, _layout_of_words(BN, WARPS), assert_trivial=True)


@gluon.jit
def halves(words, DTYPE: gl.constexpr):
    """[BN, t, i] -> [BN, t, i % 2] of k 0..63 and of k 64..127."""
    BN: gl.constexpr = words.shape[0]
    if DTYPE == gl.int8:
        return halves_of_slices(words)
    else:
        return words.reshape(BN, 4, 2, 2).permute(0, 1, 3, 2).split()


@gluon.jit
def _groups(
    ptr,
    row,
    step,
    n_groups,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    # groups.py, groups_together()
    TOGETHER: gl.constexpr,
    WORDS: gl.constexpr,
    # of [BN, t, i]: that which groups do not run along
    ACROSS: gl.constexpr,
):
    """Scales or zero points of a step: [BN, 1, 1], or with one of t and i where slices differ."""
    if GROUP == 0 or GROUP >= 128:
        at = row * n_groups if GROUP == 0 else row * n_groups + step // (GROUP // 128)
        return gl.load(ptr + at).expand_dims(1).expand_dims(ACROSS)
    else:
        of_step = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(ACROSS, WORDS)))
        group = step * (128 // GROUP) + of_step // (GROUP // 32)
        if TOGETHER < 128 // GROUP:
            # past the end, the last ones again
            last = n_groups // TOGETHER - 1
            group = gl.minimum(group // TOGETHER, last) * TOGETHER + group % TOGETHER
        if GROUP == 32:
            # one load of neighbours
            group = gl.max_contiguous(gl.multiple_of(group, [TOGETHER]), [TOGETHER])
        first = gl.multiple_of((row * n_groups).expand_dims(1), [TOGETHER, TOGETHER])
        return gl.load(ptr + (first + group.expand_dims(0))).expand_dims(ACROSS)


@gluon.jit
def fetch_factors(
    scale_ptr,
    zero_ptr,
    row,
    step,
    n_groups,
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    WARPS: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """Scales of a step, and zero points if there are any; or multiples, for int8 x."""
    WORDS: gl.constexpr = _layout_of_step(row.shape[0], WARPS, DTYPE)
    ACROSS: gl.constexpr = _across(ACT_QUANT)
    scale = _groups(scale_ptr, row, step, n_groups, GROUP, TOGETHER, WORDS, ACROSS)
    if zero_ptr is None:
        return (scale,)
    else:
        return scale, _groups(zero_ptr, row, step, n_groups, GROUP, TOGETHER, WORDS, ACROSS)


@gluon.jit
def operand(
    words,
    terms,
    DTYPE: gl.constexpr,
    FAST: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Words [BN, t, i] of 64 k, and that half of what prepare() made -> weights [BN, 64]."""
    BN: gl.constexpr = words.shape[0]
    if DTYPE == gl.int8:
        return unpack_multiples(words, terms, OPERAND)
    else:
        if FAST:
            e0, e1, e2, e3, e4, e5, e6, e7 = gl.inline_asm_elementwise(
                _UNPACK_MINUS_8 if ACT_QUANT else _UNPACK,
                _UNPACK_REGISTERS,
                [words, terms[0], terms[1], terms[2]],
                dtype=(gl.bfloat16,) * 8,
                is_pure=True,
                pack=1,
            )
        else:
            if ACT_QUANT:
                words = words ^ EIGHTS
            e0, e1, e2, e3, e4, e5, e6, e7 = unpack_by_terms(words, terms, terms, DTYPE, True)
        # [BN, t, i, p, q', r]
        z = join8(e0, e1, e2, e3, e4, e5, e6, e7)
        z = z.permute(0, 2, 3, 4, 1, 5).reshape(BN, 64)
        return gl.convert_layout(z, OPERAND, assert_trivial=True)


@gluon.jit
def prepare(factors, words, DTYPE: gl.constexpr, FAST: gl.constexpr):
    """What a step's scales and zero points become for operand(), of its two halves."""
    # of a row, before they are those of its words
    if DTYPE == gl.int8:
        terms = terms_of_multiples(factors[0])
    elif FAST:
        terms = gl.inline_asm_elementwise(
            _SCALES, "=r,=r,=r,h", [factors[0]], dtype=(gl.int32,) * 3, is_pure=True, pack=1
        )
    elif len(factors) == 1:
        terms = scaling_terms(factors[0].to(gl.float32), None, DTYPE, True)
    else:
        zero = factors[1].to(gl.float32)
        terms = scaling_terms(factors[0].to(gl.float32), zero, DTYPE, True)
    first = ()
    second = ()
    for i in gl.static_range(len(terms)):
        a, b = halves(terms[i].broadcast_to(words.shape), DTYPE)
        first += (a,)
        second += (b,)
    return first, second
