"""Calls with operands that are like earlier ones: nothing is checked and planned for them again.

Checks, a plan and a launch's arguments cost the host more than decoding a token costs the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from w4tensor.recording import Recording, Replay, active

__all__ = ["call"]

# kinds that are remembered; sizes are a part of a kind
KEPT = 4096
# {_kind: what such a call launches, or None if that is not to be had}
_known: dict[tuple, Replay | None] = {}
# torch's dispatch modes keep flags for the whole process, which two threads' modes would mix up
_recording = threading.Lock()
_NEW: Any = object()


def call(run: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], rest: tuple) -> Tensor:
    """run(*tensors, *rest), which depends on no values of tensors but by its kernels.

    Nothing that is wrong is launched: what run() refused is not remembered.
    """
    kind = _kind(run, tensors, rest)
    # a call within a recorded one is a part of it
    if kind is None or active() is not None:
        return run(*tensors, *rest)
    # another thread may clear what is known at any time
    replay = _known.get(kind, _NEW)
    if replay is not _NEW:
        return run(*tensors, *rest) if replay is None else replay(*tensors)
    # nobody waits, which may be for a compiler: a later call is recorded as well
    if not _recording.acquire(blocking=False):
        return run(*tensors, *rest)
    try:
        # with the strides of new tensors: a kind does not tell those of dimensions of size 1
        tensors = tuple(None if t is None else t.view(-1).view(t.shape) for t in tensors)
        with Recording(tensors) as recording:
            y = run(*tensors, *rest)
    finally:
        _recording.release()
    if len(_known) >= KEPT:
        _known.clear()
    _known[kind] = recording.replay(y)
    return y


def _kind(run: Callable, tensors: tuple[Tensor | None, ...], rest: tuple) -> tuple | None:
    """All that checks, plans and launches look at; None for operands that need a copy, another
    device or other machine code.

    But for strides of dimensions of size 1, which may be any in a contiguous tensor: call() hides
    them from what it records.
    """
    device = torch.cuda.current_device()
    kind: list[Any] = [run, device, *rest]
    addresses = 0
    for t in tensors:
        if t is None:
            kind.append(None)
            continue
        if t.get_device() != device or not t.is_contiguous():
            return None
        addresses |= t.data_ptr()
        kind += t.shape, t.dtype
    return None if addresses % 16 else tuple(kind)
