"""What the launches of an experts block are: its plan, a kernel and a tile for each product.

dispatch_experts.py chooses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from w4tensor.dispatch_gemv import GemvPlan

__all__ = [
    "ActQuantGroupedPlan",
    "ExpertsPlan",
    "FewPlan",
    "GroupedPlan",
    "HopperGroupedPlan",
    "HopperInt8GroupedPlan",
    "PairsPlan",
    "RowsPlan",
    "fit_together",
]


@dataclass(frozen=True, slots=True)
class PairsPlan:
    """One launch of kernels/pairs.py. A program has slots * slices warps.

    Fields:
        slots: experts of a token that warps take side by side. slices: warps that share K.
        tiles: register tiles of 16 rows. blocks: blocks of 128 k of a step, each warp.
        pdl: programmatic dependent launch, as the first or the second product of a block.
    """

    slots: int
    slices: int
    tiles: int
    blocks: int
    kwidth: int
    pdl: Literal["none", "first", "second"] = "none"

    @property
    def name(self) -> str:
        return f"pairs {self.slots}x{self.slices} warps, {16 * self.tiles}x{128 * self.blocks}"


@dataclass(frozen=True, slots=True)
class GroupedPlan:
    """One launch of kernels/grouped.py: tile, and where the scales are applied.

    Fields:
        narrow_m: tiles with at most so many rows multiply no more; 0: all are of block_m.
    """

    block_m: int
    block_n: int
    scale_after: bool
    kwidth: int
    num_warps: int
    num_stages: int
    narrow_m: int = 0
    pdl: bool = False

    @property
    def name(self) -> str:
        return f"grouped {self.block_m}x{self.block_n}"


@dataclass(frozen=True, slots=True)
class HopperGroupedPlan:
    """One launch of kernels/grouped_hopper.py, on sorted rows; fields as in GroupedPlan.

    Fields:
        split_k: slices of K, whose sums are left to be added; 1 in a block's first product.
        pipelined: as in HopperPlan.
        programs: how many share the tiles (kernels/grouped_hopper_persistent.py), of a block's
            second product only if of its first; 0: each tile has one.
        integer: x is int8, and the weights' scales are integers (kernels/hopper_multiples.py).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    narrow_m: int = 0
    pdl: bool = True
    split_k: int = 1
    pipelined: bool = True
    programs: int = 0
    integer: bool = False

    @property
    def name(self) -> str:
        split = f"/{self.split_k}" if self.split_k > 1 else ""
        shared = f" by {self.programs}" if self.programs else ""
        how = "" if self.pipelined else " unpipelined"
        kind = "int8 " if self.integer else ""
        return f"{kind}grouped {self.block_m}x{self.block_n}{split}{shared}{how}"


@dataclass(frozen=True, slots=True)
class HopperInt8GroupedPlan:
    """One launch of kernels/grouped_int8_hopper.py, on sorted rows; fields as in GroupedPlan.

    Fields:
        block_k: k of a step, 128 or 256.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    narrow_m: int = 0
    pdl: bool = True

    @property
    def name(self) -> str:
        return f"int8 grouped {self.block_m}x{self.block_n}x{self.block_k}"


@dataclass(frozen=True, slots=True)
class ActQuantGroupedPlan:
    """One launch of kernels/act_quant_grouped.py; fields as in GroupedPlan."""

    block_m: int
    block_n: int
    kwidth: int
    num_warps: int
    num_stages: int
    narrow_m: int = 0
    pdl: bool = False

    @property
    def name(self) -> str:
        return f"int8 grouped {self.block_m}x{self.block_n}"


# of pairs, and of sorted rows
FewPlan = PairsPlan | GemvPlan
RowsPlan = GroupedPlan | HopperGroupedPlan | HopperInt8GroupedPlan | ActQuantGroupedPlan


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """Both products of a block: pairs and pairs, grouped and pairs, or grouped and grouped.

    Two grouped ones share the list of tiles: fit_together().
    """

    first: FewPlan | RowsPlan
    second: FewPlan | RowsPlan

    @property
    def name(self) -> str:
        return f"{self.first.name}; {self.second.name}"


def fit_together(first: RowsPlan, second: RowsPlan) -> bool:
    """Whether the list of tiles that the first product has made serves the second.

    Programs share the tiles of a list that has no holes, and wide ones before narrow ones.
    """
    if not isinstance(second, HopperGroupedPlan) or not second.programs:
        return second.block_m == first.block_m
    shared = isinstance(first, HopperGroupedPlan) and first.programs > 0
    return shared and (second.block_m, second.narrow_m) == (first.block_m, first.narrow_m)
