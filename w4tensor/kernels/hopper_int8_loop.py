"""The loop of Hopper's kernels for int8 activations, in Gluon: rows of W times x, step by step.

    step     STEP of K, 128 or 256: words and codes of x come by the tensor memory accelerator,
             STAGES steps ahead
    cell     32 to 128 k with one scale on either side: summed in int32 by the matrix unit, then
             scaled into the fp32 sums

Eight weights are unpacked in three instructions (unpack_act_quant.py), from shared memory through
registers to the matrix unit. A program waits for its multiplications; those of others on the
multiprocessor go on meanwhile.

With RUNS, a step's weights are multiplied with one run of its tokens after another. A thread then
has the int32 sums of one run at a time, and four programs of 128 tokens and 64 rows share a
multiprocessor instead of three.

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

from w4tensor.kernels.hopper_int8_operand import (
    groups_of_step,
    int8_operands,
    loaded_tokens,
    tokens_of_step,
)
from w4tensor.kernels.hopper_memory import barrier, fetch_words, load
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT
from w4tensor.kernels.unpack_act_quant import UNIT


@gluon.constexpr_function
def layout_of_int8_sums(warps, columns):
    """Of the sums of a run of so many tokens."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 32])


@gluon.jit
def _run_of(memory, RUN: gl.constexpr, RUNS: gl.constexpr, TOKENS: gl.constexpr):
    """Of memory with tokens along dimension TOKENS, those of a run."""
    if RUNS == 1:
        return memory
    else:
        COUNT: gl.constexpr = memory.shape[TOKENS] // RUNS
        return memory.slice(RUN * COUNT, COUNT, TOKENS)


@gluon.jit
def _multiply(
    z,
    xs,
    stage,
    none,
    CELLS: gl.constexpr,
    STEP: gl.constexpr,
    RUN: gl.constexpr,
    RUNS: gl.constexpr,
):
    """Start weights of each cell times its codes, of a run of tokens, in registers of `none`."""
    CELL: gl.constexpr = STEP // CELLS
    sums = ()
    for c in gl.static_range(CELLS):
        block = _run_of(xs.index(stage * (STEP // 128) + c * CELL // 128), RUN, RUNS, 0)
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
    # pointer to groups x_stride apart (n_act_groups and n_groups of them) and columns [BM], with no
    # more than one run. None, each, where tokens have one scale, and where rows have one zero point
    # or none. A descriptor needs an x_row that is a multiple of 4: with others an H200 faulted
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
    # of the tokens; no more than one where a step has several cells
    RUNS: gl.constexpr,
):
    """Sums fp32 [BN, BM / RUNS] of each run over steps begin .. end - 1 of `steps`, at least one;
    and memory of x.

    x_row, w_row: first rows of x and of the words. up_row: of the words of up rows, where GATE is
        "halves" (hopper_memory.py). row [BN]: of the scales and zero points.
    """
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    STEP: gl.constexpr = w_desc.block_shape[1] * 2
    CELLS: gl.constexpr = STEP // CELL
    RUN: gl.constexpr = BLOCK_M // RUNS
    ACC: gl.constexpr = layout_of_int8_sums(WARPS, RUN)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    SCALES: gl.constexpr = 0 if x_scale_desc is None else x_scale_desc.block_shape[0]
    SUMS: gl.constexpr = 0 if x_sum_desc is None else x_sum_desc.block_shape[0]
    ZEROS: gl.constexpr = x_sum_desc is not None or x_sum_ptr is not None
    # a large tile has no registers for the sums of x before those of its weights are free
    LATE: gl.constexpr = RUN > 64
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
    scale = groups_of_step(scale_ptr, row, begin, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS)
    zero = ()
    if ZEROS:
        zero = groups_of_step(zero_ptr, row, begin, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS)
    if PDL:
        # weights are nobody's output; x is that of the kernel before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in gl.static_range(STAGES):
        _fetch_x(descs, memories, full, s, x_row, begin + s, begin + s < end, GROUPS, STEP)

    acc = (gl.zeros([BLOCK_N, RUN], gl.float32, ACC),) * RUNS
    none = gl.zeros([BLOCK_N, RUN], gl.int32, ACC)
    stage = 0
    phase = 0
    for step in range(begin, end):
        x_scale = ()
        x_sum = ()
        if x_scale_ptr is not None:
            x_scale = loaded_tokens(
                x_scale_ptr, column, x_stride, step, n_act_groups, ACT_GROUP, STEP
            )
        if x_sum_ptr is not None and not LATE:
            x_sum = loaded_tokens(x_sum_ptr, column, x_stride, step, n_groups, GROUP, STEP)
        mbarrier.wait(full.index(stage), phase)
        z = int8_operands(ws.index(stage), CELLS, OPERAND, WARPS, GATE)
        before = acc
        acc = ()
        for run in gl.static_range(RUNS):
            sums = _multiply(z, xs, stage, none, CELLS, STEP, run, RUNS)
            if run == RUNS - 1:
                following = gl.minimum(step + 1, steps - 1)
                next_scale = groups_of_step(
                    scale_ptr, row, following, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS
                )
                next_zero = ()
                if ZEROS:
                    next_zero = groups_of_step(
                        zero_ptr, row, following, n_groups, GROUP, STEP, WHOLE_STEPS, WARPS
                    )
            sums = _wait(sums, CELLS)
            if x_sum_ptr is not None and LATE:
                x_sum = loaded_tokens(x_sum_ptr, column, x_stride, step, n_groups, GROUP, STEP)
            if x_scale_desc is not None:
                memory = _run_of(x_scales.index(stage), run, RUNS, 1)
                x_scale = tokens_of_step(memory, ACT_GROUP, STEP, ACC)
            if x_sum_desc is not None:
                memory = _run_of(x_sums.index(stage), run, RUNS, 1)
                x_sum = tokens_of_step(memory, GROUP, STEP, ACC)
            y = _scaled(before[run], sums, scale, zero, x_scale, x_sum, step, CELLS, GROUP, STEP)
            if run < RUNS - 1:
                # the next run's sums come to the registers of these, which must have been read
                none = sums[0]
                y = warpgroup_mma_wait(0, deps=[y])
            acc += (y,)
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
