"""dispatch_experts.py: a plan for every block, and tiles that the kernels can take."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w4tensor.dispatch import Arch
from w4tensor.dispatch_experts import (
    ExpertsProblem,
    plan_experts,
    plan_gathered,
    plan_grouped,
)
from w4tensor.dispatch_gemv import GemvPlan, plan_gemv
from w4tensor.errors import Unsupported
from w4tensor.plans_experts import (
    ExpertsPlan,
    FewPlan,
    HopperGroupedPlan,
    HopperInt8GroupedPlan,
    PairsPlan,
    fit_together,
)
from w4tensor.testing import MOE_SHAPES

H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
ARCHS = (
    H200,
    Arch(capability=(8, 0), num_sms=108, triton=(3, 7)),
    Arch(capability=(9, 0), num_sms=132, triton=(3, 9)),
)

# any, and those that the tensor memory accelerator reads
WIDTHS = st.integers(1, 20000) | st.integers(1, 2500).map(lambda n: 8 * n)
ACT_GROUPS = st.sampled_from([None, 32, 64, 128, -1])


@given(
    tokens=st.integers(1, 10**6),
    top_k=st.integers(1, 20),
    experts=st.integers(1, 600),
    hidden=WIDTHS,
    inter=WIDTHS,
    group_size=st.sampled_from([16, 32, 64, 128, 256, 300]),
    act_group_size=ACT_GROUPS,
    symmetric=st.booleans(),
    arch=st.sampled_from(ARCHS),
)
def test_every_block_has_a_plan_that_kernels_can_take(arch, act_group_size, **sizes):
    problem = ExpertsProblem(**sizes, act_group_size=act_group_size)
    plan = plan_experts(problem, arch)
    assert isinstance(plan, ExpertsPlan) and plan.name
    for part in (plan.first, plan.second):
        if isinstance(part, GemvPlan):
            assert act_group_size != -1 and problem.group_size != 16
            # a program's rows are all there, without a gate too
            outputs = problem.inter if part is plan.first else problem.hidden
            assert outputs >= part.rows
        elif isinstance(part, PairsPlan):
            assert 1 <= part.slots * part.slices <= 16
            assert part.slots <= max(1, problem.top_k)
        else:
            assert part.block_n % (16 * part.num_warps) == 0
            assert part.narrow_m < part.block_m
        if isinstance(part, (HopperGroupedPlan, HopperInt8GroupedPlan)):
            assert arch.capability[0] == 9
            assert problem.hidden % 8 == problem.inter % 8 == 0 and problem.group_size != 16
        if isinstance(part, HopperInt8GroupedPlan):
            assert act_group_size in (128, -1) and problem.group_size >= 128
    if not isinstance(plan.first, FewPlan):
        assert isinstance(plan.second, FewPlan) or fit_together(plan.first, plan.second)
    # what stands after the first product is not a sum of slices
    assert getattr(plan.first, "split_k", 1) == 1
    slices = getattr(plan.second, "split_k", 1)
    assert slices == 1 or slices * problem.hidden <= problem.inter


@given(
    rows=st.integers(1, 10**6),
    experts=st.integers(1, 600),
    k=st.integers(1, 20000),
    act_group_size=ACT_GROUPS,
    symmetric=st.booleans(),
    arch=st.sampled_from(ARCHS),
)
def test_rows_that_chose_an_expert_are_sorted_where_tokens_with_one_slot_are(
    arch, symmetric, act_group_size, rows, experts, k
):
    n = 64
    kind = dict(act_group_size=act_group_size, symmetric=symmetric)
    sizes = dict(hidden=k, inter=n, group_size=128)
    block = plan_experts(ExpertsProblem(rows, 1, experts, **sizes, **kind), arch)
    first = block.first
    if isinstance(first, GemvPlan):
        # nor has it gates
        first = plan_gemv(rows, n, k, 128, arch, "none", **kind)
    elif isinstance(first, PairsPlan):
        # nothing is launched ahead of it that it may overtake
        first = dataclasses.replace(first, pdl="none")
    assert plan_gathered(rows, experts, n, k, 128, arch, **kind) == first


def test_zero_points_take_registers_of_pairs():
    # weights ahead of their use leave no room for all programs together: Mixtral's second product,
    # OLMoE's first, and one by itself
    sizes = dict(tokens=1, top_k=2, experts=8, hidden=4096, inter=14336, group_size=128)
    olmoe = dict(tokens=1, top_k=8, experts=64, hidden=2048, inter=1024, group_size=128)
    for symmetric in (True, False):
        plans = (
            plan_experts(ExpertsProblem(**sizes, symmetric=symmetric), H200).second,
            plan_experts(ExpertsProblem(**olmoe, symmetric=symmetric), H200).first,
            plan_gathered(8, 256, 2048, 2048, 128, H200, symmetric=symmetric),
        )
        assert [plan.ahead for plan in plans] == [symmetric] * 3


QWEN = dict(top_k=8, experts=256, hidden=2048, inter=512)


@pytest.mark.parametrize(
    "tokens,kind,rows,programs",
    [
        (600, {}, 32, 0),
        (1600, {}, 64, 2 * 132),
        (1600, dict(act_group_size=32), 64, 2 * 132),
        (1600, dict(symmetric=False), 64, 0),
        # a short K wants small tiles, but where zero points keep those from being shared
        (4096, {}, 64, 2 * 132),
        (4096, dict(symmetric=False), 128, 2 * 132),
        (16384, {}, 256, 132),
        (1600, dict(group_size=64), 64, 0),
        (1600, dict(act_group_size=-1), 64, 0),
    ],
)
def test_programs_share_tiles_where_that_is_faster(tokens, kind, rows, programs):
    plan = plan_experts(ExpertsProblem(tokens, **{**QWEN, "group_size": 128, **kind}), H200)
    for part in (plan.first, plan.second):
        assert (part.block_m, getattr(part, "programs", 0)) == (rows, programs)


def test_a_long_k_is_not_shared():
    mixtral = dict(top_k=2, experts=8, hidden=4096, inter=14336, group_size=128)
    plan = plan_experts(ExpertsProblem(512, **mixtral), H200)
    assert plan.first.programs == 2 * 132 and plan.second.programs == 0


@pytest.mark.parametrize("act_group_size,most", [(None, 256), (32, 256), (-1, 128)])
def test_tiles_grow_with_the_rows_of_an_expert(act_group_size, most):
    sizes = [
        plan_grouped(rows, 64, 2048, 128, H200, act_group_size).block_m
        for rows in (0, 1, 64, 512, 2048, 8192, 65536)
    ]
    assert sizes == sorted(sizes) and sizes[0] == 8 and sizes[-1] == most


@pytest.mark.parametrize(
    "rows,group_size,act_group_size,int8",
    [
        (16, 128, -1, True),
        (65536, 128, -1, True),
        (640, 128, 128, True),
        (0, 128, -1, True),
        (0, 128, 32, False),
        (0, 128, None, False),
        # each with scales that change within K too often for its rows
        (65536, 128, 128, False),
        (640, 64, -1, False),
        (640, 128, 64, False),
        (640, 128, 32, False),
    ],
)
def test_int8_tiles_serve_coarse_scales(rows, group_size, act_group_size, int8):
    plan = plan_grouped(rows, 64, 2048, group_size, H200, act_group_size)
    assert isinstance(plan, HopperInt8GroupedPlan if int8 else HopperGroupedPlan)


@pytest.mark.parametrize("shape", MOE_SHAPES, ids=lambda shape: shape.model)
def test_one_token_is_not_sorted_and_thousands_are(shape):
    def first(tokens):
        sizes = shape.experts, shape.hidden, shape.inter, shape.group_size
        return plan_experts(ExpertsProblem(tokens, shape.top_k, *sizes), H200).first

    assert isinstance(first(1), GemvPlan) and not isinstance(first(4096), FewPlan)


def plan_of(model: str, tokens: int) -> ExpertsPlan:
    shape = next(shape for shape in MOE_SHAPES if shape.model == model)
    sizes = shape.experts, shape.hidden, shape.inter, shape.group_size
    plan = plan_experts(ExpertsProblem(tokens, shape.top_k, *sizes), H200)
    assert plan is not None
    return plan


@pytest.mark.parametrize("tokens,split_k", [(3, 2), (4, 2), (8, 3), (16, 3), (32, 3), (64, 1)])
def test_a_long_k_is_cut_until_its_programs_fill_whole_rounds(tokens, split_k):
    plan = plan_of("mixtral-8x7b", tokens)
    assert plan.second.split_k == split_k and plan.first.split_k == 1
    # a slice is still long
    assert plan.second.pipelined


@pytest.mark.parametrize("inter,split_k", [(4608, 1), (15360, 3)])
def test_sums_of_slices_take_no_more_memory_than_gate_and_up(inter, split_k):
    plan = plan_experts(ExpertsProblem(4, 2, 8, hidden=5120, inter=inter, group_size=128), H200)
    assert plan.second.split_k == split_k


@pytest.mark.parametrize(
    "model,tokens,first,second",
    [
        # 1.3 rows an expert, K of 2048 and 512
        ("qwen3.5-35b-a3b", 16, True, False),
        ("qwen3.5-35b-a3b", 64, False, False),
        # tiles of 32 and of 64 rows
        ("qwen3.5-35b-a3b", 512, False, False),
        ("qwen3.5-35b-a3b", 1600, True, True),
        # 1.2 rows and 2 rows, K of 2880
        ("gpt-oss-20b", 4, True, True),
        ("gpt-oss-20b", 32, False, False),
    ],
)
def test_tiles_are_pipelined_where_loops_are_long(model, tokens, first, second):
    plan = plan_of(model, tokens)
    assert (plan.first.pipelined, plan.second.pipelined) == (first, second)


def test_refusals_and_devices_without_kernels():
    with pytest.raises(Unsupported, match="at least 1"):
        plan_experts(ExpertsProblem(0, 8, 256, 2048, 512, 128), H200)
    old = Arch(capability=(7, 5), num_sms=40, triton=(3, 6))
    assert plan_experts(ExpertsProblem(1, 8, 256, 2048, 512, 128), old) is None
