"""Which kernel, with which tile, serves a problem: plan(problem, arch) -> Plan.

Integers, strings and a frozen Arch in, a frozen dataclass out. Every border between regimes is
stated here once. Needs no GPU, no torch and no triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Arch:
    """What dispatch needs to know of a device and of the Triton release that compiles for it."""

    capability: tuple[int, int]
    num_sms: int
    triton: tuple[int, int]


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


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Few tokens: weight-stationary, K in `split_k` slices; partial sums are added in order."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    kwidth: int


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """Many tokens: weights are unpacked in registers and multiplied by the matrix unit."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    kwidth: int


@dataclass(frozen=True, slots=True)
class DequantPlan:
    """Very many tokens: blocks of `rows` rows of W are dequantised to a workspace for cuBLAS."""

    rows: int


Plan = DecodePlan | GemmPlan | DequantPlan
