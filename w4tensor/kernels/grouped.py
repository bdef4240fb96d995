"""Many tokens: rows sorted by expert, each tile of them times its expert's weights.

    y[row'] = f(W[expert(row)] @ x[row''] + bias[expert(row)])        for the rows of each tile

                  BLOCK_M rows of one expert
                +----------------+
    BLOCK_N     |   acc [BN, BM] |   += unpack(words [BN, 16]) [BN, 128] . x [BM, 128].T     a step
    rows of W   |      fp32      |
                +----------------+

    first    row'' = order[row] // X_DIV (gather), row' = row, f = act(gate) * up
    second   row'' = row, row' = order[row] (scatter to pairs), summed over slots by combine.py
    plain    row'' = row' = row: torch._grouped_mm

With a gate, each 16 rows of a tile are 8 gate rows and the up rows of the same 8 outputs, which
puts the two sums of an output into one thread. Scales go from memory into the registers of the
lanes that use them, one step ahead. W may be in either format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.act_quant_words import unpackable
from w4tensor.kernels.gate import activate, gated
from w4tensor.kernels.groups import groups_of
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.settle import settle
from w4tensor.kernels.unpack import (
    CODE_UNIT,
    SYMMETRIC_ZERO_POINT,
    join8,
    permute_x,
    unpack,
    unpack_operand,
    use_asm,
)

if TYPE_CHECKING:
    from w4tensor.plans_experts import GroupedPlan

BLOCK_K = tl.constexpr(128)
# keeps products of small scales and codes among the normal numbers of fp16
FP16_LIFT = tl.constexpr(64.0)


@triton.jit
def tile_rows(pid_n, i, N, BLOCK_N: tl.constexpr, GATE: tl.constexpr):
    """Row of W for row i of a tile, kept inside N; with a gate, 8 gate and 8 up rows in turn."""
    if GATE == "none":
        return tl.minimum(pid_n * BLOCK_N + i, N - 1)
    else:
        n = tl.minimum(pid_n * (BLOCK_N // 2) + i // 16 * 8 + i % 8, N // 2 - 1)
        half = i // 8 % 2
        if GATE == "halves":
            return n + half * (N // 2)
        else:
            return 2 * n + half


@triton.jit
def lane_rows(WARPS: tl.constexpr, TILES: tl.constexpr):
    """Row of a tile for the lanes that hold it: [4 with the same row, 8, WARPS, 2, TILES, 1]."""
    row = tl.arange(0, 8)[None, :, None, None, None, None]
    row += tl.arange(0, 2)[None, None, None, :, None, None] * 8
    row += tl.arange(0, WARPS)[None, None, :, None, None, None] * 16
    row += tl.arange(0, TILES)[None, None, None, None, :, None] * (16 * WARPS)
    return row + tl.zeros((4, 1, 1, 1, 1, 1), tl.int32)


@triton.jit
def _spread(values, KWIDTH: tl.constexpr):
    """[4 t, 8 lanes, WARPS, 2, TILES, PARTS], equal over t -> [BLOCK_N, BLOCK_K], k as in z."""
    WARPS: tl.constexpr = values.shape[2]
    TILES: tl.constexpr = values.shape[4]
    PARTS: tl.constexpr = values.shape[5]
    v = values.trans(4, 2, 3, 1, 5, 0)
    if KWIDTH == 2:
        # k = ((i, p), q', t, r)
        v = v[:, :, :, :, :, None, None, :, None]
        v = tl.broadcast_to(v, (TILES, WARPS, 2, 8, PARTS, 8 // PARTS, 2, 4, 2))
    else:
        # k = ((i, p), t, (q', r))
        v = v[:, :, :, :, :, None, :, None]
        v = tl.broadcast_to(v, (TILES, WARPS, 2, 8, PARTS, 8 // PARTS, 4, 4))
    return v.reshape(TILES * WARPS * 16, BLOCK_K)


@triton.jit
def beside(values, acc):
    """[4 t, 8, WARPS, 2, TILES, 1] times acc [BLOCK_N, BLOCK_M], whose columns are (.., t, 2)."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    v = values.trans(4, 2, 3, 1, 5, 0).reshape(BLOCK_N, 1, 4, 1)
    return (acc.reshape(BLOCK_N, BLOCK_M // 8, 4, 2) * v).reshape(BLOCK_N, BLOCK_M)


@triton.jit
def _operands(words, x, ACT_QUANT: tl.constexpr, KWIDTH: tl.constexpr, ASM: tl.constexpr):
    """Words [BLOCK_N, 16] and x [BLOCK_M, BLOCK_K] -> weights [BLOCK_N, BLOCK_K] and x.T."""
    if ACT_QUANT:
        BLOCK_N: tl.constexpr = words.shape[0]
        e0, e1, e2, e3, e4, e5, e6, e7 = unpack(unpackable(words, ASM), x.dtype, ASM)
        # [BLOCK_N, slice, t, p, q', r] -> k = 32 slice + 16q' + 4t + 2p + r, as it is in x
        z = join8(e0, e1, e2, e3, e4, e5, e6, e7).reshape(BLOCK_N, 4, 4, 2, 2, 2)
        return z.trans(0, 1, 4, 2, 3, 5).reshape(BLOCK_N, BLOCK_K), x.T
    else:
        return unpack_operand(words, KWIDTH, x.dtype, ASM), permute_x(x, KWIDTH).T


@triton.jit
def _multiply(
    acc,
    words,
    x,
    scale,
    zero,
    ACT_QUANT: tl.constexpr,
    KWIDTH: tl.constexpr,
    AFTER: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc plus one block of k; before the dot, weights are lifted by FP16_LIFT in fp16."""
    dtype: tl.constexpr = x.dtype
    BLOCK_N: tl.constexpr = words.shape[0]
    z, xt = _operands(words, x, ACT_QUANT, KWIDTH, ASM)
    if AFTER:
        acc += beside(scale / CODE_UNIT, tl.dot(z, xt))
        if zero is not None:
            # a product with ones leaves sum(x) where acc stands; joined as z is, they share x
            half = tl.full((BLOCK_N, BLOCK_K // 2), 1.0, dtype)
            ones = tl.join(half, half).reshape(BLOCK_N, BLOCK_K)
            acc -= beside((zero - SYMMETRIC_ZERO_POINT) * scale, tl.dot(ones, xt))
        return acc
    else:
        factor = scale / CODE_UNIT
        if dtype == tl.float16:
            factor *= FP16_LIFT
        if zero is None:
            w = z * _spread(factor.to(dtype), KWIDTH)
        else:
            # whole zero points leave codes exact; what is left of them is small
            whole = tl.floor(zero + 0.5)
            z -= _spread(((whole - SYMMETRIC_ZERO_POINT) * CODE_UNIT).to(dtype), KWIDTH)
            rest = ((whole - zero) * CODE_UNIT * factor).to(dtype)
            w = tl.fma(z, _spread(factor.to(dtype), KWIDTH), _spread(rest, KWIDTH))
        return settle(tl.dot(w, xt, acc), ASM)


@triton.jit
def store_tile(
    acc,
    y_ptr,
    order_ptr,
    pid_n,
    row,
    in_tile,
    N,
    SCATTER: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
):
    """f(acc [BLOCK_N, BLOCK_M]) -> the rows of y."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if GATE == "none":
        OUT: tl.constexpr = BLOCK_N
        y = activate(acc, ACT)
        n_out = N
    else:
        OUT: tl.constexpr = BLOCK_N // 2
        gate, up = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).trans(0, 2, 3, 1).split()
        y = gated(gate, up, ACT).reshape(OUT, BLOCK_M)
        n_out = N // 2
    n = pid_n * OUT + tl.arange(0, OUT)
    y_row = row
    if SCATTER:
        y_row = tl.load(order_ptr + row, mask=in_tile, other=0)
    y_ptrs = y_ptr + y_row.to(tl.int64)[None, :] * n_out + n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_tile[None, :] & (n < n_out)[:, None])


@triton.jit
def _tile(
    x_ptr,
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
    K,
    E,
    n_groups,
    stride_x,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X_DIV: tl.constexpr,
    SCATTER: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS_A_GROUP: tl.constexpr,
    ACT_QUANT: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    KWIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    TILES: tl.constexpr = BLOCK_N // (16 * WARPS)
    pid_n = tl.program_id(0)
    row = first + tl.arange(0, BLOCK_M)
    in_tile = row < end
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # rows behind the last expert are zero
    if expert < E:
        i = tl.arange(0, BLOCK_N)
        w_ptrs = w_ptr + expert * stride_we
        w_ptrs += tile_rows(pid_n, i, N, BLOCK_N, GATE).to(tl.int64)[:, None] * stride_wn
        w_ptrs += tl.arange(0, 16)[None, :]
        k = tl.arange(0, BLOCK_K)
        x_row = row
        if X_DIV > 0:
            x_row = tl.load(order_ptr + row, mask=in_tile, other=0) // X_DIV
        x_ptrs = x_ptr + x_row.to(tl.int64)[:, None] * stride_x + k[None, :]

        # [4 lanes with the same row, 8, WARPS, 2, TILES, PARTS]: the rows of the operand's lanes
        s_row = lane_rows(WARPS, TILES)
        s_at = expert * stride_se + tile_rows(pid_n, s_row, N, BLOCK_N, GATE) * stride_sn
        part = tl.arange(0, PARTS)[None, None, None, None, None, :]

        at = s_at + tl.minimum(part, n_groups - 1)
        scale = tl.load(scale_ptr + at)
        zero = None if zero_ptr is None else tl.load(zero_ptr + at)
        for block in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
            words = tl.load(w_ptrs + block * 16)
            mask = in_tile[:, None]
            if not EVEN_K:
                mask = mask & (k + block * BLOCK_K < K)[None, :]
            x = tl.load(x_ptrs + block * BLOCK_K, mask=mask, other=0.0)
            now = scale.to(tl.float32)
            now_zero = None if zero_ptr is None else zero.to(tl.float32)
            group = (block + 1) * PARTS // BLOCKS_A_GROUP + part
            at = s_at + tl.minimum(group, n_groups - 1)
            scale = tl.load(scale_ptr + at)
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + at)
            acc = _multiply(acc, words, x, now, now_zero, ACT_QUANT, KWIDTH, AFTER, ASM)
        if (not AFTER) and dtype == tl.float16:
            acc *= 1 / FP16_LIFT
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * N + tile_rows(pid_n, i, N, BLOCK_N, GATE))
            acc += bias.to(tl.float32)[:, None]
    store_tile(acc, y_ptr, order_ptr, pid_n, row, in_tile, N, SCATTER, GATE, ACT)


