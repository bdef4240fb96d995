"""gemm_hopper's product where there are more tiles than the card holds at a time, in Gluon.

As many programs as the card holds share the tiles. A program goes on from tile to tile without
emptying its ring: it fetches the next tile's first steps while it multiplies this one's last ones,
and what it stores leaves while it multiplies again. A tile costs nothing but its steps.

With P programs, program p has tiles p, p + P, ... Where the last ones would be idle, each has its
`rounds` first tiles so, and of the tiles that are left then, P to 2 P of them, an even share of
the steps (EVEN): the end of a tile, perhaps a whole one, and the beginning of another. It begins
with the last of these, stores its sums and announces them, and ends with the first, to which it
adds the sums of program p - 1 (hopper_slices.py). So programs wait only for programs that were
started before them, and that wait for nobody before they announce; two runs give the same bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from w4tensor.kernels.hopper_loop import add_steps
from w4tensor.kernels.hopper_memory import barrier, tokens_of
from w4tensor.kernels.hopper_operand import fetch_factors, layout_of_rows
from w4tensor.kernels.hopper_output import finish, memory_of_y
from w4tensor.kernels.hopper_ring import fetch_first, open_ring
from w4tensor.kernels.hopper_slices import (
    add_parts,
    await_parts,
    first_tokens,
    store_part,
    tile_at,
)


@gluon.jit
def _border(share, left, steps, LEAST: gl.constexpr):
    """Where the shares of `share` programs end among the steps of the tiles that are left: evenly,
    but no tile is cut less than LEAST steps from its ends."""
    at = left * share * steps // gl.num_programs(0)
    within = at % steps
    at = gl.where(within < LEAST, at - within, at)
    return gl.where(within > steps - LEAST, at - within + steps, at)


@gluon.jit
def _turn(turn, rounds, tiles, steps, EVEN: gl.constexpr, LEAST: gl.constexpr):
    """Tile, first step and end of what this program has in a turn, and whether it has anything."""
    programs = gl.num_programs(0)
    tile = gl.program_id(0) + turn * programs
    has = tile < tiles
    begin = 0
    end = steps
    if EVEN:
        left = tiles - rounds * programs
        first = _border(gl.program_id(0), left, steps, LEAST)
        last = _border(gl.program_id(0) + 1, left, steps, LEAST)
        shared = (last - 1) // steps - (turn - rounds)
        in_share = turn >= rounds
        has = (not in_share) | ((shared + 1) * steps > first)
        in_share &= has
        tile = gl.where(in_share, rounds * programs + shared, tile)
        begin = gl.where(in_share, gl.maximum(first - shared * steps, 0), 0)
        end = gl.where(in_share, gl.minimum(last - shared * steps, steps), steps)
    # after the last turn, what may be read
    return gl.where(has, tile, 0), begin, end, has


@gluon.jit(do_not_specialize=["token", "M", "steps", "tiles", "rounds"])
def gemm_hopper_persistent_kernel(
    x_desc,
    # of the second run of tokens, where a tile has two
    more_x_desc,
    w_desc,
    y_desc,
    more_y_desc,
    scale_ptr,
    zero_ptr,
    # of int8 x, or None: multiples of the rows' groups, and scales of the tokens
    multiple_ptr,
    x_scale_ptr,
    bias_ptr,
    part_ptr,
    flag_ptr,
    token,
    M,
    N,
    steps,
    n_groups,
    tiles,
    rounds,
    GROUP_N: gl.constexpr,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    # groups of a row that are loaded at a time
    TOGETHER: gl.constexpr,
    # whether W is in this format, or in COALESCED
    ACT_QUANT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    PIPELINED: gl.constexpr,
):
    FIRST: gl.constexpr = tokens_of(x_desc.block_shape)
    MORE: gl.constexpr = 0 if more_x_desc is None else more_x_desc.block_shape[0]
    # the first half of all tokens and the last, which overlap
    HALVES: gl.constexpr = len(x_desc.block_shape) == 3
    BLOCK_M: gl.constexpr = FIRST + MORE
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    INT8: gl.constexpr = multiple_ptr is not None
    if INT8:
        factor_ptr = multiple_ptr
    else:
        factor_ptr = scale_ptr
    scales = scale_ptr, multiple_ptr, x_scale_ptr
    EVEN: gl.constexpr = part_ptr is not None
    if MORE:
        x_descs = x_desc, more_x_desc
        y_descs = y_desc, more_y_desc
        columns = 0, FIRST
    else:
        x_descs = (x_desc,)
        y_descs = (y_desc,)
        columns = (0,)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    r = gl.arange(0, BLOCK_N, layout_of_rows(BLOCK_N, WARPS, ACT_QUANT, x_desc.dtype))
    turn = 0
    stage = 0
    phase = 0
    tile, begin, end, has = _turn(0, rounds, tiles, steps, EVEN, STAGES)
    n_tile, m_tile = tile_at(tile, tiles_n, tiles_m, GROUP_N)
    ring = open_ring(x_descs, w_desc, BLOCK_N, STAGES)
    ys = ()
    if INT8:
        # a stage of x is too small for y
        for i in gl.static_range(len(y_descs)):
            ys += (memory_of_y(y_descs[i], BLOCK_N),)
    n0 = n_tile * BLOCK_N
    factors = fetch_first(
        ring,
        x_descs,
        w_desc,
        (first_tokens(m_tile * BLOCK_M, M, FIRST, MORE), n0, n0),
        gl.minimum(n0 + r, N - 1),
        factor_ptr,
        zero_ptr,
        n_groups,
        begin,
        end,
        GROUP,
        TOGETHER,
        ACT_QUANT,
        "none",
        WARPS,
        PDL,
        False,
    )
    while has:
        n0 = n_tile * BLOCK_N
        m = first_tokens(m_tile * BLOCK_M, M, FIRST, MORE)
        row = gl.minimum(n0 + r, N - 1)
        next_tile, next_begin, next_end, has = _turn(turn + 1, rounds, tiles, steps, EVEN, STAGES)
        n_tile, m_tile = tile_at(next_tile, tiles_n, tiles_m, GROUP_N)
        next_n0 = n_tile * BLOCK_N
        next_at = first_tokens(m_tile * BLOCK_M, M, FIRST, MORE), next_n0, next_n0
        acc, stage, phase = add_steps(
            ring,
            x_descs,
            w_desc,
            (m, n0, n0),
            row,
            factor_ptr,
            zero_ptr,
            factors,
            n_groups,
            begin,
            end,
            steps,
            stage,
            phase,
            next_at,
            next_begin,
            has,
            turn > 0,
            GROUP,
            TOGETHER,
            ACT_QUANT,
            "none",
            WARPS,
            PIPELINED,
        )
        row = gl.minimum(next_n0 + r, N - 1)
        if not EVEN:
            # they come while y is stored, for which sums of others leave no registers
            factors = fetch_factors(
                factor_ptr,
                zero_ptr,
                row,
                next_begin,
                n_groups,
                GROUP,
                TOGETHER,
                ACT_QUANT,
                WARPS,
                x_desc.dtype,
            )
        if EVEN:
            TILE: gl.constexpr = BLOCK_N * BLOCK_M
            mine = gl.program_id(0)
            if end < steps:
                parts = part_ptr + mine.to(gl.int64) * TILE
                for i in gl.static_range(len(acc)):
                    store_part(parts + columns[i] * BLOCK_N, acc[i])
                barrier()
                gl.atomic_xchg(flag_ptr + mine, token, sem="release")
            if begin > 0:
                await_parts(flag_ptr + mine - 1, 1, token)
        if end == steps:
            for i in gl.static_range(len(acc)):
                sums = acc[i]
                if EVEN:
                    if begin > 0:
                        parts = part_ptr + (mine - 1).to(gl.int64) * TILE
                        sums = add_parts(sums, parts + columns[i] * BLOCK_N, 1, TILE)
                memory = ys[i] if INT8 else ring[0][i].index(stage)
                finish(
                    sums,
                    scales,
                    n_groups,
                    bias_ptr,
                    y_descs[i],
                    None,
                    memory,
                    n0,
                    m[i],
                    M,
                    N,
                    HALVES,
                )
        else:
            # the stage that is fetched anew next: all have read it
            barrier()
        if EVEN:
            factors = fetch_factors(
                factor_ptr,
                zero_ptr,
                row,
                next_begin,
                n_groups,
                GROUP,
                TOGETHER,
                ACT_QUANT,
                WARPS,
                x_desc.dtype,
            )
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        begin = next_begin
        end = next_end
        turn += 1
    tma.store_wait(0)
