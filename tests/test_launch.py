"""What launch.py decides beside the plan. Kernels are replaced: no device is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from w4tensor import arch, launch, moe
from w4tensor.dispatch import Arch, DecodePlan
from w4tensor.dispatch_gemv import GemvPlan
from w4tensor.dispatch_hopper import HopperPlan
from w4tensor.dispatch_int8 import Int8Plan
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.plans_experts import GroupedPlan, HopperGroupedPlan
from w4tensor.testing import random_codes


@pytest.fixture
def plans(monkeypatch) -> list:
    """The plans that would have run on an H200."""
    target = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    monkeypatch.setattr(arch, "current", lambda device=None: target)
    seen: list = []
    monkeypatch.setattr(launch, "run_coalesced", lambda plan, *rest: seen.append(plan))
    monkeypatch.setattr(moe, "experts", lambda *operands: seen.append(operands[5]) or operands[0])
    caches = launch._plan, launch._plan_experts
    for cache in caches:
        cache.cache_clear()
    yield seen
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
@pytest.mark.parametrize(
    "m,kind,early",
    [(1, GemvPlan, "second"), (2, DecodePlan, True), (40, HopperPlan, True)],
)
def test_weights_that_were_just_copied_are_not_read_early(plans, m, kind, early, zero_point):
    # groups of 16 for decode, which has them for itself
    group_size = 16 if kind is DecodePlan else 128
    codes = random_codes(64, 512, group_size=group_size, zero_point=zero_point)
    weight = COALESCED.pack(codes.q), codes.scale, codes.zero_point
    x = torch.randn(m, 256, dtype=codes.scale.dtype)
    # K is cut: rows of the fields are strided
    cut = [None if t is None else t[:, t.shape[1] // 2 :] for t in weight]
    launch.coalesced_linear(x, *cut, None, group_size)
    whole = [None if t is None else t.contiguous() for t in cut]
    launch.coalesced_linear(x, *whole, None, group_size)
    assert [type(plan) for plan in plans] == [kind, kind]
    assert [plan.pdl for plan in plans] == ["none" if kind is GemvPlan else False, early]


@pytest.mark.parametrize(
    "first,second,kind",
    [(128, 128, HopperGroupedPlan), (128, 16, GroupedPlan), (16, 128, GroupedPlan)],
)
def test_the_finer_groups_of_two_stacks_decide(plans, first, second, kind):
    def stack(rows, group_size):
        codes = random_codes(4, rows, 128, group_size=group_size)
        qdata = COALESCED.pack(codes.q)
        return qdata, codes.scale, codes.zero_point, group_size, None, None

    x = torch.randn(64, 128, dtype=torch.bfloat16)
    ids, weight = torch.zeros(64, 2, dtype=torch.int64), torch.ones(64, 2)
    launch.experts(x, ids, weight, stack(256, first), stack(128, second), "halves", "silu")
    assert isinstance(plans[0].first, kind) and isinstance(plans[0].second, kind)


@pytest.mark.parametrize("with_zero_points", [(False, False), (True, False), (False, True)])
def test_zero_points_of_either_stack_are_planned_for(plans, monkeypatch, with_zero_points):
    def stack(rows, zero):
        codes = random_codes(4, rows, 128, zero_point="integer" if zero else "symmetric")
        return COALESCED.pack(codes.q), codes.scale, codes.zero_point, 128, None, None

    seen = []
    monkeypatch.setattr(launch, "_plan_experts", lambda device, p: seen.append(p.symmetric))
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    ids, weight = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    first, second = map(stack, (256, 128), with_zero_points)
    assert launch.experts(x, ids, weight, first, second, "halves", "silu") is None
    assert seen == [with_zero_points == (False, False)]


def test_groups_of_16_are_not_hidden_by_shorter_rows(plans):
    def stack(rows, k, group_size):
        codes = random_codes(4, rows, k, group_size=group_size)
        return COALESCED.pack(codes.q), codes.scale, codes.zero_point, group_size, None, None

    x = torch.randn(64, 128, dtype=torch.bfloat16)
    ids, weight = torch.zeros(64, 2, dtype=torch.int64), torch.ones(64, 2)
    launch.experts(x, ids, weight, stack(16, 128, 16), stack(128, 8, 8), "halves", "silu")
    assert isinstance(plans[0].first, GroupedPlan) and isinstance(plans[0].second, GroupedPlan)


@pytest.mark.parametrize(
    "m,k,group,early",
    [
        # a tile of int8, and one of 16 bits on rounded x: each may start early, or loses by it
        (8, 1024, 32, dict(pdl=True, overlap=True)),
        (8, 8192, 32, dict(pdl=True, overlap=False)),
        (8, 8192, -1, dict(pdl=True, overlap=True)),
        (16, 1024, 32, dict(pdl=True, overlap=True)),
        (16, 8192, 32, dict(pdl=True, overlap=False)),
    ],
)
def test_activations_are_quantised_as_the_plan_says(plans, monkeypatch, m, k, group, early):
    def quantise(x, act_group_size, sums=None, **options):
        seen.update(options)
        return x, None, None

    def rounded(x, act_group_size, word_order, **options):
        assert word_order and x.shape == (1, m, k)
        seen.update(options)
        return x

    seen: dict = {}
    monkeypatch.setattr(launch, "quantize_codes", quantise)
    monkeypatch.setattr(launch, "round_activation", rounded)
    monkeypatch.setitem(launch._ACT_QUANT_KERNELS, Int8Plan, lambda *operands: plans.append("int8"))
    monkeypatch.setattr(launch, "gemm_hopper", lambda *operands: plans.append("rounded"))
    codes = random_codes(64, k, group_size=128)
    x = torch.randn(m, k, dtype=codes.scale.dtype)
    weight = ACT_QUANT.pack(codes.q), codes.scale, None
    y = launch.act_quant_linear(x, *weight, None, 128, group)
    assert y.shape == (m, 64) and seen == early
    assert plans == ["int8" if m <= 8 else "rounded"]


def test_kernels_start_on_the_device_of_x(monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    run = launch._on_its_device(lambda x, y: (x.device.index, y, len(entered)))
    for index, expected in ((0, 0), (1, 1)):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        assert run(x, "y") == (index, "y", expected)
    assert entered == [torch.device("cuda", 1)]
