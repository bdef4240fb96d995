"""Machine code of the experts kernels, for the tiles that dispatch_experts.py hands out."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import triton

from tests.kernels.lowering.sass import Lowered, lower
from w4tensor.dispatch import KWIDTH_2_EVERYWHERE, Arch
from w4tensor.dispatch_experts import ExpertsProblem, plan_experts
from w4tensor.kernels import act_quant_grouped
from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.grouped import _grouped_kernel
from w4tensor.kernels.pairs import _pairs_kernel
from w4tensor.plans_experts import (
    ActQuantGroupedPlan,
    GroupedPlan,
    PairsPlan,
)
from w4tensor.testing import MOE_SHAPES

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
H200 = Arch(capability=(9, 0), num_sms=132, triton=TRITON)
A100 = Arch(capability=(8, 0), num_sms=108, triton=TRITON)

POINTERS = {"w_ptr": "*i32", "ids_ptr": "*i64", "order_ptr": "*i32", "tiles_ptr": "*i32"}
POINTERS |= {"zero_ptr": "*fp16", "weight_ptr": "*fp32"}
ACT_QUANT_POINTERS = {"x_ptr": "*i8", "w_ptr": "*u8", "x_scale_ptr": "*fp32", "x_sum_ptr": "*fp32"}
# instructions a weight and thread in the main loop; 4.0 is what feeds the matrix unit from memory
BUDGET = {8: 2.4, 16: 2.3, 32: 2.5, 64: 3.2, 128: 4.3}
PAIRS_BUDGET = 2.5
# with int8 activations, by activation group and block_m: every sum is converted and scaled
ACT_QUANT_BUDGET = {(-1, 64): 3.0, (128, 64): 3.9, (32, 16): 2.9, (32, 32): 4.5, (32, 64): 7.5}


def signature(kernel, dtype: str, pointers: dict[str, str] = POINTERS) -> dict[str, str]:
    return {
        name: pointers.get(name, f"*{dtype}") if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }


@functools.cache
def lower_pairs(
    plan: PairsPlan, dtype="bf16", group_size=128, zero=False, gate="none", act_quant=False
) -> Lowered:
    parts = max(1, 128 // group_size)
    constants = dict(
        bias_ptr=None,
        X_DIV=8 if plan.slots == 1 else 1,
        TOP_K=plan.slots,
        SLOTS=plan.slots,
        SLICES=plan.slices,
        TILES=plan.tiles,
        BLOCKS=plan.blocks,
        PARTS=parts,
        BLOCKS_A_GROUP=-(-group_size // 128),
        VECTOR=min(8, plan.blocks * parts) if group_size <= 128 else 1,
        ACT_QUANT=act_quant,
        GATE=gate,
        ACT="silu" if gate != "none" else "none",
        KWIDTH=plan.kwidth,
        PDL=plan.pdl,
        ASM=True,
    )
    constants |= {} if zero else {"zero_ptr": None}
    constants |= {} if plan.slots > 1 else {"weight_ptr": None}
    return lower(
        _pairs_kernel,
        signature(_pairs_kernel, dtype),
        constants,
        num_warps=plan.slots * plan.slices,
        num_stages=1,
        unaligned=("n_vectors", "stride_sv"),
    )


@functools.cache
def lower_grouped(
    plan: GroupedPlan,
    dtype="bf16",
    group_size=128,
    zero=False,
    gate="none",
    act_quant=False,
    capability=90,
) -> Lowered:
    parts = max(1, 128 // group_size)
    constants = dict(
        bias_ptr=None,
        X_DIV=8 if gate != "none" else 0,
        SCATTER=gate == "none",
        PARTS=parts,
        BLOCKS_A_GROUP=-(-group_size // 128),
        ACT_QUANT=act_quant,
        GATE=gate,
        ACT="silu" if gate != "none" else "none",
        AFTER=plan.scale_after and parts == 1,
        EVEN_K=True,
        BLOCK_M=plan.block_m,
        NARROW_M=plan.narrow_m,
        BLOCK_N=plan.block_n,
        KWIDTH=plan.kwidth,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        ASM=True,
    )
    constants |= {} if zero else {"zero_ptr": None}
    return lower(
        _grouped_kernel,
        signature(_grouped_kernel, dtype),
        constants,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        capability=capability,
        unaligned=("n_groups", "stride_sn"),
    )


@functools.cache
def lower_act_quant(
    plan: ActQuantGroupedPlan, act_group_size=32, group_size=128, zero=False, gate="none"
) -> Lowered:
    kernel = act_quant_grouped._grouped_kernel
    act_group = max(act_group_size, 0)
    cell, span = cell_and_span(group_size, act_group)
    constants = dict(
        bias_ptr=None,
        BLOCK_M=plan.block_m,
        NARROW_M=plan.narrow_m,
        BLOCK_N=plan.block_n,
        X_DIV=8 if gate != "none" else 0,
        SCATTER=gate == "none",
        GROUP=group_size,
        ACT_GROUP=act_group,
        CELL=cell,
        SPAN=span,
        CHAIN=False,
        GATE=gate,
        ACT="silu" if gate != "none" else "none",
        KWIDTH=plan.kwidth,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        ASM=True,
    )
    constants |= {} if zero else {"zero_ptr": None, "x_sum_ptr": None}
    return lower(
        kernel,
        signature(kernel, "bf16", POINTERS | ACT_QUANT_POINTERS),
        constants,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        unaligned=("n_groups", "n_act_groups", "stride_sn"),
    )


def shipped(kind: type, arch: Arch, act_group_size: int | None = None) -> list[tuple]:
    """(plan, gate) of every launch that dispatch plans for the shapes of real models."""
    found = {}
    # grouped_hopper.py serves them, but for rows that the tensor memory accelerator cannot read
    more = 0 if kind is PairsPlan else 4
    for shape in MOE_SHAPES:
        for tokens in shape.tokens:
            sizes = shape.experts, shape.hidden + more, shape.inter + more
            problem = ExpertsProblem(tokens, shape.top_k, *sizes, 128, act_group_size)
            plan = plan_experts(problem, arch)
            assert plan is not None
            for part, gate in ((plan.first, "halves"), (plan.second, "none")):
                if isinstance(part, kind):
                    found[part, gate] = None
    return list(found)


def check_pairs(code: Lowered, plan: PairsPlan, budget: float = PAIRS_BUDGET) -> None:
    assert code.stack == 0, code
    # x alone goes through shared memory: 8 columns of 16 bits, 16 bytes a thread and store
    assert code.count("STS") == 4 * plan.blocks, code
    assert code.count("LDS") == 0, code
    weights = plan.slots * plan.slices * plan.tiles * 16 * plan.blocks * 128
    assert code.per_weight(weights) < budget, code


def check_grouped(code: Lowered, plan: GroupedPlan, budget: float | None = None) -> None:
    assert code.stack == 0, code
    assert code.count("STS") == 0, code
    budget = BUDGET[plan.block_m] if budget is None else budget
    assert code.per_weight(plan.block_n * 128) < budget, code


# pairs come here where gemv.py does not take them: the plans are those of one scale a token
@pytest.mark.parametrize("plan,gate", shipped(PairsPlan, H200, -1))
def test_pairs(plan, gate):
    check_pairs(lower_pairs(plan, gate=gate), plan)


@pytest.mark.parametrize("plan,gate", shipped(GroupedPlan, H200))
def test_grouped(plan, gate):
    code = lower_grouped(plan, gate=gate)
    check_grouped(code, plan)
    if plan.block_m >= 16:
        assert code.matrix == {"HGMMA"}, code


@pytest.mark.parametrize("plan,gate", shipped(GroupedPlan, A100)[:2])
def test_grouped_on_ampere(plan, gate):
    code = lower_grouped(plan, gate=gate, capability=80)
    assert code.stack == 0 and code.count("STS") == 0, code


def test_fp16_small_groups_and_zero_points():
    # more scales to load and to apply, but no spill and no shared memory
    pairs, gate = shipped(PairsPlan, H200, -1)[0]
    check_pairs(lower_pairs(pairs, "fp16", gate=gate), pairs)
    check_pairs(lower_pairs(pairs, "bf16", 32, gate=gate), pairs, 3.1)
    check_pairs(lower_pairs(pairs, "bf16", 128, True, gate=gate), pairs, 3.1)
    for grouped, gate in shipped(GroupedPlan, H200):
        if grouped.block_m in (8, 64):
            check_grouped(lower_grouped(grouped, "bf16", 32, gate=gate), grouped, 3.7)
            check_grouped(lower_grouped(grouped, "bf16", 128, True, gate=gate), grouped, 4.2)


@pytest.mark.skipif(TRITON >= KWIDTH_2_EVERYWHERE, reason="int8 from 8 rows on, there")
def test_the_bytes_for_int8_with_16_bit_activations():
    pairs, gate = shipped(PairsPlan, H200, -1)[0]
    check_pairs(lower_pairs(pairs, gate=gate, act_quant=True), pairs, 2.7)
    grouped, gate = shipped(GroupedPlan, H200, 32)[0]
    check_grouped(lower_grouped(grouped, gate=gate, act_quant=True), grouped, 2.6)


@pytest.mark.parametrize("plan,gate", shipped(ActQuantGroupedPlan, H200, 32))
def test_int8(plan, gate):
    for act_group_size in (32, 128, -1):
        code = lower_act_quant(plan, act_group_size, gate=gate)
        assert code.stack == 0 and code.count("STS") == 0, code
        assert code.matrix == {"IGMMA"}, code
        budget = ACT_QUANT_BUDGET.get((act_group_size, plan.block_m))
        if budget is not None:
            assert code.per_weight(plan.block_n * 128) < budget, code


def test_weights_of_the_second_product_are_on_their_way_before_it_waits_for_the_first():
    plan = next(p for p, gate in shipped(PairsPlan, H200, -1) if gate == "none")
    code = lower_pairs(replace(plan, pdl="second"))
    wait = code.text.index("ACQBULK")
    loads = [at for at in range(len(code.text)) if code.text.startswith("LDG.E.128", at)]
    # 16 rows of BLOCKS blocks are 2 loads of 16 bytes a block and thread
    assert sum(at < wait for at in loads) >= 2 * plan.blocks


@pytest.mark.skipif(TRITON >= KWIDTH_2_EVERYWHERE, reason="one order serves all from here on")
def test_the_other_order_of_k_would_show():
    # what the checks above see if dispatch chooses wrongly: words that come in pieces, or stores
    plan, gate = next(found for found in shipped(GroupedPlan, H200) if found[0].block_m == 8)
    code = lower_grouped(replace(plan, kwidth=2), gate=gate)
    assert code.per_weight(plan.block_n * 128) > BUDGET[8], code
    plan, gate = next(found for found in shipped(GroupedPlan, H200) if found[0].block_m == 64)
    assert lower_grouped(replace(plan, kwidth=4), gate=gate).count("STS") > 0
