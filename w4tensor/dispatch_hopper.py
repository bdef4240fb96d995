"""Tiles of kernels/gemm_hopper.py, and which of them serves a problem: plan_hopper(problem, arch).

Up to RESIDENT programs of a tile share a multiprocessor. A step of 128 k takes a program `alone` us
when it has the multiprocessor to itself; several take `shared` us each, if that is more; scales
finer than a step add to both. With P programs of one tile or slice on S multiprocessors, of
ceil(K / 128 / slices) steps, and FILL more for the first to arrive,

    us = (steps + FILL) * sum over rounds of RESIDENT * S programs of
             max(alone, shared * programs on a multiprocessor)

Where RESIDENT * S programs share the tiles, FILL is there once, and if they share them evenly, each
has as many steps as any other. It is never less than FILL * alone and the time in which all tiles'
x and weights come from L2, at L2_BYTES for each multiprocessor, or L2_FAR_BYTES where x is large:
tiles of 64 rows at many tokens are bound by that. Where sums are added, that is ADD_SLICE * slices
or ADD_EVEN more, and ADD_PART * tile / 4096 for each sum that a multiprocessor stores. Nor is it
less than the time of reading the weights at READ_BYTES, or where scales are finer than a step at
READ_FINE_BYTES. The candidate with the least predicted time is taken.

The constants are what `python -m benchmarks.fit` made of benchmarks/results/tune.csv, from those
before: 22 shapes, 3 to 4096 tokens, each point's plans timed in turn in one run on an H200, those
of 7 slices and more in a second one. Where programs may share tiles, those plans and the two to
four best others were timed anew in one run, and rows of older ones dropped. At 339 points of that
file the choice takes 1.000 times the best measured plan in the middle, 1.058 at 95 % and at most
1.153. Without one shape, 22 times, the fit takes 1.000, 1.101 and 1.334 on that shape, at the 331
of 339 points that have its choice.

`python -m benchmarks.tune --regret` of that file says what the rule loses where, and
`python -m benchmarks.fit --leave-out` on shapes that are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from w4tensor.dispatch import HOPPER, Arch, Problem

__all__ = [
    "TILES",
    "HopperPlan",
    "HopperTile",
    "hopper_us",
    "is_placed_evenly",
    "plan_hopper",
    "serves",
]

SPLITS = (1, 2, 3, 4, 5, 6, 8, 12)
# steps of a slice below which starting it costs more than it saves
MIN_STEPS = 3
# rows and columns of sums that leave no registers for zero points (tests/kernels/lowering)
NO_ZERO_POINTS = (96, 128)
# steps of a tile from which programs may share tiles: an end and a beginning of as many as a ring
# has stages, and some more
MIN_SHARED_STEPS = 12
# what the partial sums of a split may take
WORKSPACE_BYTES = 32 << 20
# of a multiprocessor, for the stages of its programs
SHARED_BYTES = 227 << 10


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """One launch of kernels/gemm_hopper.py.

    Fields:
        block_m, block_n: tokens and rows of a program.
        split_k: slices of K, a program each.
        programs: instead, how many programs share the tiles, if there are more tiles than those
            (kernels/gemm_hopper_persistent.py); 0: a program for each tile or slice.
        even: whether they share the last tiles' steps evenly, or have whole tiles.
            Where the accelerator does not store y (fp32, an odd N), each tile has a program.
        group_n: row tiles that share x in L2.
        pdl: start under programmatic dependent launch and read weights before the kernel ahead is
            done.
        pipelined: one half of a step is unpacked while the other is multiplied, which takes
            registers; otherwise more programs share a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    programs: int = 0
    even: bool = False
    group_n: int = 8
    pdl: bool = False
    pipelined: bool = True

    @property
    def name(self) -> str:
        how = "" if self.pipelined else " unpipelined"
        shared = f" by {self.programs}{' evenly' if self.even else ''}"
        parts = shared if self.programs else f"/{self.split_k}"
        return f"gemm {self.block_m}x{self.block_n}{parts}{how}"


