"""Weights of nn.Linear: what Dynamo makes of them, and that nobody else sees a difference."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._C._dynamo.guards import DictGuardManager
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import quantize_

from tests.weights import CLASSES, Case, both_classes, exact_x
from w4tensor import W4ActQuantConfig, W4CoalescedConfig, summary
from w4tensor.tensors import one_guard
from w4tensor.tensors.linear_weight import as_linear_weight, wants

CONFIGS = dict(zip(CLASSES, (W4CoalescedConfig, W4ActQuantConfig), strict=True))


# as PyTorch up to 2.12 does by itself: no guard runs below a module whose dicts are as they were
skipping_modules = torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantised(cls, module: nn.Module) -> nn.Module:
    quantize_(module, CONFIGS[cls](group_size=64))
    return module


def graph_inputs(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of the one graph that Dynamo makes of a call."""
    seen: list = []

    def backend(graph, inputs):
        seen.append(inputs)
        return graph.forward

    torch.compile(module, backend=backend, fullgraph=True)(x)
    assert len(seen) == 1
    return seen[0]


@both_classes
def test_a_graph_takes_the_fields_and_never_copies_them(cls):
    model = quantised(cls, nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64, bias=False)))
    x = exact_x(3, 256)
    inputs = graph_inputs(model, x)
    assert {type(t) for t in inputs} == {torch.Tensor, nn.Parameter}
    fields = {id(t) for linear in model for t in (linear.weight.qdata, linear.weight.scale)}
    found = [t for t in inputs if id(t) in fields]
    assert len(found) == len(fields) == 4
    # CUDA graphs read these where they are
    assert all(t._dynamo_static_input_type == "unguarded" for t in found)


class Doubled(nn.Linear):
    """A Linear with a forward of its own, which asks more of its weight."""

    def forward(self, x):
        return x @ self.weight.t() * 2


@both_classes
def test_only_what_meets_nothing_but_f_linear(cls):
    linear, doubled = nn.Linear(256, 64), Doubled(256, 64)
    assert wants(linear, "weight") and not wants(linear, "bias")
    assert not wants(doubled, "weight") and not wants(nn.Embedding(4, 4), "weight")
    quantised(cls, nn.Sequential(linear, doubled))
    assert type(linear.weight) is not cls and isinstance(linear.weight, cls)
    assert type(doubled.weight) is cls
    torch.compile(doubled, backend="eager", fullgraph=True)(exact_x(3, 256))
    for other in (Case(cls, stack=(2,)).weight(), Case(cls).weight().t(), torch.ones(2, 2), None):
        before = type(other)
        assert as_linear_weight(other) is other and type(other) is before


@both_classes
def test_it_has_the_name_of_its_class_in_files_and_messages(cls):
    model = quantised(cls, nn.Sequential(nn.Linear(256, 64)))
    w = model[0].weight
    assert type(w).__name__ == cls.__name__ and cls.__name__ in repr(w)
    assert cls.__name__ in str(summary(model))
    for again in (
        pickle.loads(pickle.dumps(w)),
        copy.deepcopy(w),
        w.detach(),
        w.clone(),
        w.to(torch.float16).to(torch.float32),
    ):
        assert type(again) is type(w) and torch.equal(again.qdata, w.qdata)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["0.weight"]
    assert type(loaded) is type(w) and torch.equal(loaded.scale, w.scale)


@both_classes
def test_bytes_of_both_kinds_of_weight_are_the_same_bytes(cls):
    case = Case(cls, n=64)
    plain, held = case.weight(), as_linear_weight(case.weight())
    x = exact_x(3, 256)
    assert torch.equal(F.linear(x, held), F.linear(x, plain))
    other = Case(cls, n=64, seed=5).weight()
    held.copy_(other)
    assert torch.equal(held.qdata, other.qdata)
    plain.copy_(held)
    assert torch.equal(plain.scale, other.scale)
    assert torch.cat((plain, held)).shape == (128, 256)
    model = nn.Linear(256, 64, bias=False)
    model.weight = nn.Parameter(held, requires_grad=False)
    model.load_state_dict({"weight": case.weight()})
    assert torch.equal(model.weight.qdata, case.weight().qdata)


