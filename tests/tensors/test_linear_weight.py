"""Weights of nn.Linear: what Dynamo makes of them, and that nobody else sees a difference."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import quantize_

from tests.weights import CLASSES, Case, both_classes, exact_x
from w4tensor import W4ActQuantConfig, W4CoalescedConfig, summary
from w4tensor.tensors.linear_weight import as_linear_weight, wants

CONFIGS = dict(zip(CLASSES, (W4CoalescedConfig, W4ActQuantConfig), strict=True))


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
