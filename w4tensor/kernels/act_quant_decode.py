"""Y[E, M, N] = X[E, M, K] @ W[E, N, K].T for M <= 16: int8 activations, the int8 matrix unit.

    y[m, n] = sum over cells of  x_scale[m, a] * scale[n, g] * sum_k x[m, k] (q[n, k] - z[n, g])

    a step of one program        a cell is as much of K as has one scale on either side (32 to 128)
           cell 0    cell 1
    W  | BLOCK_N x | BLOCK_N x |  every cell is a product of its own in a batched tl.dot, so that
    X  | BLOCK_M x | BLOCK_M x |  warps divide K, not N: each unpacks its own weights, once, and
          warp 0      warp 1 ..   keeps fp32 sums, which are added when K is through

A span, a run of cells with one scale on one side, is one warp's, which adds its cells before it
multiplies by that scale. Weights are the row operand, tokens the short side: a weight is read once
whatever M is. K may also be split over programs, whose parts are added in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from w4tensor.kernels.act_quant_tile import cell_and_span, finish
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.ordered_sum import add_parts, arrive
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT, use_asm
from w4tensor.kernels.unpack_act_quant import UNIT, join_halves, permute_codes, unpack_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_act_quant import ActQuantDecodePlan


@triton.jit(do_not_specialize=["M", "n_groups", "n_act_groups"])
def _decode_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    part_ptr,
    counter_ptr,
    M,
    N,
    n_bytes,
    n_groups,
    n_act_groups,
    stride_x_scale,
    # 0 where the row is one group, and where the token is
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    CELL: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    KWIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    SPANS: tl.constexpr = BLOCK_K // SPAN
    CELLS: tl.constexpr = SPAN // CELL
    # groups of 16 are the halves of a cell of 32, which its low and its high nibbles hold
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    INNER_GROUP: tl.constexpr = GROUP > 0 and GROUP < SPAN
    OUTER_GROUP: tl.constexpr = GROUP >= SPAN
    INNER_ACT: tl.constexpr = ACT_GROUP > 0 and ACT_GROUP < SPAN
    k_slice = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # rows past the end read the last one; only the store is masked
    row = e * N + tl.minimum(n, N - 1)
    w_ptrs = w_ptr + row[:, None] * n_bytes
    x_ptrs = x_ptr + (e * M + m)[:, None] * (n_bytes * 2)
    # groups are the first dimension of every scale: [1, BLOCK_N] and [1, BLOCK_M]
    group_row = (row * n_groups)[None, :]
    mask_m = (m < M)[None, :]
    x_scale_ptr += e * n_act_groups * stride_x_scale
    x_scale_ptrs = x_scale_ptr + m[None, :]
    if zero_ptr is not None:
        x_sum_ptr += e * n_groups * stride_x_scale

    # where the cells and the spans of a step begin
    cell = tl.arange(0, CELLS * SPANS)[:, None]
    cell_k = cell % SPANS * SPAN + cell // SPANS * CELL
    span_k = tl.arange(0, SPANS)[:, None] * SPAN
    per_slice = tl.cdiv(tl.cdiv(n_bytes * 2, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = k_slice * per_slice
    end = tl.minimum(begin + per_slice, n_bytes * 2)
    scale = 0.0
    zero = 0.0
    if OUTER_GROUP:
        g = (begin + span_k) // GROUP
        scale, zero = _load_group(scale_ptr, zero_ptr, group_row, g, n_groups)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    acc = tl.zeros([SPANS, BLOCK_N, BLOCK_M], tl.float32)
    for k0 in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        next_scale = scale
        next_zero = zero
        if OUTER_GROUP:
            # a step ahead, as 16-bit loads cannot be pipelined through shared memory
            g = (k0 + BLOCK_K + span_k) // GROUP
            next_scale, next_zero = _load_group(scale_ptr, zero_ptr, group_row, g, n_groups)
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        if EVEN_K:
            w = tl.load(w_ptrs + byte)
            x = tl.load(x_ptrs + k, mask=(m < M)[:, None], other=0)
        else:
            w = tl.load(w_ptrs + byte, mask=byte < n_bytes, other=0)
            x = tl.load(x_ptrs + k, mask=(m < M)[:, None] & (k < n_bytes * 2), other=0)
        # a cell after another, and the cells of a span SPANS apart: one warp has them all
        w = w.reshape(BLOCK_N, SPANS, CELLS, CELL // 2).trans(2, 1, 0, 3)
        x = x.reshape(BLOCK_M, SPANS, CELLS, CELL).trans(2, 1, 0, 3)
        x = permute_codes(x.reshape(CELLS * SPANS * BLOCK_M, CELL), KWIDTH)
        x = x.reshape(CELLS * SPANS, BLOCK_M, CELL).trans(0, 2, 1)
        low, high = unpack_bytes(w.reshape(CELLS * SPANS * BLOCK_N, CELL // 2), ASM)

        for half in tl.static_range(HALVES):
            if GROUP != 16:
                z = join_halves(low, high, KWIDTH)
            elif half == 0:
                z = join_halves(low, tl.zeros_like(high), KWIDTH)
            else:
                z = join_halves(tl.zeros_like(low), high, KWIDTH)
            z = z.reshape(CELLS * SPANS, BLOCK_N, CELL)
            d = tl.dot(z, x, out_dtype=tl.int32).to(tl.float32)
            # scales of the smaller groups, then sums of spans, then scales of the larger groups
            if INNER_ACT:
                a = (k0 + cell_k) // ACT_GROUP
                mask_a = mask_m & (a < n_act_groups)
                a_scale = tl.load(x_scale_ptrs + a * stride_x_scale, mask=mask_a, other=0.0)
                d *= a_scale[:, None, :]
            if INNER_GROUP:
                g = (k0 + cell_k) // GROUP + half
                g_scale, g_zero = _load_group(scale_ptr, zero_ptr, group_row, g, n_groups)
                d *= g_scale.to(tl.float32)[:, :, None]
            d = tl.sum(d.reshape(CELLS, SPANS, BLOCK_N, BLOCK_M), 0)
            if ACT_GROUP >= SPAN:
                a = (k0 + span_k) // ACT_GROUP
                mask_a = mask_m & (a < n_act_groups)
                a_scale = tl.load(x_scale_ptrs + a * stride_x_scale, mask=mask_a, other=0.0)
                d *= a_scale[:, None, :]
            if OUTER_GROUP:
                d *= scale.to(tl.float32)[:, :, None]
            acc += d

            if zero_ptr is not None and GROUP > 0:
                if INNER_GROUP:
                    shift = (g_zero.to(tl.float32) - SYMMETRIC_ZERO_POINT) * UNIT
                    shift *= g_scale.to(tl.float32)
                    first_k = k0 + cell_k
                else:
                    shift = (zero.to(tl.float32) - SYMMETRIC_ZERO_POINT) * UNIT
                    shift *= scale.to(tl.float32)
                    first_k = k0 + span_k
                g = first_k // GROUP + half
                # where a group starts is the correction for all of it
                mask_g = mask_m & (g < n_groups) & (first_k % GROUP == 0)
                sum_ptrs = x_sum_ptr + g * stride_x_scale + m[None, :]
                x_sum = tl.load(sum_ptrs, mask=mask_g, other=0.0)
                shift = shift[:, :, None] * x_sum[:, None, :]
                if INNER_GROUP:
                    shift = tl.sum(shift.reshape(CELLS, SPANS, BLOCK_N, BLOCK_M), 0)
                acc -= shift
        scale = next_scale
        zero = next_zero

    # [BLOCK_N, BLOCK_M]
    y = tl.sum(acc, 0)
    if SPLIT_K == 1:
        finish(
            y,
            x_scale_ptr,
            x_sum_ptr,
            scale_ptr,
            zero_ptr,
            bias_ptr,
            y_ptr,
            e,
            m,
            n,
            M,
            N,
            GROUP,
            ACT_GROUP,
        )
    else:
        stride = tl.num_programs(2).to(tl.int64) * M * N
        part_ptrs = part_ptr + (e * M + m)[None, :] * N + n[:, None]
        mask = (n < N)[:, None] & mask_m
        tl.store(part_ptrs + k_slice * stride, y, mask=mask)
        if arrive(counter_ptr + e * tl.num_programs(0) + tl.program_id(0), SPLIT_K):
            y = add_parts(part_ptrs, stride, mask, SPLIT_K)
            finish(
                y,
                x_scale_ptr,
                x_sum_ptr,
                scale_ptr,
                zero_ptr,
                bias_ptr,
                y_ptr,
                e,
                m,
                n,
                M,
                N,
                GROUP,
                ACT_GROUP,
            )


@triton.jit
def _load_group(scale_ptr, zero_ptr, group_row, g, n_groups):
    """What rows have for groups g: scales, 0 beyond K, and zero points, if any."""
    scale = tl.load(scale_ptr + group_row + g, mask=g < n_groups, other=0.0)
    # not read where there is none; a loop cannot carry None
    zero = scale
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + group_row + g, mask=g < n_groups, other=0.0)
    return scale, zero


_launch_decode = Launcher(_decode_kernel)


def act_quant_decode(
    x: Tensor,
    x_scale: Tensor,
    x_sum: Tensor | None,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    act_group_size: int,
    plan: ActQuantDecodePlan,
) -> None:
    """y [E, M, N] from what quantize_activation gave and contiguous W [E, N, *].

    act_group_size: as x was quantised; -1 is per token. x_sum: None without zero_point, else made
    with sum_group_size=group_size. bias [N] may be None. y is contiguous: bf16, fp16 or fp32.
    """
    e, m, n = y.shape
    n_groups = scale.shape[-1]
    group = 0 if n_groups == 1 else group_size
    act_group = max(act_group_size, 0)
    cell, span = cell_and_span(group, act_group)
    # every warp has a span of its own
    span = min(span, plan.block_k // plan.num_warps)
    assert m <= plan.block_m, "decode takes one tile of tokens"
    assert span >= 32, "a matrix instruction takes 32 k"
    tiles = -(-n // plan.block_n)
    parts = counters = None
    if plan.split_k > 1:
        parts = torch.empty(plan.split_k, e, m, n, device=x.device, dtype=torch.float32)
        counters = torch.zeros(e * tiles, device=x.device, dtype=torch.int32)
    _launch_decode(
        (tiles, plan.split_k, e),
        x,
        x_scale,
        x_sum,
        qdata.view(torch.uint8),
        scale,
        zero_point,
        bias,
        y,
        parts,
        counters,
        m,
        n,
        x.shape[-1] // 2,
        n_groups,
        x_scale.shape[-2],
        x_scale.stride(-2),
        GROUP=group,
        ACT_GROUP=act_group,
        CELL=min(cell, span),
        SPAN=span,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        SPLIT_K=plan.split_k,
        EVEN_K=x.shape[-1] % plan.block_k == 0,
        KWIDTH=plan.kwidth,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        # Triton 3.10 stops fusing by default; it would double the instructions of a scaled sum
        enable_fp_fusion=True,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
