"""Tiles of kernels/gemm_hopper.py, and which of them serves a problem: plan_hopper(problem, arch).

Up to RESIDENT programs of a tile share a multiprocessor. A step of 128 k takes a program `alone` us
when it has the multiprocessor to itself; several take `shared` us each, if that is more; scales
finer than a step add to both. With P programs on S multiprocessors, of ceil(K / 128 / slices)
steps, and FILL more for the first to arrive,

    us = (steps + FILL) * sum over rounds of RESIDENT * S programs of
             max(alone, shared * programs on a multiprocessor)

once for the tiles that are not cut and once for the slices of the others. Where sums of slices are
added, that is ADD + ADD_SLICE * slices more, and ADD_PART * tile / 4096 for each sum that a
multiprocessor stores. The time is never less than that of reading the weights at READ_BYTES, and
the tile and the split with the least predicted time are taken.

The constants were fitted to the rows of 4 to 1024 tokens of ten shapes on an H200, in
benchmarks/results/tune.csv; none of them has 32 tokens, and tiles of 32 are never the best of them.
Over those points the choice takes 1.000 times the best measured plan in the middle, 1.08 at 95 %
and 1.14 at most. Fitted ten times without the rows of one shape, and tried on that shape, it
took 1.000, 1.110 and 1.164 times the best measured tile. That figure is a little too good: the form
of the formula and how closely it is fitted were chosen by it. And it is of a fit before the two
tiles of 8 tokens were fitted once more, closer, to all shapes (6144 x 4096, 4 tokens: from 1.14 to
1.00).
`python -m benchmarks.tune --regret` of that file says what the rule loses where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from w4tensor.dispatch import HOPPER, Arch, Problem

__all__ = ["TILES", "HopperPlan", "HopperTile", "plan_hopper"]

SPLITS = (1, 2, 3, 4, 6, 8)
# steps of a slice below which starting it costs more than it saves
MIN_STEPS = 3
# what the partial sums of a split may take
WORKSPACE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """One launch of kernels/gemm_hopper.py.

    Fields:
        block_m, block_n: tokens and rows of a program.
        split_k: slices of K. whole: of how many tiles K is not cut, those that fill the card.
        group_n: row tiles that share x in L2.
        pdl: start under programmatic dependent launch and read weights before the kernel ahead is
            done.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    whole: int = 0
    group_n: int = 8
    pdl: bool = False

    @property
    def name(self) -> str:
        after = f" after {self.whole}" if self.whole else ""
        return f"gemm {self.block_m}x{self.block_n}/{self.split_k}{after}"