@both_classes
def test_other_bytes_are_seen(cls):
    linear = nn.Linear(256, 24, bias=False)
    x = exact_x(3, 256)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for case in (
        Case(cls),
        Case(cls, seed=1),
        Case(cls, group_size=32),
        Case(cls, group_size=-1),
        Case(cls, zero="fractional"),
        Case(cls, dtype=torch.float16),
    ):
        linear.weight = nn.Parameter(as_linear_weight(case.weight()), requires_grad=False)
        assert torch.equal(compiled(x), F.linear(x, case.weight())), case
    # in place of the same Parameter
    linear.weight.data = as_linear_weight(Case(cls, group_size=128, dtype=torch.float16).weight())
    assert torch.equal(compiled(x), linear(x))


@both_classes
def test_two_layers_share_a_graph(cls):
    layers = quantised(cls, nn.ModuleList(nn.Linear(256, 64) for _ in range(4)))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def run(layer, x):
        return layer(x)

    x = exact_x(3, 256)
    for layer in layers:
        run(layer, x)
    assert counter.frame_count == 1


@both_classes
def test_its_attributes_are_known_inside_a_graph(cls):
    linear = quantised(cls, nn.Linear(256, 64))

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        w = linear.weight
        assert isinstance(w, torch.Tensor) and not w.requires_grad and w.ndim == 2
        return linear(x.to(w.device, w.dtype)), w.shape[0], w.dtype, w.device

    x = exact_x(3, 256)
    y, n, dtype, device = run(x)
    assert torch.equal(y, linear(x)) and n == 64
    assert (dtype, device) == (linear.weight.dtype, linear.weight.device)


@both_classes
def test_another_thread_may_not_have_the_setting(cls):
    linear = quantised(cls, nn.Linear(256, 64))
    x, results = exact_x(3, 256), []

    def run():
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        results.append(compiled(x))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(results[0], linear(x))


@both_classes
def test_another_operator_breaks_the_graph_and_is_right(cls):
    linear = quantised(cls, nn.Linear(256, 64, bias=False))
    x = exact_x(3, 256)

    @torch.compile(backend="aot_eager")
    def run(x):
        return (x + 1) @ linear.weight.t() - 1

    assert torch.allclose(run(x), F.linear(x + 1, linear.weight) - 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x):
        return self.down(self.up(x))


@dataclass
class Node:
    """A node of Dynamo's tree of guards."""

    type: type
    tag_safe: bool
    children: int
    # guards that call Python
    calls: int


def guard_nodes(run) -> list[Node]:
    """Every node of the guards of the one graph that was compiled of the function `run`."""
    (entry,) = _debug_get_cache_entry_list(run.__code__)
    nodes, left = [], [entry.guard_manager.root]
    while left:
        manager = left.pop()
        children = list(manager.get_child_managers())
        if isinstance(manager, DictGuardManager):
            children += [m for pair in manager.get_key_value_managers().values() for m in pair if m]
        if manager is not entry.guard_manager.root:
            kind = manager.get_type_of_guarded_value()
            calls = sum(
                type(guard).__name__ == "LAMBDA_GUARD" for guard in manager.get_leaf_guards()
            )
            nodes.append(Node(kind, manager.is_tag_safe(), len(children), calls))
        left += children
    return nodes


