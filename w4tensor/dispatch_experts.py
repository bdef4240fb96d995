"""Which kernels, with which tiles, serve an experts block: plan_experts(problem, arch) -> plan.

Integers and a frozen Arch in, frozen dataclasses out, as in dispatch.py. Needs no GPU, no torch and
no triton. Two paths:

    pairs      few tokens: each (token, slot) pair reads its expert's weights, without a sort
    grouped    pairs sorted by expert on the device; a tile of rows reads its expert's weights once

The border is where the pairs of a token batch begin to share experts, so that reading an expert
once pays for a sort and an ordered sum: REREADS. Where few rows share an expert's weights, their
bytes decide: 16-bit kernels read either format of the weights, and where activations are promised
to be int8, they multiply what the codes mean. Tiles of int8 rows are faster from INT8_ROWS on, or
on a Hopper where scales are coarse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from w4tensor.dispatch import HOPPER, KWIDTH_2_EVERYWHERE, MIN_CAPABILITY, Arch
from w4tensor.dispatch_gemv import plan_gemv, serves_gemv
from w4tensor.dispatch_hopper import FILL
from w4tensor.errors import Unsupported
from w4tensor.plans_experts import (
    ActQuantGroupedPlan,
    ExpertsPlan,
    FewPlan,
    GroupedPlan,
    HopperGroupedPlan,
    HopperInt8GroupedPlan,
    PairsPlan,
    RowsPlan,
)

__all__ = [
    "ExpertsProblem",
    "plan_experts",
    "plan_gathered",
    "plan_grouped",
    "plan_pairs",
]

BLOCK_K = 128
# pairs for each expert that they hit, on average, above which they are sorted
REREADS = 1.15
# pairs above which they are sorted in any case
PAIRS_MAX = 256
# warps of a program of the pairs path
PAIRS_WARPS = 8
# rows of a tile from which the int8 unit is used where there is an act_group_size
INT8_ROWS = 16
# mean rows of an expert that is hit -> tokens of a tile
ROWS_OF_TILE = ((4.0, 8), (9.0, 16), (24.0, 32), (96.0, 64))


@dataclass(frozen=True, slots=True)
class ExpertsProblem:
    """tokens x top_k pairs; gate_up [experts, 2 * inter, hidden], down [experts, hidden, inter]."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    inter: int
    group_size: int
    # None: 16-bit activations
    act_group_size: int | None = None
    # whether neither of the weights has zero points
    symmetric: bool = True
    # whether both have integer scales (layout.py)
    integer_scales: bool = False

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def rows_an_expert(self) -> float:
        """Mean pairs of an expert that is hit, if tokens choose uniformly, no expert twice."""
        hit = self.experts * (1 - max(0.0, 1 - self.top_k / self.experts) ** self.tokens)
        return self.pairs / hit

    @property
    def few_pairs(self) -> bool:
        """Whether reading an expert again for each of its pairs costs less than sorting them."""
        return self.pairs <= PAIRS_MAX and self.rows_an_expert <= REREADS


# mean rows of an expert that is hit -> the best tile on an H200 of those in
# benchmarks/results/tune_moe.csv, at 1.3 to 512 rows; wide tiles lose more to experts that end
# within one than they save
ROWS_OF_64 = 100.0
HOPPER_TILES = (
    (6.0, HopperGroupedPlan(8, 128, 4, 4)),
    (12.0, HopperGroupedPlan(16, 128, 4, 4)),
    (28.0, HopperGroupedPlan(32, 128, 4, 4, narrow_m=8)),
    (45.0, HopperGroupedPlan(64, 128, 4, 4, narrow_m=32)),
    (ROWS_OF_64, HopperGroupedPlan(64, 128, 4, 4, narrow_m=16)),
    (200.0, HopperGroupedPlan(128, 64, 4, 3, narrow_m=32)),
    (math.inf, HopperGroupedPlan(256, 128, 8, 3, narrow_m=64)),
)

