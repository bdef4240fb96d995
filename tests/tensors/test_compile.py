"""torch.compile without graph breaks and torch.export of quantised models, with M symbolic."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.weights import Case, both_classes, exact_x
from w4tensor import Int4ActQuantTensor
from w4tensor.tensors.linear_weight import as_linear_weight

MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Two int4 linears, biases that train, and a norm between them."""

    def __init__(self, cls: type, zero: str = "integer") -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 32)
        for linear, case in (
            (self.up, Case(cls, n=256, k=64, zero=zero)),
            (self.down, Case(cls, n=32, k=256, zero=zero)),
        ):
            linear.weight = nn.Parameter(case.weight(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))


@pytest.fixture(params=[False, True], ids=["tensors", "linear_weights"])
def model(request) -> Model:
    """A Model of `cls` whose weights Dynamo sees as tensors, or as quantize_ leaves them."""
    model = Model(request.getfixturevalue("cls"))
    if request.param:
        for linear in (model.up, model.down):
            as_linear_weight(linear.weight)
    return model


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@in_every_mode
@both_classes
def test_one_graph_serves_every_m(cls, model, mode):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with mode():
        for m in (1, 2, 3, 5, 17, 64, 300):
            x = exact_x(m, 64)
            assert close(compiled(x), model(x))
    # one for the first size seen, one for all others
    assert counter.frame_count <= 2


