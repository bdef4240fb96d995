"""Y[E, M, N] = X[E, M, K] @ W[E, N, K].T for M > 16: int8 activations, the int8 matrix unit.

    y[m, n] = sum over cells of  x_scale[m, a] * scale[n, g] * sum_k x[m, k] (q[n, k] - z[n, g])

          BLOCK_M            a cell is as much of K as has one scale on either side (32 to 128),
        +---------+          a span as has one on one side. Cells are summed in int32 by the
        |   X.T   | BLOCK_K  matrix unit, scaled into the sum of their span, and that into the
        +---------+          fp32 tile
    W   | BLOCK_N |
        +---------+          weights are the row operand: unpacked in registers, never stored

Where a row of W has one scale and a token one, all of K is one int32 sum. K may be split over
programs, whose parts are added in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from w4tensor.kernels.act_quant_tile import MAX_CHAINED_K, cell_and_span, finish
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.ordered_sum import add_parts, arrive
from w4tensor.kernels.settle import settle
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT, use_asm
from w4tensor.kernels.unpack_act_quant import UNIT, join_halves, permute_codes, unpack_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_act_quant import ActQuantGemmPlan

# tiles of tokens that run one after another before the next tile of rows: they share its weights
TOKEN_TILES = 32


# one binary for every M: a batch size is no reason to compile
@triton.jit(do_not_specialize=["M", "n_groups", "n_act_groups"])
def _gemm_kernel(
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
    CHAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_TMA: tl.constexpr,
    KWIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    # cells of a span, and weight groups of a step
    CELLS: tl.constexpr = SPAN // CELL
    GROUP_K: tl.constexpr = GROUP if GROUP > 0 and GROUP < BLOCK_K else BLOCK_K
    pid = tl.program_id(0)
    k_slice = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    tile_n, tile_m = _tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), TOKEN_TILES)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows and tokens past the end read the last one; only the store is masked
    row = e * N + tl.minimum(n, N - 1)
    group_row = row * n_groups
    w_ptrs = w_ptr + row[:, None] * n_bytes
    if not X_TMA:
        x_ptrs = x_ptr + (e * M + tl.minimum(m, M - 1))[:, None] * (n_bytes * 2)
    x_scale_ptr += e * n_act_groups * stride_x_scale
    if zero_ptr is not None:
        x_sum_ptr += e * n_groups * stride_x_scale

    per_slice = tl.cdiv(tl.cdiv(n_bytes * 2, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = k_slice * per_slice
    end = tl.minimum(begin + per_slice, n_bytes * 2)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if CHAIN else tl.float32)
    scales = ()
    zeros = ()
    if GROUP > 0:
        g = begin // GROUP
        scales = _load_groups(scale_ptr, group_row, g, n_groups, BLOCK_K // GROUP_K)
        if zero_ptr is not None:
            zeros = _load_groups(zero_ptr, group_row, g, n_groups, BLOCK_K // GROUP_K)
    for k0 in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        next_scales = ()
        next_zeros = ()
        if GROUP > 0:
            # a step ahead, as 16-bit loads cannot be pipelined through shared memory
            g = (k0 + BLOCK_K) // GROUP
            next_scales = _load_groups(scale_ptr, group_row, g, n_groups, BLOCK_K // GROUP_K)
            if zero_ptr is not None:
                next_zeros = _load_groups(zero_ptr, group_row, g, n_groups, BLOCK_K // GROUP_K)
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        if EVEN_K:
            w = tl.load(w_ptrs + byte)
        else:
            w = tl.load(w_ptrs + byte, mask=byte < n_bytes, other=0)
        part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for cell in tl.static_range(BLOCK_K // CELL):
            low, high = unpack_bytes(_piece(w, cell, BLOCK_K // CELL), ASM)
            k = k0 + cell * CELL + tl.arange(0, CELL)[None, :]
            if X_TMA:
                # rows past the end are those of the next e, or zeros; k past the end gives zeros
                first_m = (e * M).to(tl.int32) + tile_m * BLOCK_M
                x = x_ptr.load([first_m, k0 + cell * CELL])
            elif EVEN_K:
                x = tl.load(x_ptrs + k)
            else:
                x = tl.load(x_ptrs + k, mask=k < n_bytes * 2, other=0)
            x = permute_codes(x, KWIDTH).T
            if CHAIN:
                acc = tl.dot(join_halves(low, high, KWIDTH), x, acc, out_dtype=tl.int32)
                acc = settle(acc, ASM)
            else:
                if GROUP == 16:
                    # the two groups of a cell of 32 are its low and its high nibbles
                    nothing = tl.zeros_like(low)
                    d = tl.dot(join_halves(low, nothing, KWIDTH), x, out_dtype=tl.int32)
                    d = d.to(tl.float32) * scales[2 * cell][:, None]
                    high_d = tl.dot(join_halves(nothing, high, KWIDTH), x, out_dtype=tl.int32)
                    d += high_d.to(tl.float32) * scales[2 * cell + 1][:, None]
                else:
                    d = tl.dot(join_halves(low, high, KWIDTH), x, out_dtype=tl.int32)
                    d = d.to(tl.float32)
                if GROUP > 16 and GROUP < SPAN:
                    d *= scales[cell * CELL // GROUP_K][:, None]
                if ACT_GROUP > 0 and ACT_GROUP < SPAN:
                    a = (k0 + cell * CELL) // ACT_GROUP
                    a_scale = _load_tokens(
                        x_scale_ptr, a, n_act_groups, stride_x_scale, m, SCALE_ROWS
                    )
                    d *= a_scale[None, :]
                # the first cell of a span begins its sum, the last one scales it
                if cell % CELLS == 0:
                    part = d
                else:
                    part += d
                if cell % CELLS == CELLS - 1:
                    if ACT_GROUP >= SPAN:
                        a = (k0 + cell * CELL) // ACT_GROUP
                        a_scale = _load_tokens(
                            x_scale_ptr, a, n_act_groups, stride_x_scale, m, SCALE_ROWS
                        )
                        part *= a_scale[None, :]
                    if GROUP >= SPAN and GROUP > 16:
                        part *= scales[cell * CELL // GROUP_K][:, None]
                    acc += part
        if zero_ptr is not None and GROUP > 0:
            for i in tl.static_range(BLOCK_K // GROUP_K):
                first_k = k0 + i * GROUP_K
                # a group longer than a step is corrected in its first step
                first = first_k % GROUP == 0
                shift = (zeros[i] - SYMMETRIC_ZERO_POINT) * UNIT * scales[i]
                shift = tl.where(first, shift, 0.0)
                x_sum = _load_tokens(
                    x_sum_ptr, first_k // GROUP, n_groups, stride_x_scale, m, SCALE_ROWS
                )
                acc -= shift[:, None] * x_sum[None, :]
        scales = next_scales
        zeros = next_zeros

    y = acc.to(tl.float32)
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
        mask = (n < N)[:, None] & (m < M)[None, :]
        tl.store(part_ptrs + k_slice * stride, y, mask=mask)
        if arrive(counter_ptr + e * tl.num_programs(0) + pid, SPLIT_K):
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
def _tile(pid, tiles_m, tiles_n, TOKEN_TILES: tl.constexpr):
    """(tile of rows, tile of tokens): tokens fastest, in bands of TOKEN_TILES."""
    band = pid // (TOKEN_TILES * tiles_n)
    height = tl.minimum(tiles_m - band * TOKEN_TILES, TOKEN_TILES)
    within = pid % (TOKEN_TILES * tiles_n)
    return within // height, band * TOKEN_TILES + within % height


@triton.jit
def _piece(w, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """The INDEX-th of COUNT equal runs of columns of w, in registers."""
    if COUNT == 1:
        return w
    else:
        R: tl.constexpr = w.shape[0]
        C: tl.constexpr = w.shape[1]
        left, right = tl.split(w.reshape(R, 2, C // 2).trans(0, 2, 1))
        if INDEX < COUNT // 2:
            return _piece(left, INDEX, COUNT // 2)
        else:
            return _piece(right, INDEX - COUNT // 2, COUNT // 2)


@triton.jit
def _load_groups(ptr, group_row, g, n_groups, COUNT: tl.constexpr):
    """COUNT tensors [BLOCK_N] in fp32: what each row has for groups g, g + 1, ..; 0 beyond K."""
    values = ()
    for i in tl.static_range(COUNT):
        value = tl.load(ptr + group_row + g + i, mask=g + i < n_groups, other=0.0)
        values += (value.to(tl.float32),)
    return values


@triton.jit
def _load_tokens(ptr, g, n_groups, stride, m, ROWS: tl.constexpr):
    """[BLOCK_M]: what each token has for group g.

    ROWS groups are loaded, as many as give every thread an element, for the load to be pipelined
    as one; the first is used.
    """
    rows = g + tl.arange(0, ROWS)[:, None]
    # the run of a group is padded up to its stride
    mask = (rows < n_groups) & (m < stride)[None, :]
    tile = tl.load(ptr + rows * stride + m[None, :], mask=mask, other=0.0)
    return _piece(tile.T, 0, ROWS).reshape(m.shape[0])


_launch_gemm = Launcher(_gemm_kernel)


def act_quant_gemm(
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
    plan: ActQuantGemmPlan,
) -> None:
    """y [E, M, N] from what quantize_activation gave and contiguous W [E, N, *].

    act_group_size: as x was quantised; -1 is per token. x_sum: None without zero_point, else made
    with sum_group_size=group_size. bias [N] may be None. y is contiguous: bf16, fp16 or fp32.
    """
    e, m, n = y.shape
    k_padded = x.shape[-1]
    n_groups = scale.shape[-1]
    group = 0 if n_groups == 1 else group_size
    act_group = max(act_group_size, 0)
    cell, span = cell_and_span(group, act_group)
    chain = group == act_group == 0 and k_padded <= MAX_CHAINED_K
    tiles = -(-n // plan.block_n) * -(-m // plan.block_m)
    parts = counters = None
    if plan.split_k > 1:
        parts = torch.empty(plan.split_k, e, m, n, device=x.device, dtype=torch.float32)
        counters = torch.zeros(e * tiles, device=x.device, dtype=torch.int32)
    if chain:
        cell = span = plan.block_k
    x_arg = x
    if plan.x_tma:
        rows = e * m
        x_arg = TensorDescriptor(x, (rows, k_padded), (k_padded, 1), [plan.block_m, cell])
    _launch_gemm(
        (tiles, plan.split_k, e),
        x_arg,
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
        k_padded // 2,
        n_groups,
        x_scale.shape[-2],
        x_scale.stride(-2),
        GROUP=group,
        ACT_GROUP=act_group,
        CELL=cell,
        SPAN=span,
        CHAIN=chain,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        SPLIT_K=plan.split_k,
        TOKEN_TILES=TOKEN_TILES,
        SCALE_ROWS=max(1, 32 * plan.num_warps // plan.block_m),
        EVEN_K=k_padded % plan.block_k == 0,
        X_TMA=plan.x_tma,
        KWIDTH=plan.kwidth,
        STAGES=plan.num_stages,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        # Triton 3.10 stops fusing by default; it would double the instructions of a scaled sum
        enable_fp_fusion=True,
    )
