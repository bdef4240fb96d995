"""grouped_hopper.py for int8 activations: the loop of hopper_int8_loop.py by rows of experts.

    y[r'] = f(sum over cells of  x_scale[r, a] * scale[e, n, g] * sum_k x[r, k] (q[e, n, k] - z))

Codes of x stand sorted in memory; their scales and sums as they were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.grouped import tile_rows
from w4tensor.kernels.hopper_int8_loop import accumulate_int8, layout_of_int8_sums
from w4tensor.kernels.hopper_memory import descriptor
from w4tensor.kernels.hopper_output import store_rows
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT
from w4tensor.kernels.unpack_act_quant import UNIT

if TYPE_CHECKING:
    from w4tensor.plans_experts import HopperInt8GroupedPlan


@gluon.jit
def _columns(order_ptr, first, end, X_DIV: gl.constexpr, ACC: gl.constexpr):
    """Of the scales and sums of x, those of rows first .. end - 1."""
    BLOCK_M: gl.constexpr = ACC.instr_shape[1]
    row = gl.minimum(first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC)), end - 1)
    return row if X_DIV == 0 else gl.load(order_ptr + row) // X_DIV


@gluon.jit
def _tile(
    x_desc,
    w_desc,
    order_ptr,
    y_ptr,
    x_scale_ptr,
    x_sum_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    pid_n,
    expert,
    first,
    end,
    N,
    E,
    steps,
    x_stride,
    n_act_groups,
    n_groups,
    BLOCK_N: gl.constexpr,
    X_DIV: gl.constexpr,
    SCATTER: gl.constexpr,
    GROUP: gl.constexpr,
    ACT_GROUP: gl.constexpr,
    CELL: gl.constexpr,
    WHOLE_STEPS: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Rows first .. end - 1, no more than x_desc's block has, of an expert's columns pid_n."""
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    ACC: gl.constexpr = layout_of_int8_sums(WARPS, BLOCK_M)
    y = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    # rows behind the last expert are zero
    if expert < E:
        n0 = pid_n * (BLOCK_N if GATE == "none" else BLOCK_N // 2)
        # experts are rows of one long matrix
        w_row = expert * N + (2 * n0 if GATE == "interleaved" else n0)
        i = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
        n = expert.to(gl.int64) * N + tile_rows(pid_n, i, N, BLOCK_N, GATE)
        # codes stand sorted, what they are scaled with where quantize_activation wrote it; order is
        # as old as the list of tiles, and may be read as early
        column = None
        if ACT_GROUP > 0 or (zero_ptr is not None and GROUP > 0):
            column = _columns(order_ptr, first, end, X_DIV, ACC)
        acc, _ = accumulate_int8(
            x_desc,
            None,
            None,
            x_scale_ptr if ACT_GROUP > 0 else None,
            x_sum_ptr if GROUP > 0 else None,
            x_stride,
            column,
            n_act_groups,
            first,
            w_desc,
            w_row,
            w_row + N // 2,
            n,
            scale_ptr,
            zero_ptr,
            n_groups,
            0,
            steps,
            steps,
            BLOCK_N,
            GROUP,
            ACT_GROUP,
            CELL,
            WHOLE_STEPS,
            GATE,
            WARPS,
            STAGES,
            EARLY,
            1,
        )
        y = acc[0] * (1.0 / UNIT)
        # those of the loop would stay in registers
        column = _columns(order_ptr, first, end, X_DIV, ACC)
        if zero_ptr is not None and GROUP == 0:
            zero = gl.load(zero_ptr + n).to(gl.float32) - SYMMETRIC_ZERO_POINT
            scale = gl.load(scale_ptr + n).to(gl.float32)
            x_sum = gl.load(x_sum_ptr + column)
            y -= (zero * scale).expand_dims(1) * x_sum.expand_dims(0)
        if ACT_GROUP == 0:
            y *= gl.load(x_scale_ptr + column).expand_dims(0)
        if bias_ptr is not None:
            y += gl.load(bias_ptr + n).to(gl.float32).expand_dims(1)
    store_rows(y, y_ptr, order_ptr, pid_n, first, end, N, SCATTER, GATE, ACT)


@gluon.jit(do_not_specialize=["steps"])
def _grouped_int8_hopper_kernel(
    x_desc,
    # of the same x: tiles of no more rows than its block multiply no more; None: all are x_desc's
    narrow_desc,
    w_desc,
    order_ptr,
    tiles_ptr,
    y_ptr,
    x_scale_ptr,
    x_sum_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    N,
    E,
    steps,
    x_stride,
    n_act_groups,
    n_groups,
    BLOCK_N: gl.constexpr,
    # row r has the scale of token order[r] // X_DIV, or if 0, of token r
    X_DIV: gl.constexpr,
    SCATTER: gl.constexpr,
    # 0 where the row is one group, and where the token is
    GROUP: gl.constexpr,
    ACT_GROUP: gl.constexpr,
    CELL: gl.constexpr,
    # whether K is a multiple of a step
    WHOLE_STEPS: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    # whether the kernel ahead may still be writing tiles
    WAIT_FOR_TILES: gl.constexpr,
):
    EARLY: gl.constexpr = PDL and not WAIT_FOR_TILES
    if PDL and WAIT_FOR_TILES:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile_ptr = tiles_ptr + gl.program_id(1) * 3
    expert = gl.load(tile_ptr)
    first = gl.load(tile_ptr + 1)
    end = gl.load(tile_ptr + 2)
    if EARLY:
        # as in grouped_hopper.py: all programs have to wait
        if (first >= end) | (expert >= E):
            tl.extra.cuda.gdc_wait()
    SIZES: gl.constexpr = 1 if narrow_desc is None else 2
    narrow = False
    if narrow_desc is not None:
        narrow = end - first <= narrow_desc.block_shape[0]
    for size in gl.static_range(SIZES):
        if (first < end) & (narrow == (size == 1)):
            _tile(
                x_desc if size == 0 else narrow_desc,
                w_desc,
                order_ptr,
                y_ptr,
                x_scale_ptr,
                x_sum_ptr,
                scale_ptr,
                zero_ptr,
                bias_ptr,
                gl.program_id(0),
                expert,
                first,
                end,
                N,
                E,
                steps,
                x_stride,
                n_act_groups,
                n_groups,
                BLOCK_N,
                X_DIV,
                SCATTER,
                GROUP,
                ACT_GROUP,
                CELL,
                WHOLE_STEPS,
                GATE,
                ACT,
                WARPS,
                STAGES,
                EARLY,
            )


_launch = Launcher(_grouped_int8_hopper_kernel)


def multiply_grouped_int8_hopper(
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
    plan: HopperInt8GroupedPlan,
    *,
    x_div: int = 0,
    scatter: bool = False,
    gate: str = "none",
    act: str = "none",
    wait_for_tiles: bool = True,
) -> Tensor:
    """Fill the rows of y [rows, N], or [rows, N / 2] with a gate, that `tiles` lists.

    Args:
        x: codes [rows, padded_k(K)], sorted by expert.
        x_scale, x_sum: [groups, tokens], as quantize_activation made them: row r has those of token
            order[r] // x_div, or where x_div is 0, of token r. x_sum: None without zero_point, else
            of groups of `group_size`.
        group_size: at least 32, or a whole row.
        act_group_size: as x was quantised; -1 is per token.
        qdata: ACT_QUANT. The rest as kernels/grouped_hopper.py has it.
    """
    n_experts, n = qdata.shape[:2]
    if tiles.shape[0] == 0:
        return y
    rows, k_padded = x.shape
    step = plan.block_k
    n_groups = scale.shape[-1]
    group = 0 if n_groups == 1 else group_size
    act_group = max(act_group_size, 0)
    cell, _ = cell_and_span(group, act_group)

    fetched = plan.block_n // 2 if gate == "halves" else plan.block_n
    out = plan.block_n if gate == "none" else plan.block_n // 2
    n_out = n if gate == "none" else n // 2
    words = qdata.view(torch.uint8)
    _launch(
        (-(-n_out // out), tiles.shape[0]),
        *(
            descriptor(x, (rows, k_padded), k_padded, (size, 128), gl.int8) if size else None
            for size in (plan.block_m, plan.narrow_m)
        ),
        descriptor(
            words, (n_experts * n, k_padded // 2), k_padded // 2, (fetched, step // 2), gl.uint8
        ),
        order,
        tiles,
        y,
        x_scale,
        x_sum,
        scale,
        zero_point,
        bias,
        n,
        n_experts,
        -(-k_padded // step),
        x_scale.stride(0),
        x_scale.shape[0],
        n_groups,
        BLOCK_N=plan.block_n,
        X_DIV=x_div,
        SCATTER=scatter,
        GROUP=group,
        ACT_GROUP=act_group,
        CELL=cell,
        WHOLE_STEPS=n_groups * group_size % step == 0,
        GATE=gate,
        ACT=act,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        WAIT_FOR_TILES=wait_for_tiles,
        num_warps=plan.num_warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y
