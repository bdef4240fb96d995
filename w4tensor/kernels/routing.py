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

Programs that share tiles evenly want no holes, and tiles of one cost side by side: list_tiles()
makes such a list once offs is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher

# up to so many pairs, a program reads all of them in one block; of more it reads blocks, twice
ONE_BLOCK_PAIRS = 16384
BLOCK_PAIRS = 4096
# of a block, those in a run whose ranks are found by themselves
RUN = 64
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
def _experts_of(ids_ptr, pair, n_pairs, E):
    """Experts of pairs, -1 where there is none."""
    ids = tl.load(ids_ptr + pair, mask=pair < n_pairs, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def _count(flags):
    return tl.sum(tl.sum(flags.to(tl.int32), 1), 0)


@triton.jit
def _place(order_ptr, first, mine, pair):
    """Write pairs that are `mine`, in their order, from row `first` on -> the row behind them."""
    # ranks within runs, then of runs: a scan of all at once is one long chain
    mine = mine.to(tl.int32)
    counts = tl.sum(mine, 1)
    before = tl.cumsum(counts, 0) - counts
    rank = before[:, None] + tl.cumsum(mine, 1) - 1
    tl.store(order_ptr + first + rank, pair, mask=mine != 0)
    return first + tl.sum(counts, 0)


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
    RUN: tl.constexpr,
    # whether BLOCK_PAIRS is all of them
    ONE_BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # program E stands behind the last expert: it has no pairs, and fills the slots that are left
    e = tl.program_id(0)
    p = tl.arange(0, BLOCK_PAIRS // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    if ONE_BLOCK:
        ids = _experts_of(ids_ptr, p, n_pairs, E)
        first = _count((ids >= 0) & (ids < e))
        end = first + _count(ids == e)
    else:
        smaller = tl.zeros((BLOCK_PAIRS // RUN, RUN), tl.int32)
        same = smaller
        for start in tl.range(0, n_pairs, BLOCK_PAIRS, num_stages=1):
            ids = _experts_of(ids_ptr, start + p, n_pairs, E)
            smaller += ((ids >= 0) & (ids < e)).to(tl.int32)
            same += (ids == e).to(tl.int32)
        first = _count(smaller)
        end = first + _count(same)
    if e < E:
        tl.store(offs_ptr + e, end)
    if tiles_ptr is not None:
        slot = first // BLOCK_M + tl.minimum(e, first)
        slot_end = tl.where(e < E, end // BLOCK_M + tl.minimum(e + 1, end), n_tiles)
        _write_tiles(tiles_ptr, e, first, end, slot, slot_end, BLOCK_M, BLOCK_SLOTS)

    if end > first:
        if ONE_BLOCK:
            _place(order_ptr, first, ids == e, p)
        else:
            row = first
            for start in tl.range(0, n_pairs, BLOCK_PAIRS, num_stages=1):
                ids = _experts_of(ids_ptr, start + p, n_pairs, E)
                row = _place(order_ptr, row, ids == e, start + p)


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
    """BLOCK_E of list_tiles()."""
    return max(32, 1 << (n_experts - 1).bit_length())


_launch_route = Launcher(_route_kernel)


def route(
    ids: Tensor, n_experts: int, block_m: int, pdl: bool = False, listed: bool = True
) -> tuple[Tensor, ...]:
    """ids [.., top_k] -> order int32 [pairs], offs int32 [E], tiles int32 [n_tiles, 3].

    A pair is t * top_k + j. Ids outside 0..E-1 appear in no list: offs[-1] pairs do. If not listed,
    tiles are left for list_tiles().
    """
    n_pairs = ids.numel()
    n_tiles = n_pairs // block_m + min(n_experts, n_pairs)
    order = torch.empty(n_pairs, dtype=torch.int32, device=ids.device)
    offs = torch.empty(n_experts, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(n_tiles, 3, dtype=torch.int32, device=ids.device)
    block, warps = BLOCK_PAIRS, 16
    if n_pairs <= ONE_BLOCK_PAIRS:
        block = max(128, 1 << (n_pairs - 1).bit_length())
        warps = max(min(4, block // 128), block // 1024)
    _launch_route(
        (n_experts + 1,),
        ids.contiguous(),
        order,
        offs,
        tiles if listed else None,
        n_pairs,
        n_experts,
        n_tiles,
        BLOCK_M=block_m,
        BLOCK_PAIRS=block,
        RUN=RUN,
        ONE_BLOCK=n_pairs <= block,
        BLOCK_SLOTS=BLOCK_SLOTS,
        PDL=pdl,
        num_warps=warps,
        **({"launch_pdl": True} if pdl else {}),
    )
    return order, offs, tiles


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
