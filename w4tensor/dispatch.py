"""Which kernel, with which tile, serves a problem: plan(problem, arch) -> Plan.

Integers, strings and a frozen Arch in, a frozen dataclass out. Every border between regimes is
stated here once. Needs no GPU, no torch and no triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from w4tensor.errors import Unsupported

if TYPE_CHECKING:
    from w4tensor.dispatch_act_quant import ActQuantPlan
    from w4tensor.dispatch_gemv import GemvPlan
    from w4tensor.dispatch_hopper import HopperPlan

__all__ = [
    "Arch",
    "DecodePlan",
    "DequantPlan",
    "GemmPlan",
    "Plan",
    "Problem",
    "ReferencePlan",
    "plan",
]

# tokens, and tokens times weights, up to which it is the fastest to take each token by itself
# (kernels/gemv.py), as it always is with one. us for 2 tokens, 4096 x 4096: 6.4, decode 7.0; 6144 x
# 4096: 9.5, decode 8.6; groups below 128, 2880 x 4096: 5.9, decode 6.2; 5120 x 2880: 10.2, decode
# 7.2. For 4, 1024 x 2048: 2.5, decode 2.7; 2048 x 4096: 5.9, decode 5.4; and with so short a row
# that a warp has nothing to do, 2048 x 512: 2.0, decode 1.8. The borders are interpolated
GEMV_MAX_M = 4
GEMV_PRODUCTS = 1 << 25
GEMV_FINE_PRODUCTS = 3 << 23
# int8 activations of 2 tokens need no launch of their own there (6144 x 4096: 8.3 us, tile 9.5); 3
# and 4 were not measured and follow those of 16 bits
GEMV_INT8_PRODUCTS = 3 << 24
GEMV_MANY_PRODUCTS = 1 << 23
GEMV_MANY_MIN_K = 1024
# where no tile of dispatch_hopper.py serves, up to here kernels/decode.py, whose warps load x for
# themselves; where one does, only with so many rows, as a large vocabulary has (2 tokens, by hand,
# 128256 x 4096: 73.9 us, tile 78.9; but 57344 x 8192: 72.4, tile 67.5; 28672 x 4096: 22.7, tile
# 21.6; 9216 x 2048: 7.8, tile 7.2; 8192 x 8192: 14.1, tile 14.5) and coarse groups (of 32, 128256 x
# 4096: 91.6, tile 88.2). The border is interpolated
DECODE_MAX_M = 2
DECODE_TALL = 3 << 15
# for smaller matrices than this, up to so many tokens (4 at 2048 x 512: 1.8 us; in different runs
# 2048 x 4096: 5.4, tile 4.9; groups of 32, 2880 x 4096: 6.6, tile 6.1; 5120 x 2880: 7.4, tile 6.9)
DECODE_SMALL_MAX_M = 4
DECODE_SMALL = 1 << 22
# beyond this K, programs of the next launch that start early cost more than they save
DECODE_PDL_MAX_K = 8192
# rows, and their length, up to which a decode program takes 8 of them instead of 16
DECODE_NARROW_N = 4096
DECODE_NARROW_K = 8192
WARPS_PER_SM = 12
# from here on dequantising costs less than tiles of kernels/gemm.py lose to cuBLAS. Those of
# dispatch_hopper.py lose nothing: up to 16384 tokens of eight shapes 0.95 to 1.03 of the time of
# bf16, dequantising 1.00 to 1.13 (benchmarks/README.md)
DEQUANT_FROM_M = 1024
# half of a Hopper's L2
WORKSPACE_BYTES = 32 << 20
# bf16 tensor cores, cp.async
MIN_CAPABILITY = (8, 0)
HOPPER = 9
# the release from which Triton wants kWidth 2 for mma.sync too
KWIDTH_2_EVERYWHERE = (3, 8)


@dataclass(frozen=True, slots=True)
class Arch:
    """What dispatch needs to know of a device and of the Triton release that compiles for it."""

    capability: tuple[int, int]
    num_sms: int
    triton: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of kernels/gemm.py for up to `max_m` tokens; split K makes programs_per_sm of them."""

    max_m: float
    block_m: int
    block_n: int
    num_stages: int
    programs_per_sm: int = 1