@skipping_modules
@both_classes
def test_guards_are_as_few_as_those_of_plain_weights(cls):
    """Structure, not time: with accessors on a weight, each call walks to it."""

    def compiled(stack):
        def run(x):
            return stack(x)

        # both have the same code, and what was compiled is kept there
        torch._dynamo.reset()
        torch.compile(run, backend="eager", fullgraph=True)(exact_x(3, 256))
        return guard_nodes(run)

    def stack():
        return nn.Sequential(*(Block() for _ in range(3))).requires_grad_(False)

    plain, ours = compiled(stack()), compiled(quantised(cls, stack()))
    weights = [node for node in ours if issubclass(node.type, cls)]
    assert len(weights) == 6 and all(node.tag_safe and not node.children for node in weights)
    assert all(node.calls == 1 for node in weights)
    for kind in (nn.Linear, Block):
        safe = [[node.tag_safe for node in nodes if node.type is kind] for nodes in (plain, ours)]
        assert safe[0] == safe[1] and any(safe[1])


def half(linear, new):
    linear.to(torch.float16)


def set_fields(linear, new):
    # a scale of another dtype than the weight's is refused
    weight = new(group_size=32).to(linear.weight.dtype)
    for name in ("qdata", "scale", "zero_point", "group_size"):
        setattr(linear.weight, name, getattr(weight, name))


def quantise_again(linear, new):
    config = next(CONFIGS[cls](group_size=32) for cls in CLASSES if isinstance(linear.weight, cls))
    linear.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
    quantize_(linear, config)


