"""Operands like earlier ones launch what a first call launches. No device is needed."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
import weakref
from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import w4tensor.kernels
from tests.machine import Machine
from w4tensor import alike, arch, launch, ops
from w4tensor.dispatch import Arch
from w4tensor.errors import PackingError, Unsupported
from w4tensor.kernels.launcher import Launcher
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


def launched(machine: Machine, run: Callable, operands: tuple) -> list[list]:
    """What run(*operands) launches, with an address wherever there is memory, and its result."""
    machine.launches.clear()
    # no memory twice: it is known by its address
    with Kept():
        y = run(*operands)
    assert machine.launches
    some = [[*rest, *map(address, args)] for *rest, args in machine.launches]
    return [*some, [Address(y.data_ptr()), y.dtype, *y.shape]]


class Kept(TorchDispatchMode):
    """Results of all operators are kept."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.results.append(func(*args, **(kwargs or {})))
        return self.results[-1]


def address(arg):
    if isinstance(arg, torch.Tensor):
        return Address(arg.data_ptr())
    if hasattr(arg, "base"):
        return Address(arg.base.data_ptr()), arg.shape, arg.strides, arg.block_shape, arg.layout
    return arg


class Address(int):
    """Told apart from other integers where launches have tensors."""


def named(launches: list[list], like: list[list], operands: tuple) -> list[list]:
    """`launches`, of whose numbers those where `like` has addresses stand for memory: of an
    operand and how far in, or of the how manieth memory that is none's; tokens are all the same."""
    spans = [(i, t.data_ptr(), t.nbytes) for i, t in enumerate(operands) if torch.is_tensor(t)]
    others: dict[int, int] = {}

    def name(arg, shown):
        if isinstance(shown, tuple):
            return tuple(name(*pair) for pair in zip(arg, shown, strict=True))
        if isinstance(shown, Address):
            for i, first, size in spans:
                if first <= arg < first + size:
                    return "operand", i, arg - first
            return "other", others.setdefault(int(arg), len(others))
        return "token" if isinstance(shown, int) and shown >> 61 else arg

    return [
        [name(*pair) for pair in zip(*both, strict=True)]
        for both in zip(launches, like, strict=True)
    ]


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
    return ops.cuda_linear, (*tensors, group_size, act_group_size, LAYOUT_VERSION)


@st.composite
def blocks(draw) -> tuple:
    """Of few experts, as a whole or one product of it."""
    experts, hidden, inter = draw(st.sampled_from(((4, 128, 256), (2, 256, 128), (3, 64, 64))))
    group_size = draw(st.sampled_from((32, 64)))
    zero = draw(st.sampled_from(("symmetric", "integer")))
    act_group_size = draw(st.sampled_from((None, None, 32, -1)))
    layout = COALESCED if act_group_size is None else ACT_QUANT
    tokens, top_k = draw(st.sampled_from((1, 3, 40, 300))), draw(st.sampled_from((1, 2)))
    x = torch.zeros(tokens, hidden, dtype=draw(st.sampled_from((torch.bfloat16, torch.float32))))

    def stack(n: int, k: int) -> tuple:
        codes = random_codes(experts, n, k, group_size=group_size, zero_point=zero)
        return layout.pack(codes.q), codes.scale, codes.zero_point

    rest = group_size, act_group_size, LAYOUT_VERSION
    what = draw(st.sampled_from(("experts", "grouped", "gathered")))
    if what == "grouped":
        offs = torch.zeros(experts, dtype=torch.int32)
        return ops.cuda_grouped_linear, (x, *stack(inter, hidden), offs, *rest)
    if what == "gathered":
        ids = torch.zeros(tokens, dtype=torch.int64)
        return ops.cuda_gathered_linear, (x, ids, *stack(inter, hidden), *rest)
    ids, weight = torch.zeros(tokens, top_k, dtype=torch.int64), torch.ones(tokens, top_k)
    bias = draw(st.sampled_from((None, torch.zeros(experts, hidden))))
    stacks = *stack(2 * inter, hidden), None, *stack(hidden, inter), bias
    return ops.cuda_experts, (x, ids, weight, *stacks, group_size, *rest[:2], "halves", "silu", 1)


