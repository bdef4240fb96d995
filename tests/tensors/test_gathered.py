"""W[ids] of stacked weights: no copy where a product follows, one wherever else it is needed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tensors.test_compile import _fresh_dynamo, in_every_mode  # noqa: F401
from tests.tensors.test_serialization import save_and_load
from tests.weights import CLASSES, Case, assert_close, both_classes, cases, exact_x
from w4tensor.errors import MisdispatchError, PackingError
from w4tensor.tensors.gathered import _Gathered

IDS = torch.tensor([2, 0, -3, 1])


def is_lazy(w: Any) -> bool:
    return isinstance(w, _Gathered) and isinstance(w, CLASSES)


@pytest.fixture
def no_copies(monkeypatch):
    def refuse(w):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(_Gathered, "_become_a_copy", refuse)


# no copy


@both_classes
@pytest.mark.parametrize("take", [lambda w, ids: w[ids], lambda w, ids: w.index_select(0, ids)])
def test_questions_views_and_products_copy_no_weight(cls, take, no_copies):
    w = Case(cls, stack=(3,), zero="fractional").weight()
    ids = IDS % 3
    g = take(w, ids)
    assert is_lazy(g) and g.shape == g.size() == (4, 24, 256) and g.ndim == g.dim() == 3
    assert g.dtype == w.dtype and g.device == w.device and len(g) == 4 and g.numel() == 4 * 24 * 256
    assert not g.requires_grad and g.is_floating_point() and "Gathered" in repr(g)
    x = exact_x(4, 1, 256)
    for view in (g, take(w.mT, ids).mT, g.mT.mT, g.transpose(-2, -1).permute(0, 2, 1)):
        assert is_lazy(view) and view.stack.qdata.data_ptr() == w.qdata.data_ptr()
        torch.bmm(view, x.mT)
        torch.bmm(x, view.mT)
        view @ x.mT
    assert g.mT.shape == (4, 256, 24)


@given(cases(stacked=True), st.integers(0, 3), st.sampled_from(["bmm", "matmul"]), st.data())
def test_products_are_those_of_the_copy(case, m, name, data):
    n_experts, product = case.stack[0], getattr(torch, name)
    ids = data.draw(st.lists(st.integers(-n_experts, n_experts - 1), max_size=5), "ids")
    ids = torch.tensor(ids, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    x = exact_x(len(ids), m, case.k)
    dense = case.dense()[ids.long()]
    right, left = x.double() @ dense.mT, dense @ x.double().mT
    w, g = case.weight(), case.weight()[ids]
    for y in (product(x, g.mT), product(x, w.mT[ids])):
        assert_close(y, right, torch.float32)
    assert_close(product(g, x.mT), left, torch.float32)
    assert is_lazy(g)
    # over N, with the copy
    v = exact_x(len(ids), m, case.n)
    size = v.double().abs() @ dense.abs()
    assert_close(product(v, g), v.double() @ dense, torch.float32, size)
    assert not is_lazy(g)
    assert_close(product(x, g.mT), right, torch.float32)


@in_every_mode
@both_classes
def test_modes(cls, mode, no_copies):
    case = Case(cls, stack=(3,))
    w = nn.Parameter(case.weight(), requires_grad=False)
    x = exact_x(4, 256)
    with mode():
        y = torch.bmm(w[IDS], x[..., None])[..., 0]
        z = torch.bmm(x[:, None], w[IDS].mT)[:, 0]
    assert torch.equal(y, z) and torch.equal(
        y.double(), (case.dense()[IDS] @ x.double()[..., None])[..., 0]
    )


@both_classes
@pytest.mark.parametrize("first", [True, False])
def test_gradients_of_x_need_no_copy_before_they_are_asked_for(cls, first, no_copies):
    case = Case(cls, stack=(3,), zero="fractional")
    x = exact_x(4, 2, 256).requires_grad_()
    g = case.weight()[IDS]
    y = torch.bmm(g, x.mT).mT if first else torch.bmm(x, g.mT)
    grad = exact_x(4, 2, 24)
    y.backward(grad)
    assert torch.equal(x.grad.double(), grad.double() @ case.dense()[IDS])


@both_classes
def test_autocast(cls, no_copies):
    g, x = Case(cls, stack=(3,)).weight()[IDS], exact_x(4, 256, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.bmm(g, x).dtype == torch.bfloat16


# a copy where it is needed

DEMANDS = {
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "select": lambda w: w[1],
    "narrow": lambda w: w.narrow(1, 3, 8),
    "narrow of the transposed": lambda w: w.mT.narrow(-1, 3, 8),
    "index": lambda w: w[torch.tensor([1, 1])].clone(),
    "mask": lambda w: w[torch.tensor([True, False, True, True])],
    "unbind": lambda w: w.unbind(0)[2],
    "cat": lambda w: torch.cat((w, w)),
    "flatten": lambda w: w.flatten(0, 1),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": save_and_load,
    "to": lambda w: w.to(torch.float32, copy=True),
    "parameter": lambda w: nn.Parameter(w, requires_grad=False),
}


@in_every_mode
@both_classes
@pytest.mark.parametrize("demand", DEMANDS.values(), ids=DEMANDS)
def test_everything_else_sees_the_copy(cls, mode, demand):
    case = Case(cls, stack=(3,), zero="fractional")
    with mode():
        got = demand(case.weight()[IDS])
        assert type(got) is cls
        assert torch.equal(got.dequantize().double(), demand(case.dense()[IDS]))


@both_classes
def test_fields_are_those_of_the_copy(cls):
    case = Case(cls, stack=(3,), zero="fractional")
    whole = [t[IDS] for t in (case.weight().qdata, *case.codes()[1:])]
    for name, value in zip(("qdata", "scale", "zero_point"), whole, strict=True):
        g = case.weight()[IDS]
        assert torch.equal(getattr(g, name), value) and type(g) is cls
        assert torch.equal(g.dequantize().double(), case.dense()[IDS])
    assert torch.equal(case.weight()[IDS].to_codes()[0], case.codes()[0][IDS])


@both_classes
def test_a_product_with_a_weight_of_the_same_module_takes_either(cls):
    case = Case(cls, stack=(3,))
    w, both = case.weight(), torch.cat((case.dense(), case.dense()[IDS]))
    assert torch.equal(torch.cat((w, w[IDS])).dequantize().double(), both)
    target = w[:1].clone()
    target.copy_(w[torch.tensor([2])])
    assert torch.equal(target.dequantize().double(), case.dense()[2:])
    linear = F.linear(exact_x(2, 256), w[IDS][0])
    assert torch.equal(linear.double(), exact_x(2, 256).double() @ case.dense()[2].T)


# what is written later


@both_classes
def test_what_is_written_into_it_stays_in_it(cls):
    case, other = Case(cls, stack=(3,)), Case(cls, stack=(3,), seed=1)
    w = case.weight()
    g = w[IDS]
    g[1].copy_(other.weight()[1])
    expected = case.dense()[IDS]
    expected[1] = other.dense()[1]
    assert torch.equal(g.dequantize().double(), expected)
    assert torch.equal(w.dequantize().double(), case.dense())


@both_classes
def test_what_is_written_into_the_ids_is_not_seen_and_into_the_stack_it_is(cls):
    case, other = Case(cls, stack=(3,)), Case(cls, stack=(3,), seed=1)
    w, x = case.weight(), exact_x(4, 256, 1)
    for take in (lambda ids: w[ids], lambda ids: w.index_select(0, ids)):
        ids = IDS % 3
        g = take(ids)
        ids.zero_()
        assert torch.equal(torch.bmm(g, x).double(), case.dense()[IDS] @ x.double())
    g = w[IDS]
    w.copy_(other.weight())
    assert torch.equal(torch.bmm(g, x).double(), other.dense()[IDS] @ x.double())


@both_classes
def test_the_copy_is_made_in_place_so_that_a_parameter_stays_one(cls):
    w = Case(cls, stack=(3,)).weight()
    linear = nn.Module()
    linear.weight = nn.Parameter(w[IDS], requires_grad=False)
    assert not is_lazy(linear.weight) and isinstance(linear.weight, nn.Parameter)
    assert linear.weight.qdata.data_ptr() != w.qdata.data_ptr()
    w.data = w[torch.tensor([0, 0, 1])]
    assert torch.equal(w.dequantize().double(), Case(cls, stack=(3,)).dense()[[0, 0, 1]])


# refusals


@both_classes
@pytest.mark.parametrize("bad", [3, 100, -4])
def test_ids_out_of_range_are_refused_as_by_indexing(cls, bad):
    case = Case(cls, stack=(3,))
    for w in (case.weight(), case.weight().mT):
        with pytest.raises(IndexError, match=f"index {bad} is out of bounds .* size 3"):
            w[torch.tensor([0, bad])]
        with pytest.raises(IndexError, match=f"index {bad} is out of bounds .* size 3"):
            w.index_select(0, torch.tensor([0, bad]))
    with pytest.raises(IndexError, match="index -1 is out of bounds"):
        case.weight().index_select(0, torch.tensor([-1]))


@both_classes
def test_ids_out_of_range_are_refused_inside_a_graph_too(cls):
    w = Case(cls, stack=(3,)).weight()
    run = torch.compile(
        lambda ids, x: torch.bmm(w[ids], x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        run(torch.tensor([0, 3]), exact_x(2, 256, 1))


@both_classes
def test_what_cannot_read_codes_is_refused(cls):
    w = Case(cls, stack=(3,)).weight()
    for op in (torch.relu, lambda g: g + 1, lambda g: g.sum(), lambda g: g.view(-1), torch.stack):
        with pytest.raises((MisdispatchError, TypeError)):
            op(w[IDS])
    for op in (lambda g: g.transpose(0, 1), lambda g: g.permute(2, 0, 1), lambda g: g @ w[IDS].mT):
        with pytest.raises(MisdispatchError):
            op(w[IDS])


@both_classes
def test_bytes_that_came_past_the_constructor_are_refused(cls):
    w = Case(cls, stack=(3,)).weight()
    w.scale = w.scale[..., :2]
    with pytest.raises(PackingError):
        torch.bmm(w[IDS], exact_x(4, 256, 1))


def test_other_indices_copy_at_once():
    w = Case(CLASSES[0], stack=(3,)).weight()
    for index in (
        torch.tensor([True, False, True]),
        (torch.tensor([0, 1]), torch.tensor([4, 1])),
        (slice(None), torch.tensor([4, 1])),
    ):
        assert type(w[index]) is CLASSES[0]
    assert type(w[0][torch.tensor([0, 1])]) is CLASSES[0]


# graphs


def both_ways(w, ids, x):
    """transformers' batched_mm of a plain and of a transposed model."""
    y = torch.bmm(w[ids], x[..., None])[..., 0]
    return y + torch.bmm(x[:, None], w.mT[ids])[:, 0]


