"""grouped.py for int8 activations: rows sorted by expert, the int8 matrix unit, ACT_QUANT weights.

    y[r'] = f(sum over cells of x_scale[a, r''] * scale[n, g] * sum_k x[r'', k] (q[n, k] - z[n, g]))

Tiles, rows and f are grouped.py's; cells and spans are act_quant_gemm.py's: a cell of K has one
scale on either side, a span one on one side. Cells are summed in int32 by the matrix unit, scaled
into the sum of their span, and that into the fp32 tile; where a row of W and a token have one scale
each, all of K is one int32 sum. Scales of W go from memory into the registers of the lanes that use
them, one step ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.act_quant_tile import MAX_CHAINED_K, cell_and_span
from w4tensor.kernels.grouped import BLOCK_K, beside, lane_rows, store_tile, tile_rows
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.settle import settle
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT, use_asm
from w4tensor.kernels.unpack_act_quant import UNIT, join_halves, permute_codes, unpack_bytes

if TYPE_CHECKING:
    from w4tensor.plans_experts import ActQuantGroupedPlan


@triton.jit
def _piece(v, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """The INDEX-th of COUNT equal runs of columns of v [R, C], in registers."""
    R: tl.constexpr = v.shape[0]
    C: tl.constexpr = v.shape[1]
    if COUNT == 1:
        return v
    else:
        left, right = v.reshape(R, 2, C // 2).trans(0, 2, 1).split()
        if INDEX < COUNT // 2:
            return _piece(left, INDEX, COUNT // 2)
        else:
            return _piece(right, INDEX - COUNT // 2, COUNT // 2)


@triton.jit
def _scale_rows(acc, values, INDEX: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] times the INDEX-th of values [4, 8, WARPS, 2, TILES, PARTS]."""
    WARPS: tl.constexpr = values.shape[2]
    TILES: tl.constexpr = values.shape[4]
    PARTS: tl.constexpr = values.shape[5]
    one = _piece(values.reshape(64 * WARPS * TILES, PARTS), INDEX, PARTS)
    return beside(one.reshape(4, 8, WARPS, 2, TILES, 1), acc)


