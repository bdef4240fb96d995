"""Operands like earlier ones launch what a first call launches. No device is needed."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.machine import Machine
from w4tensor import alike, arch, launch, ops
from w4tensor.dispatch import Arch
from w4tensor.errors import PackingError
from w4tensor.layout import ACT_QUANT, COALESCED, LAYOUT_VERSION
from w4tensor.testing import random_codes


@pytest.fixture
def hopper(machine, monkeypatch) -> Machine:
    target = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    monkeypatch.setattr(arch, "current", lambda device=None: target)
    caches = launch._plan, launch._plan_experts
    for cache in caches:
        cache.cache_clear()
    alike._known.clear()
    yield machine
    alike._known.clear()
    for cache in caches:
        cache.cache_clear()


def launched(machine: Machine, operands: tuple) -> list[tuple]:
    """What cuda_linear launches; memory is named by the operand that it is, or not at all."""
    machine.launches.clear()
    ops.cuda_linear(*operands)
    assert machine.launches
    known = {t.data_ptr(): i for i, t in enumerate(operands) if isinstance(t, torch.Tensor)}

    def named(arg):
        if isinstance(arg, torch.Tensor):
            return "memory", known.get(arg.data_ptr())
        if isinstance(arg, int) and arg >> 61:
            return "token"
        if hasattr(arg, "base"):
            return named(arg.base), tuple(arg.shape), tuple(arg.strides), tuple(arg.block_shape)
        return arg

    return [(*rest, [named(a) for a in args]) for *rest, args in machine.launches]


def off_by_one(t: torch.Tensor) -> torch.Tensor:
    """The same values, at an address that is no multiple of 16; words begin at multiples of 4."""
    first = 2 if t.dtype == COALESCED.qdata_dtype else 1
    return torch.cat([t.new_zeros(first), t.flatten()])[first:].view(t.shape)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, not side by side."""
    return torch.stack([t, t], -1)[..., 0]


@st.composite
def problems(draw) -> tuple:
    n, k = draw(st.sampled_from(((64, 256), (72, 256), (64, 512), (9, 128))))
    group_size = draw(st.sampled_from((32, 128)))
    zero = draw(st.sampled_from(("symmetric", "integer")))
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16)))
    act_group_size = draw(st.sampled_from((None, None, 32, -1)))
    codes = random_codes(n, k, group_size=group_size, dtype=dtype, zero_point=zero)
    layout = COALESCED if act_group_size is None else ACT_QUANT
    qdata = layout.pack(codes.q)
    shape = draw(st.sampled_from(((1,), (2,), (1, 1), (17,), (1, 40), (2, 20), (65,), (300,))))
    x = torch.zeros(*shape, k, dtype=draw(st.sampled_from((dtype, torch.float32))))
    bias = draw(st.sampled_from((None, torch.zeros(n, dtype=dtype), torch.zeros(n))))
    tensors = x, qdata, codes.scale, codes.zero_point, bias
    return *tensors, group_size, act_group_size, LAYOUT_VERSION


@st.composite
def neighbours(draw) -> list[tuple]:
    """A problem, and others that differ in where one operand lies."""
    problem = draw(problems())
    given = [problem]
    for at in draw(st.lists(st.integers(0, 4), max_size=3)):
        if problem[at] is not None:
            moved = draw(st.sampled_from((off_by_one, strided)))(problem[at])
            given.append((*problem[:at], moved, *problem[at + 1 :]))
    return given


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(neighbours(), min_size=1, max_size=3))
def test_a_second_call_launches_what_a_first_one_does(hopper, lists):
    some = [problem for given in lists for problem in given]
    first = []
    for problem in some:
        alike._known.clear()
        first.append(launched(hopper, problem))
    alike._known.clear()
    for _ in range(2):
        assert [launched(hopper, problem) for problem in some] == first


@pytest.mark.parametrize("act_group_size,m", [(None, 1), (None, 40), (32, 40), (64, 300)])
def test_it_is_not_worked_out_again(hopper, monkeypatch, act_group_size, m):
    codes = random_codes(64, 256, group_size=128)
    qdata = (COALESCED if act_group_size is None else ACT_QUANT).pack(codes.q)
    x = torch.zeros(m, 256, dtype=codes.scale.dtype)
    operands = x, qdata, codes.scale, None, None, 128, act_group_size, LAYOUT_VERSION
    ops.cuda_linear(*operands)
    monkeypatch.setattr(launch, "_plan", None)
    assert ops.cuda_linear(*operands).shape == (m, 64)
    # nor does the first call keep its tensors alive
    alive = weakref.ref(qdata), weakref.ref(x)
    hopper.launches.clear()
    del operands, qdata, x
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("act_group_size,m", [(None, 1), (None, 40), (32, 1), (32, 40)])
def test_kernels_read_a_bias_that_lies_side_by_side(hopper, act_group_size, m):
    codes = random_codes(64, 256, group_size=128)
    qdata = (COALESCED if act_group_size is None else ACT_QUANT).pack(codes.q)
    x, bias = torch.zeros(m, 256, dtype=codes.scale.dtype), torch.zeros(64)
    rest = 128, act_group_size, LAYOUT_VERSION
    for operand, is_read in ((bias, True), (strided(bias), False)):
        *_, last = launched(hopper, (x, qdata, codes.scale, None, operand, *rest))
        assert (("memory", 4) in last[-1]) is is_read


def test_what_is_wrong_is_refused_after_what_was_right(hopper):
    codes = random_codes(64, 256, group_size=128)
    qdata, x = COALESCED.pack(codes.q), torch.zeros(1, 256, dtype=codes.scale.dtype)
    right = x, qdata, codes.scale, None, None, 128, None, LAYOUT_VERSION
    for _ in range(2):
        ops.cuda_linear(*right)
    wrongs = [
        {1: qdata.view(torch.uint8)},
        {1: qdata[:32]},
        {2: codes.scale[:, :1]},
        {2: codes.scale.double()},
        {5: 64},
        {6: 32},
        {7: LAYOUT_VERSION + 1},
    ]
    for wrong in wrongs:
        with pytest.raises(PackingError):
            ops.cuda_linear(*(wrong.get(i, operand) for i, operand in enumerate(right)))


def test_what_is_remembered_is_bounded(hopper, monkeypatch):
    monkeypatch.setattr(alike, "KEPT", 3)
    codes = random_codes(64, 256, group_size=128)
    qdata = COALESCED.pack(codes.q)
    for m in range(1, 9):
        x = torch.zeros(m, 256, dtype=codes.scale.dtype)
        ops.cuda_linear(x, qdata, codes.scale, None, None, 128, None, LAYOUT_VERSION)
        assert 1 <= len(alike._known) <= 3
