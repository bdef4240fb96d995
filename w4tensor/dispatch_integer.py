"""Tiles of kernels/gemm_hopper.py for int8 x and integer scales: plan_integer(problem, arch).

All of K is summed in int32, so a tile pays for no scale within it (kernels/hopper_multiples.py).
What dispatch_hopper.py says of its tiles holds for these. A step is 128 k, and y has memory of its
own where programs share the tiles: only those that still leave room for as many programs do.

The constants were fitted, with what benchmarks/fit.py minimises, to benchmarks/results/
tune_integer.csv: 48 to 4096 tokens, each point's tiles, bf16, W4A16 and W4A8 with other scales in
turn, in three runs on H200s, tiles that were dropped among them. Those times include quantising,
taken for 1.2 us and 1.2e-6 us an activation, which integer_us() leaves out, as it is paid for any
kernel. At 75 of 78 points the choice was timed: it takes 1.000 times the best in the middle, 1.078
at 95 % and at most 1.105. No shape was left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from w4tensor.dispatch import HOPPER, Arch, Problem
from w4tensor.dispatch_hopper import (
    MIN_SHARED_STEPS,
    MIN_STEPS,
    NEAR_BYTES,
    SPLITS,
    WORKSPACE_BYTES,
    Candidate,
    HopperPlan,
    HopperTile,
    plan_of,
    step_us,
)

__all__ = ["TILES", "candidates", "integer_us", "plan_integer", "serves_integer"]

TILES = (
    HopperTile(64, 64, 4, 4, resident=4, alone=0.375, shared=0.169),
    HopperTile(64, 128, 4, 4, resident=3, alone=0.406, shared=0.315),
    HopperTile(128, 64, 4, 3, resident=3, alone=0.498, shared=0.197),
    HopperTile(128, 128, 8, 4, resident=2, alone=0.493, shared=0.413),
    HopperTile(128, 128, 4, 3, 2, alone=0.597, shared=0.445, pipelined=False, shares=True),
    HopperTile(256, 64, 4, 4, resident=1, alone=0.457, shared=0.457, shares=True),
    HopperTile(256, 128, 8, 4, resident=1, alone=0.746, shared=0.746, shares=True),
)
# tokens up to which the tiles of dispatch_int8.py are not slower
FEW_M = 32
FILL = 4.613
ADD_SLICE = 0.873
ADD_PART = 0.421
ADD_EVEN = 1.578
# a us; of L2, a us and a multiprocessor
READ_BYTES = 3.78e6
L2_BYTES = 97.5e3
L2_FAR_BYTES = 95.5e3
# of 128 rows, what multiples finer than a step add
FINE = 0.057


def serves_integer(p: Problem, arch: Arch) -> bool:
    """Whether the kernel can, and has tiles for so many tokens."""
    known = p.group_size >= 32 or p.group_size == p.k
    many = p.m > FEW_M and p.batch == 1
    return arch.capability[0] == HOPPER and p.integer_scales and known and many


def plan_integer(p: Problem, arch: Arch) -> HopperPlan:
    """The plan for a problem that serves_integer() accepts.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> sizes = dict(m=1024, n=28672, k=4096, group_size=128)
    >>> p = Problem(**sizes, act="int8", act_group_size=-1, integer_scales=True)
    >>> plan_integer(p, h200).name
    'gemm 256x128 by 132 evenly'
    """
    return plan_of(*_best(p, arch.num_sms), pdl=True)


def integer_us(p: Problem, arch: Arch) -> float:
    """Microseconds that plan_integer() takes on an H200, without those that quantise x."""
    return predicted_us(p, arch.num_sms, *_best(p, arch.num_sms))


def _best(p: Problem, num_sms: int) -> Candidate:
    return min(candidates(p, num_sms), key=lambda choice: predicted_us(p, num_sms, *choice))


def candidates(p: Problem, num_sms: int) -> Iterator[Candidate]:
    """Tiles with as many slices as their K may have, or with programs that share them."""
    steps = -(-p.k // 128)
    for tile in TILES:
        # no more than half of a tile may be empty; nor may it be far too small
        if tile.block_m >= 2 * p.m or 8 * tile.block_m < min(p.m, 1024):
            continue
        tiles = _tiles(p, tile)
        fill = tile.resident * num_sms
        for split_k in SPLITS:
            sums = tiles * (split_k - 1) * tile.block_m * tile.block_n * 4
            # a tile that is not pipelined has no registers for the sums of others
            few = steps < MIN_STEPS * split_k or not tile.pipelined
            many = tiles * split_k > 1.3 * fill
            if split_k == 1 or not (few or many or sums > WORKSPACE_BYTES):
                yield Candidate(tile, split_k, 0, False)
        # steps of up to two tiles a program, times programs, are counted in 32 bits
        counted = 2 * fill * fill * steps < 1 << 31
        if tile.shares and tiles > fill and steps >= MIN_SHARED_STEPS and counted:
            yield Candidate(tile, 1, fill, False)
            if tiles % fill:
                yield Candidate(tile, 1, fill, True)


def _tiles(p: Problem, of: HopperTile) -> int:
    return -(-p.n // of.block_n) * -(-p.m // of.block_m)


def predicted_us(
    p: Problem, num_sms: int, tile: HopperTile, split_k: int, programs: int, even: bool
) -> float:
    """Microseconds on an H200, as dispatch_hopper.py has them."""
    fine = FINE * tile.block_n / 128 if p.group_size < 128 else 0.0
    alone, shared = tile.alone + fine, tile.shared + fine
    steps = -(-p.k // 128)
    tiles = _tiles(p, tile)
    full = max(alone, tile.resident * shared)
    if even:
        us = (tiles * steps / programs + FILL) * full
    else:
        per_step = step_us(tiles * split_k, num_sms, tile.resident, alone, shared)
        us = -(-steps // split_k) * per_step + FILL * (full if programs else per_step)
    # with a multiple of a byte beside each scale
    weight_bytes = 0.5 + 3 / p.group_size
    l2_bytes = tiles * p.k * (tile.block_m + weight_bytes * tile.block_n)
    rate = L2_BYTES if p.m * p.k <= NEAR_BYTES else L2_FAR_BYTES
    us = max(us, FILL * alone + l2_bytes / (rate * num_sms))
    if split_k > 1 or even:
        sums = programs if even else tiles * split_k
        us += ADD_PART * sums / num_sms * tile.block_m * tile.block_n / 4096
        us += ADD_EVEN if even else ADD_SLICE * split_k
    return max(us, p.n * p.k * weight_bytes / READ_BYTES)
