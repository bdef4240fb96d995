"""Rows of x by expert: what the tensor memory accelerator reads has to stand sorted in memory.

Programs behind those of the rows list the tiles, where that was left to them (row_tiles.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.row_tiles import BLOCK_SLOTS, block_of_experts, list_tiles

# bytes of a row that a program copies
BLOCK = 4096
# bytes that a program copies, of several rows, where rows are not few: with less it starts slower
# than it copies
BYTES = 8192
FEW_ROWS = 2048


@triton.jit(do_not_specialize=["n_experts", "n_rows", "n_tiles"])
def _gather_kernel(
    x_ptr,
    order_ptr,
    offs_ptr,
    out_ptr,
    tiles_ptr,
    n_experts,
    n_rows,
    n_tiles,
    K,
    stride_x,
    X_DIV: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    given = tl.load(offs_ptr + n_experts - 1)
    first = tl.program_id(0) * ROWS
    if tiles_ptr is not None:
        e = tl.program_id(0) - tl.cdiv(n_rows, ROWS)
        if (e >= 0) & (tl.program_id(1) == 0):
            list_tiles(
                offs_ptr,
                tiles_ptr,
                e,
                given,
                n_experts,
                n_tiles,
                BLOCK_M,
                NARROW,
                BLOCK_E,
                BLOCK_SLOTS,
            )
    # rows of sentinels are nobody's
    if first < given:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (row < given)[:, None] & (k < K)
        x_row = tl.load(order_ptr + row, mask=row < given, other=0).to(tl.int64) // X_DIV
        x = tl.load(x_ptr + x_row[:, None] * stride_x + k, mask=mask)
        tl.store(out_ptr + row[:, None] * K + k, x, mask=mask)


_launch = Launcher(_gather_kernel)


def gather_rows(
    x: Tensor,
    order: Tensor,
    offs: Tensor,
    x_div: int,
    pdl: bool,
    tiles: Tensor | None = None,
    block_m: int = 1,
    narrow_m: int = 0,
) -> Tensor:
    """x [T, K] -> [pairs, K]: row r is x[order[r] // x_div]; those from offs[-1] on are unset.

    tiles: to be filled as list_tiles() does, if any.
    """
    k = x.shape[1]
    out = torch.empty(order.numel(), k, device=x.device, dtype=x.dtype)
    block = min(BLOCK // x.element_size(), 1 << (k - 1).bit_length())
    n_rows, n_experts = order.numel(), offs.numel()
    rows = 1 if n_rows <= FEW_ROWS else max(1, BYTES // (block * x.element_size()))
    _launch(
        (-(-n_rows // rows) + (0 if tiles is None else n_experts + 1), -(-k // block)),
        x,
        order,
        offs,
        out,
        tiles,
        n_experts,
        n_rows,
        0 if tiles is None else len(tiles),
        k,
        x.stride(0),
        X_DIV=x_div,
        ROWS=rows,
        BLOCK=block,
        BLOCK_M=block_m,
        NARROW=narrow_m,
        BLOCK_E=block_of_experts(n_experts),
        BLOCK_SLOTS=BLOCK_SLOTS,
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