@both_classes
def test_a_marked_dimension_needs_a_single_graph(cls, model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for m in (7, 2, 300):
        x = exact_x(m, 64)
        torch._dynamo.mark_dynamic(x, 0)
        assert close(compiled(x), model(x))
    assert counter.frame_count == 1


@both_classes
def test_new_weights_of_the_same_shape_do_not_recompile(cls, model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = exact_x(3, 64)
    compiled(x)
    with torch.no_grad():
        model.up.weight.copy_(Case(cls, n=256, k=64, zero="integer", seed=7).weight())
    assert close(compiled(x), model(x)) and counter.frame_count == 1
    model.up.weight = nn.Parameter(
        Case(cls, n=256, k=64, zero="integer", seed=8).weight(), requires_grad=False
    )
    assert close(compiled(x), model(x)) and counter.frame_count <= 2


@both_classes
def test_another_group_size_is_seen(cls):
    """Nothing about the bytes may be baked into a graph that other bytes then run."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, w):
        return F.linear(x, w)

    x = exact_x(3, 256)
    for case in (
        Case(cls),
        Case(cls, group_size=32),
        Case(cls, group_size=-1),
        Case(cls, zero="fractional"),
        Case(cls, dtype=torch.float16),
        Case(cls, n=5),
    ):
        assert torch.equal(run(x, case.weight()), F.linear(x, case.weight()))


@both_classes
def test_gradients_of_a_compiled_model(cls, model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        x = exact_x(5, 64).requires_grad_()
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([x.grad] + [p.grad for p in model.parameters() if p.requires_grad])
    for eager, traced in zip(*grads, strict=True):
        assert close(traced, eager)


FUNCTIONS = {
    "keyword bias": lambda x, w, w3: F.linear(x, w, bias=torch.ones(24)),
    "matmul": lambda x, w, w3: x @ w.t(),
    "addmm": lambda x, w, w3: torch.addmm(torch.ones(24), x, w.t()),
    "from the left": lambda x, w, w3: w @ x.t(),
    "over n": lambda x, w, w3: x[:, :24] @ w,
    "narrow": lambda x, w, w3: F.linear(x, w.narrow(0, 4, 8)),
    "narrow of K": lambda x, w, w3: F.linear(x[:, 128:], w[:, 128:]),
    "cat": lambda x, w, w3: F.linear(x, torch.cat((w, w))),
    "chunk": lambda x, w, w3: F.linear(x, w.chunk(2)[1]),
    "select": lambda x, w, w3: F.linear(x, w3[1]),
    "index": lambda x, w, w3: torch.bmm(
        w3[torch.zeros(x.shape[0], dtype=torch.int64)], x[..., None]
    ),
    "bmm": lambda x, w, w3: torch.bmm(x.expand(3, *x.shape), w3.mT),
    "grouped": lambda x, w, w3: torch._grouped_mm(
        x, w3.mT, offs=torch.tensor([1, 1, 3], dtype=torch.int32)
    ),
    "embedding": lambda x, w, w3: F.embedding(torch.tensor([1, 5]), w),
    "dequantize": lambda x, w, w3: x @ w.dequantize().t(),
    "view": lambda x, w, w3: F.linear(x, w3.view(-1, 256)),
    "unsqueeze": lambda x, w, w3: x[None] @ w[None].mT,
    "clone": lambda x, w, w3: F.linear(x, w.clone()),
    "detach": lambda x, w, w3: F.linear(x, w.detach()),
    "to": lambda x, w, w3: F.linear(x, w.to(torch.float16)),
}


@both_classes
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_operator_traces_without_a_break(cls, function):
    w, w3 = Case(cls, zero="integer").weight(), Case(cls, stack=(3,), zero="integer").weight()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 4):
        x = exact_x(m, 256)
        assert close(compiled(x, w, w3), function(x, w, w3))


@both_classes
def test_autocast_inside_a_graph(cls, model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = exact_x(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    atol = 0.1 * float(expected.abs().max())
    assert torch.allclose(y.float(), expected.float(), rtol=0.05, atol=atol)


@both_classes
def test_quantising_inside_a_graph(cls):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, weight):
        return F.linear(x, cls.from_hp(weight, 64))

    x, weight = exact_x(3, 256), torch.randn(24, 256)
    assert close(run(x, weight), F.linear(x, cls.from_hp(weight, 64)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@both_classes
def test_inductor_compiles_the_model(cls, model):
    # no pointwise operator between them: nothing for g++ to take seconds over
    both = nn.Sequential(model.up, model.down)
    compiled = torch.compile(both, fullgraph=True)
    with torch.no_grad():
        for m in (3, 9):
            x = exact_x(m, 64)
            assert close(compiled(x), both(x))


@both_classes
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("decomposed", [False, True])
def test_export_with_a_dynamic_batch(cls, model, strict, decomposed):
    model.eval()
    dynamic = ({0: torch.export.Dim("m", min=1, max=4096)},)
    with torch.no_grad():
        program = torch.export.export(
            model, (exact_x(4, 64),), dynamic_shapes=dynamic, strict=strict
        )
        if decomposed:
            program = program.run_decompositions()
            targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
            assert any("w4tensor.linear" in target for target in targets)
        for m in (1, 4, 33):
            x = exact_x(m, 64)
            assert close(program.module()(x), model(x))


@both_classes
def test_an_exported_program_saves_and_loads(cls, model, tmp_path):
    x = exact_x(4, 64)
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions()
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2")
        assert close(again.module()(x), model(x))


def integer_weights(seed: int = 0) -> tuple[Int4ActQuantTensor, Int4ActQuantTensor]:
    """[24, 256] and [3, 24, 256] with integer scales."""
    case = Case(Int4ActQuantTensor, seed=seed)
    return case.integer_weight(), case.with_(stack=(3,)).integer_weight()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_operator_traces_with_multiples(function):
    w, w3 = integer_weights()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 4):
        x = exact_x(m, 256)
        assert close(compiled(x, w, w3), function(x, w, w3))


@pytest.mark.parametrize("linear_weight", [False, True])
def test_a_linear_with_multiples_is_one_graph_bit_for_bit(linear_weight):
    linear = nn.Linear(256, 24)
    linear.weight = nn.Parameter(integer_weights()[0], requires_grad=False)
    if linear_weight:
        as_linear_weight(linear.weight)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear, fullgraph=True, backend=counter)
    for m in (1, 3, 64):
        x = exact_x(m, 256)
        assert torch.equal(compiled(x), linear(x))
    frames = counter.frame_count
    assert frames <= 2
    linear.weight.copy_(integer_weights(seed=3)[0])
    assert torch.equal(compiled(x), linear(x)) and counter.frame_count == frames
    # a weight without multiples is another format
    linear.weight = nn.Parameter(
        Case(Int4ActQuantTensor).weight(act_group_size=-1), requires_grad=False
    )
    assert torch.equal(compiled(x), linear(x))


def test_multiples_that_come_and_go_are_seen():
    targets = []

    def backend(graph, inputs):
        nodes = [n for n in graph.graph.nodes if "w4tensor.linear" in str(n.target)]
        targets.extend(len(n.args) > 8 and n.args[8] is not None for n in nodes)
        return graph

    def run(x, w):
        return F.linear(x, w)

    case, x = Case(Int4ActQuantTensor), exact_x(3, 256)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for w in (case.integer_weight(), case.weight(act_group_size=-1)):
        w = as_linear_weight(w)
        assert torch.equal(compiled(x, w), F.linear(x, w))
    assert targets == [True, False]


def test_the_gradient_of_x_through_a_graph_with_multiples():
    w, grads = integer_weights()[0], []
    for run in (F.linear, torch.compile(F.linear, fullgraph=True, backend="aot_eager")):
        x = exact_x(5, 256).requires_grad_()
        run(x, w).square().mean().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_quantising_with_integer_scales_inside_a_graph():
    def run(x, weight):
        return F.linear(x, Int4ActQuantTensor.from_hp(weight, 64, integer_scales=True))

    x, weight = exact_x(3, 256), torch.randn(24, 256)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert close(compiled(x, weight), run(x, weight))
