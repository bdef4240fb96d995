"""Which kernel, with which tile, serves int8 activations: plan_act_quant(problem, arch) -> plan.

Integers and a frozen Arch in, frozen dataclasses out, as in dispatch.py. Needs no GPU, no torch and
no triton. One token, or a few with few weights, is quantised by each program for itself, in less
time than a launch ahead of it takes (8192 x 8192: 10.3 us instead of 11.8):

    gemv     activation groups of 32, 64 or 128 (dispatch_gemv.py)

Otherwise activations are quantised in a launch of their own, before any of:

    dp4a     one token: a thread has a slice of a row
    tile     more tokens on a Hopper: the tiles of dispatch_int8.py, or where they do not serve
    decode   up to 16 tokens: warps divide K, the matrix unit multiplies each cell
    gemm     more tokens: tiles of the matrix unit

Where int8 tiles spend their time on scales, or would be slower for another reason, x is rounded to
what its codes mean, in 16 bits, for

    hopper   the tiles of dispatch_hopper.py, or where they do not serve
    rounded  a library product with W dequantised, block by block

Where a weight has integer scales, all of K is summed in int32 by

    integer  more than a few tokens on a Hopper: the tiles of dispatch_integer.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from w4tensor.dispatch import (
    HOPPER,
    KWIDTH_2_EVERYWHERE,
    Arch,
    Problem,
    is_row_by_row,
    workspace_rows,
)
from w4tensor.dispatch_gemv import GemvPlan, plan_gemv, serves_gemv
from w4tensor.dispatch_hopper import (
    HopperPlan,
    hopper_us,
    is_placed_evenly,
    plan_hopper,
    serves,
)
from w4tensor.dispatch_int8 import (
    Int8Plan,
    int8_us,
    is_fine,
    plan_int8,
    quantizing_overlaps,
    serves_int8,
)
from w4tensor.dispatch_integer import integer_us, plan_integer, serves_integer

__all__ = [
    "ActQuantDecodePlan",
    "ActQuantDp4aPlan",
    "ActQuantGemmPlan",
    "ActQuantHopperPlan",
    "ActQuantIntegerPlan",
    "ActQuantPlan",
    "ActQuantRoundedPlan",
    "plan_act_quant",
]

# most tokens of the decode kernel
DECODE_MAX_M = 16
# most tokens of the dp4a kernel: at 2 it needs as many instructions as the matrix unit's
DP4A_MAX_M = 1
# from here on, with scales finer than 128 k, the library's 16-bit product is faster than int8 tiles
ROUNDED_FROM_M = 128
# tokens up to which, on a Hopper, nothing is rounded: scales finer than 128 k, and others (8192 x
# 8192, groups of 32: 16.0 us for 8 tokens, and rounded 20.2 for 16 and 20.4 for 32; per token 17.7
# for 32)
TILE_FINE_MAX_M = 8
TILE_MAX_M = 32
# tokens from which int8 tiles may be faster again where these have a scale for each 128 k (6144 x
# 4096: 256 tokens 28 us, rounded 25; 512 tokens 38 us, rounded 41)
TILE_WIDE_MIN_M = 512
# what cells of 32 k leave room for in the registers of 256 threads
FINE_BLOCK_M = 64


@dataclass(frozen=True, slots=True)
class ActQuantDp4aPlan:
    """One launch of kernels/act_quant_dp4a.py.

    Fields:
        tokens: 1, 2 or 4, at least M. rows: rows that a thread takes in turn.
        block_n, block_slices: rows at a time and slices of 32 k of a program; a thread has one
            slice of one row where their product is 32 * num_warps.
        pdl: start under programmatic dependent launch, before the quantising kernel is done.
    """

    tokens: int
    rows: int
    block_n: int
    block_slices: int
    num_warps: int
    pdl: bool = False

    @property
    def name(self) -> str:
        return f"dp4a {self.tokens}x{self.rows * self.block_n}"


@dataclass(frozen=True, slots=True)
class ActQuantDecodePlan:
    """One launch of kernels/act_quant_decode.py: warps divide the block_k of a step.

    Fields:
        block_m, block_n: tokens (8 or 16) and rows of a program. block_k: at least 32 a warp.
        split_k: programs along K. kwidth: order of k in the operand (kernels/unpack_act_quant.py).
        pdl: start under programmatic dependent launch, before the quantising kernel is done.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    kwidth: int
    num_warps: int
    num_stages: int
    pdl: bool = False

    @property
    def name(self) -> str:
        return f"int8 decode {self.block_m}x{self.block_n}/{self.num_warps * self.split_k}"


