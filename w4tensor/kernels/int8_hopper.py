"""Y[M, N] = X[M, K] @ W[N, K].T on Hopper with int8 activations: hopper_int8_loop.py by tiles.

    y[m, n] = sum over cells of  x_scale[m, a] * scale[n, g] * sum_k x[m, k] (q[n, k] - z[n, g])

Tiles, slices of K and the ordered sums of slices are those of hopper_slices.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.hopper_int8_loop import accumulate_int8, layout_of_int8_sums
from w4tensor.kernels.hopper_memory import barrier, descriptor, reinterpret, store
from w4tensor.kernels.hopper_slices import (
    add_parts,
    await_parts,
    memory_of_sums,
    slice_at,
    store_part,
    tile_at,
    token_of_launch,
)
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT
from w4tensor.kernels.unpack_act_quant import UNIT

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_int8 import Int8Plan


@gluon.jit(do_not_specialize=["token", "M", "steps", "whole", "split_k"])
def _int8_hopper_kernel(
    x_desc,
    x_scale_desc,
    x_sum_desc,
    w_desc,
    y_desc,
    y_ptr,
    # of all of K; the descriptors are None where these are of use
    x_scale_ptr,
    x_sum_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    part_ptr,
    flag_ptr,
    token,
    M,
    N,
    steps,
    n_groups,
    # tiles that are not cut: the first ones
    whole,
    split_k,
    GROUP_N: gl.constexpr,
    # 0 where the row is one group, and where the token is
    GROUP: gl.constexpr,
    ACT_GROUP: gl.constexpr,
    CELL: gl.constexpr,
    # whether K is a multiple of a step
    WHOLE_STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    RUNS: gl.constexpr,
):
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    RUN: gl.constexpr = BLOCK_M // RUNS
    ACC: gl.constexpr = layout_of_int8_sums(WARPS, RUN)
    tile = gl.program_id(0)
    slices = 1
    k_slice = 0
    if part_ptr is not None:
        tile, k_slice, slices = slice_at(tile, whole, split_k)
    n0, m0 = tile_at(tile, gl.cdiv(N, BLOCK_N), gl.cdiv(M, BLOCK_M), GROUP_N)
    n0 *= BLOCK_N
    m0 *= BLOCK_M
    n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
    acc, xs = accumulate_int8(
        x_desc,
        x_scale_desc,
        x_sum_desc,
        None,
        None,
        0,
        None,
        0,
        m0,
        w_desc,
        n0,
        n0,
        gl.minimum(n, N - 1),
        scale_ptr,
        zero_ptr,
        n_groups,
        steps * k_slice // slices,
        steps * (k_slice + 1) // slices,
        steps,
        BLOCK_N,
        GROUP,
        ACT_GROUP,
        CELL,
        WHOLE_STEPS,
        "none",
        WARPS,
        STAGES,
        PDL,
        RUNS,
    )
    TILE: gl.constexpr = BLOCK_N * BLOCK_M
    if part_ptr is not None:
        others = slices - 1
        first = (tile - whole) * others
        parts = part_ptr + first.to(gl.int64) * TILE
        if k_slice < others:
            for run in gl.static_range(RUNS):
                store_part(parts + (k_slice * TILE + run * RUN * BLOCK_N), acc[run])
            barrier()
            gl.atomic_xchg(flag_ptr + first + k_slice, token, sem="release")
            return
        await_parts(flag_ptr + first, others, token)
    if y_desc is not None:
        # the memory of x, which is not needed any more
        TILES: gl.constexpr = xs.shape[0] * 64 // BLOCK_N
        ys = reinterpret(xs, y_desc.dtype, [TILES, BLOCK_M, BLOCK_N], y_desc.layout).index(0)
        barrier()
    for run in gl.static_range(RUNS):
        m = m0 + run * RUN + gl.arange(0, RUN, gl.SliceLayout(0, ACC))
        y = acc[run]
        if part_ptr is not None:
            y = add_parts(y, parts + run * RUN * BLOCK_N, others, TILE)
        y *= 1.0 / UNIT
        if zero_ptr is not None and GROUP == 0:
            zero = gl.load(zero_ptr + n, mask=n < N, other=0.0).to(gl.float32)
            scale = gl.load(scale_ptr + n, mask=n < N, other=0.0).to(gl.float32)
            x_sum = gl.load(x_sum_ptr + m, mask=m < M, other=0.0)
            y -= ((zero - SYMMETRIC_ZERO_POINT) * scale).expand_dims(1) * x_sum.expand_dims(0)
        if ACT_GROUP == 0:
            y *= gl.load(x_scale_ptr + m, mask=m < M, other=0.0).expand_dims(0)
        if bias_ptr is not None:
            y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32).expand_dims(1)
        if y_desc is not None:
            ys.slice(run * RUN, RUN, 0).permute((1, 0)).store(y.to(y_desc.dtype))
        else:
            mask = (n < N).expand_dims(1) & (m < M).expand_dims(0)
            at = m.to(gl.int64).expand_dims(0) * N + n.expand_dims(1)
            gl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if y_desc is not None:
        fence_async_shared()
        barrier()
        store(y_desc, [m0, n0], ys)
        tma.store_wait(0)


_launch_gemm = Launcher(_int8_hopper_kernel, anew={"token": token_of_launch})
_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def int8_hopper(
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
    plan: Int8Plan,
) -> None:
    """y [1, M, N] from what quantize_activation gave and contiguous W [1, N, *].

    act_group_size: as x was quantised; -1 is per token. x_sum: None without zero_point, else made
    with sum_group_size=group_size. bias [N] may be None. y is contiguous: bf16, fp16 or fp32.
    """
    _, m, n = y.shape
    k_padded = x.shape[-1]
    step = plan.block_k
    steps = -(-k_padded // step)
    n_groups = scale.shape[-1]
    group = 0 if n_groups == 1 else group_size
    act_group = max(act_group_size, 0)
    cell, _ = cell_and_span(group, act_group)
    tiles = -(-n // plan.block_n) * -(-m // plan.block_m)
    split_k = min(plan.split_k, steps)
    cut = tiles - plan.whole
    # slices whose sums are stored
    stored = cut * (split_k - 1)
    parts, flags = memory_of_sums(stored, plan.block_m * plan.block_n, x.device)
    y_desc = x_scale_desc = x_sum_desc = None
    # the memory that x had is that of so many tiles
    fits = plan.num_stages * step // 2 % plan.block_n == 0
    if y.dtype in _GLUON and n % 8 == 0 and y.data_ptr() % 16 == 0 and fits:
        y_desc = descriptor(y, (m, n), n, (plan.block_m, plan.block_n), _GLUON[y.dtype])

    def of_tokens(t: Tensor, size: int) -> TensorDescriptor:
        """Of fp32 [1, groups, M], padded along M: what a step's groups of `size` k have."""
        # a box begins at a multiple of 128 bytes
        block = (max(1, step // size, 32 // plan.block_m), plan.block_m)
        return descriptor(t, (t.shape[-2], m), t.stride(-2), block, gl.float32)

    if act_group:
        x_scale_desc = of_tokens(x_scale, act_group)
    if x_sum is not None and group:
        x_sum_desc = of_tokens(x_sum, group)
    words = qdata.view(torch.uint8)
    _launch_gemm(
        (plan.whole + cut * split_k,),
        descriptor(x, (m, k_padded), k_padded, (plan.block_m, 128), gl.int8),
        x_scale_desc,
        x_sum_desc,
        descriptor(words, (n, k_padded // 2), k_padded // 2, (plan.block_n, step // 2), gl.uint8),
        y_desc,
        y,
        x_scale if x_scale_desc is None else None,
        x_sum if x_sum_desc is None else None,
        scale,
        zero_point,
        bias,
        parts,
        flags,
        token_of_launch(),
        m,
        n,
        steps,
        n_groups,
        plan.whole,
        split_k,
        GROUP_N=plan.group_n,
        GROUP=group,
        ACT_GROUP=act_group,
        CELL=cell,
        WHOLE_STEPS=n_groups * group_size % step == 0,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        RUNS=plan.runs,
        num_warps=plan.num_warps,
        **({"maxnreg": plan.max_registers} if plan.max_registers else {}),
        **({"launch_pdl": True} if plan.pdl else {}),
    )
