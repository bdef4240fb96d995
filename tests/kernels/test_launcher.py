"""A Launcher gives the driver what Triton would, without asking Triton twice. No GPU is needed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.runtime.jit import JITFunction

from w4tensor.kernels.launcher import Launcher

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter compiles nothing")


@triton.jit(do_not_specialize=["token"])
def _kernel(x_ptr, y_ptr, bias_ptr, token, N, STEP: tl.constexpr, NAME: tl.constexpr):
    n = tl.program_id(0) * STEP + tl.arange(0, STEP)
    y = tl.load(x_ptr + n * N, mask=n < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if NAME == "twice":
        y *= 2
    tl.store(y_ptr + n, (y + token).to(y_ptr.dtype.element_ty), mask=n < N)


def addresses(launch: tuple) -> tuple:
    *rest, args = launch
    return *rest, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from((torch.float16, torch.float32)))
    memory = torch.zeros(64, dtype=dtype)
    x = memory[draw(st.sampled_from((0, 0, 1))) :]
    bias = draw(st.sampled_from((None, torch.zeros(64, dtype=dtype), torch.zeros(64)[1:])))
    token = draw(st.sampled_from((1, 2, 16, 1 << 40, (1 << 61) + 1)))
    n = draw(st.sampled_from((1, 2, 16, 24, 32, 1 << 33)))
    grid = draw(st.sampled_from(((1,), (2,), (2, 3), (1, 1, 2))))
    step, name = draw(st.sampled_from((16, 32))), draw(st.sampled_from(("", "twice")))
    constants = dict(STEP=step, NAME=name, num_warps=draw(st.sampled_from((1, 2))))
    return (grid, x, torch.zeros(64), bias, token, n), constants


# each example clears what the machine keeps
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(calls(), min_size=1, max_size=6))
def test_the_driver_gets_what_triton_would_give_it(machine, some):
    # of its own, so that each example begins with what was not seen
    launch = Launcher(_kernel)
    for (grid, *args), constants in some + some:
        machine.launches.clear()
        _kernel[grid](*args, **constants)
        launch(grid, *args, **constants)
        launch(grid, *args, **constants)
        by_triton, *by_us = [addresses(launch) for launch in machine.launches]
        assert by_us == [by_triton] * len(by_us)


def _refuse(*args, **kwargs):
    raise AssertionError("went through Triton")


def test_triton_is_asked_once(machine, monkeypatch):
    launch = Launcher(_kernel)
    x, y = torch.zeros(64), torch.zeros(64)
    constants = dict(STEP=16, NAME="", num_warps=1)
    launch((1,), x, y, None, 5, 24, **constants)
    monkeypatch.setattr(JITFunction, "run", _refuse)
    launch((1,), y, x, None, 6, 24, **constants)
    unlike = [
        ((2,), x, y, None, 5, 24),
        ((1,), x.half(), y, None, 5, 24),
        ((1,), x, y, y, 5, 24),
        ((1,), x, y, None, 1 << 40, 24),
        ((1,), x, y, None, 5, 32),
        ((1,), x[1:], y, None, 5, 24),
    ]
    for grid, *args in unlike:
        with pytest.raises(AssertionError, match="went through Triton"):
            launch(grid, *args, **constants)
    for other in (dict(STEP=32), dict(NAME="twice"), dict(num_warps=2)):
        with pytest.raises(AssertionError, match="went through Triton"):
            launch((1,), x, y, None, 5, 24, **constants | other)


def test_another_device_has_code_of_its_own(machine, monkeypatch):
    launch = Launcher(_kernel)
    args, constants = (torch.zeros(64), torch.zeros(64), None, 5, 24), dict(STEP=16, NAME="")
    launch((1,), *args, **constants)
    machine.device = 1
    monkeypatch.setattr(JITFunction, "run", _refuse)
    with pytest.raises(AssertionError, match="went through Triton"):
        launch((1,), *args, **constants)


def test_what_is_remembered_is_bounded(machine, monkeypatch):
    launch = Launcher(_kernel)
    # more than there may be, as two threads may leave behind
    launch._known.update(dict.fromkeys(range(5)))
    monkeypatch.setattr("w4tensor.kernels.launcher.KEPT", 3)
    for grid in range(1, 9):
        launch((grid,), torch.zeros(64), torch.zeros(64), None, 5, 24, STEP=16, NAME="")
        assert 1 <= len(launch._known) <= 3


@pytest.mark.parametrize("when", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_triton_are_called(machine, when):
    launch = Launcher(_kernel)
    args = torch.zeros(64), torch.zeros(64), None, 5, 24
    called = []
    for _ in range(2):
        launch((1,), *args, STEP=16, NAME="")
    getattr(knobs.runtime, when).add(called.append)
    try:
        launch((1,), *args, STEP=16, NAME="")
    finally:
        getattr(knobs.runtime, when).remove(called.append)
    assert len(called) == 1 and len(machine.launches) == 3
    launch((1,), *args, STEP=16, NAME="")
    assert len(called) == 1 and len(machine.launches) == 4
