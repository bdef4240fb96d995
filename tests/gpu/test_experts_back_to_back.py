"""Experts blocks that overlap: each launch begins before the one ahead is done.

A product reads the list of tiles and its weights before it waits for what the launch ahead writes.
No memory is poisoned here: a fill between two launches would have them wait for each other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from w4tensor import arch, moe
from w4tensor.dispatch_experts import ExpertsProblem, plan_experts
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.moe import Stack
from w4tensor.plans_experts import ExpertsPlan, FewPlan
from w4tensor.testing import random_codes, random_routing

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, HIDDEN, INTER = 64, 8, 1024, 512
LAYERS = 4


def _layer(seed: int, act_group_size: int | None) -> tuple[Stack, Stack]:
    layout = COALESCED if act_group_size is None else ACT_QUANT
    shapes = (2 * INTER, HIDDEN), (HIDDEN, INTER)
    codes = [
        random_codes(EXPERTS, *shape, group_size=128, device="cuda", seed=2 * seed + i)
        for i, shape in enumerate(shapes)
    ]
    first, second = (
        Stack(layout.pack(c.q), c.scale, c.zero_point, c.group_size, None, act_group_size)
        for c in codes
    )
    return first, second


def _without_overlap(plan: ExpertsPlan) -> ExpertsPlan:
    return ExpertsPlan(*(_alone(part) for part in (plan.first, plan.second)))


def _alone(part):
    return replace(part, pdl="none" if isinstance(part, FewPlan) else False)


@pytest.mark.parametrize("act_group_size", [None, 32, 128, -1])
@pytest.mark.parametrize("tokens", [1, 2, 16, 40, 300, 1600])
def test_a_chain_of_blocks_has_the_bits_of_blocks_one_by_one(tokens, act_group_size):
    sizes = EXPERTS, HIDDEN, INTER, 128, act_group_size
    plan = plan_experts(ExpertsProblem(tokens, TOP_K, *sizes), arch.current())
    assert plan is not None
    layers = [_layer(seed, act_group_size) for seed in range(LAYERS)]
    routings = [
        random_routing(tokens, EXPERTS, TOP_K, device="cuda", seed=seed) for seed in range(LAYERS)
    ]
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def chain(plan: ExpertsPlan, alone: bool) -> torch.Tensor:
        y = x
        for layer, routing in zip(layers, routings, strict=True):
            y = moe.experts(y, *routing, *layer, plan)
            if alone:
                torch.cuda.synchronize()
        return y

    expected = chain(_without_overlap(plan), alone=True)
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(chain(plan, alone=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(plan, alone=False)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
