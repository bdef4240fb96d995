"""What a call launches, kept to be launched again on other memory.

To check operands, plan their product and make the arguments of each launch costs the host more
than a product of few tokens costs the device. While a Recording is entered, it sees all launches
(kernels/launcher.py) and all of torch's operators. If these made memory or views of it and no
values, and if each address that was launched lies in an input or in that memory, then the same
launches with the addresses of other inputs, and of memory made anew, are the same call: a Replay.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recording", "Replay", "active"]

aten = torch.ops.aten
_EMPTY = {aten.empty.memory_format, aten.new_empty.default}
_ZEROS = {aten.zeros.default, aten.new_zeros.default}
_thread = threading.local()


def active() -> Recording | None:
    """The recording that this thread has entered."""
    return getattr(_thread, "recording", None)


class _Memory(NamedTuple):
    """Bytes `first` .. `first + size - 1` of the device's memory, of a storage that lives as long
    as `storage()` is not None: when it is gone, others may lie there."""

    first: int
    size: int
    storage: Callable[[], Any]

    @classmethod
    def of(cls, t: Tensor | None) -> _Memory:
        if t is None:
            return cls(0, 0, lambda: None)
        return cls(t.data_ptr(), t.nbytes, weakref.ref(t.untyped_storage()))


class _Step(NamedTuple):
    """A launch: run(*args), in which the following are put.

    Fields:
        addresses: (argument, memory, offset in it). descriptors: the same, and the descriptor's
            class and fields, of which `base` is the memory. anew: (argument, what gives it).
        made: memory of which this is the first launch. done: of which it is the last one.
    """

    run: Callable
    args: list[Any]
    addresses: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, Any, dict[str, Any]]]
    anew: list[tuple[int, Callable]]
    made: list[tuple[int, Callable[[], Tensor]]]
    done: list[int]


class _Base:
    """What Triton asks of the tensor under a descriptor."""

    __slots__ = ("_address",)

    def __init__(self, address: int):
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class Recording(TorchDispatchMode):
    """Of one call with tensors `inputs`, which are contiguous: `with Recording(inputs) as seen`."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        # of the inputs and then of what was made
        self._memory = [_Memory.of(t) for t in inputs]
        # how that was made which is not an input
        self._makers: dict[int, partial[Tensor]] = {}
        self._steps: list[_Step] = []
        self._complete = True

    def __enter__(self) -> Recording:
        assert active() is None, "a call within a call"
        _thread.recording = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _thread.recording = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self._made(out, torch.empty)
        elif func in _ZEROS:
            self._made(out, torch.zeros)
        elif func._schema.is_mutable or not all(r.alias_info for r in func._schema.returns):
            # what may be a view or a copy, as aten.contiguous, passes: a copy's address is nobody's
            self._complete = False
        return out

    def _made(self, t: Tensor, make: Callable[..., Tensor]) -> None:
        self._makers[len(self._memory)] = _maker(make, t)
        self._memory.append(_Memory.of(t))

    def launched(self, run: Callable, args: Sequence[Any], anew: Mapping[int, Callable]) -> None:
        """run(*args) was called; anew: arguments that each launch has to have of its own."""
        step = _step(self._memory, run, args, anew)
        if step is None:
            self._complete = False
        else:
            self._steps.append(step)

    def incomplete(self) -> None:
        """There was a launch that cannot be made again."""
        self._complete = False

    def replay(self, y: Tensor) -> Replay | None:
        """What gives y from other inputs like these, if anything. y was made while recording."""
        if not self._complete or not y.is_contiguous():
            return None
        makers = self._makers.copy()
        result, _ = _find(self._memory, y.data_ptr()) or (-1, 0)
        if result not in makers or self._memory[result].size != y.nbytes:
            return None
        # it may have been made in another shape
        makers[result] = _maker(makers[result].func, y)
        _share_out(makers, self._steps, result)
        if not any(memory == result for step in self._steps for memory, _ in step.made):
            return None
        return Replay(self._steps, len(makers), result)


def _maker(make: Callable[..., Tensor], like: Tensor) -> partial[Tensor]:
    return partial(make, tuple(like.shape), dtype=like.dtype, device=like.device)


def _find(memory: list[_Memory], address: int) -> tuple[int, int] | None:
    """(which memory, offset) of an address that lies in one that lives, and in no other."""
    found = [
        (i, address - m.first)
        for i, m in enumerate(memory)
        if 0 <= address - m.first < m.size and m.storage() is not None
    ]
    return found[0] if len(found) == 1 else None


def _step(
    memory: list[_Memory], run: Callable, args: Sequence[Any], anew: Mapping[int, Callable]
) -> _Step | None:
    """The launch run(*args), or None if an address is not to be found."""
    step = _Step(run, list(args), [], [], list(anew.items()), [], [])
    for i, arg in enumerate(args):
        base = getattr(arg, "base", arg)
        if not isinstance(base, Tensor):
            continue
        at = _find(memory, base.data_ptr())
        if at is None:
            return None
        if base is arg:
            step.addresses.append((i, *at))
        else:
            step.descriptors.append((i, *at, type(arg), dict(arg.__dict__)))
        # tensors are not kept alive
        step.args[i] = None
    for *_, fields in step.descriptors:
        del fields["base"]
    return step


def _share_out(makers: dict[int, partial[Tensor]], steps: list[_Step], kept: int) -> None:
    """Have each step make what it is the first to use, and let go, but of `kept`, as the last."""
    users: dict[int, list[_Step]] = {}
    for step in steps:
        for _, memory, *_ in (*step.addresses, *step.descriptors):
            if memory in makers:
                users.setdefault(memory, []).append(step)
    for memory, some in users.items():
        some[0].made.append((memory, makers[memory]))
        if memory != kept:
            some[-1].done.append(memory)


class Replay:
    """A call's launches, on other inputs than it was recorded with, and its result."""

    __slots__ = ("_made", "_result", "_steps")

    def __init__(self, steps: list[_Step], made: int, result: int):
        self._steps = steps
        # how much memory there is beside the inputs, in pieces
        self._made = made
        # which memory is what the call returns
        self._result = result

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """What the call gives for `inputs`: of dtypes, shapes and strides like those recorded, and
        aligned to 16 bytes, on the current device."""
        addresses = [0 if t is None else t.data_ptr() for t in inputs]
        addresses += [0] * self._made
        held: dict[int, Tensor] = {}
        for run, args, at, descriptors, anew, made, done in self._steps:
            for memory, make in made:
                t = held[memory] = make()
                addresses[memory] = t.data_ptr()
            args = args.copy()
            for i, memory, offset in at:
                args[i] = addresses[memory] + offset
            for i, memory, offset, cls, fields in descriptors:
                # its constructor checks, which takes longer than the launch
                args[i] = descriptor = object.__new__(cls)
                descriptor.__dict__.update(fields, base=_Base(addresses[memory] + offset))
            for i, draw in anew:
                args[i] = draw()
            run(*args)
            for memory in done:
                del held[memory]
        return held[self._result]
