"""Words of a step, and the multiples of their groups, as an int8 operand of Hopper's matrix unit.

Where a row's scales are multiples -15 .. 15 of one unit, w = (q - 8) * multiple * unit: an int8
number times what the row has once. All of K is summed in int32 then, and scaled at the end. As
QServe does (arXiv:2405.04532), four codes take one integer multiplication:

    q * multiple + (128 - 8 * multiple)     8 .. 248 in each byte, whatever carries on the way
    .. ^ 128                                (q - 8) * multiple, -120 .. 120

W is in the ACT_QUANT format, whose nibbles are q ^ 8. A thread has the bytes in shared memory whose
weights the matrix unit wants of it, k in its natural order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.hopper_memory import in_turn, rows_in_memory

_UNPACK = gl.constexpr("""{
    .reg .b32 a, b;
    lop3.b32 a, $2, 0x0F0F0F0F, 0x08080808, 0x6A;  // (a & mask) ^ 8
    shr.u32 b, $2, 4;
    lop3.b32 b, b, 0x0F0F0F0F, 0x08080808, 0x6A;
    mad.lo.u32 a, a, $6, $10;
    mad.lo.u32 b, b, $6, $10;
    xor.b32 $0, a, 0x80808080;
    xor.b32 $1, b, 0x80808080;
}""")


@gluon.constexpr_function
def _layout_in_memory(rows, warps, gate):
    """Words [BN, (s, t)] of slices of 32 k as they stand in shared memory: lane l has word l % 4 of
    each slice, of two rows or four."""
    below, lane, warp = rows_in_memory(rows, gate)
    more = [[warp * warps, 0]] if rows > 16 * warps else []
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 4], [0, 8], [below, 0]] + more,
        lane_bases=[[0, 1], [0, 2], [lane, 0], [2 * lane, 0], [4 * lane, 0]],
        warp_bases=[[warp * w, 0] for w in (1, 2, 4) if w < warps],
        block_bases=[],
        shape=[rows, 16],
    )


@gluon.constexpr_function
def layout_of_slices(rows, warps):
    """Words [BN, s, t], BN in the order of the operand."""

    def apart(bases):
        return [[n, word // 4, word % 4] for n, word in bases]

    whole = _layout_in_memory(rows, warps, "none")
    return gl.DistributedLinearLayout(
        apart(whole.reg_bases), apart(whole.lane_bases), apart(whole.warp_bases), [], [rows, 4, 4]
    )


@gluon.jit
def load_slices(stage, WARPS: gl.constexpr, GATE: gl.constexpr):
    """Words [BN, s, t] of a step."""
    BN: gl.constexpr = stage.shape[0]
    words = in_turn(stage.load(_layout_in_memory(BN, WARPS, GATE)), GATE).reshape(BN, 4, 4)
    return gl.convert_layout(words, layout_of_slices(BN, WARPS), assert_trivial=True)


@gluon.jit
def halves_of_slices(words):
    """[BN, s, t] -> [BN, s % 2, t] of k 0..63 and of k 64..127."""
    BN: gl.constexpr = words.shape[0]
    return words.reshape(BN, 2, 2, 4).permute(0, 2, 3, 1).split()


@gluon.jit
def terms_of_multiples(multiple):
    """What unpack_multiples() multiplies four codes by, and adds."""
    multiple = multiple.to(gl.int32)
    return multiple, -0x7F7F7F80 - multiple * 0x08080808


@gluon.constexpr_function
def _layout_of_bytes(rows, warps):
    """Bytes [BN, 2, 16] of the words of 64 k, those of a word one after another."""
    whole = layout_of_slices(rows, warps)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]]
        + [basis for basis in whole.reg_bases if basis != [0, 2, 0]],
        lane_bases=[[n, s, 4 * t] for n, s, t in whole.lane_bases],
        warp_bases=whole.warp_bases,
        block_bases=[],
        shape=[rows, 2, 16],
    )


@gluon.jit
def _of_bytes(of_words):
    """[BN, 2, 4] -> [BN, 2, 16]: of each word four times."""
    BN: gl.constexpr = of_words.shape[0]
    four = of_words.expand_dims(3).broadcast_to(BN, 2, 4, 4).reshape(BN, 2, 16)
    return gl.convert_layout(four, _layout_of_bytes(BN, gl.num_warps()), assert_trivial=True)


@gluon.jit
def unpack_multiples(words, terms, OPERAND: gl.constexpr):
    """Words [BN, 2, 4] of 64 k, and what terms_of_multiples() made -> int8 [BN, 64]."""
    BN: gl.constexpr = words.shape[0]
    # four numbers of a result are in one register, and of each operand they have the same one
    low, high = gl.inline_asm_elementwise(
        _UNPACK,
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [_of_bytes(words), _of_bytes(terms[0]), _of_bytes(terms[1])],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    z = gl.join(low, high).permute(0, 1, 3, 2).reshape(BN, 64)
    return gl.convert_layout(z, OPERAND, assert_trivial=True)