@triton.jit
def _grouped_kernel(
    x_ptr,
    order_ptr,
    tiles_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    E,
    n_groups,
    stride_x,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    BLOCK_M: tl.constexpr,
    NARROW_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X_DIV: tl.constexpr,
    SCATTER: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS_A_GROUP: tl.constexpr,
    ACT_QUANT: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
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
                K,
                E,
                n_groups,
                stride_x,
                stride_we,
                stride_wn,
                stride_se,
                stride_sn,
                NARROW_M if size == 1 else BLOCK_M,
                BLOCK_N,
                X_DIV,
                SCATTER,
                PARTS,
                BLOCKS_A_GROUP,
                ACT_QUANT,
                GATE,
                ACT,
                AFTER,
                EVEN_K,
                KWIDTH,
                WARPS,
                STAGES,
                ASM,
            )


_launch_grouped = Launcher(_grouped_kernel)


def multiply_grouped(
    x: Tensor,
    order: Tensor | None,
    tiles: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: GroupedPlan,
    *,
    x_div: int = 0,
    scatter: bool = False,
    gate: str = "none",
    act: str = "none",
) -> Tensor:
    """Fill the rows of y [rows, N], or [rows, N / 2] with a gate, that `tiles` lists.

    Args:
        order, tiles: as routing.py makes them, for plan.block_m; order may be None where neither
            x_div nor scatter needs it.
        x_div: row r reads x[order[r] // x_div]; 0: x[r].
        scatter: row r is written to y[order[r]] instead of y[r].
        qdata: COALESCED or ACT_QUANT [E, N, *]; bias: [E, N].
        gate, act: as multiply_pairs and kernels/gate.py name them.
    """
    n_experts, n = qdata.shape[:2]
    k = x.shape[1]
    if tiles.shape[0] == 0:
        return y
    words = qdata.view(torch.int32)
    groups = groups_of(scale, zero_point, group_size, 1)
    _launch_grouped(
        (-(-n // plan.block_n), tiles.shape[0]),
        x,
        order,
        tiles,
        words,
        scale,
        zero_point,
        bias,
        y,
        n,
        k,
        n_experts,
        scale.shape[-1],
        x.stride(0),
        words.stride(0),
        words.stride(1),
        scale.stride(0),
        scale.stride(1),
        BLOCK_M=plan.block_m,
        NARROW_M=plan.narrow_m,
        BLOCK_N=plan.block_n,
        X_DIV=x_div,
        SCATTER=scatter,
        PARTS=groups.parts,
        BLOCKS_A_GROUP=groups.blocks_a_group,
        ACT_QUANT=qdata.dtype == torch.int64,
        GATE=gate,
        ACT=act,
        AFTER=plan.scale_after and groups.parts == 1,
        EVEN_K=k % 128 == 0,
        KWIDTH=plan.kwidth,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y
