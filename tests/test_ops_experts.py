"""torch.ops.w4tensor.experts: its answer, its fake and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experts import ACTS, Block, blocks
from tests.test_ops import QUICK, _run, modes
from tests.weights import DTYPES, ROUNDING, both_classes
from w4tensor import Int4ActQuantTensor
from w4tensor.errors import PackingError, Unsupported
from w4tensor.layout import LAYOUT_VERSION

op = torch.ops.w4tensor.experts


def assert_is_the_block(y, block: Block, *load) -> None:
    expected, size = block.expected(*load)
    assert y.shape == expected.shape and y.dtype == block.dtype
    error = (y.double() - expected).abs()
    # h is rounded once, and y
    assert bool((error <= ROUNDING[block.dtype] * (size + expected.abs())).all()), error.max()


@settings(max_examples=100)
@given(blocks(), st.data())
def test_any_block_and_any_routing_is_the_definition(block, data):
    tokens = data.draw(st.integers(0, 5), "T")
    x, ids, weight = block.load(tokens, data.draw(st.integers(0, 9), "seed"))
    crowded = data.draw(st.integers(-1, block.experts), "an expert that half of the pairs have")
    ids = torch.where(ids % 2 == 0, crowded, ids)
    ids = ids.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    weight = weight.to(data.draw(st.sampled_from(DTYPES)))
    y = op(x, ids, weight, **block.operands())
    assert_is_the_block(y, block, x, ids, weight)


PAIRS = [(gate, act) for gate in ("halves", "interleaved", "none") for act in ACTS]


@pytest.mark.parametrize(
    "gate,act", [*PAIRS, ("halves", "clamped_swiglu"), ("interleaved", "clamped_swiglu")]
)
def test_every_gate_and_activation(gate, act):
    block = Block(gate=gate, act=act, bias=True)
    load = block.load(4)
    assert_is_the_block(op(*load, **block.operands()), block, *load)


def test_what_stands_between_the_products_is_rounded_to_the_dtype_of_x():
    # one weight a row of down: rounding once more or less shows
    block = Block(inter=1, top_k=1, group_sizes=(32, -1), dtype=torch.bfloat16)
    x, ids, weight = block.load(20)
    y = op(x, ids, torch.ones_like(weight), **block.operands())
    expected, _ = block.expected(x, ids, torch.ones_like(weight))
    assert torch.equal(y, expected.bfloat16())


@both_classes
def test_tokens_with_sentinels_only_are_zero(cls):
    block = Block(cls, bias=True)
    x, ids, weight = block.load(3)
    ids[1] = torch.tensor([block.experts, -1])
    y = op(x, ids, weight, **block.operands())
    assert not y[1].any() and y[0].any()


@given(st.integers(0, 4), st.integers(0, 4))
def test_the_answer_does_not_depend_on_how_tokens_are_split_into_calls(first, second):
    block = Block(bias=True, dtype=torch.bfloat16)
    load = block.load(first + second)
    whole = op(*load, **block.operands())
    parts = zip(*(t.split([first, second]) for t in load), strict=True)
    assert torch.equal(whole, torch.cat([op(*part, **block.operands()) for part in parts]))


@pytest.mark.parametrize("act_group_size", [32, 128, -1])
def test_x_is_rounded_to_int8(act_group_size):
    block = Block(Int4ActQuantTensor, act_group_size=act_group_size, act="none", hidden=192)
    x, ids, weight = block.load(4)
    # loads have integers, which are codes as they are
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert_is_the_block(op(x, ids, weight, **block.operands()), block, x, ids, weight)


@both_classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes_opcheck(cls, dtype):
    for bias, zero, tokens in ((False, "symmetric", 3), (True, "fractional", 1)):
        block = Block(cls, bias=bias, zero=zero, dtype=dtype)
        every = "ALL" if bias and dtype == torch.bfloat16 else QUICK
        torch.library.opcheck(op.default, block.load(tokens), block.operands(), test_utils=every)


@pytest.mark.parametrize("dynamic", [False, True])
@both_classes
def test_one_graph_serves_every_number_of_tokens(cls, dynamic):
    block = Block(cls, bias=True)
    operands = block.operands()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True if dynamic else None)
    def run(x, ids, weight):
        return op(x, ids, weight, **operands) * 2

    torch._dynamo.reset()
    for tokens in (5, 3, 1, 0, 8):
        load = block.load(tokens)
        assert torch.equal(run(*load), op(*load, **operands) * 2)


# refusals, before anything reads a byte


@modes
@both_classes
def test_what_does_not_fit_is_refused(cls, mode):
    block = Block(cls, bias=True)
    good = dict(zip(("x", "ids", "weight"), block.load(3), strict=True)) | block.operands()
    narrow = Block(cls, inter=48, bias=True).operands()
    fewer = Block(cls, experts=3, bias=True).operands()
    down = {name: value for name, value in narrow.items() if name.startswith("down")}
    fewer = {name: value for name, value in fewer.items() if name.startswith("down")}
    for bad, message in (
        ({"gate": "thirds"}, "gate is one of"),
        ({"act": "tanh"}, "act one of"),
        ({"gate": "none"}, r"does not fit down .*\[E, I, H\] before"),
        ({"gate": "none", "act": "clamped_swiglu"}, "multiplies gate by up"),
        (down, r"does not fit down .*\[E, 2 I, H\] before"),
        (fewer, "does not fit down"),
        ({"x": torch.randn(3, 65)}, "K=64"),
        ({"x": torch.randn(1, 3, 64)}, "takes x"),
        ({"x": torch.ones(3, 64, dtype=torch.float64)}, "dtype"),
        ({"ids": good["ids"].float()}, "ids is"),
        ({"ids": good["ids"].short()}, "ids is"),
        ({"ids": good["ids"][:2]}, "ids is"),
        ({"ids": good["ids"][0]}, "ids is"),
        ({"weight": good["weight"].long()}, "weight is"),
        ({"weight": good["weight"][:, :1]}, "weight is"),
        ({"gate_up_bias": torch.randn(4, 63)}, "gate_up_bias has shape"),
        ({"down_bias": torch.randn(64)}, "down_bias has shape"),
    ):
        with pytest.raises(Unsupported, match=message):
            _run(op, mode, **(good | bad))


@modes
@both_classes
@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_bytes_of_another_format_or_version_are_refused(cls, which, mode):
    block = Block(cls)
    good = dict(zip(("x", "ids", "weight"), block.load(3), strict=True)) | block.operands()
    other = torch.int64 if good[f"{which}_qdata"].dtype == torch.int16 else torch.int16
    with pytest.raises(PackingError, match="qdata.dtype"):
        _run(op, mode, **(good | {f"{which}_qdata": good[f"{which}_qdata"].view(other)}))
    with pytest.raises(PackingError, match="layout_version"):
        _run(op, mode, **(good | {"layout_version": LAYOUT_VERSION + 1}))


def test_operands_on_different_devices_are_refused():
    block = Block(bias=True)
    good = dict(zip(("x", "ids", "weight"), block.load(3), strict=True)) | block.operands()
    for name in ("ids", "weight", "gate_up_bias", "down_bias"):
        with pytest.raises(Unsupported, match=f"{name} is on meta"):
            op(**(good | {name: good[name].to("meta")}))
    for name in ("gate_up_qdata", "down_qdata", "down_scale"):
        with pytest.raises(PackingError, match="device"):
            op(**(good | {name: good[name].to("meta")}))
