"""The ring of Hopper's loop, in Gluon: shared memory that is filled STAGES steps of 128 k ahead.

A tile of a product is at (x_row, w_row, up_row): its first rows of x, a tuple of one or two, as it
has runs of tokens; of the words, and of the words of up rows where GATE is "halves". If the ring
has choices, (x_row, w_row, up_row, choice).
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from w4tensor.kernels.hopper_memory import (
    as_halves,
    barrier,
    fetch_words,
    load,
    reinterpret,
    tokens_of,
)
from w4tensor.kernels.hopper_operand import fetch_factors


@gluon.jit
def open_ring(
    x_desc, w_desc, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CHOICES: gl.constexpr = False
):
    """Memory of x and of words, STAGES steps of each, and barriers that say when a step is there.

    x_desc and the memory of x: one or two, for as many runs of tokens, or with CHOICES for a wide
    tile and a narrow one in the same memory. Boxes of x are [BM, 128], or [2, BM / 2, 128] of all
    tokens.
    """
    DTYPE: gl.constexpr = x_desc[0].dtype
    BLOCK_M: gl.constexpr = tokens_of(x_desc[0].block_shape)
    X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, 128], DTYPE)
    xs = (gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], X),)
    if len(x_desc) == 2:
        MORE: gl.constexpr = x_desc[1].block_shape[0]
        LAYOUT: gl.constexpr = x_desc[1].layout
        if CHOICES:
            NARROW: gl.constexpr = [STAGES * BLOCK_M // MORE, MORE, 128]
            xs += (reinterpret(xs[0], DTYPE, NARROW, LAYOUT),)
        else:
            xs += (gl.allocate_shared_memory(DTYPE, [STAGES, MORE, 128], LAYOUT),)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, 16], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    barrier()
    return xs, ws, full


@gluon.jit
def expect(ring, stage, at, ok):
    """Tell the barrier of a stage how many bytes fetch_words() and fetch_x() bring."""
    xs, ws, full = ring
    WORDS: gl.constexpr = ws.shape[1] * 64
    # 128 numbers
    ROW: gl.constexpr = 16 * xs[0].dtype.primitive_bitwidth
    if len(at) == 3:
        MORE: gl.constexpr = 0 if len(xs) == 1 else xs[-1].shape[1]
        BOTH: gl.constexpr = (xs[0].shape[1] + MORE) * ROW + WORDS
        mbarrier.expect(full.index(stage), BOTH, pred=ok)
    else:
        for i in gl.static_range(len(xs)):
            mine = ok & (at[3] == i)
            mbarrier.expect(full.index(stage), xs[i].shape[1] * ROW + WORDS, pred=mine)


@gluon.jit
def x_at(ring, PART: gl.constexpr, stage):
    """Memory of x of a stage."""
    xs, ws, _ = ring
    # narrow tiles have the beginning of what wide ones have
    return xs[PART].index(stage * (xs[PART].shape[0] // ws.shape[0]))


@gluon.jit
def fetch_x(x_desc, ring, stage, at, step, ok):
    for part in gl.static_range(len(x_desc)):
        memory = x_at(ring, part, stage)
        bar = ring[2].index(stage)
        if len(at) == 4:
            mine = ok & (at[3] == part)
            load(x_desc[part], [at[0][0], step * 128], bar, memory, pred=mine)
        elif len(x_desc[part].block_shape) == 3:
            LAYOUT: gl.constexpr = x_desc[part].layout
            load(x_desc[part], [0, 0, step * 128], bar, as_halves(memory, LAYOUT), pred=ok)
        else:
            load(x_desc[part], [at[0][part], step * 128], bar, memory, pred=ok)


@gluon.jit
def fetch_first(
    ring,
    x_desc,
    w_desc,
    at,
    row,
    scale_ptr,
    zero_ptr,
    n_groups,
    begin,
    end,
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    GATE: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
    SCALES_FIRST: gl.constexpr,
):
    """Fetch steps begin .., as many as the ring holds -> the factors of the first one.

    Parameters as add_steps() has them.
    """
    _, ws, full = ring
    STAGES: gl.constexpr = ws.shape[0]
    DTYPE: gl.constexpr = x_desc[0].dtype
    for s in gl.static_range(STAGES):
        ok = begin + s < end
        expect(ring, s, at, ok)
        fetch_words(w_desc, ws, full, s, at[1], at[2], begin + s, ok, GATE)
    if SCALES_FIRST:
        factors = fetch_factors(
            scale_ptr, zero_ptr, row, begin, n_groups, GROUP, TOGETHER, ACT_QUANT, WARPS, DTYPE
        )
    if PDL:
        # weights are nobody's output; x is that of the kernel before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in gl.static_range(STAGES):
        fetch_x(x_desc, ring, s, at, begin + s, begin + s < end)
    if not SCALES_FIRST:
        factors = fetch_factors(
            scale_ptr, zero_ptr, row, begin, n_groups, GROUP, TOGETHER, ACT_QUANT, WARPS, DTYPE
        )
    return factors
