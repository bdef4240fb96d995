"""Rows of W in the COALESCED format -> plain [rows, K], for a library matrix product to read.

    w[n, k] = (q[n, k] - zero_point[n, k // g]) * scale[n, k // g]

            BLOCKS * 128 k
          +--------+--------+---
    BN    |  read 64 bytes a row and block, write 256
    rows  |
          +--------+--------+---

All words of a program are in flight together. Weights leave in the order of the fragments, in
pieces of 4 bytes; through shared memory they become runs of 16 bytes a lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import FP16_LIFT, join8, unpack_scaled, use_asm

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_N = 8
# 128-wide blocks of K that a program takes, where a row has as many
BLOCKS = 8
NUM_WARPS = 4


@triton.jit
def _to_words(values, PARTS: tl.constexpr):
    """[BN, BLOCKS * PARTS] -> fp32 in the words' shape [BN, BLOCKS * 16], for p = 0 and p = 1."""
    BN: tl.constexpr = values.shape[0]
    BLOCKS: tl.constexpr = values.shape[1] // PARTS
    v = values.to(tl.float32).reshape(BN, BLOCKS, 1, PARTS)
    v = tl.broadcast_to(v, (BN, BLOCKS, 4, PARTS))
    if PARTS == 8:
        v0, v1 = v.reshape(BN, BLOCKS, 4, 4, 2).split()
    else:
        v0 = v.reshape(BN, BLOCKS, 4, PARTS, 1)
        v0 = tl.broadcast_to(v0, (BN, BLOCKS, 4, PARTS, 4 // PARTS))
        v1 = v0
    return v0.reshape(BN, BLOCKS * 16), v1.reshape(BN, BLOCKS * 16)


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
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first_row + tl.minimum(n, rows - 1)
    n_words = tl.cdiv(K, 128) * 16
    block = tl.program_id(0) * BLOCKS

    word = block * 16 + tl.arange(0, BLOCKS * 16)
    w_ptrs = w_ptr + row[:, None] * n_words + word[None, :]
    words = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=(word < n_words)[None, :], other=0)

    part = block * PARTS + tl.arange(0, BLOCKS * PARTS)
    if GROUP == 0:
        part = part * 0
    elif GROUP > 128:
        part = part // (GROUP // 128)
    at = row[:, None] * n_groups + tl.minimum(part, n_groups - 1)[None, :]
    scale0, scale1 = _to_words(tl.load(scale_ptr + at), PARTS)
    zero0 = None
    zero1 = None
    if zero_ptr is not None:
        zero0, zero1 = _to_words(tl.load(zero_ptr + at), PARTS)

    e0, e1, e2, e3, e4, e5, e6, e7 = unpack_scaled(words, scale0, scale1, zero0, zero1, DTYPE, ASM)
    # [BN, block, t, i, p, q', r] -> k in its own order
    z = join8(e0, e1, e2, e3, e4, e5, e6, e7).reshape(BLOCK_N, BLOCKS, 4, 4, 2, 2, 2)
    z = z.trans(0, 1, 3, 4, 5, 2, 6).reshape(BLOCK_N, BLOCKS * 128)
    if DTYPE == tl.float16:
        z *= 1 / FP16_LIFT
    k = block * 128 + tl.arange(0, BLOCKS * 128)
    out_ptrs = out_ptr + n[:, None] * K + k[None, :]
    mask = (n < rows)[:, None] if EVEN_K else (n < rows)[:, None] & (k < K)[None, :]
    tl.store(out_ptrs, z, mask=mask)


_launch_dequantize = Launcher(_dequantize_kernel)


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
    n_groups = scale.shape[-1]
    blocks = min(BLOCKS, 1 << (-(-k // 128) - 1).bit_length())
    grid = (-(-k // (128 * blocks)), -(-rows // BLOCK_N))
    group = 0 if n_groups == 1 else group_size
    _launch_dequantize(
        grid,
        qdata.view(torch.int32),
        scale,
        zero_point,
        out,
        first_row,
        rows,
        k,
        n_groups,
        BLOCK_N=BLOCK_N,
        BLOCKS=blocks,
        GROUP=group,
        PARTS=128 // group if 0 < group < 128 else 1,
        EVEN_K=k % (128 * blocks) == 0,
        ASM=use_asm(),
        num_warps=NUM_WARPS,
    )
