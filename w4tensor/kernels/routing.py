"""Stable counting sort of (token, slot) pairs by expert, and the list of row tiles that serves it.

    ids      [pairs]          3 0 3 9 0          9 is no expert here (E = 4): a sentinel
    order    [pairs]          1 4 | | 0 2 |      the pairs of expert 0, 1, 2, 3; sentinels nowhere
    offs     [E]              2 2 2 4            where each expert ends, as torch._grouped_mm has it
    tiles    [n_tiles, 3]     (expert, first row, end row), at most BLOCK_M rows each

One launch and no communication: program e counts for itself how many pairs have a smaller expert
(its first row) and how many have its own, then writes those. Its tiles start at

    slot(e) = first // BLOCK_M + min(e, first)

which leaves room for ceil(count / BLOCK_M) tiles before slot(e + 1) (floor(a + b) >= floor(a) +
floor(b), and an expert that has pairs raises min(e, first) by one), needs no sum over the tiles of
others, and ends at pairs // BLOCK_M + min(E, pairs). Slots in between are empty: first row = end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher

# pairs a program looks at together
BLOCK_PAIRS = 4096
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


# one binary for every number of tokens of a size
@triton.jit(do_not_specialize=["n_pairs", "n_tiles"])
def _route_kernel(
    ids_ptr,
    order_ptr,
    offs_ptr,
    tiles_ptr,
    n_pairs,
    E,
    n_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    # whether that is all of them
    ONE_BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # program E stands behind the last expert: it has no pairs, and fills the slots that are left
    e = tl.program_id(0)
    p = tl.arange(0, BLOCK_PAIRS)
    if ONE_BLOCK:
        ids = tl.load(ids_ptr + p, mask=p < n_pairs, other=-1)
        mine = ((ids == e) & (e < E)).to(tl.int32)
        # both counts in one sum, each below 2 * BLOCK_PAIRS
        counts = tl.sum(((ids >= 0) & (ids < e)).to(tl.int32) + mine * (2 * BLOCK_PAIRS), 0)
        first = counts % (2 * BLOCK_PAIRS)
        end = first + counts // (2 * BLOCK_PAIRS)
    else:
        smaller = tl.zeros((BLOCK_PAIRS,), tl.int32)
        same = tl.zeros((BLOCK_PAIRS,), tl.int32)
        for start in tl.range(0, n_pairs, BLOCK_PAIRS, num_stages=2):
            ids = tl.load(ids_ptr + start + p, mask=start + p < n_pairs, other=-1)
            smaller += ((ids >= 0) & (ids < e)).to(tl.int32)
            same += ((ids == e) & (e < E)).to(tl.int32)
        first = tl.sum(smaller, 0)
        end = first + tl.sum(same, 0)
    if e < E:
        tl.store(offs_ptr + e, end)
    slot = first // BLOCK_M + tl.minimum(e, first)
    slot_end = tl.where(e < E, end // BLOCK_M + tl.minimum(e + 1, end), n_tiles)
    _write_tiles(tiles_ptr, e, first, end, slot, slot_end, BLOCK_M, BLOCK_SLOTS)

    if end > first:
        if ONE_BLOCK:
            rank = tl.cumsum(mine, 0)
            tl.store(order_ptr + first + rank - 1, p, mask=mine != 0)
        else:
            row = first
            for start in tl.range(0, n_pairs, BLOCK_PAIRS, num_stages=2):
                ids = tl.load(ids_ptr + start + p, mask=start + p < n_pairs, other=-1)
                mine = (ids == e).to(tl.int32)
                rank = tl.cumsum(mine, 0)
                tl.store(order_ptr + row + rank - 1, start + p, mask=mine != 0)
                row += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def _tiles_kernel(
    offs_ptr,
    tiles_ptr,
    n_rows,
    E,
    n_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    # program E lists the rows behind the last expert
    e = tl.program_id(0)
    first = tl.load(offs_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(offs_ptr + e, mask=e < E, other=0)
    end = tl.where(e < E, end, n_rows)
    slot = first // BLOCK_M + tl.minimum(e, first)
    slot_end = tl.where(e < E, end // BLOCK_M + tl.minimum(e + 1, end), n_tiles)
    _write_tiles(tiles_ptr, e, first, end, slot, slot_end, BLOCK_M, BLOCK_SLOTS)


_launch_route = Launcher(_route_kernel)


def route(ids: Tensor, n_experts: int, block_m: int, pdl: bool = False) -> tuple[Tensor, ...]:
    """ids [.., top_k] -> order int32 [pairs], offs int32 [E], tiles int32 [n_tiles, 3].

    A pair is t * top_k + j. Ids outside 0..E-1 appear in no list: offs[-1] pairs do.
    """
    n_pairs = ids.numel()
    n_tiles = n_pairs // block_m + min(n_experts, n_pairs)
    order = torch.empty(n_pairs, dtype=torch.int32, device=ids.device)
    offs = torch.empty(n_experts, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(n_tiles, 3, dtype=torch.int32, device=ids.device)
    block = min(BLOCK_PAIRS, max(128, 1 << (n_pairs - 1).bit_length()))
    _launch_route(
        (n_experts + 1,),
        ids.contiguous(),
        order,
        offs,
        tiles,
        n_pairs,
        n_experts,
        n_tiles,
        BLOCK_M=block_m,
        BLOCK_PAIRS=block,
        ONE_BLOCK=n_pairs <= block,
        BLOCK_SLOTS=BLOCK_SLOTS,
        PDL=pdl,
        num_warps=min(8, max(1, block // 128)),
        **({"launch_pdl": True} if pdl else {}),
    )
    return order, offs, tiles


_launch_tiles = Launcher(_tiles_kernel)


def tiles_of(offs: Tensor, n_rows: int, block_m: int) -> Tensor:
    """offs int32 [E], the row at which each expert ends -> tiles int32 [n_tiles, 3].

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
        BLOCK_SLOTS=BLOCK_SLOTS,
        num_warps=1,
    )
    return tiles