# the best of benchmarks/tune.py on an H200; beside each, us at 28672 x 4096, group 128, bf16
HOPPER_TILES = (
    Tile(8, 8, 64, 4, programs_per_sm=2),  # M = 3 .. 8: 24.9
    Tile(16, 16, 64, 4, programs_per_sm=2),  # M = 9 .. 16: 25.9
    Tile(32, 32, 128, 5, programs_per_sm=2),  # M = 32: 28.8
    Tile(64, 64, 128, 5),  # M = 64: 34.3
    Tile(math.inf, 128, 64, 3),  # M = 128: 55.8, 256: 109.2, 512: 198.4
)
# not measured: what lowers without a spill for sm_80
AMPERE_TILES = (
    Tile(16, 16, 64, 4, programs_per_sm=2),
    Tile(math.inf, 64, 64, 3),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Y[E, M, N] = X[E, M, K] @ dequant(W)[E, N, K].T; E = 1 for a Linear."""

    m: int
    n: int
    k: int
    group_size: int
    act: Literal["bf16", "fp16", "int8"]
    symmetric: bool = True
    batch: int = 1
    act_group_size: int | None = None
    # whether a row's scales are multiples of one unit, and there are the multiples (layout.py)
    integer_scales: bool = False


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One launch of kernels/decode.py: weights go straight to registers, warps take turns along K.

    Fields:
        block_m, block_n: tokens (8 or 16) and rows of a program.
        block_k: the step of one warp; a program's is num_warps times that, and holds whole groups.
        split_k: programs along K. kwidth: order of k in the operand (kernels/unpack.py).
        x_ahead: x is loaded one step ahead, as weights are.
        evict: eviction policy of the weights.
        pdl: start under programmatic dependent launch, before the kernel ahead is done.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    split_k: int
    kwidth: int
    num_stages: int = 1
    x_ahead: bool = False
    evict: Literal["", "evict_first"] = ""
    pdl: bool = False

    @property
    def name(self) -> str:
        return f"decode {self.block_m}x{self.block_n}/{self.num_warps * self.split_k}"


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """One launch of kernels/gemm.py: tile, slices of K, and where the scales are applied.

    Fields:
        block_m, block_n: tokens and rows of a program. group_n: row tiles that share x in L2.
        split_k: slices of K. kwidth: order of k in the operand (kernels/unpack.py).
        x_tma: x comes by the tensor memory accelerator where its rows allow it (Hopper).
        maxnreg: registers a thread at most, so that two programs share a multiprocessor; 0: any.
    """

    block_m: int
    block_n: int
    group_n: int
    split_k: int
    scale_after: bool
    kwidth: int
    num_warps: int
    num_stages: int
    x_tma: bool = False
    maxnreg: int = 0

    @property
    def name(self) -> str:
        return f"gemm {self.block_m}x{self.block_n}/{self.split_k}"


@dataclass(frozen=True, slots=True)
class DequantPlan:
    """Very many tokens: blocks of `rows` rows of W are dequantised to a workspace for cuBLAS."""

    rows: int
    name: ClassVar[str] = "dequantise + cuBLAS"


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """A device that no kernel was written for: plain torch on it."""

    name: ClassVar[str] = "reference"


Plan = DecodePlan | GemmPlan | DequantPlan | ReferencePlan


def plan(problem: Problem, arch: Arch) -> Plan | GemvPlan | HopperPlan | ActQuantPlan:
    """The plan for `problem` on `arch`; there is one for every legal problem.

    Raises:
        Unsupported: a size below 1, or a group_size that does not divide K.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> plan(Problem(m=1, n=4096, k=4096, group_size=128, act="bf16"), h200).name
    'gemv 8x4096'
    """
    # below, because it builds on this file
    from w4tensor.dispatch_act_quant import plan_act_quant
    from w4tensor.dispatch_gemv import plan_gemv, serves_gemv
    from w4tensor.dispatch_hopper import plan_hopper, serves

    p = problem
    if min(p.m, p.n, p.k, p.batch, p.group_size) < 1:
        raise Unsupported(f"every size of {p} must be at least 1")
    if p.k % p.group_size:
        raise Unsupported(f"K={p.k} is not a multiple of group_size={p.group_size}")
    if arch.capability < MIN_CAPABILITY:
        return ReferencePlan()
    if p.act == "int8":
        return plan_act_quant(p, arch)
    if is_row_by_row(p) and serves_gemv(p.n, p.k, p.group_size, arch):
        return plan_gemv(p.m * p.batch, p.n, p.k, p.group_size, arch, symmetric=p.symmetric)
    tiled = serves(p, arch)
    if p.batch == 1 and not tiled and p.m >= DEQUANT_FROM_M:
        return DequantPlan(rows=workspace_rows(p))
    if p.m <= (_decode_max_m(p) if tiled else DECODE_MAX_M):
        return _decode_plan(p, arch)
    return plan_hopper(p, arch) if tiled else _gemm_plan(p, arch)


def _decode_plan(p: Problem, arch: Arch) -> DecodePlan:
    """About WARPS_PER_SM warps a multiprocessor, with 512 codes of K a step where they fit."""
    narrow = p.n * p.batch <= DECODE_NARROW_N and p.k <= DECODE_NARROW_K
    block_n = 8 if narrow else 16
    tiles = -(-p.n // block_n) * p.batch
    steps = -(-p.k // 128)
    num_warps = 1
    while num_warps < 8 and tiles * num_warps * 1.5 < WARPS_PER_SM * arch.num_sms:
        num_warps *= 2
    while num_warps > 1 and num_warps > steps:
        num_warps //= 2
    whole_row = p.group_size == p.k
    block_k = next(
        (b for b in (512, 256, 128) if p.k >= b * num_warps and p.k % (b * num_warps) == 0), 128
    )
    if not whole_row:
        # a step holds whole groups
        block_k = max(block_k, p.group_size // num_warps, 128)
    return DecodePlan(
        block_m=8,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        split_k=1,
        kwidth=2 if arch.triton >= KWIDTH_2_EVERYWHERE else 4,
        x_ahead=True,
        evict="evict_first",
        pdl=arch.capability[0] >= HOPPER and p.k <= DECODE_PDL_MAX_K,
    )


def is_row_by_row(p: Problem) -> bool:
    """Whether kernels/gemv.py is the fastest, where it serves."""
    products = p.m * p.n * p.k
    if p.m <= 2:
        most = GEMV_FINE_PRODUCTS if p.group_size < 128 else GEMV_PRODUCTS
        return p.m == 1 or products <= (GEMV_INT8_PRODUCTS if p.act == "int8" else most)
    return p.m <= GEMV_MAX_M and p.k >= GEMV_MANY_MIN_K and products <= GEMV_MANY_PRODUCTS


def _decode_max_m(p: Problem) -> int:
    if p.n * p.k < DECODE_SMALL:
        return DECODE_SMALL_MAX_M
    return DECODE_MAX_M if p.n >= DECODE_TALL and p.group_size >= 64 else 0


def workspace_rows(p: Problem) -> int:
    """Rows whose bf16 values fit WORKSPACE_BYTES: they stay in L2 until cuBLAS reads them."""
    rows = WORKSPACE_BYTES // (2 * p.k)
    return min(p.n, max(256, rows // 256 * 256))


def _gemm_plan(p: Problem, arch: Arch) -> GemmPlan:
    hopper = arch.capability[0] == HOPPER
    tile = next(t for t in (HOPPER_TILES if hopper else AMPERE_TILES) if p.m <= t.max_m)
    block_n = tile.block_n
    if _tiles(p, tile.block_m, block_n) < arch.num_sms:
        # too few for the card: tiles of half the rows
        block_n = min(block_n, 64)
    block_m = tile.block_m
    if _tiles(p, block_m, block_n) < arch.num_sms:
        block_m = min(block_m, 64)
    wgmma = hopper and block_m >= 16
    return GemmPlan(
        block_m=block_m,
        block_n=block_n,
        group_n=8,
        split_k=_split_k(_tiles(p, block_m, block_n), p.k, tile.programs_per_sm * arch.num_sms),
        scale_after=block_m <= 64 and p.group_size % 128 == 0,
        kwidth=2 if wgmma or arch.triton >= KWIDTH_2_EVERYWHERE else 4,
        num_warps=4,
        num_stages=tile.num_stages,
        # otherwise rows past M read the last one over and over: 44 us for 1 token in a tile of 16
        x_tma=hopper,
    )


def _tiles(p: Problem, block_m: int, block_n: int) -> int:
    return -(-p.n // block_n) * -(-p.m // block_m) * p.batch


def _split_k(tiles: int, k: int, wanted: int) -> int:
    """Slices of K, a power of two up to 8, that make at most `wanted` programs of a few steps."""
    split = 1
    while split < 8 and split * 2 * tiles <= wanted and split * 2 * 4 * 128 <= k:
        split *= 2
    return split