@dataclass(frozen=True, slots=True)
class HopperTile:
    """A tile, and what a step of it costs (above).

    Fields:
        coarse_slices: the fewest slices that it may serve by where groups are not finer than a
            step, if it is not shared.
        shares: whether programs may share its tiles. Not measured to be of use for the others.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int
    alone: float
    shared: float
    pipelined: bool = True
    coarse_slices: int = 1
    shares: bool = False


class Candidate(NamedTuple):
    """A tile, and how its tiles are divided among programs: as HopperPlan has it."""

    tile: HopperTile
    split_k: int
    programs: int
    even: bool


TILES = (
    HopperTile(8, 64, 4, 4, resident=5, alone=0.410, shared=0.186),
    HopperTile(8, 128, 4, 4, resident=3, alone=0.650, shared=0.252, shares=True),
    HopperTile(16, 64, 4, 4, resident=5, alone=0.311, shared=0.182),
    HopperTile(16, 128, 4, 4, resident=3, alone=0.438, shared=0.349, shares=True),
    HopperTile(32, 64, 4, 4, resident=4, alone=0.335, shared=0.231),
    HopperTile(32, 128, 4, 4, resident=2, alone=0.679, shared=0.321, shares=True),
    HopperTile(64, 64, 4, 4, resident=2, alone=0.364, shared=0.280),
    HopperTile(64, 128, 4, 4, resident=2, alone=0.529, shared=0.488, shares=True),
    HopperTile(96, 64, 4, 4, resident=1, alone=0.461, shared=0.461),
    HopperTile(96, 64, 4, 3, resident=2, alone=0.712, shared=0.295),
    HopperTile(96, 128, 4, 3, resident=2, alone=1.252, shared=0.586, shares=True),
    HopperTile(128, 64, 4, 3, resident=2, alone=0.741, shared=0.358, shares=True),
    HopperTile(128, 64, 4, 4, resident=1, alone=0.495, shared=0.495),
    HopperTile(128, 128, 8, 3, resident=1, alone=0.786, shared=0.786, shares=True),
    HopperTile(192, 64, 4, 2, resident=2, alone=1.155, shared=0.485),
    HopperTile(192, 64, 4, 3, resident=1, alone=0.641, shared=0.641),
    HopperTile(256, 128, 8, 3, resident=1, alone=1.404, shared=1.404, shares=True),
    # 16 tokens, us: 6144 x 4096 7.8 by 4 slices, pipelined 8.9; 8192 x 28672 43 by 8, 49 by 2; but
    # (in earlier runs) 28672 x 4096 25 whole, 23. The last: 12352 x 2048, 256 tokens, 20, 26
    HopperTile(16, 64, 4, 4, 6, alone=0.422, shared=0.166, pipelined=False, coarse_slices=4),
    HopperTile(
        16, 128, 4, 3, 4, alone=0.513, shared=0.300, pipelined=False, coarse_slices=4, shares=True
    ),
    HopperTile(
        32, 128, 4, 4, 3, alone=0.795, shared=0.307, pipelined=False, coarse_slices=4, shares=True
    ),
    HopperTile(
        64, 128, 4, 3, 3, alone=1.204, shared=0.437, pipelined=False, coarse_slices=4, shares=True
    ),
    HopperTile(128, 64, 4, 2, 3, alone=1.109, shared=0.397, pipelined=False),
)
FILL = 2.664
ADD_SLICE = 0.222
ADD_PART = 1.127
ADD_EVEN = 1.356
# a us; of L2, a us and a multiprocessor
READ_BYTES = 4.366e6
READ_FINE_BYTES = 3.807e6
L2_BYTES = 97.837e3
# the same where x has more bytes than this
L2_FAR_BYTES = 80.730e3
NEAR_BYTES = 4 << 20
# what scales finer than a step add to `alone` and to `shared`, and to both in large tiles
FINE_ALONE = 0.180
FINE_SHARED = 0.026
FINE_LARGE = 0.077
LARGE_M = 96
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
    >>> p = Problem(m=1024, n=28672, k=4096, group_size=128, act="bf16")
    >>> plan_hopper(p, h200).name
    'gemm 256x128 by 132'
    """
    tile, split_k, programs, even = _best(p, arch.num_sms)
    early = split_k > 1 or p.m >= PDL_MIN_M or p.n * p.k <= PDL_WEIGHTS
    return plan_of(tile, split_k, programs, even, pdl=early)


def plan_of(tile: HopperTile, split_k: int, programs: int, even: bool, pdl: bool) -> HopperPlan:
    """The plan of a candidate."""
    shape = tile.block_m, tile.block_n, tile.num_warps, tile.num_stages
    return HopperPlan(*shape, split_k, programs, even, pdl=pdl, pipelined=tile.pipelined)


def hopper_us(p: Problem, arch: Arch) -> float:
    """Microseconds that plan_hopper() takes on an H200."""
    return predicted_us(p, arch.num_sms, *_best(p, arch.num_sms))