def copy_state_by_swapping(linear, new):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        linear.load_state_dict({"weight": new()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def move_by_overwriting(linear, new):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        linear.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


# what becomes of linear.weight; new(..) is a weight like it but for its codes and what is given
CHANGES = {
    "data": lambda linear, new: setattr(linear.weight, "data", new()),
    "data of other groups": lambda linear, new: setattr(linear.weight, "data", new(group_size=32)),
    "data with zero points": lambda linear, new: setattr(
        linear.weight, "data", new(zero="integer")
    ),
    "data of other rows": lambda linear, new: setattr(linear.weight, "data", new(n=80)),
    "Parameter": lambda linear, new: setattr(linear, "weight", new()),
    "Parameter of other groups": lambda linear, new: setattr(linear, "weight", new(group_size=-1)),
    "Parameter with zero points": lambda linear, new: setattr(
        linear, "weight", new(zero="integer")
    ),
    "swapped tensors": lambda linear, new: torch.utils.swap_tensors(linear.weight, new()),
    "swapped groups": lambda linear, new: torch.utils.swap_tensors(
        linear.weight, new(group_size=32)
    ),
    "copy_": lambda linear, new: linear.weight.copy_(new()),
    "qdata.copy_": lambda linear, new: linear.weight.qdata.copy_(new().qdata),
    "_apply": lambda linear, new: linear._apply(torch.clone),
    "to": half,
    "to, overwriting": move_by_overwriting,
    "load_state_dict": lambda linear, new: linear.load_state_dict({"weight": new()}),
    "load_state_dict, swapping": copy_state_by_swapping,
    "load_state_dict, assigning": lambda linear, new: linear.load_state_dict(
        {"weight": new(group_size=32)}, assign=True
    ),
    "fields": set_fields,
    "quantised again": quantise_again,
}


def changes_are_seen(cls, changes: list[str]) -> None:
    """The same function, compiled before the changes and called after each, and never compiled."""
    torch._dynamo.reset()
    seeds = itertools.count(1)
    linears = [nn.Linear(256, 64, bias=False), nn.Linear(256, 64, bias=False)]
    model = nn.ModuleList(nn.Sequential(linear) for linear in linears)

    def new(**case):
        weight = as_linear_weight(Case(cls, seed=next(seeds), **({"n": 64} | case)).weight())
        return nn.Parameter(weight, requires_grad=False)

    for linear in linears:
        linear.weight = new()

    def run(x):
        return [part(x) for part in model]

    compiled, x = torch.compile(run, backend="aot_eager", fullgraph=True), exact_x(3, 256)
    for change in (None, *changes):
        if change is not None:
            CHANGES[change](linears[0], new)
        # guards record what they have seen, then rely on it
        for _ in range(3):
            for ours, eager in zip(compiled(x), run(x), strict=True):
                assert torch.equal(ours, eager), changes


@pytest.mark.parametrize("change", CHANGES)
@both_classes
def test_a_change_of_the_weight_is_seen(cls, change):
    changes_are_seen(cls, [change])


# where modules are skipped, 2.13 refuses to swap what compiled code has seen
NOT_SWAPPED = [name for name in CHANGES if re.search("data|Parameter|copy_|fields", name)]


@pytest.mark.parametrize("change", NOT_SWAPPED)
@both_classes
def test_a_change_is_seen_where_dynamo_skips_modules(cls, change):
    with skipping_modules:
        changes_are_seen(cls, [change])


@both_classes
def test_a_float_weight_may_take_its_place_by_swapping(cls):
    linear = quantised(cls, nn.Linear(256, 64, bias=False))
    compiled, x = torch.compile(linear, backend="aot_eager", fullgraph=True), exact_x(3, 256)
    compiled(x)
    floats = nn.Parameter(torch.randn(64, 256), requires_grad=False)
    torch.utils.swap_tensors(linear.weight, floats)
    assert torch.equal(compiled(x), x @ linear.weight.t()) and isinstance(floats, cls)


@both_classes
def test_a_weight_of_the_other_class_may_take_its_place_by_swapping(cls):
    linear = quantised(cls, nn.Linear(256, 64, bias=False))
    compiled, x = torch.compile(linear, backend="aot_eager", fullgraph=True), exact_x(3, 256)
    (other,) = set(CLASSES) - {cls}
    weight = quantised(other, nn.Linear(256, 64, bias=False)).weight
    for _ in range(3):
        assert torch.equal(compiled(x), linear(x))
        torch.utils.swap_tensors(linear.weight, weight)


@both_classes
def test_a_region_that_is_compiled_once_serves_weights_of_its_format(cls):
    configs = [CONFIGS[cls](group_size=g) for g in (64, 64, 32, 64)]
    linears = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in configs)
    for linear, config in zip(linears, configs, strict=True):
        quantize_(linear, config)

    @torch.compiler.nested_compile_region
    def region(linear, x):
        return linear(x) * 2

    def run(x):
        return [region(linear, x) for linear in linears]

    compiled, x = torch.compile(run, backend="aot_eager", fullgraph=True), exact_x(3, 256)
    for ours, linear in zip(compiled(x), linears, strict=True):
        assert torch.equal(ours, linear(x) * 2)


# the others refuse a weight of another format, or of other rows
ANY_TIME = [name for name in CHANGES if not re.search("copy_|rows|dict$|dict, swapping", name)]


@settings(max_examples=15, deadline=None)
@given(cls=st.sampled_from(CLASSES), changes=st.lists(st.sampled_from(ANY_TIME), max_size=5))
@example(cls=CLASSES[0], changes=["to", "fields", "quantised again"])
def test_changes_in_any_order_are_seen(cls, changes):
    with torch._dynamo.config.patch(recompile_limit=32):
        changes_are_seen(cls, changes)


@pytest.mark.parametrize("lacks", ["comptime", "is_from_unspecialized_nn_module_source"])
@both_classes
def test_where_dynamo_has_other_insides_its_own_guards_stay(cls, lacks, monkeypatch):
    def absent(source):
        raise AttributeError(lacks)

    monkeypatch.setattr(one_guard, lacks, None if lacks == "comptime" else absent)
    changes_are_seen(cls, ["data of other groups", "Parameter", "fields", "to"])


@both_classes
def test_layers_that_share_a_graph_are_all_watched(cls):
    layers = quantised(cls, nn.ModuleList(nn.Linear(256, 64, bias=False) for _ in range(3)))
    compiled = torch.compile(lambda layer, x: layer(x), backend="aot_eager", fullgraph=True)
    x = exact_x(3, 256)
    for _ in range(3):
        for layer in layers:
            assert torch.equal(compiled(layer, x), layer(x))
    # the first is the one that was traced
    for layer in reversed(layers):
        case = Case(cls, n=64, group_size=32)
        layer.weight.data = as_linear_weight(case.weight())
        for _ in range(3):
            assert torch.equal(compiled(layer, x), layer(x))


@both_classes
def test_two_weights_of_one_buffer_are_not_taken_for_one(cls):
    linears = [nn.Linear(256, 24, bias=False) for _ in range(2)]
    model = nn.ModuleList(linears)
    for linear in linears:
        linear.weight = nn.Parameter(as_linear_weight(Case(cls).weight()), requires_grad=False)
    linears[1].weight.qdata = linears[0].weight.qdata
    x = exact_x(3, 256)

    def run(x):
        return [linear(x) for linear in model]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for seed in (0, 1, 2):
        if seed:
            new = as_linear_weight(Case(cls, seed=seed).weight())
            linears[seed % 2].weight = nn.Parameter(new, requires_grad=False)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(compiled(x), run(x), strict=True))