@st.composite
def neighbours(draw) -> list[tuple]:
    """A problem, and others that differ in where one operand lies."""
    run, problem = draw(st.one_of(problems(), blocks()))
    given = [(run, problem)]
    for at in draw(st.lists(st.integers(0, 4), max_size=3)):
        if problem[at] is not None:
            moved = draw(st.sampled_from((off_by_one, strided)))(problem[at])
            given.append((run, (*problem[:at], moved, *problem[at + 1 :])))
    return given


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(neighbours(), min_size=1, max_size=3))
def test_a_second_call_launches_what_a_first_one_does(hopper, lists):
    some = [problem for given in lists for problem in given]
    first = []
    for run, operands in some:
        alike._known.clear()
        first.append(launched(hopper, run, operands))
    alike._known.clear()
    tokens = [number for launches in first for number in tokens_of(launches)]
    for _ in range(2):
        for (run, operands), like in zip(some, first, strict=True):
            launches = launched(hopper, run, operands)
            assert named(launches, like, operands) == named(like, like, operands)
            tokens += tokens_of(launches)
    assert len(tokens) == len(set(tokens))


def tokens_of(launches: list[list]) -> list[int]:
    return [arg for args in launches for arg in args if type(arg) is int and arg >> 61]


def problem(what: str, rows: int, act_group_size: int | None) -> tuple:
    """One of the operators, and operands."""
    layout = COALESCED if act_group_size is None else ACT_QUANT
    rest = 64, act_group_size, LAYOUT_VERSION
    x = torch.zeros(rows, 256, dtype=torch.bfloat16)

    def stack(*sizes: int) -> tuple:
        codes = random_codes(*sizes, group_size=64)
        return layout.pack(codes.q), codes.scale, None

    if what == "linear":
        return ops.cuda_linear, (x, *stack(128, 256), None, *rest)
    if what == "grouped":
        offs = torch.zeros(8, dtype=torch.int32)
        return ops.cuda_grouped_linear, (x, *stack(8, 128, 256), offs, *rest)
    if what == "gathered":
        ids = torch.zeros(rows, dtype=torch.int64)
        return ops.cuda_gathered_linear, (x, ids, *stack(8, 128, 256), *rest)
    ids, weight = torch.zeros(rows, 2, dtype=torch.int64), torch.ones(rows, 2)
    stacks = *stack(8, 256, 256), None, *stack(8, 256, 128), None
    return ops.cuda_experts, (x, ids, weight, *stacks, 64, *rest[:2], "halves", "silu", 1)


@pytest.mark.parametrize("act_group_size", [None, 32, -1])
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
@pytest.mark.parametrize("what", ["linear", "grouped", "gathered", "experts"])
def test_every_operator_is_replayed(hopper, what, rows, act_group_size):
    run, operands = problem(what, rows, act_group_size)
    run(*operands)
    assert len(alike._known) == 1 and None not in alike._known.values()


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what operators made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            self.now += out.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(out.untyped_storage(), self._gone, out.nbytes)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("act_group_size", [None, -1])
def test_a_first_call_needs_no_more_memory_than_others(hopper, act_group_size, monkeypatch):
    # they would be kept with their operands
    monkeypatch.setattr(hopper, "launches", deque(maxlen=0))
    run, operands = problem("experts", 1000, act_group_size)
    peaks = []
    for call in (ops._run_checked_experts, run, run):
        with Peak() as seen:
            call(*operands)
        peaks.append(seen.peak)
    plain, first, replayed = peaks
    assert 0 < replayed <= first == plain and None not in alike._known.values()


@pytest.mark.parametrize("what", ["linear", "gathered", "experts"])
def test_strides_of_one_row_do_not_matter(hopper, what):
    run, (x, *rest) = problem(what, 1, None)
    first = launched(hopper, run, (x, *rest))
    alike._known.clear()
    # contiguous all the same
    odd = torch.zeros(x.shape[1], 1, dtype=x.dtype).mT
    assert odd.is_contiguous() and odd.stride() != x.stride()
    for operands in ((odd, *rest), (x, *rest), (odd, *rest)):
        launches = launched(hopper, run, operands)
        assert named(launches, first, operands) == named(first, first, (x, *rest))
    assert len(alike._known) == 1 and None not in alike._known.values()


def test_every_launch_has_a_token_of_its_own():
    """Sums of slices are told from those of earlier launches by it."""
    package = w4tensor.kernels
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    ]
    launchers = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Launcher)}
    with_token = [v for v in launchers.values() if "token" in v._names]
    assert len(with_token) == 3
    for launcher in with_token:
        assert list(launcher._anew) == [launcher._names.index("token")]


