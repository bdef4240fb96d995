"""Tiles of kernels/int8_hopper.py, and which of them serves a problem: plan_int8(p, arch).

What dispatch_hopper.py says of its tiles holds for these, with fewer constants: steps are as long
as a tile's block_k, and the first to arrive is in START. Scales that change within K cost more for
each sum: C128 us for 8192 of them and 128 k where tokens have a scale for each 128 k, C32 where
scales of either side change within 128 k. That is why only tiles of few tokens serve the latter.

The constants were fitted, by hand with what benchmarks/fit.py minimises, to
benchmarks/results/tune_int8.csv: seven shapes, 2 to 4096 tokens, in two runs on H200s, beside x
rounded for W4A16's tiles and W4A16. Those times include quantising, taken for 1.2 us and 1.2e-6 us
an activation, which int8_us() leaves out, as it is paid for any kernel. At the 182 of 203 points
whose choice was measured it takes 1.000 times the best measured tile in the middle, 1.066 at 95 %
and at most 1.121. No shape was left out of the fit.

The tile with two runs was fitted to a later run, of the rows without W4A16's time: the same shapes
from 96 tokens, each point's tiles in turn. There 88 of 91 choices were measured, at 1.000 times the
best in the middle, 1.051 at 95 % and at most 1.143; without that tile 1.139 and 1.186.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from w4tensor.dispatch import HOPPER, Arch, Problem
from w4tensor.dispatch_hopper import SPLITS, WORKSPACE_BYTES, step_us

__all__ = [
    "TILES",
    "Int8Plan",
    "Int8Tile",
    "int8_us",
    "is_fine",
    "plan_int8",
    "quantizing_overlaps",
    "serves_int8",
]

# steps of a slice below which starting it costs more than it saves
MIN_STEPS = 2


@dataclass(frozen=True, slots=True)
class Int8Plan:
    """One launch of kernels/int8_hopper.py.

    Fields:
        block_m, block_n: tokens and rows of a program. block_k: k of a step, 128 or 256.
        runs: of tokens, multiplied one after another, so that fewer registers do.
        split_k: slices of K. whole: of how many tiles K is not cut, those that fill the card.
        group_n: row tiles that share x in L2.
        pdl: start under programmatic dependent launch and read weights before the kernel ahead is
            done. overlap: do so while x is still being quantised.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    whole: int = 0
    group_n: int = 8
    pdl: bool = True
    overlap: bool = True
    runs: int = 1

    @property
    def max_registers(self) -> int:
        """Of a thread; 0: any."""
        return RUNS_REGISTERS if self.runs > 1 else 0

    @property
    def name(self) -> str:
        after = f" after {self.whole}" if self.whole else ""
        runs = f"{self.runs}*" if self.runs > 1 else ""
        return f"int8 tile {runs}{self.block_m // self.runs}x{self.block_n}/{self.split_k}{after}"


