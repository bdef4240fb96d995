"""Words and scales of a step as what the matrix unit and its sums take, in Gluon, for int8 x.

What hopper_operand.py is for 16-bit x: a thread has the bytes in shared memory whose weights the
matrix unit wants of it, and the scales of the rows and of the tokens whose sums it has.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.hopper_memory import in_turn, rows_in_memory
from w4tensor.kernels.unpack_act_quant import join_halves, unpack_bytes


@gluon.constexpr_function
def _layout_of_bytes(rows, step, warps, gate):
    """Bytes [BN, STEP / 2] as they stand in shared memory: lane l has bytes 4 (l % 4) .. of each 16
    of two rows, or four."""
    below, lane, warp = rows_in_memory(rows, gate)
    more = [[warp * warps, 0]] if rows > 16 * warps else []
    slices = {128: 2, 256: 3}[step]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]] + [[0, 16 << i] for i in range(slices)] + [[below, 0]] + more,
        lane_bases=[[0, 4], [0, 8], [lane, 0], [2 * lane, 0], [4 * lane, 0]],
        warp_bases=[[warp * w, 0] for w in (1, 2, 4) if w < warps],
        block_bases=[],
        shape=[rows, step // 2],
    )


@gluon.jit
def int8_operands(
    memory, CELLS: gl.constexpr, OPERAND: gl.constexpr, WARPS: gl.constexpr, GATE: gl.constexpr
):
    """Bytes [BN, STEP / 2] in memory -> weights int8 [BN, STEP / CELLS] of each cell."""
    BN: gl.constexpr = memory.shape[0]
    STEP: gl.constexpr = memory.shape[1] * 2
    words = in_turn(memory.load(_layout_of_bytes(BN, STEP, WARPS, GATE)), GATE)
    ROWS: gl.constexpr = _layout_of_bytes(BN, STEP, WARPS, "none")
    low, high = unpack_bytes(gl.convert_layout(words, ROWS, assert_trivial=True), True)
    return _cells(join_halves(low, high, 4), CELLS, OPERAND)


@gluon.jit
def _cells(z, CELLS: gl.constexpr, OPERAND: gl.constexpr):
    if CELLS == 1:
        return (gl.convert_layout(z, OPERAND, assert_trivial=True),)
    else:
        BN: gl.constexpr = z.shape[0]
        HALF: gl.constexpr = z.shape[1] // 2
        first, second = z.reshape(BN, 2, HALF).permute(0, 2, 1).split()
        return _cells(first, CELLS // 2, OPERAND) + _cells(second, CELLS // 2, OPERAND)


@gluon.constexpr_function
def _layout_of_groups(rows, groups, warps):
    """[BN, groups]: each thread has what its rows of a sum have."""
    more = [[16 * warps, 0]] if rows > 16 * warps else []
    none = [0, 0]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1 << i] for i in range(groups.bit_length() - 1)] + [[8, 0]] + more,
        lane_bases=[none, none, [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 * w, 0] for w in (1, 2, 4) if w < warps],
        block_bases=[],
        shape=[rows, groups],
    )


@gluon.jit
def groups_of_step(
    ptr,
    row,
    step,
    n_groups,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    # whether K is a multiple of a step
    WHOLE_STEPS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """fp32 [BN] of each weight group of a step."""
    COUNT: gl.constexpr = STEP // GROUP if GROUP > 0 and GROUP < STEP else 1
    if GROUP == 0:
        return (gl.load(ptr + row).to(gl.float32),)
    elif COUNT == 1:
        group = step // (GROUP // STEP)
        if row.dtype == gl.int32:
            # offsets in registers, which take half of what pointers would
            at = ptr + (row * n_groups + group)
        else:
            at = ptr + row * n_groups + group
        return (gl.load(at).to(gl.float32),)
    else:
        WHOLE: gl.constexpr = _layout_of_groups(row.shape[0], COUNT, WARPS)
        first = gl.convert_layout(
            row * n_groups, gl.SliceLayout(1, WHOLE), assert_trivial=True
        ).expand_dims(1)
        group = (step * COUNT + gl.arange(0, COUNT, gl.SliceLayout(0, WHOLE))).expand_dims(0)
        if WHOLE_STEPS:
            # one load of neighbours
            first = gl.multiple_of(first, [COUNT, COUNT])
        else:
            group = gl.minimum(group, n_groups - 1)
        values = gl.load(ptr + (first + group)).to(gl.float32)
        ROW: gl.constexpr = row.type.layout
        return _rows(values.permute(1, 0), ROW)


@gluon.constexpr_function
def _layout_of_tokens(groups, columns, acc):
    """[groups, BM]: each thread has what its columns of a sum have."""
    reg = [[0, 1]] + [[0, 8 << i] for i in range(columns.bit_length() - 4)]
    reg += [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    none = [0, 0]
    warps = acc.warps_per_cta[0]
    return gl.DistributedLinearLayout(
        reg_bases=reg,
        lane_bases=[[0, 2], [0, 4], none, none, none],
        warp_bases=[none] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[groups, columns],
    )


@gluon.jit
def tokens_of_step(memory, GROUP: gl.constexpr, STEP: gl.constexpr, ACC: gl.constexpr):
    """fp32 [groups, BM] in memory -> a tensor [BM] of each group of a step."""
    COUNT: gl.constexpr = STEP // GROUP if GROUP < STEP else 1
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    values = memory.slice(0, COUNT, 0).load(_layout_of_tokens(COUNT, memory.shape[1], ACC))
    return _rows(values, COLUMN)


@gluon.jit
def loaded_tokens(ptr, column, stride, step, n, GROUP: gl.constexpr, STEP: gl.constexpr):
    """The same of [n groups, stride] in global memory; 0 behind the last group."""
    COUNT: gl.constexpr = STEP // GROUP if GROUP < STEP else 1
    values = ()
    for i in gl.static_range(COUNT):
        group = step * COUNT + i if GROUP < STEP else step // (GROUP // STEP)
        values += (gl.load(ptr + (group * stride + column), mask=group < n, other=0.0),)
    return values


@gluon.jit
def _rows(values, LAYOUT: gl.constexpr):
    """[R, C] -> R tensors [C]."""
    if values.shape[0] == 1:
        row = values.reshape(values.shape[1])
        return (gl.convert_layout(row, LAYOUT, assert_trivial=True),)
    else:
        HALF: gl.constexpr = values.shape[0] // 2
        first, second = values.reshape(2, HALF, values.shape[1]).permute(1, 2, 0).split()
        return _rows(first, LAYOUT) + _rows(second, LAYOUT)