@both_classes
def test_a_graph_is_not_compiled_again_for_nothing(cls):
    """New bytes of a format, weights that no graph knows: neither makes a graph invalid."""
    linear = nn.Linear(256, 24, bias=False)
    linear.weight = nn.Parameter(as_linear_weight(Case(cls).weight()), requires_grad=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(linear, backend=counter, fullgraph=True), exact_x(3, 256)
    compiled(x)
    for change in ("data", "Parameter", "swapped tensors", "copy_", "_apply"):
        unknown = quantised(cls, nn.Linear(256, 64)).to(torch.float16)
        unknown.weight.data = unknown.weight.data.to(torch.float32)
        CHANGES[change](
            linear,
            lambda: nn.Parameter(as_linear_weight(Case(cls, seed=3).weight()), requires_grad=False),
        )
        assert torch.equal(compiled(x), linear(x))
    assert counter.frame_count == 1


def there_and_back(linear, weights, turn):
    """Changes of the format, that every other turn takes back."""
    if turn % 3 == 0:
        for dtype in (torch.float16, torch.bfloat16):
            yield linear.to(dtype)
    elif turn % 3 == 1:
        for _ in range(2):
            yield torch.utils.swap_tensors(linear.weight, weights[0])
    else:
        for weight in weights[1:]:
            linear.weight.data = weight
            yield None


@both_classes
def test_a_format_that_was_compiled_is_not_compiled_again(cls):
    """Nor are graphs of other weights, which every change of a format concerns."""
    torch._dynamo.reset()

    def weight(group_size=64):
        case = Case(cls, n=64, group_size=group_size, seed=group_size)
        return as_linear_weight(case.weight()).to(torch.bfloat16)

    linears = [nn.Linear(256, 64, bias=False) for _ in range(2)]
    for linear in linears:
        linear.weight = nn.Parameter(weight(), requires_grad=False)
    spare = nn.Parameter(weight(128), requires_grad=False)
    counters = [CompileCounterWithBackend("aot_eager") for _ in linears]
    compiled = [
        torch.compile(linear, backend=counter, fullgraph=True)
        for linear, counter in zip(linears, counters, strict=True)
    ]

    def both_are_right():
        for linear, run in zip(linears, compiled, strict=True):
            x = exact_x(3, 256).to(linear.weight.dtype)
            assert torch.equal(run(x), linear(x))

    # as they were, as fp16, and by groups of 128 and of 32
    both_are_right()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for turn in range(12):
            for _ in there_and_back(linears[0], (spare, weight(32), weight()), turn):
                both_are_right()
    assert [counter.frame_count for counter in counters] == [4, 4]


def swap_fields(weight, other):
    """As swap_tensors does, which 2.13 refuses where modules are skipped."""
    weight.__dict__, other.__dict__ = other.__dict__, weight.__dict__


def swap_all(weight, other):
    weight.__class__, other.__class__ = type(other), type(weight)
    swap_fields(weight, other)
    torch._C._swap_tensor_impl(weight, other)


@skipping_modules
@both_classes
def test_a_float_weight_that_comes_twice_is_seen_twice(cls):
    torch._dynamo.reset()
    linear = quantised(cls, nn.Linear(256, 64, bias=False))
    model, other = nn.ModuleList([nn.Sequential(linear)]), nn.ModuleList([nn.Sequential(linear)])
    floats = nn.Parameter(torch.randn(64, 256), requires_grad=False)
    x = exact_x(3, 256)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return [part(x) for part in model]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def watch_again(x):
        return [part(x) * 2 for part in other]

    for _ in range(3):
        run(x)
    swap_all(linear.weight, floats)
    swap_all(linear.weight, floats)
    watch_again(x)
    swap_all(linear.weight, floats)
    assert torch.equal(run(x)[0], linear(x)) and isinstance(floats, cls)


@skipping_modules
@both_classes
def test_a_class_of_its_own_is_seen(cls):
    torch._dynamo.reset()

    class Twice(cls):
        pass

    Twice._linear = staticmethod(lambda *args: 2 * cls._linear(*args))
    linear = quantised(cls, nn.Linear(256, 64, bias=False))
    model, x = nn.ModuleList([nn.Sequential(linear)]), exact_x(3, 256)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return [part(x) for part in model]

    once = [run(x)[0] for _ in range(3)][-1]
    linear.weight.__class__ = Twice
    assert torch.equal(run(x)[0], 2 * once)


def swap_data(weight, other):
    ours, theirs = weight.data, other.data
    weight.data, other.data = theirs, ours


@skipping_modules
@pytest.mark.parametrize("swap", [swap_fields, swap_data])
@both_classes
def test_both_weights_that_change_places_are_watched_on(cls, swap):
    torch._dynamo.reset()
    linears = [nn.Linear(256, 64, bias=False) for _ in range(2)]
    for linear, group_size in zip(linears, (64, 32), strict=True):
        case = Case(cls, n=64, group_size=group_size)
        linear.weight = nn.Parameter(as_linear_weight(case.weight()), requires_grad=False)
    x = exact_x(3, 256)
    models = [nn.ModuleList([nn.Sequential(linear)]) for linear in linears]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def first(x):
        return [part(x) for part in models[0]]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def second(x):
        return [part(x) for part in models[1]]

    def both_are_right():
        # guards record what they have seen, then rely on it
        for _ in range(3):
            for linear, run in zip(linears, (first, second), strict=True):
                assert torch.equal(run(x)[0], linear(x))

    both_are_right()
    swap(*(linear.weight for linear in linears))
    # the first as it was compiled, and the second as the first was
    linears[0].weight.data = as_linear_weight(Case(cls, n=64, group_size=64, seed=1).weight())
    both_are_right()
    linears[0].weight.data = as_linear_weight(Case(cls, n=64, group_size=32, seed=2).weight())
    both_are_right()


@both_classes
def test_a_watched_weight_is_saved_as_any_other(cls):
    model = quantised(cls, nn.Sequential(nn.Linear(256, 64, bias=False)))
    x = exact_x(3, 256)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    file = io.BytesIO()
    torch.save(model.state_dict(keep_vars=True), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["0.weight"]
    assert "_guarded" in model[0].weight.__dict__ and "_guarded" not in loaded.__dict__
    for again in (
        loaded,
        copy.copy(model[0].weight),
        copy.deepcopy(model)[0].weight,
        pickle.loads(pickle.dumps(model))[0].weight,
    ):
        assert torch.equal(F.linear(x, again), model(x))
        assert "_guarded" not in again.__dict__