@in_every_mode
@both_classes
def test_a_graph_gathers_through_the_ids_and_copies_no_weight(cls, mode):
    w = nn.Parameter(Case(cls, stack=(3,), zero="fractional").weight(), requires_grad=False)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    run = torch.compile(
        both_ways, fullgraph=True, backend=aot_autograd(fw_compiler=keep), dynamic=True
    )
    with mode():
        for s in (4, 3, 2):
            x = exact_x(s, 256)
            assert torch.equal(run(w, IDS[:s], x), both_ways(w, IDS[:s], x))
    for code in graphs:
        assert "gathered_linear" in code and "aten.index" not in code


@both_classes
def test_it_goes_into_a_graph_and_comes_out(cls):
    case = Case(cls, stack=(3,), zero="fractional")
    w, x = case.weight(), exact_x(4, 256, 1)
    torch_compile = {"fullgraph": True, "backend": "aot_eager"}
    into = torch.compile(lambda g, x: torch.bmm(g, x) * 2, **torch_compile)
    out = torch.compile(lambda w, ids: (w[ids], w[ids].mT), **torch_compile)
    g = w[IDS]
    assert torch.equal(into(g, x), torch.bmm(g, x) * 2) and is_lazy(g)
    for got, expected in zip(out(w, IDS), (case.dense()[IDS], case.dense()[IDS].mT), strict=True):
        assert torch.equal(got.dequantize().double(), expected)


