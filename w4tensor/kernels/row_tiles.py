"""The list of row tiles that serves rows sorted by expert.

    offs     [E]              2 2 2 4            where each expert ends, as torch._grouped_mm has it
    tiles    [n_tiles, 3]     (expert, first row, end row), at most BLOCK_M rows each

A list without communication: the tiles of expert e, whose first row is `first`, start at

    slot(e) = first // BLOCK_M + min(e, first)

which leaves room for ceil(count / BLOCK_M) tiles before slot(e + 1) (floor(a + b) >= floor(a) +
floor(b), and an expert that has pairs raises min(e, first) by one), needs no sum over the tiles of
others, and ends at pairs // BLOCK_M + min(E, pairs). Slots in between are empty: first row = end.

Programs that share tiles evenly want no holes, and tiles of one cost side by side: list_tiles()
makes such a list once offs is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher

# tile slots that one store fills
BLOCK_SLOTS = 32


@triton.jit
def _write_tiles(
    tiles_ptr, expert, first, end, slot, slot_end, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """Slots slot..slot_end: rows first..end in steps of BLOCK_M, then empty ones."""
    i = tl.arange(0, BLOCK)
    for s in range(slot, slot_end, BLOCK):
        at = tiles_ptr + (s + i) * 3
        row = tl.minimum(first + (s - slot + i) * BLOCK_M, end)
        mask = s + i < slot_end
        tl.store(at, expert + tl.zeros_like(i), mask=mask)
        tl.store(at + 1, row, mask=mask)
        tl.store(at + 2, tl.minimum(row + BLOCK_M, end), mask=mask)


@triton.jit
def write_tiles_of(
    tiles_ptr, e, first, end, E, n_tiles, BLOCK_M: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    """Tiles of rows first..end of expert e, at slot(e). e = E, behind the last one, has no rows: it
    fills the slots that are left."""
    slot = first // BLOCK_M + tl.minimum(e, first)
    slot_end = tl.where(e < E, end // BLOCK_M + tl.minimum(e + 1, end), n_tiles)
    _write_tiles(tiles_ptr, e, first, end, slot, slot_end, BLOCK_M, BLOCK_SLOTS)


@triton.jit
def list_tiles(
    offs_ptr,
    tiles_ptr,
    e,
    n_rows,
    E,
    n_tiles,
    BLOCK_M: tl.constexpr,
    # tiles with at most so many rows are narrow
    NARROW: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Tiles of expert e: wide ones of all experts, then narrow ones. e = E: those of the rows from
    offs[-1] to n_rows, behind all, and then empty slots."""
    i = tl.arange(0, BLOCK_E)
    ends = tl.load(offs_ptr + i, mask=i < E, other=0)
    count = ends - tl.load(offs_ptr + i - 1, mask=(i > 0) & (i < E), other=0)
    rest = count % BLOCK_M
    wide = count // BLOCK_M + (rest > NARROW).to(tl.int32)
    narrow = ((rest > 0) & (rest <= NARROW)).to(tl.int32)
    slot = tl.sum(tl.where(i < e, wide, 0), 0)
    slot_end = slot + tl.sum(tl.where(i == e, wide, 0), 0)
    slot_narrow = tl.sum(wide, 0) + tl.sum(tl.where(i < e, narrow, 0), 0)
    first = tl.load(offs_ptr + e - 1, mask=e > 0, other=0)
    if e < E:
        end = tl.load(offs_ptr + e)
        _write_tiles(tiles_ptr, e, first, end, slot, slot_end, BLOCK_M, BLOCK_SLOTS)
        first += (slot_end - slot) * BLOCK_M
        slot_end = slot_narrow + (first < end).to(tl.int32)
        _write_tiles(tiles_ptr, e, first, end, slot_narrow, slot_end, BLOCK_M, BLOCK_SLOTS)
    else:
        _write_tiles(tiles_ptr, e, first, n_rows, slot_narrow, n_tiles, BLOCK_M, BLOCK_SLOTS)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def _tiles_kernel(
    offs_ptr,
    tiles_ptr,
    n_rows,
    E,
    n_tiles,
    BLOCK_M: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    e = tl.program_id(0)
    list_tiles(offs_ptr, tiles_ptr, e, n_rows, E, n_tiles, BLOCK_M, NARROW, BLOCK_E, BLOCK_SLOTS)


def block_of_experts(n_experts: int) -> int:
    """BLOCK_E: one expert each."""
    return max(32, 1 << (n_experts - 1).bit_length())


_launch_tiles = Launcher(_tiles_kernel)


def tiles_of(offs: Tensor, n_rows: int, block_m: int, narrow_m: int = 0) -> Tensor:
    """offs int32 [E], the row at which each expert ends -> tiles int32 [n_tiles, 3], as
    list_tiles() has them.

    Rows from offs[-1] on stand in tiles of their own, whose expert is E.
    """
    n_experts = offs.numel()
    n_tiles = n_rows // block_m + min(n_experts, n_rows) + 1
    tiles = torch.empty(n_tiles, 3, dtype=torch.int32, device=offs.device)
    _launch_tiles(
        (n_experts + 1,),
        offs,
        tiles,
        n_rows,
        n_experts,
        n_tiles,
        BLOCK_M=block_m,
        NARROW=narrow_m,
        BLOCK_E=block_of_experts(n_experts),
        BLOCK_SLOTS=BLOCK_SLOTS,
        num_warps=1,
    )
    return tiles
