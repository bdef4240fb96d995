"""What of a call may be launched again, and with which memory. No device is needed."""

from __future__ import annotations

import itertools
import threading
import weakref

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from w4tensor.kernels.launcher import Launcher
from w4tensor.recording import Recording, Replay, active

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter compiles nothing")

SIZE = 64
numbers = itertools.count(1 << 40)


@triton.jit(do_not_specialize=["number"])
def _add_kernel(x_ptr, y_ptr, number, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_ptr + n, tl.load(x_ptr + n) + number)


add = Launcher(_add_kernel)
add_anew = Launcher(_add_kernel, anew={"number": lambda: next(numbers)})


def memory() -> torch.Tensor:
    return torch.empty(SIZE, device="cpu")


def record(call, *inputs: torch.Tensor) -> Replay | None:
    with Recording(inputs) as recording:
        y = call(*inputs)
    return recording.replay(y)


def two_launches(x: torch.Tensor) -> torch.Tensor:
    between, y = memory(), memory()
    add((1,), x, between, 5, N=SIZE)
    add((1,), between[16:], y, 6, N=16)
    return y


def test_the_same_launches_have_the_addresses_of_other_memory(machine):
    replay = record(two_launches, torch.zeros(SIZE))
    assert replay is not None
    machine.launches.clear()
    x = torch.zeros(SIZE)
    y = replay(x)
    assert y.shape == (SIZE,) and y.dtype == torch.float32
    (*_, (x_ptr, between, *first)), (*_, (inside, y_ptr, *second)) = machine.launches
    assert (x_ptr, y_ptr) == (x.data_ptr(), y.data_ptr())
    assert inside == between + 16 * x.itemsize and between not in (x_ptr, y_ptr)
    assert (first, second) == ([5, SIZE], [6, 16])


def test_descriptors_have_the_addresses_of_other_memory(machine):
    def call(x):
        y = memory()
        rows = x.view(4, 16)
        add((1,), TensorDescriptor.from_tensor(rows[1:], [1, 16]), y, 5, N=16)
        return y

    replay = record(call, torch.zeros(SIZE))
    assert replay is not None
    x = torch.zeros(SIZE)
    for _ in range(2):
        replay(x)
        given = machine.launches[-1][-1][0]
        assert given.base.data_ptr() == x[16:].data_ptr()
        assert (given.shape, given.strides, given.block_shape) == ((3, 16), (16, 1), [1, 16])


def test_some_arguments_are_drawn_for_each_launch(machine):
    def call(x):
        y = memory()
        add_anew((1,), x, y, next(numbers), N=SIZE)
        return y

    x = torch.zeros(SIZE)
    replay = record(call, x)
    assert replay is not None
    for _ in range(2):
        replay(x)
    drawn = [args[2] for *_, args in machine.launches]
    assert len(drawn) == len(set(drawn)) == 3


def values_are_made(x):
    return two_launches(x + 1)


def values_are_written(x):
    y = two_launches(x)
    return y.zero_()


def values_are_copied(x):
    return two_launches(torch.stack([x, x], -1)[..., 0].contiguous())


def values_are_read(x):
    return two_launches(x) if x.sum().item() == 0 else x


def memory_of_nobody(x):
    y = memory()
    add((1,), ELSEWHERE, y, 5, N=SIZE)
    return y


def other_code_for_other_alignment(x):
    y = memory()
    add((1,), x, y[1:], 5, N=16)
    return y


def other_code_at_last(x):
    between = two_launches(x)
    add((1,), x[1:], between, 5, N=16)
    return between


def no_launch(x):
    return memory()


def nothing_made(x):
    add((1,), x, x, 5, N=SIZE)
    return x


def a_part_of_what_was_made(x):
    return two_launches(x)[:8]


def a_view_in_another_order(x):
    return two_launches(x).view(8, 8).mT


ELSEWHERE = torch.zeros(SIZE)
NOT_AGAIN = (
    values_are_made,
    values_are_written,
    values_are_copied,
    values_are_read,
    memory_of_nobody,
    other_code_for_other_alignment,
    other_code_at_last,
    no_launch,
    nothing_made,
    a_part_of_what_was_made,
    a_view_in_another_order,
)