def test_a_call_that_is_replayed_has_other_tokens(hopper):
    """In the kernel of W4A8, which cuts K of so few tokens."""
    codes = random_codes(4096, 4096, group_size=128)
    x = torch.zeros(16, 4096, dtype=codes.scale.dtype)
    operands = x, ACT_QUANT.pack(codes.q), codes.scale, None, None, 128, -1, LAYOUT_VERSION
    first, again = (launched(hopper, ops.cuda_linear, operands) for _ in range(2))
    assert any("_int8_hopper_kernel" in launch[0] for launch in first[:-1])
    assert None not in alike._known.values()
    tokens = [number for launches in (first, again) for number in tokens_of(launches)]
    assert len(tokens) == len(set(tokens)) == 2


def test_another_thread_may_forget_what_is_known(hopper, monkeypatch):
    codes = random_codes(64, 256, group_size=128)
    x = torch.zeros(1, 256, dtype=codes.scale.dtype)
    operands = x, COALESCED.pack(codes.q), codes.scale, None, None, 128, None, LAYOUT_VERSION

    class Forgetful(dict):
        def __contains__(self, kind):
            known = super().__contains__(kind)
            self.clear()
            return known

    monkeypatch.setattr(alike, "_known", Forgetful())
    for _ in range(3):
        assert ops.cuda_linear(*operands).shape == (1, 64)


def test_one_thread_records_and_none_waits(hopper):
    """torch keeps whether there is a dispatch mode in flags of the process."""
    begun, entered, left = (threading.Event() for _ in range(3))

    def outer(x):
        begun.set()
        assert entered.wait(60)
        return x.clone()

    def inner(x):
        entered.set()
        # modes that overlap and do not nest would leave flags behind
        assert left.wait(60)
        return x.clone()

    def begin():
        alike.call(outer, (torch.zeros(4),), ())
        left.set()

    thread = threading.Thread(target=begin)
    thread.start()
    assert begun.wait(60)
    alike.call(inner, (torch.zeros(8),), ())
    thread.join()
    assert len(alike._known) == 1
    assert not _python_dispatch._is_in_torch_dispatch_mode
    alike.call(inner, (torch.zeros(8),), ())
    assert len(alike._known) == 2


def test_a_call_within_a_call_is_a_part_of_it(hopper):
    run, operands = problem("linear", 1, None)
    run(*operands)

    def twice(x, *rest):
        run(x, *rest)
        return run(x, *rest)

    def both(*operands):
        return alike.call(twice, operands[:5], operands[5:])

    first, again = (launched(hopper, both, operands) for _ in range(2))
    assert len(alike._known) == 2 and None not in alike._known.values()
    assert named(again, first, operands) == named(first, first, operands)


def test_a_call_that_fails_is_followed_by_others(hopper):
    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        alike.call(fail, (torch.zeros(4),), ())
    run, operands = problem("linear", 1, None)
    run(*operands)
    assert len(alike._known) == 1 and None not in alike._known.values()


def test_tensors_of_another_device_are_not_remembered(hopper):
    codes = random_codes(64, 256, group_size=128)
    x = torch.zeros(1, 256, dtype=codes.scale.dtype)
    operands = x, COALESCED.pack(codes.q), codes.scale, None, None, 128, None, LAYOUT_VERSION
    hopper.device = 1
    ops.cuda_linear(*operands)
    assert hopper.launches and not alike._known
    hopper.device = -1
    ops.cuda_linear(*operands)
    assert alike._known


@pytest.mark.parametrize("name", ["linear", "grouped_linear", "gathered_linear", "experts"])
def test_operands_are_those_of_the_operator(monkeypatch, name):
    arguments = getattr(torch.ops.w4tensor, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    run = getattr(ops, f"cuda_{name}")
    assert list(inspect.signature(run).parameters) == names
    monkeypatch.setattr(alike, "call", lambda run, tensors, rest: (tensors, rest))
    tensors, rest = run(**{name: name for name in names})
    # whatever comes between them
    assert [*tensors] == [a.name for a in arguments if "Tensor" in str(a.type)]
    assert [*rest] == [a.name for a in arguments if "Tensor" not in str(a.type)]


def test_operators_are_told_apart(hopper):
    codes = random_codes(4, 64, 128, group_size=64)
    x = torch.zeros(3, 128, dtype=codes.scale.dtype)
    offs = torch.zeros(4, dtype=torch.int32)
    operands = x, COALESCED.pack(codes.q), codes.scale, None, offs, 64, None, LAYOUT_VERSION
    for _ in range(2):
        ops.cuda_grouped_linear(*operands)
        with pytest.raises(Unsupported):
            ops.cuda_linear(*operands)


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
        operands = x, qdata, codes.scale, None, operand, *rest
        launches = launched(hopper, ops.cuda_linear, operands)
        *_, last, _ = named(launches, launches, operands)
        assert (("operand", 4, 0) in last) is is_read


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
