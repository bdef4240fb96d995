"""A Launcher gives the driver what Triton would, without asking Triton twice. No GPU is needed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
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


class _Machine:
    """What stands for a device: it keeps what is launched on it, and runs nothing."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.utils = self
        machine = self

        class Launched:
            def __init__(self, source, metadata):
                pass

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
                args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
                machine.launches.append(((x, y, z), stream, function, packed, *args))

        self.launcher_cls = Launched

    def load_binary(self, name, binary, shared, device):
        return "module", hash(binary), 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = driver._active
    driver.set_active(_Machine())
    yield driver.active
    driver._active = before


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from((torch.float16, torch.float32)))
    memory = torch.zeros(64, dtype=dtype)
    x = memory[draw(st.sampled_from((0, 0, 1))) :]
    bias = draw(st.sampled_from((None, torch.zeros(64, dtype=dtype), torch.zeros(64)[1:])))
    token = draw(st.sampled_from((1, 2, 16, 1 << 40, (1 << 61) + 1)))
    n = draw(st.sampled_from((1, 2, 16, 24, 32, 1 << 33)))
    grid = draw(st.sampled_from(((1,), (2,), (2, 3), (1, 1, 2))))
    constants = dict(STEP=draw(st.sampled_from((16, 32))), NAME=draw(st.sampled_from(("", "twice"))))
    warps = draw(st.sampled_from((1, 2)))
    return (grid, x, torch.zeros(64), bias, token, n), constants | dict(num_warps=warps)


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
        by_triton, by_us = machine.launches
        assert by_us == by_triton


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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(JITFunction, "run", _refuse)
    with pytest.raises(AssertionError, match="went through Triton"):
        launch((1,), *args, **constants)


def test_what_is_remembered_is_bounded(machine, monkeypatch):
    monkeypatch.setattr("w4tensor.kernels.launcher.KEPT", 3)
    launch = Launcher(_kernel)
    for grid in range(1, 9):
        launch((grid,), torch.zeros(64), torch.zeros(64), None, 5, 24, STEP=16, NAME="")
        assert 1 <= len(launch._known) <= 3