@dataclass(frozen=True, slots=True)
class HopperTile:
    """A tile, and what a step of it costs (above)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int
    alone: float
    shared: float


TILES = (
    HopperTile(8, 64, 4, 4, resident=5, alone=0.391, shared=0.152),
    HopperTile(8, 128, 4, 4, resident=3, alone=0.556, shared=0.201),
    HopperTile(16, 64, 4, 4, resident=5, alone=0.314, shared=0.178),
    HopperTile(16, 128, 4, 4, resident=3, alone=0.439, shared=0.342),
    HopperTile(32, 64, 4, 4, resident=4, alone=0.308, shared=0.203),
    HopperTile(32, 128, 4, 4, resident=2, alone=0.466, shared=0.352),
    HopperTile(64, 64, 4, 4, resident=2, alone=0.338, shared=0.257),
    HopperTile(64, 128, 4, 4, resident=2, alone=0.501, shared=0.399),
    HopperTile(96, 64, 4, 4, resident=1, alone=0.369, shared=0.369),
    HopperTile(96, 64, 4, 3, resident=2, alone=0.481, shared=0.323),
    HopperTile(96, 128, 4, 3, resident=2, alone=0.767, shared=0.534),
    HopperTile(128, 64, 4, 3, resident=2, alone=0.523, shared=0.339),
    HopperTile(128, 64, 4, 4, resident=1, alone=0.443, shared=0.443),
    HopperTile(128, 128, 8, 3, resident=1, alone=0.728, shared=0.728),
    HopperTile(192, 64, 4, 2, resident=2, alone=0.893, shared=0.493),
    HopperTile(192, 64, 4, 3, resident=1, alone=0.553, shared=0.553),
    HopperTile(256, 128, 8, 3, resident=1, alone=1.179, shared=1.179),
)
FILL = 2.23
ADD = 0.31
ADD_SLICE = 0.49
ADD_PART = 1.62
# a us
READ_BYTES = 2.81e6
# what scales finer than a step add to `alone` and to `shared`
FINE_ALONE = 0.103
FINE_SHARED = 0.020
# tokens from which the next kernel's early programs never crowd out this one's, and weights
PDL_MIN_M = 32
PDL_WEIGHTS = 1 << 25


def serves(p: Problem, arch: Arch) -> bool:
    """Whether the kernel can: rows of x that the tensor memory accelerator reads, known groups."""
    return (
        arch.capability[0] == HOPPER
        and p.batch == 1
        and p.k % 8 == 0
        and (p.group_size >= 32 or p.group_size == p.k)
    )


def plan_hopper(p: Problem, arch: Arch) -> HopperPlan:
    """The plan for a problem that serves() accepts.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> p = Problem(m=256, n=28672, k=4096, group_size=128, act="bf16")
    >>> plan_hopper(p, h200).name
    'gemm 256x128/1'
    """
    sms = arch.num_sms
    tile, split_k, whole = min(candidates(p, sms), key=lambda choice: predicted_us(p, sms, *choice))
    return HopperPlan(
        tile.block_m,
        tile.block_n,
        tile.num_warps,
        tile.num_stages,
        split_k,
        whole,
        pdl=split_k > 1 or p.m >= PDL_MIN_M or p.n * p.k <= PDL_WEIGHTS,
    )


def candidates(p: Problem, num_sms: int) -> Iterator[tuple[HopperTile, int, int]]:
    """Tiles with as many slices as their K may have, and how many tiles are not cut."""
    for tile in TILES:
        # no more than half of a tile may be empty
        if tile.block_m >= 2 * max(p.m, 8):
            continue
        # far too small, and not measured
        if tile.block_m < min(p.m, 64) / 2 or 8 * tile.block_m < min(p.m, 1024):
            continue
        tiles = _tiles(p, tile)
        fill = tile.resident * num_sms
        for split_k in SPLITS:
            whole = tiles // fill * fill if split_k > 1 else 0
            sums = (tiles - whole) * (split_k - 1) * tile.block_m * tile.block_n * 4
            few = -(-p.k // 128) < MIN_STEPS * split_k
            many = (tiles - whole) * split_k > 2 * fill
            if split_k == 1 or not (few or many or sums > WORKSPACE_BYTES or tiles == whole):
                yield tile, split_k, whole


def _tiles(p: Problem, tile: HopperTile) -> int:
    return -(-p.n // tile.block_n) * -(-p.m // tile.block_m)


def predicted_us(p: Problem, num_sms: int, tile: HopperTile, split_k: int, whole: int) -> float:
    """Microseconds on an H200, as the formula at the top of this file says."""
    fine = p.group_size < 128
    alone = tile.alone + FINE_ALONE * fine
    shared = tile.shared + FINE_SHARED * fine
    steps = -(-p.k // 128)
    sliced = (_tiles(p, tile) - whole) * split_k
    us = 0.0
    for programs, slices in ((whole, 1), (sliced, split_k)):
        rounds, rest = divmod(programs, tile.resident * num_sms)
        step = rounds * max(alone, tile.resident * shared)
        if rest:
            step += max(alone, -(-rest // num_sms) * shared)
        us += (-(-steps // slices) + FILL) * step
    if split_k > 1:
        parts = sliced / num_sms * tile.block_m * tile.block_n / 4096
        us += ADD + ADD_SLICE * split_k + ADD_PART * parts
    return max(us, p.n * p.k * (0.5 + 2 / p.group_size) / READ_BYTES)
