"""Y[E, M, N] = X[E, M, K] @ dequant(W)[E, N, K].T with W in the COALESCED format, for M > 16.

Weights are the row operand of the matrix unit and tokens its columns, so that the dequantised
weights go from registers to the unit (wgmma's register operand, or mma.sync) and are never stored:

              BLOCK_M tokens
            +----------------+
    BLOCK_N |   acc [BN, BM] |   += (q - zero) * scale [BN, 128] . x [BM, 128].T     a step
    rows    |      fp32      |
            +----------------+

Words and x are copied to shared memory STAGES - 1 steps ahead, x by the tensor memory accelerator
where X_TMA says so, which takes no registers; scales wait in registers, one step ahead. A scale
goes to the weights before the dot; or, where groups are whole steps and tokens few (SCALE_AFTER),
to the sum after it, which takes fewer instructions. A step waits for its own products (settle.py).
K is cut into SPLIT_K slices where tiles alone would leave the card idle; partial sums are added in
the order of the slices (ordered_sum.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from w4tensor.kernels.groups import groups_of
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.ordered_sum import add_parts, arrive
from w4tensor.kernels.settle import settle
from w4tensor.kernels.unpack import (
    CODE_UNIT,
    FP16_LIFT,
    join8,
    permute_x,
    unpack,
    unpack_scaled,
    use_asm,
)

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch import GemmPlan


@triton.jit
def _tile(pid, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_N: tl.constexpr):
    """Tile of a program: GROUP_N tiles of rows share each tile of tokens while it is in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    first = pid // (GROUP_N * tiles_m) * GROUP_N
    width = tl.minimum(tiles_n - first, GROUP_N)
    within = pid % (GROUP_N * tiles_m)
    return first + within % width, within // width


@triton.jit
def _row(f, WARPS: tl.constexpr):
    """Row of the f-th of [(BN / (16 WARPS), 2, WARPS, 8)]: the rows of a thread, eight apart."""
    return f // (16 * WARPS) * (16 * WARPS) + f // 8 % WARPS * 16 + f // (8 * WARPS) % 2 * 8 + f % 8