# tiles of at most so many rows are not pipelined (kernels/hopper_loop.py) where K is this short, or
# no longer than this if an expert has more rows than this on average. us of a block, H200, with
# both products pipelined, with the first, with none: E=256, 16 tokens 61.2, 58.9, 60.2; 128 tokens
# 131, 125, 124; 512 191, 173, 163; 1600 (64 rows a tile) 276, 284, 288. gpt-oss, 4 tokens 73, 82.
# Mixtral, 64 tokens, with both and with the second: 256, 244
UNPIPELINED_M = 32
UNPIPELINED_SHORT_K = 1024
UNPIPELINED_K = 4096
UNPIPELINED_ROWS = 2.25
UNPIPELINED_STAGES = 3
# a longer K of the second product is cut into slices: tiles of at most so many rows, of which so
# many programs share a multiprocessor. Mixtral, us: 3 tokens 124 by 2 slices (whole 162), 4 142
# (170), 8 178 by 3 (191), 16 205 by 3 (211), 32 219 by 3 (231)
SLICED_M = 16
SLICED_RESIDENT = 3
SLICES = (1, 2, 3, 4)

# programs that share the tiles of so many rows, on a multiprocessor, where K is not longer than
# SHARED_K. us of a block by tiles that are not shared and by shared ones, in one run on an H200:
# E=256, 1600 tokens 297, 267, 4096 664, 607; Qwen3, 1024 tokens 259, 242, 4096 750, 683; OLMoE,
# 1024 280, 265; Mixtral, 512 820, with its first product 792, with both 798. Of fewer rows: E=256,
# 256 tokens 139, 138, Qwen3 119, 127. Groups of 64 gain nothing (gpt-oss, 1024 522, 538, 4096 1519,
# 1511). W4A8's words with groups of 32: E=256, 1600 298, 285, 4096 697, 658, Qwen3, 1024 264, 264,
# 4096 831, 740. Zero points: E=256, 1600 296, 304, and by tiles of 128 rows, 4096 671, 647
SHARED_RESIDENT = {64: 2, 128: 2, 256: 1}
SHARED_K = 4096
SHARED_GROUP = 128
SHARED_WITH_ZERO_POINTS = 128
# where one of a block's products has no longer K, tiles of 64 rows serve up to so many. E=256, 4096
# tokens (128 rows), shared: 607 us, by tiles of 128 rows 632; zero points, not shared, 708 and 671
SHORT_K = 512
SHORT_K_ROWS = 200.0

# the same of int8 tiles, where tokens have one scale each
HOPPER_INT8_TILES = (
    (3.0, HopperInt8GroupedPlan(8, 128, 256, 4, 3)),
    (6.0, HopperInt8GroupedPlan(16, 64, 256, 4, 4)),
    (11.0, HopperInt8GroupedPlan(16, 128, 256, 4, 3)),
    (24.0, HopperInt8GroupedPlan(32, 64, 256, 4, 3, narrow_m=8)),
    (40.0, HopperInt8GroupedPlan(32, 128, 128, 4, 4, narrow_m=8)),
    (90.0, HopperInt8GroupedPlan(64, 64, 128, 4, 4, narrow_m=16)),
    (math.inf, HopperInt8GroupedPlan(128, 64, 128, 4, 3, narrow_m=32)),
)

# the same where scales are integers, from so many rows. us of a block, H200, in one run, by this
# tile, tiles of 64 rows, and int8 tiles that scale within K: E=256, 1600 tokens (50 rows) 310, 259,
# 260, 4096 469, 549, 507; Qwen3, 1024 218, 213, 212, 4096 534, 648, 590; OLMoE, 256 118, 102, 95,
# 1024 196, 227, 214; Mixtral, 256 (64 rows) 375, 391, 420, 512 535, 642, 601. Programs that share
# the tiles: 2 % faster to 6 % slower
INTEGER_ROWS = 60.0
INTEGER_TILE = HopperGroupedPlan(128, 128, 4, 3, narrow_m=32, pipelined=False, integer=True)


def plan_experts(problem: ExpertsProblem, arch: Arch) -> ExpertsPlan | None:
    """The plan for a block, or None on a device that no kernel was written for.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> qwen = ExpertsProblem(1, 8, experts=256, hidden=2048, inter=512, group_size=128)
    >>> plan_experts(qwen, h200).name
    'gemv 8x2048; gemv 8x4096'
    """
    p = problem
    if min(p.tokens, p.top_k, p.experts, p.hidden, p.inter, p.group_size) < 1:
        raise Unsupported(f"every size of {p} must be at least 1")
    if arch.capability < MIN_CAPABILITY:
        return None
    if p.few_pairs:
        kind = p.group_size, p.act_group_size, p.symmetric
        return ExpertsPlan(
            first=_plan_few(p.pairs, 1, p.inter, p.hidden, *kind, arch, "first"),
            second=_plan_few(p.tokens, p.top_k, p.hidden, p.inter, *kind, arch, "second"),
        )
    sizes = p.group_size, p.hidden, p.inter
    tile: RowsPlan = INTEGER_TILE
    if not _takes_integer_tile(p, arch):
        tile = _plan_grouped(p.rows_an_expert, *sizes, arch, p.act_group_size, p.symmetric)
    first = for_short_loops(tile, p.hidden, p.rows_an_expert)
    first = shared(first, p.hidden, p, arch)
    second = _of_second_product(tile, p, arch)
    if isinstance(first, HopperGroupedPlan) and first.programs:
        second = shared(second, p.inter, p, arch)
    return ExpertsPlan(first=first, second=second)


