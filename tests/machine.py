"""What stands for a CUDA device where there is none: it keeps what is launched and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Machine:
    """A Triton driver.

    Fields:
        launches: (kernel and Triton's choice of code, grid, stream, arguments), oldest first.
    """

    def __init__(self):
        self.launches: list[tuple] = []
        self.device = -1

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, kernel: JITFunction, key: Any, *rest: Any) -> CompiledKernel:
        """In the place of JITFunction._do_compile: what Triton keys its code by is the code."""
        code = object.__new__(_Code)
        code.name = kernel.__name__, str(key)
        return code


class _Code(CompiledKernel):
    function = None
    packed_metadata = None
    module = None

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, grid, stream, *args) -> None:
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        if enter is not None:
            enter(metadata)
        # kernels keep code from test to test, and each has its own machine
        driver.active.launches.append((self.name, (x, y, z), stream, args))
        if leave is not None:
            leave(metadata)


def in_place_of_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine that is the current device, on which CPU tensors are taken to be."""
    made = Machine()

    def compile(kernel: JITFunction, *args: Any) -> CompiledKernel:
        return made.compile(kernel, *args)

    monkeypatch.setattr(torch.cuda, "current_device", made.get_current_device)
    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    before = driver._active
    driver.set_active(made)
    yield made
    driver._active = before
