"""w4tensor.tensors.experts: the block on tensors, what it refuses, and under torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from tests.experts import Block, blocks
from tests.tensors.test_compile import in_every_mode
from tests.tensors.test_linear_weight import (
    CHANGES,
    NOT_SWAPPED,
    _fresh_dynamo,  # noqa: F401
    guard_nodes,
    skipping_modules,
)
from tests.weights import CLASSES, Case, both_classes
from w4tensor.errors import MisdispatchError, Unsupported
from w4tensor.tensors import experts


@given(blocks())
def test_it_is_the_operator_on_the_fields_of_the_tensors(block):
    load, (gate_up, down) = block.load(3), block.tensors()
    expected = torch.ops.w4tensor.experts(*load, **block.operands())
    for views in ((gate_up, down), (gate_up.mT, down.transpose(-2, -1))):
        y = experts(*load, *views, *block.biases(), gate=block.gate, act=block.act)
        assert torch.equal(y, expected)


@in_every_mode
@both_classes
def test_it_compiles_without_a_break_for_any_number_of_tokens(cls, mode):
    block = Block(cls, bias=True, gate="interleaved", act="clamped_swiglu")
    weights = [torch.nn.Parameter(w, requires_grad=False) for w in block.tensors()]
    biases = block.biases()

    def run(x, ids, weight, gate_up, down):
        y = experts(
            x, ids, weight, gate_up, down, *biases, gate="interleaved", act="clamped_swiglu"
        )
        return y + x

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    with mode():
        for tokens in (5, 3, 8, 2):
            load = block.load(tokens)
            for t in load:
                torch._dynamo.mark_dynamic(t, 0)
            assert torch.equal(compiled(*load, *weights), run(*load, *weights))
    assert counter.frame_count == 1


class Holder(nn.Module):
    """A module that holds two stacks, as transformers' experts do."""

    def __init__(self, cls: type) -> None:
        super().__init__()
        for name, n, k in (("gate_up", 128, 64), ("down", 64, 64)):
            weight = Case(cls, n=n, k=k, stack=(3,)).weight()
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x, ids, weight):
        return experts(x, ids, weight, self.gate_up, self.down)


@both_classes
def test_a_graph_takes_the_fields_of_the_weights_and_never_copies_them(cls):
    module, seen = Holder(cls), []

    def backend(graph, inputs):
        seen.extend(inputs)
        return graph.forward

    ids, weight = torch.tensor([[0, 2], [1, 1]]), torch.full((2, 2), 0.5)
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(2, 64), ids, weight)
    assert not any(isinstance(t, cls) for t in seen)
    fields = {id(t) for w in (module.gate_up, module.down) for t in (w.qdata, w.scale)}
    found = [t for t in seen if id(t) in fields]
    # CUDA graphs read these where they are
    assert len(found) == 4
    assert all(t._dynamo_static_input_type == "unguarded" for t in found)


@skipping_modules
@both_classes
def test_guards_of_the_weights_are_on_themselves(cls):
    """Structure, not time: with accessors on a weight, each call walks to its fields."""
    module = Holder(cls)

    def run(*load):
        return module(*load)

    torch.compile(run, backend="eager", fullgraph=True)(*Block(cls, experts=3).load(2))
    found = [node for node in guard_nodes(run) if issubclass(node.type, cls)]
    assert len(found) == 2
    assert all(node.tag_safe and not node.children and node.calls == 1 for node in found)


def change_is_seen(cls, changed: str, change: str) -> None:
    """The same block, compiled before the change of one weight and called after it."""
    size = {"gate_up": (128, 64), "down": (64, 64)}
    seeds = itertools.count(1)

    def new(group_size=16, **case):
        n, k = size[changed]
        weight = Case(cls, n=n, k=k, group_size=group_size, stack=(3,), seed=next(seeds), **case)
        return nn.Parameter(weight.weight(), requires_grad=False)

    class Half(nn.Module):
        """A block of which one weight is a parameter; Linear's is what CHANGES know."""

        def __init__(self):
            super().__init__()
            self.weight = new()
            n, k = next(size[name] for name in size if name != changed)
            self.other = Case(cls, n=n, k=k, group_size=16, stack=(3,)).weight()

        def forward(self, *load):
            pair = (self.weight, self.other) if changed == "gate_up" else (self.other, self.weight)
            return experts(*load, *pair)

    module, load = Half(), Block(cls, experts=3).load(4)
    compiled = torch.compile(lambda *load: module(*load), backend="aot_eager", fullgraph=True)
    for step in (None, change):
        if step is not None:
            CHANGES[step](module, new)
        # guards record what they have seen, then rely on it
        for _ in range(3):
            assert torch.equal(compiled(*load), module(*load))


