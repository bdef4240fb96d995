"""grouped_hopper's product where there are more tiles than the card holds at a time, in Gluon.

As many programs as the card holds share the tiles: program p has the tiles p, p + P, ... of the
list, which has wide tiles first and then the narrow ones (kernels/row_tiles.py), so that all have
as many of each. A program goes on from tile to tile without emptying its ring (hopper_loop.py): it
fetches the next tile's first steps while it multiplies this one's last ones and while it stores.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.grouped import tile_rows
from w4tensor.kernels.hopper_loop import add_steps, layout_of_sums
from w4tensor.kernels.hopper_memory import reinterpret
from w4tensor.kernels.hopper_operand import fetch_factors, layout_of_rows
from w4tensor.kernels.hopper_output import store_rows
from w4tensor.kernels.hopper_ring import fetch_first, open_ring


@gluon.jit
def _listed(tiles_ptr, index, tiles_n, slots):
    """Of a product's tile: its expert, its first row and the one behind its last, and its column;
    behind the list no rows."""
    slot = index // tiles_n
    at = tiles_ptr + slot * 3
    inside = slot < slots
    expert = gl.load(at, mask=inside, other=0)
    first = gl.load(at + 1, mask=inside, other=0)
    end = gl.load(at + 2, mask=inside, other=0)
    return expert, first, end, index % tiles_n


@gluon.jit
def _has_rows(tile, E):
    """Whether it has rows of an expert."""
    return (tile[1] < tile[2]) & (tile[0] < E)


@gluon.jit
def _choice(tile, NARROW: gl.constexpr):
    """0 of a wide tile, 1 of a narrow one."""
    if NARROW:
        return (tile[2] - tile[1] <= NARROW).to(gl.int32)
    else:
        return 0


@gluon.jit
def _place(tile, N, E, BLOCK_N: gl.constexpr, NARROW: gl.constexpr, GATE: gl.constexpr):
    """A tile as hopper_ring.py has it."""
    expert, first, _, pid_n = tile
    n0 = pid_n * (BLOCK_N if GATE == "none" else BLOCK_N // 2)
    # experts are rows of one long matrix
    w_row = gl.minimum(expert, E - 1) * N + (2 * n0 if GATE == "interleaved" else n0)
    if NARROW:
        return (first,), w_row, w_row + N // 2, _choice(tile, NARROW)
    else:
        return (first,), w_row, w_row + N // 2


@gluon.jit
def _rows(tile, i, N, E, BLOCK_N: gl.constexpr, GATE: gl.constexpr):
    """Rows of scales of a tile."""
    expert, _, _, pid_n = tile
    return gl.minimum(expert, E - 1) * N + tile_rows(pid_n, i, N, BLOCK_N, GATE)


@gluon.jit
def _memory_of_y(ring, stage, CHOICE: gl.constexpr, OUT: gl.constexpr):
    """That of x in a stage, as [BM, OUT]."""
    xs, ws, _ = ring
    x: gl.constexpr = 0 if CHOICE is None else CHOICE
    SHAPE: gl.constexpr = [xs[x].shape[0] * 128 // OUT, xs[x].shape[1], OUT]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE[1:], xs[x].dtype)
    return reinterpret(xs[x], xs[x].dtype, SHAPE, LAYOUT).index(stage * (SHAPE[0] // ws.shape[0]))


@gluon.jit
def _multiply(
    ring,
    x_descs,
    w_desc,
    order_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    tile,
    following,
    factors,
    N,
    E,
    steps,
    n_groups,
    stage,
    phase,
    has_next,
    stores,
    SCATTER: gl.constexpr,
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    WARPS: gl.constexpr,
    PIPELINED: gl.constexpr,
    NARROW: gl.constexpr,
    CHOICE: gl.constexpr,
):
    """A tile's rows of y -> the ring's stage and phase for the next tile, and its first factors."""
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    STAGES: gl.constexpr = ring[1].shape[0]
    DTYPE: gl.constexpr = x_descs[0].dtype
    i = gl.arange(0, BLOCK_N, layout_of_rows(BLOCK_N, WARPS, ACT_QUANT, DTYPE))
    acc, stage, phase = add_steps(
        ring,
        x_descs,
        w_desc,
        _place(tile, N, E, BLOCK_N, NARROW, GATE),
        _rows(tile, i, N, E, BLOCK_N, GATE),
        scale_ptr,
        zero_ptr,
        factors,
        n_groups,
        0,
        steps,
        steps,
        stage,
        phase,
        _place(following, N, E, BLOCK_N, NARROW, GATE),
        0,
        has_next,
        stores,
        GROUP,
        TOGETHER,
        ACT_QUANT,
        GATE,
        WARPS,
        PIPELINED,
        CHOICE,
    )
    # they come while y is stored
    row = _rows(following, i, N, E, BLOCK_N, GATE)
    factors = fetch_factors(
        scale_ptr, zero_ptr, row, 0, n_groups, GROUP, TOGETHER, ACT_QUANT, WARPS, DTYPE
    )
    y = acc[0]
    expert, first, end, pid_n = tile
    if bias_ptr is not None:
        b = gl.arange(0, BLOCK_N, gl.SliceLayout(1, y.type.layout))
        bias = gl.load(bias_ptr + expert.to(gl.int64) * N + tile_rows(pid_n, b, N, BLOCK_N, GATE))
        y += bias.to(gl.float32).expand_dims(1)
    OUT: gl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    memory = _memory_of_y(ring, stage, CHOICE, OUT)
    store_rows(y, y_ptr, order_ptr, pid_n, first, end, N, SCATTER, GATE, ACT, memory)
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase, factors


@gluon.jit(do_not_specialize=["slots", "steps"])
def grouped_hopper_persistent_kernel(
    x_desc,
    # of the same x: tiles of no more rows than its block multiply no more; None: all are x_desc's
    narrow_desc,
    w_desc,
    order_ptr,
    tiles_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    slots,
    N,
    E,
    steps,
    n_groups,
    BLOCK_N: gl.constexpr,
    SCATTER: gl.constexpr,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
    # whether W is in this format, or in COALESCED
    ACT_QUANT: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    # whether the kernel ahead may still be writing tiles
    WAIT_FOR_TILES: gl.constexpr,
    PIPELINED: gl.constexpr,
):
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    OUT: gl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    NARROW: gl.constexpr = 0 if narrow_desc is None else narrow_desc.block_shape[0]
    CHOICES: gl.constexpr = narrow_desc is not None
    if CHOICES:
        x_descs = x_desc, narrow_desc
    else:
        x_descs = (x_desc,)
    if PDL and WAIT_FOR_TILES:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    programs = gl.num_programs(0)
    tiles_n = gl.cdiv(N if GATE == "none" else N // 2, OUT)
    index = gl.program_id(0)
    tile = _listed(tiles_ptr, index, tiles_n, slots)
    after = _listed(tiles_ptr, index + programs, tiles_n, slots)
    has = _has_rows(tile, E)
    i = gl.arange(0, BLOCK_N, layout_of_rows(BLOCK_N, WARPS, ACT_QUANT, x_desc.dtype))
    ring = open_ring(x_descs, w_desc, BLOCK_N, STAGES, CHOICES)
    factors = fetch_first(
        ring,
        x_descs,
        w_desc,
        _place(tile, N, E, BLOCK_N, NARROW, GATE),
        _rows(tile, i, N, E, BLOCK_N, GATE),
        scale_ptr,
        zero_ptr,
        n_groups,
        0,
        gl.where(has, steps, 0),
        GROUP,
        TOGETHER,
        ACT_QUANT,
        GATE,
        WARPS,
        PDL and not WAIT_FOR_TILES,
        False,
    )
    stage = 0
    phase = 0
    # narrow tiles are the last ones. Not branches of one loop: ptxas (12.9) takes what one of them
    # computes of x's address for computed in the other, too
    for choice in gl.static_range(2 if CHOICES else 1):
        while has & (_choice(tile, NARROW) == choice):
            following = after
            # read a turn before it is asked for
            after = _listed(tiles_ptr, index + 2 * programs, tiles_n, slots)
            has = _has_rows(following, E)
            stage, phase, factors = _multiply(
                ring,
                x_descs,
                w_desc,
                order_ptr,
                y_ptr,
                scale_ptr,
                zero_ptr,
                bias_ptr,
                tile,
                following,
                factors,
                N,
                E,
                steps,
                n_groups,
                stage,
                phase,
                has,
                index >= programs,
                SCATTER,
                GROUP,
                TOGETHER,
                ACT_QUANT,
                GATE,
                ACT,
                WARPS,
                PIPELINED,
                NARROW,
                choice if CHOICES else None,
            )
            tile = following
            index += programs
    if order_ptr is None:
        # rows behind the last expert are zero
        ACC: gl.constexpr = layout_of_sums(WARPS, BLOCK_M, x_desc.dtype)
        zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        while tile[1] < tile[2]:
            _, first, end, pid_n = tile
            memory = _memory_of_y(ring, 0, 0 if CHOICES else None, OUT)
            store_rows(zeros, y_ptr, order_ptr, pid_n, first, end, N, SCATTER, GATE, ACT, memory)
            index += programs
            tile = _listed(tiles_ptr, index, tiles_n, slots)
