"""The loop of Hopper's kernels for int8 activations, in Gluon: rows of W times x, step by step.

    step     STEP of K, 128 or 256: words and codes of x come by the tensor memory accelerator,
             STAGES steps ahead
    cell     32 to 128 k with one scale on either side: summed in int32 by the matrix unit, then
             scaled into the fp32 sums

Eight weights are unpacked in three instructions (unpack_act_quant.py), from shared memory through
registers to the matrix unit. A program waits for its multiplications; those of others on the
multiprocessor go on meanwhile.

Scales and sums of x come with x where a tile's first row is aligned for it, else by plain loads.
With a GATE, rows of W are taken in turn (hopper_memory.py).

W is in the ACT_QUANT format. Sums are in units of 1 / UNIT, and where tokens have one scale each,
without it.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from w4tensor.kernels.hopper_memory import barrier, fetch_words, in_turn, load, rows_in_memory
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT
from w4tensor.kernels.unpack_act_quant import UNIT, join_halves, unpack_bytes


@gluon.constexpr_function
def layout_of_int8_sums(warps, columns):
    """Of what accumulate_int8() returns."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 32])


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
def _operands(
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


@gluon.jit
def _multiply(z, xs, stage, none, CELLS: gl.constexpr, STEP: gl.constexpr):
    """Start weights of each cell times its codes."""
    CELL: gl.constexpr = STEP // CELLS
    sums = ()
    for c in gl.static_range(CELLS):
        block = xs.index(stage * (STEP // 128) + c * CELL // 128)
        x = block.slice(c * CELL % 128, CELL, 1).permute((1, 0))
        sums += (warpgroup_mma(z[c], x, none, use_acc=False, is_async=True),)
    return sums


@gluon.jit
def _wait(sums, CELLS: gl.constexpr):
    """Sums when they are there."""
    if CELLS == 1:
        return (warpgroup_mma_wait(0, deps=[sums[0]]),)
    elif CELLS == 2:
        return warpgroup_mma_wait(0, deps=[sums[0], sums[1]])
    elif CELLS == 4:
        return warpgroup_mma_wait(0, deps=[sums[0], sums[1], sums[2], sums[3]])
    else:
        return warpgroup_mma_wait(
            0, deps=[sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]]
        )


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
def _groups(
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
        return (gl.load(ptr + row * n_groups + step // (GROUP // STEP)).to(gl.float32),)
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
def _tokens(memory, GROUP: gl.constexpr, STEP: gl.constexpr, ACC: gl.constexpr):
    """fp32 [groups, BM] in memory -> a tensor [BM] of each group of a step."""
    COUNT: gl.constexpr = STEP // GROUP if GROUP < STEP else 1
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    values = memory.slice(0, COUNT, 0).load(_layout_of_tokens(COUNT, memory.shape[1], ACC))
    return _rows(values, COLUMN)


@gluon.jit
def _loaded_tokens(ptr, column, stride, step, n, GROUP: gl.constexpr, STEP: gl.constexpr):
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


@gluon.jit
def _scaled(
    acc,
    sums,
    scale,
    zero,
    x_scale,
    x_sum,
    step,
    CELLS: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
):
    """acc + the sums of a step, scaled."""
    # cells of a weight group
    WIDE: gl.constexpr = CELLS // len(scale)
    part = gl.full(acc.shape, 0.0, gl.float32, acc.type.layout)
    for c in gl.static_range(CELLS):
        d = sums[c].to(gl.float32)
        if len(x_scale) > 0:
            d *= x_scale[c * len(x_scale) // CELLS].expand_dims(0)
        if c % WIDE == 0:
            part = d
        else:
            part += d
        if c % WIDE == WIDE - 1:
            acc += part * scale[c // WIDE].expand_dims(1)
    if len(zero) > 0:
        for i in gl.static_range(len(zero)):
            shift = (zero[i] - SYMMETRIC_ZERO_POINT) * UNIT * scale[i]
            if GROUP > STEP:
                # of a group longer than a step, in its first one
                shift = gl.where(step % (GROUP // STEP) == 0, shift, 0.0)
            acc -= shift.expand_dims(1) * x_sum[i].expand_dims(0)
    return acc


@gluon.constexpr_function
def _groups_fetched(act_group, sums, group):
    """Widths of the groups of what _fetch_x() brings: of codes, scales and sums."""
    return (0,) + ((act_group,) if act_group else ()) + ((group,) if sums else ())


@gluon.jit
def _fetch_tokens(
    desc, memory, full, stage, x_row, step, ok, GROUP: gl.constexpr, STEP: gl.constexpr
):
    first = step * (STEP // GROUP) if GROUP < STEP else step // (GROUP // STEP)
    load(desc, [first, x_row], full.index(stage), memory.index(stage), pred=ok)


@gluon.jit
def _fetch_x(
    descs, memories, full, stage, x_row, step, ok, GROUPS: gl.constexpr, STEP: gl.constexpr
):
    """Codes of a step, then what its groups have, of each further descriptor."""
    BLOCKS: gl.constexpr = STEP // 128
    for block in gl.static_range(BLOCKS):
        memory = memories[0].index(stage * BLOCKS + block)
        load(descs[0], [x_row, (step * BLOCKS + block) * 128], full.index(stage), memory, pred=ok)
    for i in gl.static_range(1, len(descs)):
        _fetch_tokens(descs[i], memories[i], full, stage, x_row, step, ok, GROUPS[i], STEP)


@gluon.jit
def accumulate_int8(
    x_desc,
    # scales and sums of x, group-major: by a descriptor of at least the groups of a step, or by a
    # pointer to groups x_stride apart (n_act_groups and n_groups of them) and columns [BM]. None,
    # each, where tokens have one scale, and where rows have one zero point or none. A descriptor
    # needs an x_row that is a multiple of 4: with others an H200 faulted
    x_scale_desc,
    x_sum_desc,
    x_scale_ptr,
    x_sum_ptr,
    x_stride,
    column,
    n_act_groups,
    x_row,
    w_desc,
    w_row,
    up_row,
    row,
    scale_ptr,
    zero_ptr,
    n_groups,
    begin,
    end,
    steps,
    BLOCK_N: gl.constexpr,
    # 0 where the row is one group, and where the token is
    GROUP: gl.constexpr,
    ACT_GROUP: gl.constexpr,
    CELL: gl.constexpr,
    # whether K is a multiple of a step
    WHOLE_STEPS: gl.constexpr,
    GATE: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Sums fp32 [BN, BM] over steps begin .. end - 1 of `steps`, at least one; and memory of x.

    x_row, w_row: first rows of x and of the words. up_row: of the words of up rows, where GATE is
        "halves" (hopper_memory.py). row [BN]: of the scales and zero points.
    """
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    STEP: gl.constexpr = w_desc.block_shape[1] * 2
    CELLS: gl.constexpr = STEP // CELL
    ACC: gl.constexpr = layout_of_int8_sums(WARPS, BLOCK_M)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    SCALES: gl.constexpr = 0 if x_scale_desc is None else x_scale_desc.block_shape[0]
    SUMS: gl.constexpr = 0 if x_sum_desc is None else x_sum_desc.block_shape[0]
    ZEROS: gl.constexpr = x_sum_desc is not None or x_sum_ptr is not None
    # a large tile has no registers for the sums of x before those of its weights are free
    LATE: gl.constexpr = BLOCK_M > 64
    GROUPS: gl.constexpr = _groups_fetched(ACT_GROUP, SUMS > 0, GROUP)
    BYTES: gl.constexpr = BLOCK_M * (STEP + 4 * SCALES + 4 * SUMS) + BLOCK_N * STEP // 2

    xs = gl.allocate_shared_memory(gl.int8, [STAGES * STEP // 128, BLOCK_M, 128], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, STEP // 2], w_desc.layout)
    # what is fetched with x, and the width of its groups
    descs = (x_desc,)
    memories = (xs,)
    if x_scale_desc is not None:
        x_scales = gl.allocate_shared_memory(
            gl.float32, [STAGES, SCALES, BLOCK_M], x_scale_desc.layout
        )
        descs += (x_scale_desc,)
        memories += (x_scales,)
    if x_sum_desc is not None:
        x_sums = gl.allocate_shared_memory(gl.float32, [STAGES, SUMS, BLOCK_M], x_sum_desc.layout)
        descs += (x_sum_desc,)
        memories += (x_sums,)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    barrier()
    for s in gl.static_range(STAGES):
        ok = begin + s < end
        mbarrier.expect(full.index(s), BYTES, pred=ok)
        fetch_words(w_desc, ws, full, s, w_row, up_row, begin + s, ok, GATE)
    scale = _groups(scale_ptr, row, begin, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS)
    zero = ()
    if ZEROS:
        zero = _groups(zero_ptr, row, begin, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS)
    if PDL:
        # weights are nobody's output; x is that of the kernel before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in gl.static_range(STAGES):
        _fetch_x(descs, memories, full, s, x_row, begin + s, begin + s < end, GROUPS, STEP)

    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    none = gl.zeros([BLOCK_N, BLOCK_M], gl.int32, ACC)
    stage = 0
    phase = 0
    for step in range(begin, end):
        x_scale = ()
        x_sum = ()
        if x_scale_ptr is not None:
            x_scale = _loaded_tokens(
                x_scale_ptr, column, x_stride, step, n_act_groups, ACT_GROUP, STEP
            )
        if x_sum_ptr is not None and not LATE:
            x_sum = _loaded_tokens(x_sum_ptr, column, x_stride, step, n_groups, GROUP, STEP)
        mbarrier.wait(full.index(stage), phase)
        z = _operands(ws.index(stage), CELLS, OPERAND, WARPS, GATE)
        sums = _multiply(z, xs, stage, none, CELLS, STEP)
        following = gl.minimum(step + 1, steps - 1)
        next_scale = _groups(scale_ptr, row, following, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS)
        next_zero = ()
        if ZEROS:
            next_zero = _groups(zero_ptr, row, following, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS)
        sums = _wait(sums, CELLS)
        if x_sum_ptr is not None and LATE:
            x_sum = _loaded_tokens(x_sum_ptr, column, x_stride, step, n_groups, GROUP, STEP)
        if x_scale_desc is not None:
            x_scale = _tokens(x_scales.index(stage), ACT_GROUP, STEP, ACC)
        if x_sum_desc is not None:
            x_sum = _tokens(x_sums.index(stage), GROUP, STEP, ACC)
        acc = _scaled(acc, sums, scale, zero, x_scale, x_sum, step, CELLS, GROUP, STEP)
        scale = next_scale
        zero = next_zero
        barrier()
        ahead = step + STAGES
        mbarrier.expect(full.index(stage), BYTES, pred=ahead < end)
        fetch_words(w_desc, ws, full, stage, w_row, up_row, ahead, ahead < end, GATE)
        _fetch_x(descs, memories, full, stage, x_row, ahead, ahead < end, GROUPS, STEP)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    return acc, xs
