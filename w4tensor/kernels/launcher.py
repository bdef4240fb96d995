"""kernel[grid](...) without Triton's look at every argument, once it has seen such arguments.

That look takes the host longer than the device takes for a product of few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from w4tensor.recording import active

__all__ = ["Launcher"]

# kinds of calls that a kernel remembers; sizes are a part of a kind
KEPT = 4096


class Launcher:
    """Launches `kernel`, which triton.jit or gluon.jit made: launcher(grid, *args, **constants).

    args: tensors, descriptors, integers and None, by position. constants: the constexprs, which
    come after them, then num_warps and the like; at each call the same names in the same order.

    A call gets the machine code that Triton chose for an earlier one which agrees with it in the
    device, the grid, constants, dtypes, blocks of descriptors and integers; where the kernel does
    not specialise on an integer, in its width. Tensors that do not begin at a multiple of 16 bytes
    always go through Triton, which has other code for them.
    """

    def __init__(self, kernel: Any, anew: dict[str, Callable[[], Any]] | None = None):
        """anew: arguments that have to differ from launch to launch, and what gives them."""
        self._kernel = kernel
        # Triton's interpreter compiles nothing
        self._compiles = isinstance(kernel, JITFunction)
        params = kernel.params if self._compiles else []
        self._names = [p.name for p in params]
        self._free = {p.num for p in params if p.do_not_specialize}
        self._anew = {p.num: anew[p.name] for p in params if anew and p.name in anew}
        # {what calls agree in: (machine code on that grid, values of the constexprs)}
        self._known: dict[tuple, tuple[Callable, list]] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        known = self._launch(grid, args, constants)
        recording = active()
        if recording is None:
            return
        if known is None:
            recording.incomplete()
        else:
            run, constexprs = known
            recording.launched(run, (*args, *constexprs), self._anew)

    def _launch(self, grid: tuple, args: tuple, constants: dict) -> tuple[Callable, list] | None:
        """Launch -> the machine code that did so and its constexprs, if it serves calls alike."""
        if not self._compiles:
            self._kernel[grid](*args, **constants)
            return None
        device = torch.cuda.current_device()
        agree: list[Any] = [device, grid, *constants.values()]
        addresses = 0
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                addresses |= arg.data_ptr()
                agree.append(arg.dtype)
            elif isinstance(arg, int):
                agree.append(arg.bit_length() > 31 if i in self._free else arg)
            elif arg is None:
                agree.append(None)
            else:
                addresses |= arg.base.data_ptr()
                agree += arg.base.dtype, *arg.block_shape
        key = tuple(agree)
        known = None if addresses % 16 else self._known.get(key)
        if known is not None:
            run, constexprs = known
            run(*args, *constexprs)
            return known
        compiled = self._kernel[grid](*args, **constants)
        if addresses % 16 or not isinstance(compiled, CompiledKernel):
            return None
        if len(self._known) >= KEPT:
            self._known.clear()
        constexprs = [constants[name] for name in self._names[len(args) :]]
        known = self._known[key] = _runner(compiled, (*grid, 1, 1)[:3], device), constexprs
        return known


def _runner(compiled: CompiledKernel, grid: tuple[int, int, int], device: int) -> Callable:
    """compiled[grid] on the current stream of `device`, without what that makes for hooks as long
    as there are none."""
    with_hooks, hooks = compiled[grid], knobs.runtime
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(*args: Any) -> None:
        for chain in (hooks.launch_enter_hook, hooks.launch_exit_hook):
            if chain is not None and getattr(chain, "calls", True):
                return with_hooks(*args)
        stream = driver.active.get_current_stream(device)
        run(*grid, stream, function, metadata, None, None, None, *args)

    return launch
