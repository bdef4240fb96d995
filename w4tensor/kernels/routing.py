"""Stable counting sort of (token, slot) pairs by expert.

    ids      [pairs]          3 0 3 9 0          9 is no expert here (E = 4): a sentinel
    order    [pairs]          1 4 | | 0 2 |      the pairs of expert 0, 1, 2, 3; sentinels nowhere
    offs     [E]              2 2 2 4            where each expert ends, as torch._grouped_mm has it
    tiles    [n_tiles, 3]     the row tiles of each (row_tiles.py)

For few pairs, one launch and no communication: program e counts for itself how many pairs have a
smaller expert (its first row) and how many have its own, then writes those. Every program reads all
ids, which takes longer the more pairs and experts there are. Of more, one launch counts the experts
of each CHUNK of pairs, and another places a chunk a program: behind all pairs of smaller experts,
and those of the same expert in chunks before it and in its own. Each of those programs adds the
counts of all chunks, which grows with the square of the pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.row_tiles import BLOCK_SLOTS, block_of_experts, write_tiles_of

# of one launch, which keeps them in registers; and times experts. us on an H200, by one launch and
# by two: 256 experts, 8192 pairs 6.8, 10.2, 12800 13.6, 9.9; 128 experts, 16384 7.6, 9.5; 8
# experts, 8192 4.8, 6.6. By one that read all ids twice, and by two: 256 experts, 32768 33.0, 9.8,
# 65536 63.1, 15.5, 131072 123, 35.5
ONE_LAUNCH_PAIRS = 16384
ONE_LAUNCH_READS = 1 << 21
CHUNK = 256
# of pairs, those in a run whose ranks are found by themselves
RUN = 64
# of a chunk, those that others are compared with at a time
OTHERS = 32
# chunks whose counts a step adds
BLOCK_CHUNKS = 32


@triton.jit
def _experts_of(ids_ptr, pair, n_pairs, E):
    """Experts of pairs, -1 where there is none."""
    ids = tl.load(ids_ptr + pair, mask=pair < n_pairs, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def _count(flags):
    return tl.sum(tl.sum(flags.to(tl.int32), 1), 0)


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
    # all pairs at least
    BLOCK_PAIRS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # program E stands behind the last expert, and has no pairs
    e = tl.program_id(0)
    pair = tl.arange(0, BLOCK_PAIRS // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    ids = _experts_of(ids_ptr, pair, n_pairs, E)
    first = _count((ids >= 0) & (ids < e))
    end = first + _count(ids == e)
    if e < E:
        tl.store(offs_ptr + e, end)
    if tiles_ptr is not None:
        write_tiles_of(tiles_ptr, e, first, end, E, n_tiles, BLOCK_M, BLOCK_SLOTS)
    if end > first:
        mine = (ids == e).to(tl.int32)
        # ranks within runs, then of runs: a scan of all at once is one long chain
        counts = tl.sum(mine, 1)
        before = tl.cumsum(counts, 0) - counts
        rank = before[:, None] + tl.cumsum(mine, 1) - 1
        tl.store(order_ptr + first + rank, pair, mask=mine != 0)


@triton.jit(do_not_specialize=["n_pairs"])
def _count_kernel(
    ids_ptr,
    counts_ptr,
    n_pairs,
    E,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts [chunks, BLOCK_E]: pairs of each chunk with each expert; sentinels are not counted."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    ids = _experts_of(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), n_pairs, E)
    counts = tl.histogram(ids, BLOCK_E, mask=ids >= 0)
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["n_pairs", "n_tiles", "n_chunks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    offs_ptr,
    tiles_ptr,
    n_pairs,
    E,
    n_tiles,
    n_chunks,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the pairs of chunk program_id to where they belong."""
    chunk = tl.program_id(0)
    of_chunk = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + of_chunk
    experts = tl.arange(0, BLOCK_E)
    # ids are older than the launch ahead
    mine = _experts_of(ids_ptr, pair, n_pairs, E)
    rank = tl.zeros((CHUNK,), tl.int32)
    # unrolled, so that all loads are under way at once
    for start in tl.static_range(0, CHUNK, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = _experts_of(ids_ptr, chunk * CHUNK + other, n_pairs, E)
        earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < of_chunk[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BLOCK_CHUNKS, BLOCK_E), tl.int32)
    before = total
    for start in range(0, n_chunks, BLOCK_CHUNKS):
        c = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        at = counts_ptr + c * BLOCK_E + experts[None, :]
        counts = tl.load(at, mask=c < n_chunks, other=0)
        total += counts
        before += tl.where(c < chunk, counts, 0)
    total = tl.sum(total, 0)
    before = tl.sum(before, 0)
    ends = tl.cumsum(total, 0)
    firsts = ends - total
    row = tl.gather(firsts + before, tl.maximum(mine, 0), 0) + rank
    tl.store(order_ptr + row, pair, mask=mine >= 0)
    if chunk == 0:
        tl.store(offs_ptr + experts, ends, mask=experts < E)
    if tiles_ptr is not None:
        # experts by turns, and as in _route_kernel one behind the last
        for e in range(chunk, E + 1, n_chunks):
            first = tl.sum(tl.where(experts < e, total, 0), 0)
            end = first + tl.sum(tl.where(experts == e, total, 0), 0)
            write_tiles_of(tiles_ptr, e, first, end, E, n_tiles, BLOCK_M, BLOCK_SLOTS)


_launch_route = Launcher(_route_kernel)
_launch_count = Launcher(_count_kernel)
_launch_place = Launcher(_place_kernel)


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
    ids = ids.contiguous()
    written = order, offs, tiles if listed else None
    early = {"launch_pdl": True} if pdl else {}
    if n_pairs <= ONE_LAUNCH_PAIRS and n_pairs * n_experts <= ONE_LAUNCH_READS:
        block = max(128, 1 << (n_pairs - 1).bit_length())
        _launch_route(
            (n_experts + 1,),
            ids,
            *written,
            n_pairs,
            n_experts,
            n_tiles,
            BLOCK_M=block_m,
            BLOCK_PAIRS=block,
            RUN=RUN,
            BLOCK_SLOTS=BLOCK_SLOTS,
            PDL=pdl,
            num_warps=max(min(4, block // 128), block // 1024),
            **early,
        )
        return order, offs, tiles
    n_chunks = -(-n_pairs // CHUNK)
    block_e = block_of_experts(n_experts)
    counts = torch.empty(n_chunks, block_e, dtype=torch.int32, device=ids.device)
    sizes = dict(CHUNK=CHUNK, BLOCK_E=block_e)
    _launch_count(
        (n_chunks,), ids, counts, n_pairs, n_experts, **sizes, PDL=pdl, num_warps=8, **early
    )
    _launch_place(
        (n_chunks,),
        ids,
        counts,
        *written,
        n_pairs,
        n_experts,
        n_tiles,
        n_chunks,
        BLOCK_M=block_m,
        **sizes,
        OTHERS=OTHERS,
        BLOCK_CHUNKS=BLOCK_CHUNKS,
        BLOCK_SLOTS=BLOCK_SLOTS,
        PDL=pdl,
        num_warps=8,
        **early,
    )
    return order, offs, tiles
