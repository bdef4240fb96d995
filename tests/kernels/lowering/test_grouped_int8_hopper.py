"""Machine code of kernels/grouped_int8_hopper.py, as test_int8_hopper.py reads int8_hopper.py's."""

from __future__ import annotations

import functools

import pytest
import triton

from tests.kernels.lowering.sass import Lowered, descriptor, lower, messages
from tests.kernels.lowering.test_int8_hopper import OPTIONAL
from w4tensor.dispatch_experts import HOPPER_INT8_TILES
from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.grouped_int8_hopper import _grouped_int8_hopper_kernel
from w4tensor.plans_experts import HopperInt8GroupedPlan

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

TILES = [plan for _, plan in HOPPER_INT8_TILES]
FIRST = dict(gate="halves", act_name="silu")
SECOND = dict(gate="none", act_name="none", scatter=True)


@functools.cache
def built(
    plan: HopperInt8GroupedPlan,
    gate: str = "halves",
    act_name: str = "silu",
    group: int = 128,
    act: int = 0,
    given: tuple[str, ...] = (),
    scatter: bool = False,
    whole: bool = True,
) -> Lowered:
    """The kernel for sm_90; group and act: 0 where a row, and where a token, is one group."""
    optional = ("zero_ptr", "bias_ptr")
    types = {name: OPTIONAL[name] for name in given}
    constants: dict[str, object] = {name: None for name in optional if name not in given}

    if "zero_ptr" not in given:
        constants["x_sum_ptr"] = None
    if plan.narrow_m == 0:
        constants["narrow_desc"] = None
    fetched = plan.block_n // 2 if gate == "halves" else plan.block_n
    types |= dict(
        x_desc=descriptor([plan.block_m, 128], "i8"),
        narrow_desc=descriptor([max(8, plan.narrow_m), 128], "i8"),
        w_desc=descriptor([fetched, plan.block_k // 2], "u8"),
        y_ptr="*bf16",
        x_scale_ptr="*fp32",
        x_sum_ptr="*fp32",
        scale_ptr="*bf16",
        order_ptr="*i32",
        tiles_ptr="*i32",
    )
    types = {n: types.get(n, "i32") for n in _grouped_int8_hopper_kernel.arg_names}
    constants |= dict(
        BLOCK_N=plan.block_n,
        X_DIV=8 if gate != "none" else 0,
        SCATTER=scatter,
        GROUP=group,
        ACT_GROUP=act,
    )
    constants |= dict(CELL=cell_and_span(group, act)[0], WHOLE_STEPS=whole, GATE=gate, ACT=act_name)
    constants |= dict(WARPS=plan.num_warps, STAGES=plan.num_stages, PDL=True, WAIT_FOR_TILES=False)
    unaligned = tuple(name for name in types if name.endswith("_desc")) + (
        "steps",
        "n_act_groups",
        "n_groups",
    )
    return lower(_grouped_int8_hopper_kernel, types, constants, plan.num_warps, unaligned=unaligned)


def check(plan: HopperInt8GroupedPlan, budget: float, **options) -> None:
    code = built(plan, **options)
    assert code.stack == 0 and code.matrix == {"IGMMA"}, str(code)
    # the output goes through shared memory, after the loop
    assert code.count("STS", "STSM") == 0, str(code)
    assert "C75" not in messages(code), messages(code)
    weights = plan.block_n * plan.block_k
    assert code.per_weight(weights) <= budget, (code.per_weight(weights), str(code))


# instructions a weight of the main loop: without and with zero points
BUDGET = {
    (8, 128): (1.25, 1.9),
    (16, 64): (1.9, 2.8),
    (16, 128): (1.4, 2.1),
    (32, 64): (2.2, 3.5),
    (32, 128): (2.0, 2.8),
    (64, 64): (3.2, 5.1),
    (128, 64): (4.2, 7.8),
}


@pytest.mark.parametrize("plan", TILES, ids=lambda plan: plan.name)
@pytest.mark.parametrize("product", [FIRST, SECOND], ids=lambda p: p["gate"])
def test_every_tile_as_the_first_product_and_as_the_second(plan, product):
    plain, zeros = BUDGET[plan.block_m, plan.block_n]
    check(plan, plain, **product)
    check(plan, zeros, given=("zero_ptr", "bias_ptr"), whole=False, **product)


@pytest.mark.parametrize("plan", [p for p in TILES if p.block_m <= 32], ids=lambda plan: plan.name)
@pytest.mark.parametrize("group,act,gate", [(128, 128, "halves"), (0, 128, "interleaved")])
def test_scales_of_a_token_that_change(plan, group, act, gate):
    check(plan, 3.2, group=group, act=act, gate=gate)