@both_classes
def test_a_graph_that_needs_the_copy_makes_it(cls):
    case = Case(cls, stack=(3,), zero="fractional")
    run = torch.compile(
        lambda w, ids, x: F.linear(x, w[ids].narrow(1, 3, 8)[0]),
        fullgraph=True,
        backend="aot_eager",
    )
    y = run(case.weight(), IDS, exact_x(2, 256))
    assert torch.equal(y.double(), exact_x(2, 256).double() @ case.dense()[2, 3:11].T)


@both_classes
def test_on_meta_and_among_fakes(cls):
    w = Case(cls, stack=(3,)).weight()
    meta = torch.bmm(w.to("meta")[IDS.to("meta")], torch.empty(4, 256, 1, device="meta"))
    assert meta.shape == (4, 24, 1) and meta.device.type == "meta"
    with FakeTensorMode() as fake:
        x = fake.from_tensor(exact_x(4, 256, 1))
        assert torch.bmm(fake.from_tensor(w)[fake.from_tensor(IDS)], x).shape == (4, 24, 1)


# a model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@both_classes
def test_a_model_generates_with_batched_mm_and_copies_no_weight(cls, name, no_copies):
    hf = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=99,
        head_dim=32,
    )
    configs = {"mixtral": hf.MixtralConfig, "gpt_oss": hf.GptOssConfig}
    torch.manual_seed(0)
    config = configs[name](**sizes, pad_token_id=0, eos_token_id=None)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(model)
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        for weight in ("gate_up_proj", "down_proj"):
            experts = ours.mlp.experts
            transposed = getattr(experts, "is_transposed", False)
            w = getattr(experts, weight).detach()
            w = cls.from_hp(w.mT if transposed else w, 16, **({} if cls is CLASSES[0] else {}))
            w = w.mT if transposed else w
            setattr(experts, weight, nn.Parameter(w, requires_grad=False))
            dense = nn.Parameter(w.dequantize(), requires_grad=False)
            setattr(theirs.mlp.experts, weight, dense)
    for m in (model, plain):
        m.set_experts_implementation("batched_mm")
    prompt = torch.randint(1, 99, (2, 5))
    with torch.no_grad():
        got, expected = model(prompt).logits, plain(prompt).logits
    # int8 activations are off by a percent
    tolerance = 1e-4 if cls is CLASSES[0] else 0.05
    assert (got - expected).norm() <= tolerance * expected.norm()
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9)
    if cls is CLASSES[0]:
        assert torch.equal(tokens, plain.generate(prompt, max_new_tokens=4, do_sample=False))
