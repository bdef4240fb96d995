"""Tiles of kernels/gemm_hopper.py, and which of them serves a problem: plan_hopper(problem, arch).

Up to RESIDENT programs of a tile share a multiprocessor. A step of 128 k takes a program `alone` us
when it has the multiprocessor to itself; several take `shared` us each, if that is more; scales
finer than a step add to both. With P programs on S multiprocessors, of ceil(K / 128 / slices)
steps, and FILL more for the first to arrive,

    us = (steps + FILL) * sum over rounds of RESIDENT * S programs of
             max(alone, shared * programs on a multiprocessor)

once for the tiles that are not cut and once for the slices of the others. It is never less than
FILL * alone and the time in which all tiles' x and weights come from L2, at L2_BYTES for each
multiprocessor, or L2_FAR_BYTES where x is large: tiles of 64 rows at many tokens are bound by that.
Where sums of slices are added, that is ADD_SLICE * slices more, ADD_PART * tile / 4096 for each sum
that a multiprocessor stores, and AFTER if some tiles are not cut. Nor is it less than the time of
reading the weights at READ_BYTES, or where scales are finer than a step at READ_FINE_BYTES. The
tile and the split with the least predicted time are taken.

The constants are what `python -m benchmarks.fit` made of benchmarks/results/tune.csv, from those
before: 22 shapes, 3 to 2048 tokens, each point's tiles timed in turn in one run on an H200, those
of 7 slices and more in a second one. At 307 points of that file the choice takes 1.000 times the
best measured plan in the middle, 1.061 at 95 % and at most 1.153. Without one shape, 22 times, the
fit takes 1.000, 1.091 and 1.334 on that shape, at the 302 of 307 points that have its choice.
L2_FAR_BYTES came after 129 points, whose choice a fit without it had changed, were timed on another
H200 with both choices: at many tokens tiles of 128 x 128 were up to 15 % faster there than those of
128 x 64. Where today's choice is one of the two (93 points), it loses 1.1 % on average.

`python -m benchmarks.tune --regret` of that file says what the rule loses where, and
`python -m benchmarks.fit --leave-out` on shapes that are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
# what the partial sums of a split may take
WORKSPACE_BYTES = 32 << 20
# of a multiprocessor, for the stages of its programs
SHARED_BYTES = 227 << 10


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """One launch of kernels/gemm_hopper.py.

    Fields:
        block_m, block_n: tokens and rows of a program.
        split_k: slices of K. whole: of how many tiles K is not cut, those that fill the card.
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
    whole: int = 0
    group_n: int = 8
    pdl: bool = False
    pipelined: bool = True

    @property
    def name(self) -> str:
        after = f" after {self.whole}" if self.whole else ""
        how = "" if self.pipelined else " unpipelined"
        return f"gemm {self.block_m}x{self.block_n}/{self.split_k}{after}{how}"


@dataclass(frozen=True, slots=True)
class HopperTile:
    """A tile, and what a step of it costs (above).

    Fields:
        coarse_slices: the fewest slices that it may serve by where groups are not finer than a
            step; if more than 1, all tiles are cut.
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


TILES = (
    HopperTile(8, 64, 4, 4, resident=5, alone=0.411, shared=0.185),
    HopperTile(8, 128, 4, 4, resident=3, alone=0.644, shared=0.246),
    HopperTile(16, 64, 4, 4, resident=5, alone=0.293, shared=0.180),
    HopperTile(16, 128, 4, 4, resident=3, alone=0.445, shared=0.333),
    HopperTile(32, 64, 4, 4, resident=4, alone=0.316, shared=0.219),
    HopperTile(32, 128, 4, 4, resident=2, alone=0.643, shared=0.321),
    HopperTile(64, 64, 4, 4, resident=2, alone=0.341, shared=0.278),
    HopperTile(64, 128, 4, 4, resident=2, alone=0.536, shared=0.454),
    HopperTile(96, 64, 4, 4, resident=1, alone=0.443, shared=0.443),
    HopperTile(96, 64, 4, 3, resident=2, alone=0.692, shared=0.295),
    HopperTile(96, 128, 4, 3, resident=2, alone=1.194, shared=0.562),
    HopperTile(128, 64, 4, 3, resident=2, alone=0.720, shared=0.327),
    HopperTile(128, 64, 4, 4, resident=1, alone=0.467, shared=0.467),
    HopperTile(128, 128, 8, 3, resident=1, alone=0.756, shared=0.756),
    HopperTile(192, 64, 4, 2, resident=2, alone=1.135, shared=0.485),
    HopperTile(192, 64, 4, 3, resident=1, alone=0.632, shared=0.632),
    HopperTile(256, 128, 8, 3, resident=1, alone=1.349, shared=1.349),
    # 16 tokens, us: 6144 x 4096 7.8 by 4 slices, pipelined 8.9; 8192 x 28672 43 by 8, 49 by 2; but
    # (in earlier runs) 28672 x 4096 25 whole, 23. The last: 12352 x 2048, 256 tokens, 20, 26
    HopperTile(16, 64, 4, 4, 6, alone=0.393, shared=0.158, pipelined=False, coarse_slices=4),
    HopperTile(16, 128, 4, 3, 4, alone=0.486, shared=0.294, pipelined=False, coarse_slices=4),
    HopperTile(32, 128, 4, 4, 3, alone=0.759, shared=0.288, pipelined=False, coarse_slices=4),
    HopperTile(64, 128, 4, 3, 3, alone=1.156, shared=0.431, pipelined=False, coarse_slices=4),
    HopperTile(128, 64, 4, 2, 3, alone=1.127, shared=0.344, pipelined=False),
)
FILL = 3.412
ADD_SLICE = 0.216
ADD_PART = 0.946
AFTER = 0.934
# a us; of L2, a us and a multiprocessor
READ_BYTES = 4.366e6
READ_FINE_BYTES = 3.807e6
L2_BYTES = 100.004e3
# the same where x has more bytes than this
L2_FAR_BYTES = 83.734e3
NEAR_BYTES = 4 << 20
# what scales finer than a step add to `alone` and to `shared`, and to both in large tiles
FINE_ALONE = 0.178
FINE_SHARED = 0.024
FINE_LARGE = 0.090
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
    'gemm 256x128/1'
    """
    tile, split_k, whole = _best(p, arch.num_sms)
    return HopperPlan(
        tile.block_m,
        tile.block_n,
        tile.num_warps,
        tile.num_stages,
        split_k,
        whole,
        pdl=split_k > 1 or p.m >= PDL_MIN_M or p.n * p.k <= PDL_WEIGHTS,
        pipelined=tile.pipelined,
    )


