"""Many tokens on Hopper: rows sorted by expert, each tile of them times its expert's weights.

What kernels/grouped.py does, by the loop of hopper_loop.py: x has to stand sorted in memory
(kernels/gather.py). W is COALESCED, or ACT_QUANT with x in word order.

Where the tiles of few experts do not fill the card, K is cut into SPLIT_K slices, whose sums are
stored in fp32 for another launch to add (kernels/combine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.grouped import tile_rows
from w4tensor.kernels.grouped_hopper_persistent import grouped_hopper_persistent_kernel
from w4tensor.kernels.groups import groups_together
from w4tensor.kernels.hopper_loop import accumulate, layout_of_sums
from w4tensor.kernels.hopper_memory import aligned_rows, descriptor
from w4tensor.kernels.hopper_operand import layout_of_rows
from w4tensor.kernels.hopper_output import scaled_rows, store_rows
from w4tensor.kernels.launcher import Launcher
from w4tensor.layout import ACT_QUANT

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.plans_experts import HopperGroupedPlan


@gluon.jit
def _tile(
    x_desc,
    w_desc,
    order_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    scales,
    bias_ptr,
    pid_n,
    expert,
    first,
    end,
    # of this slice of K: its number, its first step and the one behind its last
    k_slice,
    begin_step,
    end_step,
    N,
    E,
    steps,
    n_groups,
    BLOCK_N: gl.constexpr,
    SCATTER: gl.constexpr,
    X_DIV: gl.constexpr,
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
    PIPELINED: gl.constexpr,
):
    """Rows first .. end - 1, no more than x_desc's block has, of an expert's columns pid_n."""
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    ACC: gl.constexpr = layout_of_sums(WARPS, BLOCK_M, x_desc.dtype)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    # rows behind the last expert are zero
    if expert < E:
        n0 = pid_n * (BLOCK_N if GATE == "none" else BLOCK_N // 2)
        # experts are rows of one long matrix
        w_row = expert * N + (2 * n0 if GATE == "interleaved" else n0)
        i = gl.arange(0, BLOCK_N, layout_of_rows(BLOCK_N, WARPS, ACT_QUANT, x_desc.dtype))
        sums, _ = accumulate(
            (x_desc,),
            w_desc,
            ((first,), w_row, w_row + N // 2),
            expert.to(gl.int64) * N + tile_rows(pid_n, i, N, BLOCK_N, GATE),
            scale_ptr,
            zero_ptr,
            n_groups,
            begin_step,
            end_step,
            steps,
            BLOCK_N,
            GROUP,
            TOGETHER,
            ACT_QUANT,
            GATE,
            WARPS,
            STAGES,
            EARLY,
            PIPELINED,
            False,
        )
        acc = sums[0]
        b = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
        of_outputs = expert.to(gl.int64) * N + tile_rows(pid_n, b, N, BLOCK_N, GATE)
        if scales[1] is not None:
            acc = scaled_rows(acc, scales, of_outputs, n_groups, order_ptr, first, end, X_DIV)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + of_outputs)
            acc += gl.where(k_slice == 0, bias.to(gl.float32), 0.0).expand_dims(1)
    store_rows(acc, y_ptr, order_ptr, pid_n, first, end, N, SCATTER, GATE, ACT)


@gluon.jit(do_not_specialize=["n_rows", "steps"])
def _grouped_hopper_kernel(
    x_desc,
    # of the same x: tiles of no more rows than its block multiply no more; None: all are x_desc's
    narrow_desc,
    w_desc,
    order_ptr,
    tiles_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    # of int8 x, or None: multiples of the rows' groups, and scales of the tokens
    multiple_ptr,
    x_scale_ptr,
    bias_ptr,
    n_rows,
    N,
    E,
    steps,
    n_groups,
    BLOCK_N: gl.constexpr,
    SPLIT_K: gl.constexpr,
    SCATTER: gl.constexpr,
    # row r of int8 x has the scale of token order[r] // X_DIV, or if 0, of token r
    X_DIV: gl.constexpr,
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
    EARLY: gl.constexpr = PDL and not WAIT_FOR_TILES
    if PDL and WAIT_FOR_TILES:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile_ptr = tiles_ptr + gl.program_id(1) * 3
    expert = gl.load(tile_ptr)
    first = gl.load(tile_ptr + 1)
    end = gl.load(tile_ptr + 2)
    if EARLY:
        # accumulate() waits where there is a product; all programs have to, or this launch could be
        # done before the one ahead, and the next one would take both for done
        if (first >= end) | (expert >= E):
            tl.extra.cuda.gdc_wait()
    k_slice = gl.program_id(2)
    begin_step = 0
    end_step = steps
    if SPLIT_K > 1:
        begin_step = steps * k_slice // SPLIT_K
        end_step = steps * (k_slice + 1) // SPLIT_K
        y_ptr += k_slice.to(gl.int64) * n_rows * N
    # slots of the list that no expert needed are empty; an expert's last tile may be short
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
                scale_ptr if multiple_ptr is None else multiple_ptr,
                zero_ptr,
                (scale_ptr, multiple_ptr, x_scale_ptr),
                bias_ptr,
                gl.program_id(0),
                expert,
                first,
                end,
                k_slice,
                begin_step,
                end_step,
                N,
                E,
                steps,
                n_groups,
                BLOCK_N,
                SCATTER,
                X_DIV,
                GROUP,
                TOGETHER,
                ACT_QUANT,
                GATE,
                ACT,
                WARPS,
                STAGES,
                EARLY,
                PIPELINED,
            )


_launch_grouped_hopper = Launcher(_grouped_hopper_kernel)
_launch_persistent = Launcher(grouped_hopper_persistent_kernel)


def multiply_grouped_hopper(
    x: Tensor,
    order: Tensor | None,
    tiles: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: HopperGroupedPlan,
    *,
    scatter: bool = False,
    gate: str = "none",
    act: str = "none",
    wait_for_tiles: bool = True,
    multiple: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_div: int = 0,
) -> Tensor:
    """Fill the rows of y [rows, N], or [rows, N / 2] with a gate, that `tiles` lists.

    Where the plan has split_k > 1, y is fp32 [split_k, rows, N], sums of slices of K, and there is
    neither gate nor act.

    Args:
        x: [rows, K], sorted by expert, or [rows, padded_k(K)] in word order where qdata is
            ACT_QUANT. The rest as kernels/grouped.py has it, qdata contiguous.
        wait_for_tiles: the launch ahead of this one may make `tiles` and `order`. If not, they were
            done before it began, and are read, and weights too, while it makes x.
        multiple, x_scale: with them, x is int8 [rows, padded_k(K)] in its own order, and qdata is
            ACT_QUANT: multiple int8, like scale (kernels/hopper_multiples.py); x_scale fp32
            [tokens], of which row r has that of token order[r] // x_div, or if x_div is 0, of r.
    """
    n_experts, n = qdata.shape[:2]
    if tiles.shape[0] == 0:
        return y
    words = qdata.view(torch.int32)
    steps = words.shape[-1] // 16
    x = aligned_rows(x)
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}[x.dtype]
    fetched = plan.block_n // 2 if gate == "halves" else plan.block_n
    out = plan.block_n if gate == "none" else plan.block_n // 2
    n_out = n if gate == "none" else n // 2
    assert plan.split_k <= steps, "a slice has a step"
    assert plan.split_k == 1 or gate == act == "none", "slices are sums, which others add"
    columns = -(-n_out // out)
    programs = min(plan.programs, columns * len(tiles))
    # the memory that x had is that of y; the next tile's first steps come while the ring empties;
    # and scales are counted in 32 bits
    fits = y.dtype == x.dtype and steps >= plan.num_stages and scale.numel() < 1 << 31
    shared = programs > 0 and plan.split_k == 1 and fits
    launch = _launch_persistent if shared else _launch_grouped_hopper
    launch(
        (programs,) if shared else (columns, len(tiles), plan.split_k),
        *(
            descriptor(x, tuple(x.shape), x.stride(0), (rows, 128), dtype) if rows else None
            for rows in (plan.block_m, plan.narrow_m)
        ),
        descriptor(words, (n_experts * n, 16 * steps), 16 * steps, (fetched, 16), gl.int32),
        order,
        tiles,
        y,
        scale,
        zero_point,
        *(() if shared else (multiple, x_scale)),
        bias,
        len(tiles) if shared else y.shape[-2],
        n,
        n_experts,
        steps,
        scale.shape[-1],
        BLOCK_N=plan.block_n,
        **({} if shared else {"SPLIT_K": plan.split_k, "X_DIV": x_div}),
        SCATTER=scatter,
        GROUP=0 if scale.shape[-1] == 1 else group_size,
        TOGETHER=groups_together(scale.shape[-1], group_size, plan.block_m),
        ACT_QUANT=qdata.dtype == ACT_QUANT.qdata_dtype,
        GATE=gate,
        ACT=act,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        WAIT_FOR_TILES=wait_for_tiles,
        PIPELINED=plan.pipelined,
        num_warps=plan.num_warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y