@dataclass(frozen=True, slots=True)
class Int8Tile:
    """A tile, and what a step of it costs (above)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    resident: int
    alone: float
    shared: float
    runs: int = 1

    @property
    def fine(self) -> bool:
        """Whether it serves scales that change within 128 k."""
        return self.block_m == 8

    @property
    def name(self) -> str:
        runs = f"{self.runs}*" if self.runs > 1 else ""
        return f"{runs}{self.block_m // self.runs}x{self.block_n}x{self.block_k}"

    def serves(self, p: Problem) -> bool:
        """Runs have no registers left for scales of tokens that change, nor for zero points."""
        if self.runs > 1:
            return p.act_group_size == -1 and p.symmetric
        return self.fine or not is_fine(p)

    def plan(
        self, split_k: int = 1, whole: int = 0, pdl: bool = True, overlap: bool = True
    ) -> Int8Plan:
        """The plan for this tile, cut as asked."""
        shape = self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages
        return Int8Plan(*shape, split_k, whole, pdl=pdl, overlap=overlap, runs=self.runs)


TILES = (
    Int8Tile(8, 64, 256, 4, 4, resident=5, alone=0.499, shared=0.327),
    Int8Tile(8, 128, 256, 4, 3, resident=3, alone=0.573, shared=0.460),
    Int8Tile(16, 64, 256, 4, 4, resident=4, alone=0.497, shared=0.279),
    Int8Tile(16, 128, 256, 4, 3, resident=3, alone=0.695, shared=0.490),
    Int8Tile(32, 64, 256, 4, 3, resident=4, alone=0.364, shared=0.250),
    Int8Tile(64, 64, 128, 4, 4, resident=4, alone=0.562, shared=0.219),
    Int8Tile(64, 128, 128, 4, 4, resident=2, alone=0.607, shared=0.420),
    Int8Tile(128, 64, 128, 4, 3, resident=3, alone=0.823, shared=0.331),
    Int8Tile(128, 64, 128, 4, 2, resident=4, alone=1.16, shared=0.32, runs=2),
)
# registers of a thread with which four of the last share a multiprocessor
RUNS_REGISTERS = 128
START = 0.704
ADD_SLICE = 0.639
ADD_PART = 0.607
# a us; of L2, a us and a multiprocessor
READ_BYTES = 3.704e6
L2_BYTES = 77.8e3
C128 = 0.0442
C32 = 0.401
# tokens whose quantising programs leave those of a product room on every multiprocessor
FEW_TO_QUANTIZE = 32


def is_fine(p: Problem) -> bool:
    """Whether scales change within 128 k: each change costs two instructions a sum."""
    groups = [
        g for g in (p.group_size if p.group_size != p.k else 0, p.act_group_size or 0) if g > 0
    ]
    return min(groups, default=128) < 128


def quantizing_overlaps(p: Problem, evenly: bool) -> bool:
    """Whether the product should start while activations are still being quantised.

    It then has its first weights sooner, a microsecond or less; but its programs are placed where
    the quantising ones leave room, which may be two on one multiprocessor and none on another
    (4096 x 4096, 96 tokens, groups of 32: 15.7 us, not 12.5; per token, 8192 x 8192, 192 tokens: 52
    us, not 43). With many tokens it starts early only where they cannot: `evenly`, where no
    multiprocessor has room for more of its programs than its share. Few tokens leave them room
    everywhere; what is excepted is what was measured to lose: long K, which has more to quantise.
    """
    if p.m > FEW_TO_QUANTIZE:
        return evenly
    return p.act_group_size == -1 or p.k <= 4096


def serves_int8(p: Problem, arch: Arch) -> bool:
    """Whether the kernel can: one weight, whose bytes have one scale each, and tiles for it."""
    known = p.group_size >= 32 or p.group_size == p.k
    few = p.m <= max(tile.block_m for tile in TILES if tile.fine)
    return arch.capability[0] == HOPPER and p.batch == 1 and known and (few or not is_fine(p))


def plan_int8(p: Problem, arch: Arch) -> Int8Plan:
    """The plan for a problem that serves_int8() accepts.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> p = Problem(m=8, n=28672, k=4096, group_size=128, act="int8", act_group_size=32)
    >>> plan_int8(p, h200).name
    'int8 tile 8x128/1'
    """
    return plan_of(p, arch, *best(p, arch.num_sms))


def plan_of(p: Problem, arch: Arch, tile: Int8Tile, split_k: int, whole: int) -> Int8Plan:
    """The plan for one of candidates()."""
    programs = whole + (_tiles(p, tile) - whole) * split_k
    evenly = tile.resident <= -(-programs // arch.num_sms)
    return tile.plan(split_k, whole, overlap=quantizing_overlaps(p, evenly))


def int8_us(p: Problem, arch: Arch) -> float:
    """Microseconds that plan_int8() takes on an H200, without those that quantise x."""
    return predicted_us(p, arch.num_sms, *best(p, arch.num_sms))


def best(p: Problem, num_sms: int) -> tuple[Int8Tile, int, int]:
    """The candidate that is predicted to be the fastest."""
    return min(candidates(p, num_sms), key=lambda choice: predicted_us(p, num_sms, *choice))


def candidates(p: Problem, num_sms: int) -> Iterator[tuple[Int8Tile, int, int]]:
    """Tiles with as many slices as their K may have, and how many tiles are not cut."""
    for tile in TILES:
        # no more than half of a tile may be empty
        if tile.block_m >= 2 * max(p.m, 8) or not tile.serves(p):
            continue
        # far too small, and not measured
        if tile.block_m < min(p.m, 64) / 2 or 8 * tile.block_m < min(p.m, 1024):
            continue
        tiles = _tiles(p, tile)
        fill = tile.resident * num_sms
        for split_k in SPLITS:
            whole = tiles // fill * fill if split_k > 1 else 0
            cut = tiles - whole
            sums = cut * (split_k - 1) * tile.block_m * tile.block_n * 4
            few = -(-p.k // tile.block_k) < MIN_STEPS * split_k
            if split_k == 1 or not (
                few or cut == 0 or cut * split_k > 1.3 * fill or sums > WORKSPACE_BYTES
            ):
                yield tile, split_k, whole


def _tiles(p: Problem, tile: Int8Tile) -> int:
    return -(-p.n // tile.block_n) * -(-p.m // tile.block_m)


def predicted_us(p: Problem, num_sms: int, tile: Int8Tile, split_k: int, whole: int) -> float:
    """Microseconds on an H200, as the formula at the top of this file says."""
    scales = C32 if is_fine(p) else C128 if (p.act_group_size or 0) > 0 else 0.0
    scales *= tile.block_m * tile.block_n / 8192 * tile.block_k / 128
    alone, shared = tile.alone + scales, tile.shared + scales
    steps = -(-p.k // tile.block_k)
    sliced = (_tiles(p, tile) - whole) * split_k
    us = 0.0
    for programs, slices in ((whole, 1), (sliced, split_k)):
        us += -(-steps // slices) * step_us(programs, num_sms, tile.resident, alone, shared)
    weight_bytes = 0.5 + 2 / p.group_size
    l2_bytes = _tiles(p, tile) * p.k * (tile.block_m + weight_bytes * tile.block_n)
    us = max(us, l2_bytes / (L2_BYTES * num_sms))
    if split_k > 1:
        parts = sliced / num_sms * tile.block_m * tile.block_n / 4096
        us += ADD_SLICE * split_k + ADD_PART * parts
    return START + max(us, p.n * p.k * weight_bytes / READ_BYTES)
