"""Y[E, M, N] = X[E, M, K] @ dequant(W)[E, N, K].T for M <= 16: every weight word is read once.

A program owns BLOCK_N rows of W and one slice of K; its WARPS warps take turns along K, each with
the whole tile to itself, so that no warp waits for another before the end:

           warp 0       warp 1      ...      warp 0       warp 1     <- 128 * BLOCKS wide each
        +------------+------------+-------+------------+---
    BN  |   step 0   |   step 0   |       |   step 1   |             acc[warp] [BN, BM] fp32
        +------------+------------+-------+------------+---

    y = sum over warps of acc[warp],   acc += scale * ((q - 8) . x - (zero - 8) * sum(x))

Words, scales and x go from memory straight into the registers in which mma.sync wants them: each
load is one dimension (two where neighbours go in one access) whose order spells lane, warp and
register, fastest first, because that is how Triton deals a one-dimensional load out. Reshapes and
transpositions then turn it into an operand without moving anything. Next to nothing but unpacking
and multiplying is left: 1.6 to 2 instructions a weight (tests/kernels/lowering).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from w4tensor.kernels.groups import groups_of
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.ordered_sum import add_parts, arrive
from w4tensor.kernels.unpack import (
    CODE_UNIT,
    SYMMETRIC_ZERO_POINT,
    join8,
    unpack,
    use_asm,
)

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch import DecodePlan


@triton.jit
def _weights(
    z,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    RUNS: tl.constexpr,
    KWIDTH: tl.constexpr,
):
    """[(H, BLOCKS, WARPS, 8), 16, p, q', r] -> operand [RUNS * WARPS, 8 H, K of a run]."""
    V: tl.constexpr = 8 * BLOCKS // RUNS
    # [H, block, warp, lane, t, i, p, q', r]: K of a warp's step is (block, i, p), then 16
    z = z.reshape(H, BLOCKS, WARPS, 8, 4, 4, 2, 2, 2).trans(1, 5, 6, 2, 0, 3, 4, 7, 8)
    z = z.reshape(RUNS, V, WARPS, H, 8, 4, 2, 2)
    if KWIDTH == 2:
        z = z.trans(0, 2, 3, 4, 1, 6, 5, 7)
    else:
        z = z.trans(0, 2, 3, 4, 1, 5, 6, 7)
    return z.reshape(RUNS * WARPS, H * 8, V * 16)


@triton.jit
def _tokens(
    pairs,
    B: tl.constexpr,
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    RUNS: tl.constexpr,
    KWIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Pairs of x, int32 [(B, BLOCKS, i, p, q', WARPS, 8, t)] -> [RUNS * WARPS, K of a run, 8 B]."""
    V: tl.constexpr = 8 * BLOCKS // RUNS
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    x = tl.join(low, high).reshape(B, RUNS, V, 2, WARPS, 8, 4, 2)
    if KWIDTH == 2:
        x = x.trans(1, 4, 2, 3, 6, 7, 0, 5)
    else:
        x = x.trans(1, 4, 2, 6, 3, 7, 0, 5)
    return x.reshape(RUNS * WARPS, V * 16, B * 8)


@triton.jit
def _by_row(values, H: tl.constexpr, WARPS: tl.constexpr):
    """Scales [(SEGMENTS / VECTOR, H, WARPS, 8, t), VECTOR] -> fp32, shaped as a product is."""
    VECTOR: tl.constexpr = values.shape[1]
    RUNS: tl.constexpr = values.shape[0] // (H * WARPS * 32)
    v = values.to(tl.float32).reshape(RUNS, H, WARPS, 8, 4, VECTOR)
    v = v.trans(0, 5, 2, 1, 3, 4).reshape(RUNS * VECTOR, WARPS, H, 8, 4)
    return v[:, :, :, :, None, :, None]


@triton.jit
def _sums_of_x(xt, B: tl.constexpr, WARPS: tl.constexpr):
    """Sums of x over each run of k, for every lane that holds the token: [RUNS, .., B, 4, 2]."""
    RUNS: tl.constexpr = xt.shape[0] // WARPS
    # a product with ones leaves the sums where the matrix unit leaves everything else
    # joined as weights are, ones are an operand of the same order, and the dots share x
    half = tl.full((xt.shape[0], 16, xt.shape[1] // 2), 1.0, xt.dtype)
    ones = tl.join(half, half).reshape(xt.shape[0], 16, xt.shape[1])
    d = tl.dot(ones, xt).reshape(RUNS, WARPS, 2, 8, B, 4, 2)
    # both halves of 16 equal rows are the same
    sums, _ = d.trans(0, 1, 3, 4, 5, 6, 2).split()
    return sums[:, :, None]


@triton.jit
def _accumulate(
    acc,
    words,
    x,
    scale,
    zero,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    KWIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc [WARPS, H, 8, B, 4, 2] plus one step of every warp."""
    WARPS: tl.constexpr = acc.shape[0]
    H: tl.constexpr = acc.shape[1]
    B: tl.constexpr = acc.shape[3]
    e0, e1, e2, e3, e4, e5, e6, e7 = unpack(words, DTYPE, ASM)
    z = _weights(join8(e0, e1, e2, e3, e4, e5, e6, e7), H, BLOCKS, WARPS, SEGMENTS, KWIDTH)
    xt = _tokens(x, B, BLOCKS, WARPS, SEGMENTS, KWIDTH, DTYPE)
    d = tl.dot(z, xt).reshape(SEGMENTS, WARPS, H, 8, B, 4, 2)
    if ASYMMETRIC:
        shift = (_by_row(zero, H, WARPS) - SYMMETRIC_ZERO_POINT) * CODE_UNIT
        d -= _sums_of_x(xt, B, WARPS) * shift
    return acc + tl.sum(d * _by_row(scale, H, WARPS), 0)


@triton.jit
def _load_x(x_ptrs, k, K, ok, MASK_K: tl.constexpr, PAIRS: tl.constexpr):
    """x at k and k + 1 as the low and high half of an int32."""
    if PAIRS:
        mask = ok & (k < K) if MASK_K else ok
        return tl.load(x_ptrs.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
    else:
        low = tl.load(x_ptrs, mask=ok & (k < K), other=0.0).to(tl.int16, bitcast=True)
        high = tl.load(x_ptrs + 1, mask=ok & (k + 1 < K), other=0.0).to(tl.int16, bitcast=True)
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _decode_kernel(
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
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    KWIDTH: tl.constexpr,
    X_AHEAD: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    H: tl.constexpr = BLOCK_N // 8
    B: tl.constexpr = BLOCK_M // 8
    STEP: tl.constexpr = WARPS * BLOCKS
    STEP_VECTORS: tl.constexpr = 0 if GROUP == 0 else STEP * 128 // GROUP // VECTOR
    k_slice = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    n0 = tl.program_id(0) * BLOCK_N
    n_blocks = tl.cdiv(K, 128)
    full = K // (128 * STEP)
    begin = full * k_slice // SPLIT_K
    end = full * (k_slice + 1) // SPLIT_K

    # words [(H, BLOCKS, WARPS, 8), 16]; rows past the end read the last one
    f = tl.arange(0, H * BLOCKS * WARPS * 8)
    row = tl.minimum(n0 + f // (8 * WARPS * BLOCKS) * 8 + f % 8, N - 1)
    w_block = f // 8 % WARPS * BLOCKS + f // (8 * WARPS) % BLOCKS
    w_ptrs = w_ptr + (e * N + row)[:, None] * (n_blocks * 16) + tl.arange(0, 16)[None, :]

    # tokens past the end read the last one
    # x, pairs of k [(B, BLOCKS, i, p, q', WARPS, 8, t)]
    f = tl.arange(0, B * BLOCKS * 16 * WARPS * 32)
    token = tl.minimum(f // (32 * WARPS * 16 * BLOCKS) * 8 + f // 4 % 8, M - 1)
    x_block = f // 32 % WARPS * BLOCKS + f // (32 * WARPS * 16) % BLOCKS
    # t, in a form that keeps lanes four pairs apart from being taken for one 16-byte load
    t = (3 - f % 4) ^ 3
    x_k = x_block * 128 + f // (32 * WARPS) % 16 * 8 + t * 2
    x_ptrs = x_ptr + e * stride_xe + token * stride_xm.to(tl.int64) + x_k

    # scales [(SEGMENTS / VECTOR, H, WARPS, 8, t), VECTOR]
    f = tl.arange(0, SEGMENTS // VECTOR * H * WARPS * 32)
    row = tl.minimum(n0 + f // (32 * WARPS) % H * 8 + f // 4 % 8, N - 1)
    s_row = (e * N + row) * n_vectors
    s_vector = f // (32 * WARPS * H)
    if GROUP != 0:
        s_vector += f // 32 % WARPS * (BLOCKS * 128) // GROUP // VECTOR

    acc = tl.zeros((WARPS, H, 8, B, 4, 2), tl.float32)
    # weights and scales do not depend on the kernel before this one, and may come before it ends
    if not EVEN_K:
        # what is left of K after the full steps; the last slice has it
        last = k_slice == SPLIT_K - 1
        block = full * STEP
        at = s_row + tl.minimum(full * STEP_VECTORS + s_vector, n_vectors - 1)
        at = at[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        tail_words = tl.load(
            w_ptrs + (tl.minimum(block + w_block, n_blocks - 1) * 16)[:, None], mask=last, other=0
        )
        tail_scale = tl.load(scale_ptr + at, mask=last, other=0.0)
        tail_zero = tail_scale
        if zero_ptr is not None:
            tail_zero = tl.load(zero_ptr + at, mask=last, other=0.0)
    w_ptrs += (w_block * 16)[:, None]
    s_at = (s_row + s_vector)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    words = tl.load(w_ptrs + begin * (STEP * 16), mask=begin < end, eviction_policy=EVICT)
    at = begin * (STEP_VECTORS * VECTOR)
    scale = tl.load(scale_ptr + s_at + at, mask=begin < end)
    # not read where there is none; a loop cannot carry None
    zero = scale
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + s_at + at, mask=begin < end)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if X_AHEAD:
        x_now = _load_x(x_ptrs + begin * (STEP * 128), 0, K, begin < end, False, PAIRS)
    if not EVEN_K:
        k = block * 128
        x = _load_x(x_ptrs + k, k + x_k, K, last, True, PAIRS)
        acc = _accumulate(
            acc,
            tail_words,
            x,
            tail_scale,
            tail_zero,
            BLOCKS,
            SEGMENTS,
            zero_ptr is not None,
            KWIDTH,
            DTYPE,
            ASM,
        )

    for step in tl.range(begin, end, num_stages=STAGES):
        ahead = step + 1
        next_words = tl.load(w_ptrs + ahead * (STEP * 16), mask=ahead < end, eviction_policy=EVICT)
        at = ahead * (STEP_VECTORS * VECTOR)
        next_scale = tl.load(scale_ptr + s_at + at, mask=ahead < end)
        next_zero = next_scale
        if zero_ptr is not None:
            next_zero = tl.load(zero_ptr + s_at + at, mask=ahead < end)
        if X_AHEAD:
            x = x_now
            x_now = _load_x(x_ptrs + ahead * (STEP * 128), 0, K, ahead < end, False, PAIRS)
        else:
            x = _load_x(x_ptrs + step * (STEP * 128), 0, K, True, False, PAIRS)
        acc = _accumulate(
            acc,
            words,
            x,
            scale,
            zero,
            BLOCKS,
            SEGMENTS,
            zero_ptr is not None,
            KWIDTH,
            DTYPE,
            ASM,
        )
        words = next_words
        scale = next_scale
        zero = next_zero

    # [BN, BM]
    y = tl.sum(acc, 0).reshape(BLOCK_N, BLOCK_M) / CODE_UNIT
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = (e * M + m)[None, :] * N + n[:, None]
    if SPLIT_K == 1:
        _finish(y, bias_ptr, y_ptr + at, n, N, mask)
    else:
        stride = tl.num_programs(2).to(tl.int64) * M * N
        tl.store(part_ptr + k_slice * stride + at, y, mask=mask)
        if arrive(counter_ptr + e * tl.num_programs(0) + tl.program_id(0), SPLIT_K):
            y = add_parts(part_ptr + at, stride, mask, SPLIT_K)
            _finish(y, bias_ptr, y_ptr + at, n, N, mask)


@triton.jit
def _finish(y, bias_ptr, y_ptrs, n, N, mask):
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


_launch_decode = Launcher(_decode_kernel)


def decode(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: DecodePlan,
) -> None:
    """y [E, M, N] from x [E, M, K] (bf16 or fp16, K contiguous) and contiguous W [E, N, *].

    zero_point and bias [N] may be None. y is contiguous and may be bf16, fp16 or fp32.
    """
    e, m, k = x.shape
    n, n_groups = scale.shape[-2:]
    assert m <= plan.block_m, "decode takes one tile of tokens"
    step = plan.num_warps * plan.block_k
    assert n_groups == 1 or step % group_size == 0, "groups straddle steps"
    segments = 1 if n_groups == 1 else max(1, plan.block_k // group_size)
    tiles = -(-n // plan.block_n)
    parts = counters = None
    if plan.split_k > 1:
        parts = torch.empty(plan.split_k, e, m, n, device=x.device, dtype=torch.float32)
        counters = torch.zeros(e * tiles, device=x.device, dtype=torch.int32)
    vector = groups_of(scale, zero_point, group_size, plan.block_k // 128).vector
    _launch_decode(
        (tiles, plan.split_k, e),
        x,
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
        BLOCKS=plan.block_k // 128,
        WARPS=plan.num_warps,
        SPLIT_K=plan.split_k,
        GROUP=0 if n_groups == 1 else group_size,
        SEGMENTS=segments,
        VECTOR=vector,
        EVEN_K=k % step == 0,
        STAGES=plan.num_stages,
        PAIRS=x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0 and x.data_ptr() % 4 == 0,
        KWIDTH=plan.kwidth,
        X_AHEAD=plan.x_ahead,
        EVICT=plan.evict,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