def for_short_loops(tile: RowsPlan, k: int, mean_rows: float) -> RowsPlan:
    """The tile, not pipelined where that is faster."""
    most = UNPIPELINED_K if mean_rows > UNPIPELINED_ROWS else UNPIPELINED_SHORT_K
    if not isinstance(tile, HopperGroupedPlan) or k > most or tile.block_m > UNPIPELINED_M:
        return tile
    return replace(tile, num_stages=UNPIPELINED_STAGES, pipelined=False)


def shared(tile: RowsPlan, k: int, p: ExpertsProblem, arch: Arch) -> RowsPlan:
    """The tile of a product over k, shared by as many programs as the card holds where that is
    faster."""
    if not isinstance(tile, HopperGroupedPlan) or tile.split_k > 1 or k > SHARED_K:
        return tile
    if p.group_size < SHARED_GROUP or tile.block_m not in SHARED_RESIDENT or tile.integer:
        return tile
    if not p.symmetric and tile.block_m < SHARED_WITH_ZERO_POINTS:
        return tile
    return replace(tile, programs=SHARED_RESIDENT[tile.block_m] * arch.num_sms)


def _of_second_product(tile: RowsPlan, p: ExpertsProblem, arch: Arch) -> RowsPlan:
    """K cut where programs are few: rounds of them that the card takes, times steps and a start."""
    short = p.inter <= UNPIPELINED_K or tile.block_m > SLICED_M
    if not isinstance(tile, HopperGroupedPlan) or short:
        return for_short_loops(tile, p.inter, p.rows_an_expert)
    programs = math.ceil(p.pairs / p.rows_an_expert) * -(-p.hidden // tile.block_n)
    steps = -(-p.inter // BLOCK_K)

    def cost(split_k: int) -> float:
        rounds = -(-programs * split_k // (SLICED_RESIDENT * arch.num_sms))
        return rounds * (-(-steps // split_k) + FILL)

    # fp32 sums of slices take no more memory than what gate and up would take in 16 bits
    slices = [s for s in SLICES if s == 1 or s * p.hidden <= p.inter]
    return replace(tile, split_k=min(slices, key=cost))


def _plan_few(
    items: int,
    top_k: int,
    n: int,
    k: int,
    group_size: int,
    act_group_size: int | None,
    symmetric: bool,
    arch: Arch,
    product: Literal["none", "first", "second"],
) -> FewPlan:
    """`items` sums over `top_k` slots, each of a row of x [k] times W: `n` outputs."""
    if serves_gemv(n, k, group_size, arch, act_group_size):
        # what a block's first product makes of a gate and an up row each
        rows = 2 * n if product == "first" else n
        shape = items, rows, top_k * k, group_size
        return plan_gemv(*shape, arch, product, symmetric, act_group_size)
    return plan_pairs(top_k, k, arch, product)


def plan_pairs(
    top_k: int, k: int, arch: Arch, product: Literal["none", "first", "second"] = "none"
) -> PairsPlan:
    """A pairs product that sums `top_k` slots, each over `k`, as one of a block's or by itself.

    Slots side by side that leave the fewest idle, where a round counts as one slot; of four to
    eight warps, those that read the fewest blocks of K, where a step counts as one block.
    """
    blocks_of_k = -(-k // BLOCK_K)
    slots = min((s for s in (4, 2, 1) if s <= top_k), key=lambda s: -(-top_k // s) * (s + 1))

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        slices, blocks = tile
        steps = -(-blocks_of_k // (slices * blocks))
        return steps * (slices * blocks + 1), slices

    warps = [s for s in (1, 2, 4, 8) if PAIRS_WARPS // 2 <= slots * s <= PAIRS_WARPS]
    slices, blocks = min(((s, b) for s in warps for b in (4, 2, 1)), key=cost)
    # where a step is not all of K, two tiles of two blocks are as many loads and half the x
    tiles = 1
    if slots == 1 and blocks_of_k >= 8:
        slices, blocks, tiles = 4, 2, 2
    return PairsPlan(
        slots=slots,
        slices=slices,
        tiles=tiles,
        blocks=blocks,
        kwidth=2 if arch.triton >= KWIDTH_2_EVERYWHERE else 4,
        pdl=product if arch.capability[0] >= HOPPER else "none",
    )


def plan_grouped(
    rows: int, experts: int, k: int, group_size: int, arch: Arch, act_group_size: int | None = None
) -> RowsPlan:
    """Tiles for `rows` rows [rows, k] that are spread over `experts`."""
    hit = experts * (1 - (1 - 1 / experts) ** rows)
    mean_rows = rows / max(hit, 1.0)
    tile = _plan_grouped(mean_rows, group_size, k, k, arch, act_group_size)
    return for_short_loops(tile, k, mean_rows)


def plan_gathered(
    rows: int,
    experts: int,
    n: int,
    k: int,
    group_size: int,
    arch: Arch,
    act_group_size: int | None = None,
    symmetric: bool = True,
) -> FewPlan | RowsPlan:
    """One product of `rows` rows, each with an expert [n, k] of its own choice."""
    kind = group_size, act_group_size, symmetric
    problem = ExpertsProblem(rows, 1, experts, k, 1, *kind)
    if problem.few_pairs:
        return _plan_few(rows, 1, n, k, *kind, arch, "none")
    tile = _plan_grouped(problem.rows_an_expert, group_size, k, k, arch, act_group_size, symmetric)
    return shared(for_short_loops(tile, k, problem.rows_an_expert), k, problem, arch)


def _plan_grouped(
    mean_rows: float,
    group_size: int,
    k_first: int,
    k_second: int,
    arch: Arch,
    act_group_size: int | None,
    symmetric: bool = True,
) -> RowsPlan:
    hopper = arch.capability[0] == HOPPER
    # what the tensor memory accelerator reads, and scales that words have one of
    aligned = k_first % 8 == 0 and k_second % 8 == 0 and group_size != 16
    if hopper and aligned:
        if mean_rows <= _most_int8_rows(group_size, act_group_size):
            return next(plan for most, plan in HOPPER_INT8_TILES if mean_rows <= most)
        if symmetric and mean_rows <= SHORT_K_ROWS and min(k_first, k_second) <= SHORT_K:
            mean_rows = min(mean_rows, ROWS_OF_64)
        return next(plan for most, plan in HOPPER_TILES if mean_rows <= most)
    block_m = next((m for most, m in ROWS_OF_TILE if mean_rows <= most), 128 if hopper else 64)
    # wgmma, and every mma from some release on, takes k in its own order
    natural = (hopper and block_m >= 16) or arch.triton >= KWIDTH_2_EVERYWHERE
    if act_group_size is not None and (block_m >= INT8_ROWS or natural):
        # sums in int32 and in fp32 take twice the registers
        block_m = min(block_m, 64)
        return ActQuantGroupedPlan(
            block_m=block_m,
            block_n=128,
            kwidth=4 if natural else 8,
            num_warps=8 if block_m == 64 else 4,
            num_stages=4 if block_m <= 16 else 3,
            narrow_m=_narrow(block_m) if hopper else 0,
        )
    return GroupedPlan(
        block_m=block_m,
        block_n=128,
        scale_after=block_m <= 32 and group_size % BLOCK_K == 0,
        kwidth=2 if natural else 4,
        num_warps=8 if block_m == 128 else 4,
        num_stages=4 if block_m <= 16 else 3,
        narrow_m=_narrow(block_m) if hopper else 0,
    )


def _takes_integer_tile(p: ExpertsProblem, arch: Arch) -> bool:
    """Whether tiles of int8 rows and integer scales serve, and are faster than others."""
    aligned = p.hidden % 8 == 0 and p.inter % 8 == 0 and p.group_size != 16
    serves = arch.capability[0] == HOPPER and p.integer_scales and aligned
    return serves and p.rows_an_expert > INTEGER_ROWS


def _most_int8_rows(group_size: int, act_group_size: int | None) -> float:
    """Mean rows of an expert up to which int8 tiles beat 16-bit ones on rounded x, on an H200: each
    change of scale within K costs an operation or more a sum."""
    if act_group_size is None or 0 < act_group_size < 128 or group_size < 128:
        return -math.inf
    return math.inf if act_group_size == -1 else 20.0


def _narrow(block_m: int) -> int:
    return block_m // 4 if block_m >= 64 else 0
