"""The search for experts' tiles tries what dispatch chooses, on every layer that is benchmarked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import tune_moe
from w4tensor.dispatch import Arch
from w4tensor.dispatch_experts import plan_experts
from w4tensor.plans_experts import FewPlan
from w4tensor.testing import MOE_SHAPES

# the card that was searched
H200 = Arch((9, 0), 132, (3, 6))


def _alone(plan):
    return replace(plan, pdl="none" if isinstance(plan, FewPlan) else False)


@pytest.mark.parametrize("act_group_size", [None, 32, 128, -1])
@pytest.mark.parametrize("shape", MOE_SHAPES, ids=lambda shape: shape.model)
def test_what_dispatch_chooses_is_tried(shape, act_group_size):
    for tokens in shape.tokens:
        problem = tune_moe.problem_of(shape, tokens, act_group_size)
        plan = plan_experts(problem, H200)
        assert plan is not None
        first, second = tune_moe.candidates(problem, H200)
        assert _alone(plan.first) in first, f"{tokens} tokens: {plan.first}"
        assert _alone(plan.second) in second, f"{tokens} tokens: {plan.second}"
