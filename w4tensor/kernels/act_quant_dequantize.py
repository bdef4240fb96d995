"""Rows of W in the ACT_QUANT format -> plain [rows, K], for a library matrix product to read.

    w[n, k] = (q[n, k] - zero_point[n, k // g]) * scale[n, k // g], computed in fp32

A program takes BLOCK_N rows and one 128-wide block of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT, use_asm
from w4tensor.kernels.unpack_act_quant import UNIT, join_halves, unpack_bytes

BLOCK_N = 32


@triton.jit
def _dequantize_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first_row,
    rows,
    K,
    n_groups,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    # groups of a block, each of WIDTH
    PARTS: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    WIDTH: tl.constexpr = 128 // PARTS
    block = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < rows
    row = first_row + n
    byte = block * 64 + tl.arange(0, 64)
    w_ptrs = w_ptr + row[:, None] * (tl.num_programs(0) * 64) + byte[None, :]
    low, high = unpack_bytes(tl.load(w_ptrs, mask=in_n[:, None], other=0), ASM)
    w = join_halves(low, high, 4).to(tl.float32).reshape(BLOCK_N, PARTS, WIDTH) * (1.0 / UNIT)
    group = tl.arange(0, PARTS) * 0
    if GROUP > 0:
        group = (block * 128 + tl.arange(0, PARTS) * WIDTH) // GROUP
    at = row[:, None] * n_groups + group[None, :]
    known = in_n[:, None] & (group < n_groups)[None, :]
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + at, mask=known, other=0.0).to(tl.float32)
        w -= (zero - SYMMETRIC_ZERO_POINT)[:, :, None]
    w *= tl.load(scale_ptr + at, mask=known, other=0.0).to(tl.float32)[:, :, None]
    w = w.reshape(BLOCK_N, 128).to(out_ptr.dtype.element_ty)
    k = block * 128 + tl.arange(0, 128)
    mask = in_n[:, None] if EVEN_K else in_n[:, None] & (k < K)[None, :]
    tl.store(out_ptr + n[:, None] * K + k[None, :], w, mask=mask)


_launch_dequantize = Launcher(_dequantize_kernel)


def act_quant_dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    out: Tensor,
    first_row: int,
    group_size: int,
) -> None:
    """out [rows, K] (bf16, fp16 or fp32, contiguous) = rows first_row .. of contiguous W [N, *]."""
    rows, k = out.shape
    grid = (-(-k // 128), -(-rows // BLOCK_N))
    _launch_dequantize(
        grid,
        qdata.view(torch.uint8),
        scale,
        zero_point,
        out,
        first_row,
        rows,
        k,
        scale.shape[-1],
        GROUP=0 if scale.shape[-1] == 1 else group_size,
        BLOCK_N=BLOCK_N,
        EVEN_K=k % 128 == 0,
        ASM=use_asm(),
        num_warps=4,
    )
