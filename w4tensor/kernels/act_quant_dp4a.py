"""Y[E, M, N] = X[E, M, K] @ W[E, N, K].T for M <= 4: int8 activations, int4 weights, dp4a.

    y[m, n] = sum over slices of 32 k of  x_scale[m, a] * scale[n, g] * sum_k x[m, k] (q[n, k] - z)

                   lane 0   lane 1          one thread has a slice of one row, 16 bytes of weights,
    row n       | slice 0 | slice 1 | ..    and unpacks it once for all tokens and, in turn, for
    row n + 1   | slice 0 | slice 1 | ..    ROWS rows, so that activations are read once for all

A row belongs to one program: BLOCK_SLICES threads add its slices in a fixed tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from w4tensor.kernels.dp4a import S8_S8, dp4a
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT, use_asm
from w4tensor.kernels.unpack_act_quant import UNIT

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_act_quant import ActQuantDp4aPlan

# 0xF0 in each byte, as int32
HIGH_NIBBLES = tl.constexpr(-0x0F0F0F10)


# one binary for every weight of a shape class: group counts are no reason to compile
@triton.jit(do_not_specialize=["n_groups", "n_act_groups"])
def _dp4a_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    n_slices,
    n_groups,
    n_act_groups,
    stride_x_scale,
    # 0 where the row is one group, and where the token is
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    # groups of 16 are the two halves of a slice, which its low and its high nibbles hold
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    e = tl.program_id(1).to(tl.int64)
    n0 = tl.program_id(0) * (ROWS * BLOCK_N)
    x_ptr += e * M * n_slices * 8
    x_scale_ptr += e * n_act_groups * stride_x_scale
    if zero_ptr is not None:
        x_sum_ptr += e * n_groups * stride_x_scale
    # [BLOCK_N, 1] for each row in turn; rows past the end read the last one
    rows = ()
    for r in tl.static_range(ROWS):
        n = tl.minimum(n0 + r * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        rows += ((e * N + n)[:, None],)

    s = tl.arange(0, BLOCK_SLICES)[None, :]
    # weights do not depend on the kernel before this one, and may come before it ends
    weights, scales, zeros = _load_rows(
        w_ptr, scale_ptr, zero_ptr, rows, s, n_slices, n_groups, GROUP, HALVES, ROWS, BLOCK_N
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # [BLOCK_N, BLOCK_SLICES] for each row in turn and each token
    accs = (tl.zeros([BLOCK_N, BLOCK_SLICES], tl.float32),) * (ROWS * TOKENS)
    for first in tl.range(0, n_slices, BLOCK_SLICES, num_stages=1):
        s = first + tl.arange(0, BLOCK_SLICES)[None, :]
        next_weights, next_scales, next_zeros = _load_rows(
            w_ptr,
            scale_ptr,
            zero_ptr,
            rows,
            s + BLOCK_SLICES,
            n_slices,
            n_groups,
            GROUP,
            HALVES,
            ROWS,
            BLOCK_N,
        )
        low_x = ()
        high_x = ()
        x_scales = ()
        x_sums = ()
        for m in tl.static_range(TOKENS):
            token = tl.minimum(m, M - 1)
            if ACT_GROUP > 0:
                a = s // (ACT_GROUP // 32)
                a_ptrs = x_scale_ptr + a * stride_x_scale + token
                x_scales += (tl.load(a_ptrs, mask=a < n_act_groups, other=0.0),)
            if zero_ptr is not None and GROUP > 0:
                for half in tl.static_range(HALVES):
                    g = s * 32 // GROUP + half
                    # the slice in which a group starts takes the correction for all of it
                    mask_g = (g < n_groups) & (s * 32 % GROUP == 0)
                    g_ptrs = x_sum_ptr + g * stride_x_scale + token
                    x_sums += (tl.load(g_ptrs, mask=mask_g, other=0.0),)
            low_x += (_load_words(x_ptr + token * n_slices * 8, s, 8, 0, n_slices, BLOCK_N),)
            high_x += (_load_words(x_ptr + token * n_slices * 8, s, 8, 4, n_slices, BLOCK_N),)

        updated = ()
        for r in tl.static_range(ROWS):
            low_w = (weights[r] << 4) & HIGH_NIBBLES
            high_w = weights[r] & HIGH_NIBBLES
            for m in tl.static_range(TOKENS):
                acc = accs[r * TOKENS + m]
                for half in tl.static_range(HALVES):
                    d = tl.zeros([BLOCK_N, BLOCK_SLICES, 4], tl.int32)
                    if GROUP != 16 or half == 0:
                        d = dp4a(low_w, low_x[m], d, S8_S8, ASM)
                    if GROUP != 16 or half == 1:
                        d = dp4a(high_w, high_x[m], d, S8_S8, ASM)
                    part = tl.sum(d, 2).to(tl.float32)
                    if GROUP > 0 and ACT_GROUP > 0:
                        part *= scales[r * HALVES + half].to(tl.float32) * x_scales[m]
                    elif GROUP > 0:
                        part *= scales[r * HALVES + half].to(tl.float32)
                    elif ACT_GROUP > 0:
                        part *= x_scales[m]
                    acc += part
                    if zero_ptr is not None and GROUP > 0:
                        shift = zeros[r * HALVES + half].to(tl.float32) - SYMMETRIC_ZERO_POINT
                        shift *= scales[r * HALVES + half].to(tl.float32) * UNIT
                        acc -= x_sums[m * HALVES + half] * shift
                updated += (acc,)
        accs = updated
        weights = next_weights
        scales = next_scales
        zeros = next_zeros

    for r in tl.static_range(ROWS):
        n = n0 + r * BLOCK_N + tl.arange(0, BLOCK_N)
        row = e * N + tl.minimum(n, N - 1)
        for m in tl.static_range(TOKENS):
            y = tl.sum(accs[r * TOKENS + m], 1) * (1.0 / UNIT)
            token = tl.minimum(m, M - 1)
            # scales that all of K has
            if GROUP == 0:
                if zero_ptr is not None:
                    shift = tl.load(zero_ptr + row).to(tl.float32) - SYMMETRIC_ZERO_POINT
                    y -= shift * tl.load(x_sum_ptr + token)
                y *= tl.load(scale_ptr + row).to(tl.float32)
            if ACT_GROUP == 0:
                y *= tl.load(x_scale_ptr + token)
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            y_ptrs = y_ptr + (e * M + m) * N + n
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (m < M))


@triton.jit
def _load_words(ptr, s, STRIDE: tl.constexpr, OFFSET: tl.constexpr, n_slices, ROWS: tl.constexpr):
    """Four words of each of slices s [1, S], for ROWS rows alike: [ROWS, S, 4], 0 beyond K."""
    # of the full shape, so that activations are loaded in the layout of the weights
    same = (tl.arange(0, ROWS) * 0)[:, None, None]
    word = same + s[:, :, None] * STRIDE + (OFFSET + tl.arange(0, 4))[None, None, :]
    return tl.load(ptr + word, mask=(s < n_slices)[:, :, None], other=0)


@triton.jit
def _load_rows(
    w_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    s,
    n_slices,
    n_groups,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Words, scales and zero points of slices s of the rows in turn; all in flight at once."""
    weights = ()
    for r in tl.static_range(ROWS):
        row_ptr = w_ptr + rows[r][:, :, None] * (n_slices * 4)
        weights += (_load_words(row_ptr, s, 4, 0, n_slices, BLOCK_N),)
    scales = ()
    zeros = ()
    if GROUP > 0:
        for r in tl.static_range(ROWS):
            for half in tl.static_range(HALVES):
                g = s * 32 // GROUP + half
                at = rows[r] * n_groups + g
                scales += (tl.load(scale_ptr + at, mask=g < n_groups, other=0.0),)
                if zero_ptr is not None:
                    zeros += (tl.load(zero_ptr + at, mask=g < n_groups, other=0.0),)
    return weights, scales, zeros


