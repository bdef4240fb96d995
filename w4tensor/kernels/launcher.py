"""kernel[grid](...) without Triton's look at every argument, once it has seen such arguments.

That look takes the host longer than the device takes for a product of few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

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

    def __init__(self, kernel: Any):
        self._kernel = kernel
        # Triton's interpreter compiles nothing
        self._compiles = isinstance(kernel, JITFunction)
        params = kernel.params if self._compiles else []
        self._names = [p.name for p in params]
        self._free = {p.num for p in params if p.do_not_specialize}
        # {what calls agree in: (machine code on that grid, values of the constexprs)}
        self._known: dict[tuple, tuple[Any, list]] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        self._launch(grid, args, constants)

    def again(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Again | None:
        """Launch, and return what launches that code again without looking at anything.

        For callers that know when arguments agree. again(*first) takes as many of the first
        arguments as may differ. None where the code is not to be had: see above.
        """
        known = self._launch(grid, args, constants)
        return None if known is None else Again(known[0], args, known[1])

    def _launch(self, grid: tuple, args: tuple, constants: dict) -> tuple[Any, list] | None:
        if not self._compiles:
            self._kernel[grid](*args, **constants)
            return None
        agree: list[Any] = [torch.cuda.current_device(), grid, *constants.values()]
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
        if len(self._known) == KEPT:
            self._known.clear()
        constexprs = [constants[name] for name in self._names[len(args) :]]
        known = self._known[key] = compiled[(*grid, 1, 1)[:3]], constexprs
        return known


class Again:
    """A launch with other first arguments."""

    __slots__ = ("_args", "_run")

    def __init__(self, run: Any, args: tuple, constexprs: list):
        self._run = run
        # tensors are among the first, and not kept alive
        self._args = *(arg if isinstance(arg, int) else None for arg in args), *constexprs

    def __call__(self, *first: Any) -> None:
        self._run(*first, *self._args[len(first) :])
