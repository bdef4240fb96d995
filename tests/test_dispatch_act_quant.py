"""Every legal problem with int8 activations has a plan, and the plan fits its kernel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from w4tensor.dispatch import Arch, Problem
from w4tensor.dispatch_act_quant import (
    ActQuantDecodePlan,
    ActQuantDp4aPlan,
    ActQuantGemmPlan,
    ActQuantRoundedPlan,
    plan_act_quant,
)

ARCHS = [
    Arch(capability=capability, num_sms=num_sms, triton=triton)
    for capability, num_sms in (((8, 0), 108), ((8, 9), 128), ((9, 0), 132), ((10, 0), 148))
    for triton in ((3, 6), (3, 7), (3, 8), (3, 9))
]


@st.composite
def problems(draw) -> Problem:
    group_size = draw(st.sampled_from((16, 32, 64, 128, 256, 0)))
    k = draw(st.integers(1, 40000)) if group_size == 0 else group_size * draw(st.integers(1, 150))
    return Problem(
        m=draw(st.sampled_from((1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 129, 1024, 5000))),
        n=draw(st.integers(1, 200000)),
        k=k,
        group_size=group_size or k,
        act="int8",
        symmetric=draw(st.booleans()),
        batch=draw(st.sampled_from((1, 3, 64))),
        act_group_size=draw(st.sampled_from((32, 64, 128, -1))),
    )


@given(problems(), st.sampled_from(ARCHS))
def test_a_plan_fits_its_kernel(p, arch):
    plan = plan_act_quant(p, arch)
    hopper = arch.capability[0] == 9
    natural = arch.triton >= (3, 8)
    if isinstance(plan, ActQuantRoundedPlan):
        assert p.batch == 1 and 1 <= plan.rows <= p.n
        return
    warps = plan.num_warps
    if isinstance(plan, ActQuantDp4aPlan):
        assert p.m <= plan.tokens
        # a thread has one slice of one row
        assert plan.block_n * plan.block_slices == 32 * warps
        assert plan.pdl <= (arch.capability >= (9, 0))
        return
    shared = plan.num_stages * plan.block_k * (plan.block_m + plan.block_n // 2)
    assert shared <= (200_000 if hopper else 96_000)
    if isinstance(plan, ActQuantDecodePlan):
        assert p.m <= plan.block_m and plan.block_m in (8, 16)
        # every warp has at least what one instruction takes, every slice at least a step
        assert plan.block_k // warps >= 32 and (plan.split_k - 1) * plan.block_k < p.k
        assert plan.kwidth == (4 if natural else 8)
        assert plan.pdl <= (arch.capability >= (9, 0))
    else:
        assert isinstance(plan, ActQuantGemmPlan)
        # two tiles of 32-bit sums in the registers of a program's threads
        assert plan.block_m * plan.block_n // (32 * warps) <= 64
        assert plan.block_n >= 16 * warps and plan.block_k % 128 == 0
        assert plan.kwidth == (4 if hopper or natural else 8)
        assert plan.x_tma <= hopper


def test_plans_are_hashable_and_named():
    arch = ARCHS[8]
    for m in (1, 8, 64, 4096):
        p = Problem(m=m, n=4096, k=4096, group_size=128, act="int8", act_group_size=32)
        plan = plan_act_quant(p, arch)
        assert hash(plan) == hash(plan_act_quant(p, arch)) and plan.name