def hopper_us(p: Problem, arch: Arch) -> float:
    """Microseconds that plan_hopper() takes on an H200."""
    return predicted_us(p, arch.num_sms, *_best(p, arch.num_sms))


def is_placed_evenly(p: Problem, plan: HopperPlan, arch: Arch) -> bool:
    """Whether no multiprocessor has the memory for more of the plan's programs than its share."""
    tiles = -(-p.n // plan.block_n) * -(-p.m // plan.block_m)
    programs = plan.whole + (tiles - plan.whole) * plan.split_k
    # 128 numbers of each token, 128 codes of each row
    stage_bytes = 256 * plan.block_m + 64 * plan.block_n
    return SHARED_BYTES // (plan.num_stages * stage_bytes) <= -(-programs // arch.num_sms)


def _best(p: Problem, num_sms: int) -> tuple[HopperTile, int, int]:
    return min(candidates(p, num_sms), key=lambda choice: predicted_us(p, num_sms, *choice))


def candidates(p: Problem, num_sms: int) -> Iterator[tuple[HopperTile, int, int]]:
    """Tiles with as many slices as their K may have, and how many tiles are not cut."""
    for tile in TILES:
        # no more than half of a tile may be empty
        if tile.block_m >= 2 * max(p.m, 8):
            continue
        # far too small, and not measured
        if tile.block_m < min(p.m, 64) / 2 or 8 * tile.block_m < min(p.m, 1024):
            continue
        if not p.symmetric and (tile.block_m, tile.block_n) == NO_ZERO_POINTS:
            continue
        tiles = _tiles(p, tile)
        fill = tile.resident * num_sms
        least = tile.coarse_slices if p.group_size >= 128 else 1
        for split_k in SPLITS:
            whole = tiles // fill * fill if split_k > 1 else 0
            if split_k < least or (least > 1 and whole):
                continue
            sums = (tiles - whole) * (split_k - 1) * tile.block_m * tile.block_n * 4
            few = -(-p.k // 128) < MIN_STEPS * split_k
            many = (tiles - whole) * split_k > 2 * fill
            if split_k == 1 or not (few or many or sums > WORKSPACE_BYTES or tiles == whole):
                yield tile, split_k, whole


def _tiles(p: Problem, tile: HopperTile) -> int:
    return -(-p.n // tile.block_n) * -(-p.m // tile.block_m)


def step_us(programs: int, num_sms: int, resident: int, alone: float, shared: float) -> float:
    """What a step of `programs` takes, summed over rounds of as many as the card holds."""
    rounds, rest = divmod(programs, resident * num_sms)
    us = rounds * max(alone, resident * shared)
    return us + max(alone, -(-rest // num_sms) * shared) if rest else us


def predicted_us(p: Problem, num_sms: int, tile: HopperTile, split_k: int, whole: int) -> float:
    """Microseconds on an H200, as the formula at the top of this file says."""
    alone, shared = tile.alone, tile.shared
    if p.group_size < 128:
        large = tile.block_m >= LARGE_M
        alone += FINE_LARGE if large else FINE_ALONE
        shared += FINE_LARGE if large else FINE_SHARED
    steps = -(-p.k // 128)
    sliced = (_tiles(p, tile) - whole) * split_k
    us = 0.0
    for programs, slices in ((whole, 1), (sliced, split_k)):
        step = step_us(programs, num_sms, tile.resident, alone, shared)
        us += (-(-steps // slices) + FILL) * step
    weight_bytes = 0.5 + 2 / p.group_size
    l2_bytes = _tiles(p, tile) * p.k * (2 * tile.block_m + weight_bytes * tile.block_n)
    rate = L2_BYTES if 2 * p.m * p.k <= NEAR_BYTES else L2_FAR_BYTES
    us = max(us, FILL * alone + l2_bytes / (rate * num_sms))
    if split_k > 1:
        parts = sliced / num_sms * tile.block_m * tile.block_n / 4096
        us += ADD_SLICE * split_k + ADD_PART * parts + AFTER * (whole > 0)
    read_bytes = READ_FINE_BYTES if p.group_size < 128 else READ_BYTES
    return max(us, p.n * p.k * weight_bytes / read_bytes)
