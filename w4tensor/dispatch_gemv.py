"""Tiles of kernels/gemv.py, which takes one row of x at a time: serves_gemv() and plan_gemv().

A program has ROWS rows; its warps share K, 1024 k a step each. warps_per_sm() of them find room on
a multiprocessor, so that programs take rounds; and a program takes as long as it has steps, and one
more to begin and to end. The number of warps with the least rounds * (steps + 1) is taken. Where
all programs have one round and more than one step, the next step's weights are loaded ahead, which
takes registers, as scales finer than 128 k and zero points do.

Measured on an H200, one token, us: 4096 x 4096 4.7 (4 warps; 2: 5.4), 8192 x 8192 11.6 (2 warps; 4:
13.5, 1: 14.1), 28672 x 4096 20.2 (2 warps; 1: 20.7), 57344 x 8192 61.8 (1 warp; 2: 63.9). 16 rows
need so many registers that they lose, but for a few per cent at K = 14336; 4 lose everywhere but
for N of some hundreds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from w4tensor.dispatch import HOPPER, MIN_CAPABILITY, Arch

__all__ = ["GemvPlan", "plan_gemv", "serves_gemv"]

ROWS = 8
# k that a warp takes a step
WARP_K = 1024
# numbers of weights of a matrix, above which offsets would need 64 bits
MAX_WEIGHTS = 1 << 33


@dataclass(frozen=True, slots=True)
class GemvPlan:
    """One launch of kernels/gemv.py.

    Fields:
        rows: rows of W of a program, a power of two. num_warps: its warps, which share K.
        ahead: the next step's weights are loaded before this one's are used.
        pdl: programmatic dependent launch, as the first or the second product of an experts block;
            a product by itself is as the second, whose weights nobody ahead decides.
    """

    rows: int
    num_warps: int
    ahead: bool = False
    pdl: Literal["none", "first", "second"] = "none"

    @property
    def name(self) -> str:
        return f"gemv {self.rows}x{WARP_K * self.num_warps}"


def serves_gemv(
    n: int, k: int, group_size: int, arch: Arch, act_group_size: int | None = None
) -> bool:
    """Whether the kernel can: whole programs, x in pairs or with int8 activations in 16 bytes, and
    words that have one scale each."""
    known = group_size >= 32 or group_size == k
    if act_group_size is not None:
        # a scale a token would need all of x first
        known = known and act_group_size != -1
    whole = k % (2 if act_group_size is None else 8) == 0
    return (
        arch.capability >= MIN_CAPABILITY and n >= ROWS and whole and n * k < MAX_WEIGHTS and known
    )


def warps_per_sm(more: bool, ahead: bool) -> int:
    """How many find registers on a multiprocessor (tests/kernels/lowering/test_gemv.py).

    more: a thread has more than one scale of a row's chunk: finer ones, or zero points beside them.
    """
    return 20 - 4 * more - 4 * ahead


def plan_gemv(
    items: int,
    n: int,
    k: int,
    group_size: int,
    arch: Arch,
    product: Literal["none", "first", "second"] = "second",
    symmetric: bool = True,
    act_group_size: int | None = None,
) -> GemvPlan:
    """The plan for `items` rows of x, each of `k` numbers, times [n, k] each.

    act_group_size: of int8 activations, whose words have one scale each; None for 16 bits.

    >>> h200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    >>> plan_gemv(1, 4096, 4096, 128, h200).name
    'gemv 8x4096'
    """
    programs = items * -(-n // ROWS)
    more = not symmetric or (group_size < 128 and act_group_size is None)

    def rounds(warps: int, ahead: bool) -> int:
        return -(-programs * warps // (warps_per_sm(more, ahead) * arch.num_sms))

    def steps(warps: int) -> int:
        return -(-k // (warps * WARP_K))

    # each with something to do
    some = [warps for warps in (1, 2, 4, 8) if warps == 1 or warps * WARP_K <= k]
    num_warps = min(some, key=lambda warps: rounds(warps, False) * (steps(warps) + 1))
    ahead = steps(num_warps) > 1 and rounds(num_warps, True) == 1
    pdl: Literal["none", "first", "second"] = product if arch.capability[0] >= HOPPER else "none"
    return GemvPlan(ROWS, num_warps, ahead, pdl)