@pytest.mark.parametrize("call", NOT_AGAIN, ids=lambda call: call.__name__)
def test_what_cannot_be_launched_again_is_not(machine, call):
    for _ in range(2):
        assert record(call, torch.zeros(SIZE)) is None


def test_an_address_in_two_inputs_is_in_none(machine):
    def call(x, overlapping):
        return two_launches(x)

    x = torch.zeros(SIZE)
    assert record(call, x, torch.zeros(SIZE)) is not None
    assert record(call, x, x[32:]) is not None
    assert record(call, x, x[:32]) is None


def test_memory_is_let_go_after_its_last_launch(machine, monkeypatch):
    alive: list[weakref.ref] = []
    seen = []
    empty = torch.empty

    def tracked(*args, **kwargs):
        t = empty(*args, **kwargs)
        alive.append(weakref.ref(t))
        return t

    def count(*_):
        seen.append(sum(ref() is not None for ref in alive))

    def call(x):
        first = memory()
        add((1,), x, first, 5, N=SIZE)
        second = memory()
        add((1,), first, second, 5, N=SIZE)
        y = memory()
        add((1,), second, y, 5, N=SIZE)
        return y

    monkeypatch.setattr(torch, "empty", tracked)
    x = torch.zeros(SIZE)
    replay = record(call, x)
    assert replay is not None
    machine.launches.clear()
    assert not any(ref() is not None for ref in alive)
    knobs.runtime.launch_enter_hook.add(count)
    try:
        y = replay(x)
    finally:
        knobs.runtime.launch_enter_hook.remove(count)
    assert seen == [1, 2, 2] and count() is None and seen[-1] == 1
    assert y is not None


def test_a_recorded_call_lets_memory_go_when_it_does(machine):
    alive = []

    def call(x):
        for _ in range(3):
            between = memory()
            alive.append(weakref.ref(between.untyped_storage()))
            add((1,), x, between, 5, N=SIZE)
            # which keeps what it was given
            machine.launches.clear()
            del between
            assert not any(ref() is not None for ref in alive)
        return two_launches(x)

    assert record(call, torch.zeros(SIZE)) is not None


def test_where_memory_has_gone_others_may_lie(machine):
    """An address is that of what lives there when it is launched."""
    place = np.zeros(SIZE, np.float32)
    x = torch.zeros(SIZE)
    made = []

    def make(*args, **kwargs):
        made.append(torch.empty(*args, **kwargs))
        return made[-1]

    with Recording((x,)) as recording:
        for number in range(3):
            # in the place of the one before, whose storage is gone
            y = torch.from_numpy(place)
            recording._made(y, make)
            add((1,), x, y, number, N=SIZE)
            # which keeps what it was given
            machine.launches.clear()
            if number < 2:
                del y
    replay = recording.replay(y)
    assert replay is not None
    result = replay(x)
    wrote = [args[1] for *_, args in machine.launches]
    assert wrote == [t.data_ptr() for t in made] and len(made) == 3
    assert result is made[-1]


def test_the_result_has_the_shape_that_was_returned(machine):
    def call(x):
        return two_launches(x).view(4, 16)

    replay = record(call, torch.zeros(SIZE))
    assert replay is not None and replay(torch.zeros(SIZE)).shape == (4, 16)


@pytest.mark.parametrize("call", [two_launches, values_are_copied, values_are_made])
def test_inference_mode_sees_through_no_copy(machine, call):
    """There, operators that may copy are not taken apart: contiguous() is said to give a view."""
    with torch.inference_mode():
        replay = record(call, torch.zeros(SIZE))
    assert (replay is not None) is (call is two_launches)


def test_what_was_zero_is_zero(machine):
    def call(x):
        y = torch.zeros(SIZE, dtype=torch.int32)
        add((1,), x, y, 5, N=SIZE)
        return y

    replay = record(call, torch.zeros(SIZE))
    assert replay is not None
    kept = []
    for _ in range(20):
        kept.append(replay(torch.zeros(SIZE)))
        # what the allocator may give to the next one
        torch.full((SIZE,), 7, dtype=torch.int32)
    assert all(torch.equal(y, torch.zeros(SIZE, dtype=torch.int32)) for y in kept)


def test_a_recording_is_of_its_thread_and_ends_with_its_call(machine):
    seen = []
    with pytest.raises(ZeroDivisionError), Recording(()) as recording:
        assert active() is recording
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert seen == [None] and active() is None
