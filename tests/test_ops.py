"""torch.ops.w4tensor: answers, fakes, gradients and refusals of the operators themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.weights import CLASSES, DTYPES, Case, assert_close, both_classes, cases, exact_x
from w4tensor import Int4ActQuantTensor, reference
from w4tensor.checks import ACT_GROUP_SIZES, check_act_group_size
from w4tensor.errors import PackingError, Unsupported
from w4tensor.layout import ACT_QUANT, COALESCED, LAYOUT_VERSION

ops = torch.ops.w4tensor


def packed(case: Case, act_group_size: int = 32) -> dict:
    """The weight's part of an operator's arguments."""
    q, scale, zero_point = case.codes()
    act = case.cls is Int4ActQuantTensor
    return {
        "qdata": (ACT_QUANT if act else COALESCED).pack(q),
        "scale": scale,
        "zero_point": zero_point,
        "group_size": case.g,
        "act_group_size": act_group_size if act else None,
        "layout_version": LAYOUT_VERSION,
    }


@given(cases(stacked=False), st.sampled_from(DTYPES), st.integers(0, 5), st.booleans(), st.data())
def test_linear_is_exact_on_integers(case, dtype, m, with_bias, data):
    act = data.draw(st.sampled_from(ACT_GROUP_SIZES))
    x = exact_x(m, case.k, dtype=dtype, seed=case.seed)
    bias = torch.arange(case.n).to(dtype) if with_bias else None
    y = ops.linear(x, bias=bias, **packed(case, act))
    expected = x.double() @ case.dense().T + (0 if bias is None else bias.double())
    assert_close(y, expected, dtype)
    if dtype == torch.float32:
        assert torch.equal(y.double(), expected)


@given(cases(stacked=True), st.integers(0, 4))
def test_stacked_linear_multiplies_weight_by_weight(case, m):
    x = exact_x(*case.stack, m, case.k)
    y = ops.linear(x, bias=None, **packed(case))
    assert torch.equal(y.double(), x.double() @ case.dense().mT)


@given(cases(stacked=False), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_answer_does_not_depend_on_how_tokens_are_split_into_calls(case, sizes):
    x = exact_x(sum(sizes), case.k)
    whole = ops.linear(x, bias=None, **packed(case))
    parts = [ops.linear(part, bias=None, **packed(case)) for part in x.split(sizes)]
    assert torch.equal(whole, torch.cat(parts))


@given(cases(stacked=True), st.data())
def test_grouped_linear_gives_each_expert_its_rows_and_zeros_beyond(case, data):
    counts = [data.draw(st.integers(0, 3)) for _ in range(case.stack[0])]
    tail = data.draw(st.integers(0, 2))
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = exact_x(sum(counts) + tail, case.k)
    y = ops.grouped_linear(x, offs=offs, **packed(case))
    dense, start = case.dense(), 0
    for expert, end in enumerate(offs.tolist()):
        assert torch.equal(y[start:end].double(), x[start:end].double() @ dense[expert].T)
        start = end
    assert y.shape == (len(x), case.n) and not y[start:].any()


# every operator is right as PyTorch sees it: schema, fake, autograd, under aot_autograd


def _grad(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


# the fourth check of opcheck, aot_autograd with symbolic sizes, takes seconds: once an operator
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@both_classes
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_linear_passes_opcheck(cls, rank):
    x = _grad(torch.randn(*(2, 3, 192)[-rank:]))
    for zero in ("symmetric", "fractional"):
        weight = packed(Case(cls, n=12, k=192, zero=zero))
        for bias in (None, _grad(torch.randn(12))):
            args = weight | {"bias": bias}
            torch.library.opcheck(ops.linear.default, (x,), args, test_utils=QUICK)


@both_classes
def test_linear_passes_opcheck_under_aot_autograd(cls):
    weight = packed(Case(cls, n=12, k=192, zero="fractional")) | {"bias": _grad(torch.randn(12))}
    torch.library.opcheck(ops.linear.default, (_grad(torch.randn(2, 3, 192)),), weight)


@both_classes
def test_stacked_linear_passes_opcheck(cls):
    weight = packed(Case(cls, n=12, k=192, stack=(2,))) | {"bias": None}
    x = _grad(torch.randn(2, 3, 192))
    torch.library.opcheck(ops.linear.default, (x,), weight, test_utils=QUICK)


@both_classes
def test_grouped_linear_passes_opcheck(cls):
    weight = packed(Case(cls, n=12, k=192, stack=(3,)))
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    for dtype in DTYPES:
        x = _grad(torch.randn(7, 192).to(dtype))
        every = dtype == torch.float16
        torch.library.opcheck(
            ops.grouped_linear.default,
            (x,),
            weight | {"offs": offs},
            test_utils="ALL" if every else QUICK,
        )


@pytest.mark.parametrize("k", [64, 100])
@pytest.mark.parametrize("act_group_size", ACT_GROUP_SIZES)
def test_quantize_activation_passes_opcheck(k, act_group_size):
    for x in (torch.randn(3, k), torch.randn(2, 3, k).to(torch.bfloat16), torch.randn(k)):
        args = (x, act_group_size)
        torch.library.opcheck(ops.quantize_activation.default, args, test_utils=QUICK)


# gradients


@both_classes
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_gradient_of_x_and_bias_is_that_of_the_dequantised_product(cls, rank):
    case = Case(cls, n=12, k=192, zero="fractional")
    x = _grad(exact_x(*(2, 3, 192)[-rank:]))
    bias = _grad(torch.randn(12))
    y = ops.linear(x, bias=bias, **packed(case))
    grad = exact_x(*y.shape)
    got = torch.autograd.grad(y, (x, bias), grad)
    plain = torch.nn.functional.linear(x, case.dense().float(), bias)
    for a, b in zip(got, torch.autograd.grad(plain, (x, bias), grad), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b)


@both_classes
@pytest.mark.parametrize("n", [5, 16])
@pytest.mark.parametrize("k", [33, 192])
def test_the_gradient_of_a_grouped_product(cls, n, k):
    case = Case(cls, n=n, k=k, group_size=-1, stack=(3,))
    x = _grad(torch.randn(7, k))
    y = ops.grouped_linear(x, offs=torch.tensor([2, 2, 5], dtype=torch.int32), **packed(case))
    # a sum gives an expanded gradient, rows of stride zero
    y.sum().backward()
    dense = case.dense()
    expected = torch.zeros(7, k, dtype=torch.float64)
    expected[:2], expected[2:5] = dense[0].sum(0), dense[2].sum(0)
    assert torch.allclose(x.grad.double(), expected)


# refusals, before anything reads a byte


def _run(op, mode: str, *args, **kwargs):
    """Call `op` on real tensors, on meta, or on fakes: the refusal must be the same."""
    to_meta = torch.utils._pytree.tree_map_only
    if mode == "meta":
        args, kwargs = to_meta(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        return op(*args, **kwargs)
    if mode == "fake":
        with FakeTensorMode() as fake:
            args, kwargs = to_meta(torch.Tensor, fake.from_tensor, (args, kwargs))
            return op(*args, **kwargs)
    return op(*args, **kwargs)


modes = pytest.mark.parametrize("mode", ["real", "meta", "fake"])


@modes
@both_classes
def test_the_other_format_and_other_versions_are_refused(cls, mode):
    other = CLASSES[1 - CLASSES.index(cls)]
    x, offs = torch.randn(3, 256), torch.tensor([1, 3], dtype=torch.int32)
    for stack in ((), (2,)):
        good = packed(Case(cls, stack=stack))
        for bad, field in (
            ({"qdata": packed(Case(other, stack=stack))["qdata"]}, "qdata.dtype"),
            ({"layout_version": LAYOUT_VERSION + 1}, "layout_version"),
        ):
            with pytest.raises(PackingError) as caught:
                if stack:
                    _run(ops.grouped_linear, mode, x, offs=offs, **(good | bad))
                else:
                    _run(ops.linear, mode, x, bias=None, **(good | bad))
            assert caught.value.field == field


@modes
def test_x_that_does_not_fit_is_refused(mode):
    good = packed(Case(CLASSES[0])) | {"bias": None}
    for x in (torch.randn(3, 255), torch.randn(3, 257), torch.randn(256, 3), torch.tensor(1.0)):
        with pytest.raises(Unsupported, match="K=256"):
            _run(ops.linear, mode, x, **good)
    for dtype in (torch.float64, torch.int8, torch.bool, torch.complex64):
        with pytest.raises(Unsupported, match="dtype"):
            _run(ops.linear, mode, torch.ones(3, 256).to(dtype), **good)


def test_operands_on_different_devices_are_refused():
    good = packed(Case(CLASSES[0], zero="integer")) | {"bias": None}
    x = torch.randn(3, 256)
    with pytest.raises(PackingError, match="qdata.device"):
        ops.linear(x.to("meta"), **good)
    for field in ("scale", "zero_point"):
        with pytest.raises(PackingError) as caught:
            ops.linear(x, **(good | {field: good[field].to("meta")}))
        assert caught.value.field == f"{field}.device"
    with pytest.raises(Unsupported, match="bias is on meta"):
        ops.linear(x, **(good | {"bias": torch.empty(24, device="meta")}))
    offs = torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(Unsupported, match="offs is on meta"):
        ops.grouped_linear(x, offs=offs, **packed(Case(CLASSES[0], stack=(2,))))


@modes
def test_a_bias_that_does_not_fit_is_refused(mode):
    good, x = packed(Case(CLASSES[0])), torch.randn(3, 256)
    for bias in (torch.randn(23), torch.randn(25), torch.randn(1), torch.randn(1, 24)):
        with pytest.raises(Unsupported, match="bias has shape"):
            _run(ops.linear, mode, x, bias=bias, **good)
    with pytest.raises(Unsupported, match="no bias"):
        stacked = packed(Case(CLASSES[0], stack=(2,)))
        _run(ops.linear, mode, torch.randn(2, 3, 256), bias=torch.randn(24), **stacked)


@modes
def test_stacks_that_do_not_match_are_refused(mode):
    stacked = packed(Case(CLASSES[0], stack=(2,))) | {"bias": None}
    for shape in ((3, 256), (1, 3, 256), (3, 3, 256), (2, 2, 3, 256), (256,)):
        with pytest.raises(Unsupported, match="stacked weights"):
            _run(ops.linear, mode, torch.randn(shape), **stacked)


@modes
def test_offsets_that_do_not_fit_are_refused(mode):
    stacked, x = packed(Case(CLASSES[0], stack=(2,))), torch.randn(3, 256)
    for offs in (
        torch.tensor([1, 3]),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([0, 1, 3], dtype=torch.int32),
        torch.tensor([[1, 3]], dtype=torch.int32),
    ):
        with pytest.raises(Unsupported, match="offs is"):
            _run(ops.grouped_linear, mode, x, offs=offs, **stacked)
    offs = torch.tensor([1, 3], dtype=torch.int32)
    with pytest.raises(Unsupported, match="grouped product"):
        _run(ops.grouped_linear, mode, x[None], offs=offs, **stacked)
    with pytest.raises(Unsupported, match="grouped product"):
        _run(ops.grouped_linear, mode, x, offs=offs, **packed(Case(CLASSES[0])))


@pytest.mark.parametrize("size", [0, 1, 16, 31, 256, -2])
def test_unknown_activation_groups_are_refused(size):
    with pytest.raises(Unsupported, match=f"act_group_size={size}"):
        check_act_group_size(size)
    with pytest.raises(Unsupported, match="act_group_size"):
        ops.quantize_activation(torch.randn(2, 64), size)
    with pytest.raises(Unsupported, match="act_group_size"):
        ops.linear(torch.randn(2, 256), bias=None, **packed(Case(Int4ActQuantTensor), size))


def test_quantize_activation_is_the_reference():
    x = torch.randn(3, 100)
    for got, expected in zip(
        ops.quantize_activation(x, 32), reference.quantize_activation(x, 32), strict=True
    ):
        assert torch.equal(got, expected)


# integer scales

INTEGER = Case(Int4ActQuantTensor)


@given(cases(cls=Int4ActQuantTensor, stacked=False), st.sampled_from(DTYPES), st.integers(0, 5))
def test_multiples_change_no_bit_of_a_linear(case, dtype, m):
    case = case.with_(zero="symmetric")
    x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(case.seed)).to(dtype)
    args = packed(case, -1) | {"bias": torch.randn(case.n).to(dtype)}
    y = ops.linear(x, **args, multiple=case.multiple())
    assert torch.equal(y, ops.linear(x, **args))
    assert torch.equal(y, ops.linear(x, **args, multiple=None))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_linear_with_multiples_passes_opcheck(rank):
    args = packed(INTEGER.with_(n=12, k=192), -1) | {"bias": _grad(torch.randn(12))}
    args["multiple"] = INTEGER.with_(n=12, k=192).multiple()
    x = _grad(torch.randn(*(2, 3, 192)[-rank:]))
    tests = "ALL" if rank == 2 else QUICK
    torch.library.opcheck(ops.linear.default, (x,), args, test_utils=tests)


def test_the_gradient_of_x_and_bias_with_multiples():
    args = packed(INTEGER, -1)
    grads = []
    for multiple in (INTEGER.multiple(), None):
        x, bias = _grad(exact_x(2, 3, 256)), _grad(torch.ones(24))
        y = ops.linear(x, bias=bias, **args, multiple=multiple)
        grads.append(torch.autograd.grad(y, (x, bias), exact_x(*y.shape)))
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)
    assert torch.allclose(grads[0][0].double(), exact_x(2, 3, 24).double() @ INTEGER.dense())


@modes
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("multiple.dtype", {"multiple": INTEGER.multiple().to(torch.uint8)}),
        ("multiple.dtype", {"multiple": INTEGER.multiple().float()}),
        ("multiple.shape", {"multiple": INTEGER.multiple().mT}),
        ("multiple.shape", {"multiple": INTEGER.multiple()[:, :2]}),
        ("multiple", {"zero_point": torch.full((24, 4), 8.0)}),
        ("multiple", {"act_group_size": 32}),
        ("multiple", packed(INTEGER.with_(cls=CLASSES[0]))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_multiples_that_are_not_of_the_weight_are_refused(mode, field, changes):
    good = packed(INTEGER, -1) | {"bias": None, "multiple": INTEGER.multiple()}
    _run(ops.linear, mode, torch.randn(3, 256), **good)
    with pytest.raises(PackingError) as caught:
        _run(ops.linear, mode, torch.randn(3, 256), **(good | changes))
    assert caught.value.field == field


def test_multiples_on_another_device_are_refused():
    good = packed(INTEGER, -1) | {"bias": None}
    with pytest.raises(PackingError) as caught:
        ops.linear(torch.randn(3, 256), **good, multiple=INTEGER.multiple().to("meta"))
    assert caught.value.field == "multiple.device"