def is_placed_evenly(p: Problem, plan: HopperPlan, arch: Arch, x_bytes: int = 2) -> bool:
    """Whether no multiprocessor has the memory for more of the plan's programs than its share."""
    programs = plan.programs or _tiles(p, plan) * plan.split_k
    # 128 numbers of each token, 128 codes of each row
    stage_bytes = 128 * x_bytes * plan.block_m + 64 * plan.block_n
    return SHARED_BYTES // (plan.num_stages * stage_bytes) <= -(-programs // arch.num_sms)


def _best(p: Problem, num_sms: int) -> Candidate:
    return min(candidates(p, num_sms), key=lambda choice: predicted_us(p, num_sms, *choice))


def candidates(p: Problem, num_sms: int) -> Iterator[Candidate]:
    """Tiles with as many slices as their K may have, or with programs that share them."""
    steps = -(-p.k // 128)
    for tile in TILES:
        # no more than half of a tile may be empty
        if tile.block_m >= 2 * max(p.m, 8):
            continue
        # far too small, and not measured
        if tile.block_m < min(p.m, 64) / 2 or 8 * tile.block_m < min(p.m, 1024):
            continue
        without_zero_points = (tile.block_m, tile.block_n) == NO_ZERO_POINTS
        if without_zero_points and not p.symmetric:
            continue
        tiles = _tiles(p, tile)
        fill = tile.resident * num_sms
        least = tile.coarse_slices if p.group_size >= 128 else 1
        for split_k in SPLITS:
            sums = tiles * (split_k - 1) * tile.block_m * tile.block_n * 4
            few = steps < MIN_STEPS * split_k
            many = tiles * split_k > 2 * fill
            too_much = split_k > 1 and (few or many or sums > WORKSPACE_BYTES)
            if split_k >= least and not too_much:
                yield Candidate(tile, split_k, 0, False)
        # steps of up to two tiles a program, times programs, are counted in 32 bits
        counted = 2 * fill * fill * steps < 1 << 31
        # no registers for what ragged steps of fine groups take
        too_ragged = without_zero_points and p.group_size < 128 and p.k % 128
        shares = tile.shares and steps >= MIN_SHARED_STEPS and counted and not too_ragged
        if shares and tiles > fill:
            yield Candidate(tile, 1, fill, False)
            if tiles % fill:
                yield Candidate(tile, 1, fill, True)


def _tiles(p: Problem, of: HopperTile | HopperPlan) -> int:
    return -(-p.n // of.block_n) * -(-p.m // of.block_m)


def step_us(programs: int, num_sms: int, resident: int, alone: float, shared: float) -> float:
    """What a step of `programs` takes, summed over rounds of as many as the card holds."""
    rounds, rest = divmod(programs, resident * num_sms)
    us = rounds * max(alone, resident * shared)
    return us + max(alone, -(-rest // num_sms) * shared) if rest else us


def predicted_us(
    p: Problem, num_sms: int, tile: HopperTile, split_k: int, programs: int, even: bool
) -> float:
    """Microseconds on an H200, as the formula at the top of this file says."""
    alone, shared = tile.alone, tile.shared
    if p.group_size < 128:
        large = tile.block_m >= LARGE_M
        alone += FINE_LARGE if large else FINE_ALONE
        shared += FINE_LARGE if large else FINE_SHARED
    steps = -(-p.k // 128)
    tiles = _tiles(p, tile)
    full = max(alone, tile.resident * shared)
    if even:
        us = (tiles * steps / programs + FILL) * full
    else:
        per_step = step_us(tiles * split_k, num_sms, tile.resident, alone, shared)
        us = -(-steps // split_k) * per_step + FILL * (full if programs else per_step)
    weight_bytes = 0.5 + 2 / p.group_size
    l2_bytes = tiles * p.k * (2 * tile.block_m + weight_bytes * tile.block_n)
    rate = L2_BYTES if 2 * p.m * p.k <= NEAR_BYTES else L2_FAR_BYTES
    us = max(us, FILL * alone + l2_bytes / (rate * num_sms))
    if split_k > 1 or even:
        sums = programs if even else tiles * split_k
        us += ADD_PART * sums / num_sms * tile.block_m * tile.block_n / 4096
        us += ADD_EVEN if even else ADD_SLICE * split_k
    read_bytes = READ_FINE_BYTES if p.group_size < 128 else READ_BYTES
    return max(us, p.n * p.k * weight_bytes / read_bytes)