@triton.jit
def _to_words(values, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Values [(PARTS / VECTOR, rows, t), VECTOR] -> fp32 for p = 0 and p = 1, each [BN, 16]."""
    VECTOR: tl.constexpr = values.shape[1]
    v = values.to(tl.float32).reshape(PARTS // VECTOR, BLOCK_N, 4, VECTOR).trans(1, 2, 0, 3)
    if PARTS == 8:
        v0, v1 = v.reshape(BLOCK_N, 4, 4, 2).split()
    else:
        v0 = v.reshape(BLOCK_N, 4, PARTS, 1)
        v0 = tl.broadcast_to(v0, (BLOCK_N, 4, PARTS, 4 // PARTS))
        v1 = v0
    return v0.reshape(BLOCK_N, 16), v1.reshape(BLOCK_N, 16)


@triton.jit
def _weights(z, WARPS: tl.constexpr, KWIDTH: tl.constexpr):
    """[(r, 2, WARPS, 8), 16, p, q', r] -> operand [BN, 128]."""
    BN: tl.constexpr = z.shape[0]
    z = z.reshape(BN // (16 * WARPS), 2, WARPS, 8, 4, 4, 2, 2, 2)
    if KWIDTH == 2:
        z = z.trans(0, 2, 1, 3, 5, 6, 7, 4, 8)
    else:
        z = z.trans(0, 2, 1, 3, 5, 6, 4, 7, 8)
    return z.reshape(BN, 128)


@triton.jit
def _scale_at(
    row,
    vector,
    block,
    n_vectors,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Offsets [.., VECTOR] of a block's scales; a block past the end has those of the last one."""
    if GROUP == 0:
        first = 0
    elif GROUP > 128:
        first = block // (GROUP // 128)
    else:
        first = block * (PARTS // VECTOR)
    at = row + tl.minimum(first + vector, n_vectors - 1)
    return at[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _gemm_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    part_ptr,
    counter_ptr,
    M,
    N,
    K,
    n_vectors,
    stride_xe,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_TMA: tl.constexpr,
    KWIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype if X_TMA else x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    k_slice = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    pid_n, pid_m = _tile(pid, N, M, BLOCK_N, BLOCK_M, GROUP_N)
    n_blocks = tl.cdiv(K, 128)
    begin = n_blocks * k_slice // SPLIT_K
    end = n_blocks * (k_slice + 1) // SPLIT_K

    # words [(BN / (16 WARPS), 2, WARPS, 8), 16]; rows past the end read the last one
    row = tl.minimum(pid_n * BLOCK_N + _row(tl.arange(0, BLOCK_N), WARPS), N - 1)
    w_ptrs = w_ptr + (e * N + row)[:, None] * (n_blocks * 16) + tl.arange(0, 16)[None, :]

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(m, M - 1).to(tl.int64)
    k = tl.arange(0, 128)
    if not X_TMA:
        x_ptrs = x_ptr + e * stride_xe + token[:, None] * stride_xm + k[None, :]

    # scales [(PARTS / VECTOR, BN / (16 WARPS), 2, WARPS, 8, t), VECTOR]
    f = tl.arange(0, PARTS // VECTOR * BLOCK_N * 4)
    row = tl.minimum(pid_n * BLOCK_N + _row(f // 4 % BLOCK_N, WARPS), N - 1)
    s_row = (e * N + row) * n_vectors
    s_vector = f // (4 * BLOCK_N)
    at = _scale_at(s_row, s_vector, begin, n_vectors, GROUP, PARTS, VECTOR)
    scale = tl.load(scale_ptr + at)
    # not read where there is none; a loop cannot carry None
    zero = scale
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + at)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        words = tl.load(w_ptrs + block * 16)
        if X_TMA:
            # rows past the end are those of the next e, or zeros; k past the end gives zeros
            x = x_ptr.load([(e * M).to(tl.int32) + pid_m * BLOCK_M, block * 128])
        elif EVEN_K:
            x = tl.load(x_ptrs + block * 128)
        else:
            x = tl.load(x_ptrs + block * 128, mask=(block * 128 + k < K)[None, :], other=0.0)
        xt = permute_x(x, KWIDTH).T
        at = _scale_at(s_row, s_vector, block + 1, n_vectors, GROUP, PARTS, VECTOR)
        next_scale = tl.load(scale_ptr + at)
        next_zero = next_scale
        if zero_ptr is not None:
            next_zero = tl.load(zero_ptr + at)
        if SCALE_AFTER:
            e0, e1, e2, e3, e4, e5, e6, e7 = unpack(words, DTYPE, ASM)
            z = _weights(join8(e0, e1, e2, e3, e4, e5, e6, e7), WARPS, KWIDTH)
            # as the matrix unit leaves it: [.., WARPS, 2, 8 lanes, BM / 8, 4 lanes, 2]
            d = tl.dot(z, xt).reshape(BLOCK_N // (16 * WARPS), WARPS, 2, 8, BLOCK_M // 8, 4, 2)
            s = scale.to(tl.float32).reshape(BLOCK_N // (16 * WARPS), 2, WARPS, 8, 4)
            d *= s.trans(0, 2, 1, 3, 4)[:, :, :, :, None, :, None]
            acc += d.reshape(BLOCK_N, BLOCK_M)
        else:
            scale0, scale1 = _to_words(scale, BLOCK_N, PARTS)
            if zero_ptr is not None:
                zero0, zero1 = _to_words(zero, BLOCK_N, PARTS)
            else:
                zero0 = None
                zero1 = None
            e0, e1, e2, e3, e4, e5, e6, e7 = unpack_scaled(
                words, scale0, scale1, zero0, zero1, DTYPE, ASM
            )
            z = _weights(join8(e0, e1, e2, e3, e4, e5, e6, e7), WARPS, KWIDTH)
            acc = settle(tl.dot(z, xt, acc), ASM)
        scale = next_scale
        zero = next_zero

    if SCALE_AFTER:
        acc /= CODE_UNIT
    elif DTYPE == tl.float16:
        acc /= FP16_LIFT
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = (e * M + m)[None, :] * N + n[:, None]
    if SPLIT_K == 1:
        _finish(acc, bias_ptr, y_ptr + at, n, N, mask)
    else:
        stride = tl.num_programs(2).to(tl.int64) * M * N
        tl.store(part_ptr + k_slice * stride + at, acc, mask=mask)
        if arrive(counter_ptr + e * tl.num_programs(0) + pid, SPLIT_K):
            acc = add_parts(part_ptr + at, stride, mask, SPLIT_K)
            _finish(acc, bias_ptr, y_ptr + at, n, N, mask)


@triton.jit
def _finish(acc, bias_ptr, y_ptrs, n, N, mask):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptrs, acc.to(y_ptrs.dtype.element_ty), mask=mask)


_launch_gemm = Launcher(_gemm_kernel)


def gemm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: GemmPlan,
) -> None:
    """y [E, M, N] from x [E, M, K] (bf16 or fp16, K contiguous) and contiguous W [E, N, *].

    zero_point and bias [N] may be None. y is contiguous and may be bf16, fp16 or fp32.
    """
    e, m, k = x.shape
    n, n_groups = scale.shape[-2:]
    tiles = -(-n // plan.block_n) * -(-m // plan.block_m)
    parts = counters = None
    if plan.split_k > 1:
        parts = torch.empty(plan.split_k, e, m, n, device=x.device, dtype=torch.float32)
        counters = torch.zeros(e * tiles, device=x.device, dtype=torch.int32)
    group = 0 if n_groups == 1 else group_size
    in_block = 128 // group if 0 < group < 128 else 1
    vector = groups_of(scale, zero_point, group_size, blocks=1).vector
    x_tma = plan.x_tma and _tma_reads(x)
    x_arg = TensorDescriptor(x, (e * m, k), x.stride()[1:], [plan.block_m, 128]) if x_tma else x
    _launch_gemm(
        (tiles, plan.split_k, e),
        x_arg,
        qdata.view(torch.int32),
        scale,
        zero_point,
        bias,
        y,
        parts,
        counters,
        m,
        n,
        k,
        n_groups // vector,
        x.stride(0),
        x.stride(1),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        GROUP_N=plan.group_n,
        SPLIT_K=plan.split_k,
        GROUP=group,
        PARTS=in_block,
        VECTOR=vector,
        SCALE_AFTER=plan.scale_after and in_block == 1 and zero_point is None,
        EVEN_K=k % 128 == 0,
        X_TMA=x_tma,
        KWIDTH=plan.kwidth,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        **({"maxnreg": plan.maxnreg} if plan.maxnreg else {}),
    )


def _tma_reads(x: Tensor) -> bool:
    """Whether x [E, M, K] is one matrix [E M, K] with 16-byte aligned rows."""
    e, m, _ = x.shape
    one = e == 1 or x.stride(0) == m * x.stride(1)
    return one and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