@triton.jit
def _scale_columns(acc, values, INDEX: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] times the INDEX-th row of values [GROUPS, BLOCK_M]."""
    BLOCK_M: tl.constexpr = acc.shape[1]
    GROUPS: tl.constexpr = values.shape[0]
    return acc * _piece(values.T, INDEX, GROUPS).reshape(1, BLOCK_M)


@triton.jit
def _tile(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    order_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    expert,
    first,
    end,
    N,
    E,
    n_bytes,
    n_groups,
    n_act_groups,
    stride_x_scale,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X_DIV: tl.constexpr,
    SCATTER: tl.constexpr,
    # 0 where a row of W is one group, and where a token is
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    CELL: tl.constexpr,
    SPAN: tl.constexpr,
    CHAIN: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    KWIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    TILES: tl.constexpr = BLOCK_N // (16 * WARPS)
    CELLS: tl.constexpr = SPAN // CELL
    # groups of a block, on either side
    PARTS: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 and GROUP < BLOCK_K else 1
    ACT_PARTS: tl.constexpr = BLOCK_K // ACT_GROUP if ACT_GROUP > 0 else 1
    pid_n = tl.program_id(0)
    row = first + tl.arange(0, BLOCK_M)
    in_tile = row < end
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # rows behind the last expert are zero
    if expert < E:
        x_row = row
        if X_DIV > 0:
            x_row = tl.load(order_ptr + row, mask=in_tile, other=0) // X_DIV
        n_row = tile_rows(pid_n, tl.arange(0, BLOCK_N), N, BLOCK_N, GATE)
        w_ptrs = w_ptr + expert * stride_we + n_row.to(tl.int64)[:, None] * stride_wn
        w_ptrs += tl.arange(0, BLOCK_K // 2)[None, :]
        x_ptrs = x_ptr + x_row.to(tl.int64)[:, None] * (n_bytes * 2) + tl.arange(0, CELL)[None, :]
        x_scale_ptrs = x_scale_ptr + x_row[None, :]
        # as many groups as give every thread one element, so that the load is pipelined as one
        a = tl.arange(0, max(ACT_PARTS, 32 * WARPS // BLOCK_M))[:, None]
        part = tl.arange(0, PARTS)[None, None, None, None, None, :]

        # [4 lanes with the same row, 8, WARPS, 2, TILES, PARTS]: the rows of the operand's lanes
        s_row = lane_rows(WARPS, TILES)
        s_at = expert * stride_se + tile_rows(pid_n, s_row, N, BLOCK_N, GATE) * stride_sn

        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if CHAIN else tl.float32)
        at = s_at + tl.minimum(part, n_groups - 1)
        scale = tl.load(scale_ptr + at)
        zero = None if zero_ptr is None else tl.load(zero_ptr + at)
        for block in tl.range(0, n_bytes // (BLOCK_K // 2), num_stages=STAGES):
            k = block * BLOCK_K
            now = scale.to(tl.float32)
            now_zero = None if zero_ptr is None else zero.to(tl.float32)
            if GROUP > 0:
                # a block ahead; groups beyond K meet codes of zero
                ahead = (k + BLOCK_K) // GROUP + part
                at = s_at + tl.minimum(ahead, n_groups - 1)
                scale = tl.load(scale_ptr + at)
                if zero_ptr is not None:
                    zero = tl.load(zero_ptr + at)
            if ACT_GROUP > 0:
                group = k // ACT_GROUP + a
                x_scale = tl.load(
                    x_scale_ptrs + group * stride_x_scale,
                    mask=in_tile[None, :] & (group < n_act_groups),
                    other=0.0,
                )
            w = tl.load(w_ptrs + block * (BLOCK_K // 2))
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for cell in tl.static_range(BLOCK_K // CELL):
                x = tl.load(x_ptrs + (k + cell * CELL), mask=in_tile[:, None], other=0)
                xt = permute_codes(x, KWIDTH).T
                low, high = unpack_bytes(_piece(w, cell, BLOCK_K // CELL), ASM)
                if CHAIN:
                    z = join_halves(low, high, KWIDTH)
                    acc = settle(tl.dot(z, xt, acc, out_dtype=tl.int32), ASM)
                else:
                    if GROUP == 16:
                        # the two groups of a cell of 32 are its low and its high nibbles
                        z = join_halves(low, tl.zeros_like(high), KWIDTH)
                        d = tl.dot(z, xt, out_dtype=tl.int32).to(tl.float32)
                        d = _scale_rows(d, now, 2 * cell)
                        z = join_halves(tl.zeros_like(low), high, KWIDTH)
                        high_d = tl.dot(z, xt, out_dtype=tl.int32).to(tl.float32)
                        d += _scale_rows(high_d, now, 2 * cell + 1)
                    else:
                        z = join_halves(low, high, KWIDTH)
                        d = tl.dot(z, xt, out_dtype=tl.int32).to(tl.float32)
                    if GROUP > 16 and GROUP < SPAN:
                        d = _scale_rows(d, now, cell * CELL // GROUP)
                    if ACT_GROUP > 0 and ACT_GROUP < SPAN:
                        d = _scale_columns(d, x_scale, cell * CELL // ACT_GROUP)
                    # the first cell of a span begins its sum, the last one scales it
                    if cell % CELLS == 0:
                        total = d
                    else:
                        total += d
                    if cell % CELLS == CELLS - 1:
                        if ACT_GROUP >= SPAN:
                            total = _scale_columns(total, x_scale, cell * CELL // ACT_GROUP)
                        if GROUP >= SPAN and GROUP > 16:
                            total = _scale_rows(total, now, cell * CELL // GROUP)
                        acc += total
            if zero_ptr is not None and GROUP > 0:
                shift = (now_zero - SYMMETRIC_ZERO_POINT) * UNIT * now
                for i in tl.static_range(PARTS):
                    g = k // GROUP + i
                    # a group longer than a block is corrected where it begins
                    begins = (g < n_groups) & (k % GROUP == 0 if GROUP > BLOCK_K else True)
                    x_sum = tl.load(
                        x_sum_ptr + g * stride_x_scale + x_row, mask=in_tile & begins, other=0.0
                    )
                    sums = tl.broadcast_to(x_sum[None, :], (BLOCK_N, BLOCK_M))
                    acc -= _scale_rows(sums, shift, i)

        y = acc.to(tl.float32) * (1.0 / UNIT)
        if GROUP == 0:
            if zero_ptr is not None:
                x_sum = tl.load(x_sum_ptr + x_row, mask=in_tile, other=0.0)
                sums = tl.broadcast_to(x_sum[None, :], (BLOCK_N, BLOCK_M))
                y -= _scale_rows(sums, zero.to(tl.float32) - SYMMETRIC_ZERO_POINT, 0)
            y = _scale_rows(y, scale.to(tl.float32), 0)
        if ACT_GROUP == 0:
            y *= tl.load(x_scale_ptr + x_row, mask=in_tile, other=0.0)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + expert * N + n_row).to(tl.float32)[:, None]
    store_tile(y, y_ptr, order_ptr, pid_n, row, in_tile, N, SCATTER, GATE, ACT)


@triton.jit
def _grouped_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    order_ptr,
    tiles_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    N,
    E,
    n_bytes,
    n_groups,
    n_act_groups,
    stride_x_scale,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    BLOCK_M: tl.constexpr,
    NARROW_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X_DIV: tl.constexpr,
    SCATTER: tl.constexpr,
    # 0 where a row of W is one group, and where a token is
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    CELL: tl.constexpr,
    SPAN: tl.constexpr,
    CHAIN: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    KWIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    expert = tl.load(tile_ptr).to(tl.int64)
    first = tl.load(tile_ptr + 1)
    end = tl.load(tile_ptr + 2)
    # slots of the list that no expert needed are empty; an expert's last tile may be short
    narrow = end - first <= NARROW_M
    for size in tl.static_range(2 if NARROW_M > 0 else 1):
        if (first < end) & (narrow == (size == 1)):
            _tile(
                x_ptr,
                x_scale_ptr,
                x_sum_ptr,
                order_ptr,
                w_ptr,
                scale_ptr,
                zero_ptr,
                bias_ptr,
                y_ptr,
                expert,
                first,
                end,
                N,
                E,
                n_bytes,
                n_groups,
                n_act_groups,
                stride_x_scale,
                stride_we,
                stride_wn,
                stride_se,
                stride_sn,
                NARROW_M if size == 1 else BLOCK_M,
                BLOCK_N,
                X_DIV,
                SCATTER,
                GROUP,
                ACT_GROUP,
                CELL,
                SPAN,
                CHAIN,
                GATE,
                ACT,
                KWIDTH,
                WARPS,
                STAGES,
                ASM,
            )


_launch_grouped = Launcher(_grouped_kernel)


def multiply_act_quant_grouped(
    x: Tensor,
    x_scale: Tensor,
    x_sum: Tensor | None,
    order: Tensor | None,
    tiles: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    act_group_size: int,
    plan: ActQuantGroupedPlan,
    *,
    x_div: int = 0,
    scatter: bool = False,
    gate: str = "none",
    act: str = "none",
) -> Tensor:
    """multiply_grouped for ACT_QUANT weights and what quantize_activation gave.

    Args:
        x, x_scale, x_sum: codes int8 [rows, K], scale [groups, rows] and, where there are zero
            points, sums [groups of W, rows] made with sum_group_size=group_size.
        act_group_size: as x was quantised; -1 is per token.
    """
    n_experts, n, n_groups = scale.shape
    if tiles.shape[0] == 0:
        return y
    qbytes = qdata.view(torch.uint8)
    group = 0 if n_groups == 1 else group_size
    act_group = max(act_group_size, 0)
    chain = group == act_group == 0 and x.shape[-1] <= MAX_CHAINED_K
    cell, span = (128, 128) if chain else cell_and_span(group, act_group)
    _launch_grouped(
        (-(-n // plan.block_n), tiles.shape[0]),
        x,
        x_scale,
        x_sum,
        order,
        tiles,
        qbytes,
        scale,
        zero_point,
        bias,
        y,
        n,
        n_experts,
        x.shape[-1] // 2,
        n_groups,
        x_scale.shape[-2],
        x_scale.stride(-2),
        qbytes.stride(0),
        qbytes.stride(1),
        scale.stride(0),
        scale.stride(1),
        BLOCK_M=plan.block_m,
        NARROW_M=plan.narrow_m,
        BLOCK_N=plan.block_n,
        X_DIV=x_div,
        SCATTER=scatter,
        GROUP=group,
        ACT_GROUP=act_group,
        CELL=cell,
        SPAN=span,
        CHAIN=chain,
        GATE=gate,
        ACT=act,
        KWIDTH=plan.kwidth,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y
