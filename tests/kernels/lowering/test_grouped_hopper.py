"""grouped_hopper.py as machine code, for a GPU that need not be there: as test_gemm_hopper.py."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import triton

from tests.kernels.lowering.descriptors import stale_descriptors
from tests.kernels.lowering.sass import Lowered, descriptor, lower, messages
from w4tensor.dispatch_experts import (
    HOPPER_TILES,
    SHARED_RESIDENT,
    SLICED_M,
    SLICED_RESIDENT,
    UNPIPELINED_M,
    for_short_loops,
)
from w4tensor.kernels.grouped_hopper import _grouped_hopper_kernel
from w4tensor.kernels.grouped_hopper_persistent import grouped_hopper_persistent_kernel
from w4tensor.kernels.groups import groups_together
from w4tensor.plans_experts import HopperGroupedPlan

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

PIPELINED = [plan for _, plan in HOPPER_TILES]
FEW = [plan for plan in PIPELINED if plan.block_m <= UNPIPELINED_M]
TILES = PIPELINED + [for_short_loops(plan, k=128, mean_rows=1) for plan in FEW]
SHARED = [replace(plan, programs=1) for plan in PIPELINED if plan.block_m in SHARED_RESIDENT]
REGISTERS = 65536
SHARED_BYTES = 227 << 10


@functools.cache
def lowered(
    plan: HopperGroupedPlan,
    gate: str = "halves",
    act: str = "silu",
    dtype: str = "bf16",
    group: int = 128,
    zero: str | None = None,
    bias: bool = False,
    scatter: bool = False,
    act_quant: bool = False,
    y: str | None = None,
    as_given: bool = False,
) -> Lowered:
    shared = plan.programs > 0
    fetched = plan.block_n // 2 if gate == "halves" else plan.block_n
    signature = {
        "x_desc": descriptor([plan.block_m, 128], "i8" if plan.integer else dtype),
        "narrow_desc": descriptor([max(8, plan.narrow_m), 128], "i8" if plan.integer else dtype),
        "w_desc": descriptor([fetched, 16], "i32"),
        "order_ptr": "*i32",
        "tiles_ptr": "*i32",
        "y_ptr": f"*{y or dtype}",
        "scale_ptr": f"*{dtype}",
        "zero_ptr": f"*{zero}",
        **({} if shared else {"multiple_ptr": "*i8", "x_scale_ptr": "*fp32"}),
        "bias_ptr": f"*{dtype}",
        "slots" if shared else "n_rows": "i32",
        **dict.fromkeys(("N", "E", "steps", "n_groups"), "i32"),
    }
    constants = {
        "BLOCK_N": plan.block_n,
        **({} if shared else {"SPLIT_K": plan.split_k, "X_DIV": 0 if gate == "none" else 8}),
        "SCATTER": scatter,
        "GROUP": group,
        "TOGETHER": groups_together(64, group or 128, plan.block_m),
        "ACT_QUANT": act_quant or plan.integer,
        "GATE": gate,
        "ACT": act,
        "WARPS": plan.num_warps,
        "STAGES": plan.num_stages,
        "PDL": plan.pdl,
        "WAIT_FOR_TILES": as_given,
        "PIPELINED": plan.pipelined,
    }
    if plan.narrow_m == 0:
        constants["narrow_desc"] = None
    if zero is None:
        constants["zero_ptr"] = None
    if not bias:
        constants["bias_ptr"] = None
    if as_given:
        constants["order_ptr"] = None
    if not plan.integer and not shared:
        constants |= dict.fromkeys(("multiple_ptr", "x_scale_ptr"), None)
    unaligned = ("x_desc", "narrow_desc", "w_desc", "n_rows", "slots", "steps")
    kernel = grouped_hopper_persistent_kernel if shared else _grouped_hopper_kernel
    return lower(kernel, signature, constants, plan.num_warps, unaligned=unaligned)


def _check(code: Lowered, plan: HopperGroupedPlan, budget: float) -> None:
    assert code.stack == 0, str(code)
    # the output goes through shared memory, after the loop
    assert code.matrix == {"HGMMA"} and code.count("STS", "STSM") == 0, str(code)
    assert code.count("HGMMA") == 8 * plan.block_n // (16 * plan.num_warps), str(code)
    serialised = re.search(r"C75\d\d.*", messages(code))
    assert serialised is None, serialised
    assert stale_descriptors(code.text) == []
    assert code.per_weight(plan.block_n * 128) <= budget, str(code)


@pytest.mark.parametrize("plan", TILES, ids=lambda plan: plan.name)
def test_every_tile_as_the_first_product_and_as_the_second(plan):
    _check(lowered(plan), plan, 4.0)
    _check(lowered(plan, gate="none", act="none", scatter=True), plan, 4.0)


@pytest.mark.parametrize("plan", SHARED, ids=lambda plan: f"{plan.name}-{plan.narrow_m}")
@pytest.mark.parametrize(
    "options,budget",
    [
        ({}, 4.0),
        (dict(gate="none", act="none", scatter=True), 4.0),
        (dict(gate="none", act="none", as_given=True), 4.0),
        (dict(act_quant=True), 4.5),
        (dict(gate="interleaved", act="clamped_swiglu", group=32, zero="fp16", bias=True), 6.0),
    ],
    ids=str,
)
def test_tiles_that_programs_share(plan, options, budget):
    code = lowered(plan, **options)
    _check(code, plan, budget)
    resident = SHARED_RESIDENT[plan.block_m]
    assert resident * code.threads * (-(-code.registers // 8) * 8) <= REGISTERS
    assert resident * (code.shared + 1024) <= SHARED_BYTES


@pytest.mark.parametrize("plan", FEW, ids=lambda plan: plan.name)
def test_tiles_that_are_not_pipelined_share_a_multiprocessor_with_more(plan):
    def resident(plan: HopperGroupedPlan) -> int:
        code = lowered(plan)
        return REGISTERS // (code.threads * (-(-code.registers // 8) * 8))

    assert resident(for_short_loops(plan, k=128, mean_rows=1)) >= 4 > resident(plan)


@pytest.mark.parametrize("plan", [p for p in FEW if p.block_m <= SLICED_M], ids=lambda p: p.name)
def test_slices_of_k(plan):
    plan = replace(plan, split_k=2)
    _check(lowered(plan, gate="none", act="none", scatter=True, y="fp32"), plan, 4.0)
    code = lowered(plan, gate="none", act="none", scatter=True, y="fp32")
    assert code.registers * code.threads * SLICED_RESIDENT <= REGISTERS


@pytest.mark.parametrize(
    "options,budget",
    [
        (dict(gate="interleaved", act="clamped_swiglu", group=64, bias=True), 3.5),
        (dict(dtype="fp16", act="gelu_tanh"), 4.5),
        (dict(gate="none", act="relu2", group=32), 3.5),
        (dict(zero="fp16"), 4.5),
        (dict(act_quant=True), 3.5),
        (dict(act_quant=True, gate="interleaved", group=32, zero="fp16"), 4.5),
    ],
    ids=str,
)
def test_gates_activations_groups_and_zero_points(options, budget):
    plan = next(plan for plan in TILES if plan.block_m == 32)
    _check(lowered(plan, **options), plan, budget)