# of other rows a block is refused, and quantize_ knows no module of this kind
FORMATS = [name for name in CHANGES if name not in ("data of other rows", "quantised again")]
either = pytest.mark.parametrize("changed", ["gate_up", "down"])


@pytest.mark.parametrize("change", FORMATS)
@either
@both_classes
def test_a_change_of_a_weight_is_seen(cls, changed, change):
    change_is_seen(cls, changed, change)


@pytest.mark.parametrize("change", sorted({*FORMATS} & {*NOT_SWAPPED}))
@either
@both_classes
def test_a_change_is_seen_where_dynamo_skips_modules(cls, changed, change):
    with skipping_modules:
        change_is_seen(cls, changed, change)


def test_weights_that_are_not_stacked_int4_are_refused():
    block = Block()
    load, (gate_up, down) = block.load(3), block.tensors()
    for bad in (gate_up.dequantize(), gate_up[0]):
        with pytest.raises(MisdispatchError, match="gate_up is a"):
            experts(*load, bad, down)
    for bad in (down.dequantize(), down[0]):
        with pytest.raises(MisdispatchError, match="down is a"):
            experts(*load, gate_up, bad)


def test_weights_that_were_quantised_differently_are_refused():
    load, (gate_up, _) = Block().load(3), Block(CLASSES[0]).tensors()
    other = Block(CLASSES[1])
    with pytest.raises(Unsupported, match="quantise both alike"):
        experts(*load, gate_up, other.tensors()[1])
    with pytest.raises(Unsupported, match="quantise both alike"):
        experts(*load, other.tensors()[0], other.with_(act_group_size=64).tensors()[1])
    wrong = Case(CLASSES[0], n=64, k=48, group_size=16, stack=(4,)).weight()
    with pytest.raises(Unsupported, match="does not fit down"):
        experts(*load, gate_up, wrong)


@pytest.mark.parametrize("which", [0, 2])
def test_a_gradient_is_refused_rather_than_lost(which):
    load, weights = list(Block().load(3)), Block().tensors()
    load[which].requires_grad_()
    with pytest.raises(Unsupported, match="no gradient"):
        experts(*load, *weights)
    with torch.no_grad():
        assert experts(*load, *weights).shape == (3, 64)


@pytest.mark.parametrize("which", [0, 2])
def test_a_tangent_is_refused_rather_than_lost(which):
    load, weights = list(Block().load(3)), Block().tensors()

    def call(operand):
        return experts(*load[:which], operand, *load[which + 1 :], *weights)

    with pytest.raises(Unsupported, match="forward mode"):
        torch.func.jvp(call, (load[which],), (torch.ones_like(load[which]),))
    with forward_ad.dual_level():
        assert call(load[which]).shape == (3, 64)

    def tangent(x):
        return torch.func.jvp(call, (x,), (torch.ones_like(x),))[1]

    torch._dynamo.reset()
    with pytest.raises(Unsupported, match="forward mode"):
        torch.compile(tangent, backend="aot_eager")(load[which])
    compiled = torch.compile(call, backend="aot_eager")
    assert compiled(load[which]).shape == (3, 64)
    with forward_ad.dual_level(), pytest.raises(Unsupported, match="forward mode"):
        compiled(forward_ad.make_dual(load[which], torch.ones_like(load[which])))

    def in_a_level(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    with pytest.raises(Exception, match="forward mode"):
        torch.compile(in_a_level, backend="aot_eager")(load[which])


def test_a_graph_refuses_what_eager_refuses():
    compiled = torch.compile(lambda *args: experts(*args) * 2, fullgraph=True, backend="aot_eager")
    block = Block(CLASSES[1])
    load, (gate_up, down) = block.load(3), block.tensors()
    with pytest.raises(Exception, match="quantise both alike"):
        compiled(*load, gate_up, block.with_(act_group_size=64).tensors()[1])
    load[0].requires_grad_()
    with pytest.raises(Exception, match="no gradient"):
        compiled(*load, gate_up, down)