@dataclass(frozen=True, slots=True)
class ActQuantGemmPlan:
    """One launch of kernels/act_quant_gemm.py. block_k is a multiple of 128.

    Fields:
        x_tma: x comes by the tensor memory accelerator (Hopper).
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    kwidth: int
    num_warps: int
    num_stages: int
    x_tma: bool = False

    @property
    def name(self) -> str:
        return f"int8 gemm {self.block_m}x{self.block_n}/{self.split_k}"


@dataclass(frozen=True, slots=True)
class ActQuantHopperPlan:
    """One launch of kernels/gemm_hopper.py on x rounded to its codes, in word order.

    Fields:
        overlap: start while x is still being rounded, where `gemm` starts early at all.
    """

    gemm: HopperPlan
    overlap: bool = True

    @property
    def name(self) -> str:
        return f"rounded x, {self.gemm.name}"


@dataclass(frozen=True, slots=True)
class ActQuantIntegerPlan:
    """One launch of kernels/gemm_hopper.py on int8 x and integer scales.

    Fields:
        overlap: start while x is still being quantised.
    """

    gemm: HopperPlan
    overlap: bool = True

    @property
    def name(self) -> str:
        return f"int8 {self.gemm.name}"


@dataclass(frozen=True, slots=True)
class ActQuantRoundedPlan:
    """cuBLAS on x rounded to its codes and on blocks of `rows` dequantised rows of W."""

    rows: int
    name: ClassVar[str] = "rounded x, dequantise + cuBLAS"


ActQuantPlan = (
    GemvPlan
    | ActQuantDp4aPlan
    | ActQuantDecodePlan
    | ActQuantGemmPlan
    | Int8Plan
    | ActQuantHopperPlan
    | ActQuantIntegerPlan
    | ActQuantRoundedPlan
)


def plan_act_quant(p: Problem, arch: Arch) -> ActQuantPlan:
    """The plan for a legal problem with int8 activations.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> p = Problem(m=8, n=4096, k=4096, group_size=128, act="int8", act_group_size=32)
    >>> plan_act_quant(p, h200).name
    'int8 tile 8x128/4'
    """
    if is_row_by_row(p) and serves_gemv(p.n, p.k, p.group_size, arch, p.act_group_size):
        return plan_gemv(
            p.m * p.batch,
            p.n,
            p.k,
            p.group_size,
            arch,
            symmetric=p.symmetric,
            act_group_size=p.act_group_size,
        )
    if p.m <= DP4A_MAX_M:
        return _dp4a_plan(p, arch)
    if serves_integer(p, arch) and integer_us(p, arch) <= _other_us(p, arch):
        gemm = plan_integer(p, arch)
        evenly = is_placed_evenly(p, gemm, arch, x_bytes=1)
        return ActQuantIntegerPlan(gemm, quantizing_overlaps(p, evenly))
    rounded = _rounded_plan(p, arch)
    if serves_int8(p, arch) and (rounded is None or _rounding_is_slower(p, arch)):
        return plan_int8(p, arch)
    if rounded is not None:
        return rounded
    return _decode_plan(p, arch) if p.m <= DECODE_MAX_M else _gemm_plan(p, arch)


def _rounded_plan(p: Problem, arch: Arch) -> ActQuantHopperPlan | ActQuantRoundedPlan | None:
    """The plan for x rounded in 16 bits, where there is one that may be the fastest."""
    if p.batch > 1 or not (is_fine(p) or serves_int8(p, arch)):
        return None
    if serves(p, arch):
        gemm = plan_hopper(p, arch)
        evenly = is_placed_evenly(p, gemm, arch)
        return ActQuantHopperPlan(gemm, quantizing_overlaps(p, evenly))
    return ActQuantRoundedPlan(rows=workspace_rows(p)) if p.m >= ROUNDED_FROM_M else None


def _other_us(p: Problem, arch: Arch) -> float:
    """Microseconds, without quantising, of what serves where scales are any."""
    return int8_us(p, arch) if serves_int8(p, arch) else hopper_us(p, arch)


def _rounding_is_slower(p: Problem, arch: Arch) -> bool:
    if p.m <= (TILE_FINE_MAX_M if is_fine(p) else TILE_MAX_M) or not serves(p, arch):
        return True
    if p.act_group_size == -1:
        # at 56 points of seven shapes 11 % faster in the middle, 13 % slower at most
        return True
    return p.m >= TILE_WIDE_MIN_M and int8_us(p, arch) <= hopper_us(p, arch)


def _dp4a_plan(p: Problem, arch: Arch) -> ActQuantDp4aPlan:
    # four rows a thread, unless that leaves multiprocessors idle
    rows = next((r for r in (4, 2) if p.n * p.batch >= 4 * r * 4 * arch.num_sms), 1)
    tokens = next(t for t in (1, 2, 4) if p.m <= t)
    return ActQuantDp4aPlan(tokens, rows, block_n=4, block_slices=32, num_warps=4, pdl=_pdl(arch))


def _decode_plan(p: Problem, arch: Arch) -> ActQuantDecodePlan:
    block_k = 512 if p.k > 256 else 256
    # two products a cell leave registers for one tile of 16 rows
    block_n = 16 if p.group_size == 16 else 32
    tiles = -(-p.n // block_n) * p.batch
    steps = -(-p.k // block_k)
    split_k = 1
    while tiles * split_k < 2 * arch.num_sms and split_k * 2 * 2 <= steps and split_k < 8:
        split_k *= 2
    return ActQuantDecodePlan(
        block_m=8 if p.m <= 8 else 16,
        block_n=block_n,
        block_k=block_k,
        split_k=split_k,
        kwidth=4 if arch.triton >= KWIDTH_2_EVERYWHERE else 8,
        num_warps=4,
        num_stages=4 if p.m <= 8 else 3,
        pdl=_pdl(arch),
    )


def _gemm_plan(p: Problem, arch: Arch) -> ActQuantGemmPlan:
    hopper = arch.capability[0] == HOPPER
    fine = is_fine(p)
    block_m = next((b for b in (32, 64) if p.m <= b), FINE_BLOCK_M if fine or not hopper else 128)
    # so that two programs of four warps share a multiprocessor, where sums leave them registers
    block_n = 128 if hopper and block_m < 128 else 64
    tiles = -(-p.n // block_n) * -(-p.m // block_m) * p.batch
    steps = -(-p.k // 128)
    split_k = 1
    while 2 * tiles * split_k <= arch.num_sms and split_k * 2 * 4 <= steps and split_k < 8:
        split_k *= 2
    return ActQuantGemmPlan(
        block_m=block_m,
        block_n=block_n,
        block_k=128,
        split_k=split_k,
        kwidth=4 if hopper or arch.triton >= KWIDTH_2_EVERYWHERE else 8,
        num_warps=8 if hopper and fine and block_m == 64 else 4,
        num_stages=4,
        # one load a cell: many small ones where cells are fine
        x_tma=hopper and block_m >= 64 and not fine,
    )


def _pdl(arch: Arch) -> bool:
    return arch.capability >= (HOPPER, 0)