_launch_dp4a = Launcher(_dp4a_kernel)


def act_quant_dp4a(
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
    plan: ActQuantDp4aPlan,
) -> None:
    """y [E, M, N] from what quantize_activation gave and contiguous W [E, N, *].

    act_group_size: as x was quantised; -1 is per token. x_sum: None without zero_point, else made
    with sum_group_size=group_size. bias [N] may be None. y is contiguous: bf16, fp16 or fp32.
    """
    e, m, n = y.shape
    n_groups = scale.shape[-1]
    assert m <= plan.tokens, "a thread holds every token"
    _launch_dp4a(
        (-(-n // (plan.rows * plan.block_n)), e),
        x.view(torch.int32),
        x_scale,
        x_sum,
        qdata.view(torch.int32),
        scale,
        zero_point,
        bias,
        y,
        m,
        n,
        x.shape[-1] // 32,
        n_groups,
        x_scale.shape[-2],
        x_scale.stride(-2),
        GROUP=0 if n_groups == 1 else group_size,
        ACT_GROUP=max(act_group_size, 0),
        TOKENS=plan.tokens,
        ROWS=plan.rows,
        BLOCK_N=plan.block_n,
        BLOCK_SLICES=plan.block_slices,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        # Triton 3.10 stops fusing by default; it would double the instructions of a scaled sum
        enable_fp_fusion=True,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
