"""Rows of W in the COALESCED format -> plain [rows, K], for a library matrix product to read.

    w[n, k] = (q[n, k] - zero_point[n, k // g]) * scale[n, k // g], computed in fp32

A program takes BLOCK_N rows and one 128-wide block of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT
from w4tensor.kernels.unpack import CODE_UNIT, unpack_operand, use_asm

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
    blocks_per_group,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < rows
    row = first_row + n
    blocks = tl.num_programs(0)
    words = tl.load(
        w_ptr + row[:, None] * (blocks * 16) + block * 16 + tl.arange(0, 16)[None, :],
        mask=in_n[:, None],
        other=0,
    )
    z = unpack_operand(words, 2, dtype, ASM).to(tl.float32).reshape(BLOCK_N, PARTS, 128 // PARTS)
    group = block * PARTS // blocks_per_group + tl.arange(0, PARTS)
    at = row[:, None] * n_groups + group[None, :]
    known = in_n[:, None] & (group < n_groups)[None, :]
    scale = tl.load(scale_ptr + at, mask=known, other=0.0).to(tl.float32)
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + at, mask=known, other=0.0).to(tl.float32)
        z -= ((zero - SYMMETRIC_ZERO_POINT) * CODE_UNIT)[:, :, None]
    w = (z * (scale / CODE_UNIT)[:, :, None]).reshape(BLOCK_N, 128).to(dtype)
    k = block * 128 + tl.arange(0, 128)
    out_ptrs = out_ptr + n[:, None] * K + k[None, :]
    if EVEN_K:
        tl.store(out_ptrs, w, mask=in_n[:, None])
    else:
        tl.store(out_ptrs, w, mask=in_n[:, None] & (k < K)[None, :])


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    out: Tensor,
    first_row: int,
    group_size: int,
) -> None:
    """out [rows, K] (bf16 or fp16, contiguous) = rows first_row .. of contiguous W [N, *]."""
    rows, k = out.shape
    grid = (triton.cdiv(k, 128), triton.cdiv(rows, BLOCK_N))
    _dequantize_kernel[grid](
        qdata.view(torch.int32),
        scale,
        zero_point,
        out,
        first_row,
        rows,
        k,
        scale.shape[-1],
        triton.cdiv(group_size, 128),
        BLOCK_N=BLOCK_N,
        PARTS=128 // group_size if group_size < 128 and group_size != k else 1,
        EVEN_K=k % 128 == 0,
        ASM=use_asm(),
        num_warps=4,
    )
