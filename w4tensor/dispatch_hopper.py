"""Tiles of kernels/gemm_hopper.py, and which of them serves a problem: plan_hopper(problem, arch).

Up to RESIDENT programs of a tile share a multiprocessor. A step of 128 k takes a program `alone` us
when it has the multiprocessor to itself; several take `shared` us each, if that is more. With P
programs on S multiprocessors, of K / 128 / split_k steps, and FILL more for the first to arrive,

    us = (steps + FILL) * sum over rounds of RESIDENT * S programs of
             max(alone, shared * programs on a multiprocessor)
         + ADD + ADD_PART * split_k * tile / 4096    where sums of slices are added

and never less than reading the weights at READ_BYTES. The tile and the split with the least
predicted time are taken. The constants were fitted to benchmarks/results/tune.csv, the times of
every tile on an H200; `python -m benchmarks.tune --regret` of that file says what the rule loses to
the best measured tile.
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
    HopperTile(8, 64, 4, 4, resident=5, alone=0.311, shared=0.227),
    HopperTile(8, 128, 4, 4, resident=3, alone=0.499, shared=0.339),
    HopperTile(16, 64, 4, 4, resident=5, alone=0.318, shared=0.208),
    HopperTile(16, 128, 4, 4, resident=3, alone=0.406, shared=0.399),
    HopperTile(32, 64, 4, 4, resident=4, alone=0.284, shared=0.222),
    HopperTile(32, 128, 4, 4, resident=2, alone=0.424, shared=0.373),
    HopperTile(64, 64, 4, 4, resident=2, alone=0.410, shared=0.259),
    HopperTile(64, 128, 4, 4, resident=2, alone=0.481, shared=0.466),
    HopperTile(96, 64, 4, 4, resident=1, alone=0.430, shared=0.380),
    HopperTile(96, 64, 4, 3, resident=2, alone=0.440, shared=0.320),
    HopperTile(96, 128, 4, 3, resident=2, alone=0.620, shared=0.600),
    HopperTile(128, 64, 4, 3, resident=2, alone=0.457, shared=0.372),
    HopperTile(128, 64, 4, 4, resident=1, alone=0.434, shared=0.433),
    HopperTile(128, 128, 8, 3, resident=1, alone=0.745, shared=0.694),
    HopperTile(192, 64, 4, 2, resident=2, alone=0.650, shared=0.540),
    HopperTile(192, 64, 4, 3, resident=1, alone=0.620, shared=0.620),
    HopperTile(192, 128, 8, 3, resident=1, alone=1.040, shared=1.040),
    HopperTile(256, 128, 8, 3, resident=1, alone=1.337, shared=1.337),
)
FILL = 2.28
ADD = 1.67
ADD_PART = 0.69
# a us
READ_BYTES = 3.0e6
# what scales finer than a step add to `shared`
FINE_GROUPS = 1.29
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
    tile, split_k, whole = min(candidates(p, sms), key=lambda choice: predicted_us(p, *choice, sms))
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
        tiles = _tiles(p, tile)
        fill = tile.resident * num_sms
        for split_k in SPLITS:
            whole = tiles // fill * fill if split_k > 1 else 0
            sums = (tiles - whole) * (split_k - 1) * tile.block_m * tile.block_n * 4
            few = -(-p.k // 128) < MIN_STEPS * split_k
            if split_k == 1 or not (few or sums > WORKSPACE_BYTES or tiles == whole):
                yield tile, split_k, whole


def _tiles(p: Problem, tile: HopperTile) -> int:
    return -(-p.n // tile.block_n) * -(-p.m // tile.block_m)


def predicted_us(p: Problem, tile: HopperTile, split_k: int, whole: int, num_sms: int) -> float:
    """Microseconds on an H200, as the formula at the top of this file says."""
    shared = tile.shared * (FINE_GROUPS if p.group_size < 128 else 1.0)
    steps = -(-p.k // 128)
    us = 0.0
    for programs, slices in ((whole, 1), ((_tiles(p, tile) - whole) * split_k, split_k)):
        rounds, rest = divmod(programs, tile.resident * num_sms)
        step = rounds * max(tile.alone, tile.resident * shared)
        if rest:
            step += max(tile.alone, -(-rest // num_sms) * shared)
        us += (steps / slices + FILL) * step
    if split_k > 1:
        us += ADD + ADD_PART * split_k * tile.block_m * tile.block_n / 4096
    return max(us, p.n * p.k * (0.5 + 2 / p.group_size) / READ_BYTES)
