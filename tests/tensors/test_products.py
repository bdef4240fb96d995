"""Every product with a weight, against the product with the dequantised tensor."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import BaseTorchDispatchMode

from tests.test_reference import round_activations
from tests.weights import (
    CLASSES,
    DTYPES,
    Case,
    all_dtypes,
    assert_close,
    both_classes,
    cases,
    exact_x,
)
from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, ops
from w4tensor.errors import MisdispatchError, PackingError, Unsupported
from w4tensor.tensors import experts
from w4tensor.tensors.linear_weight import as_linear_weight

aten = torch.ops.aten
MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def product(x, dense, bias=None):
    """fp64 x @ dense.T + bias."""
    y = x.double() @ dense.mT
    return y if bias is None else y + bias.double()


# F.linear


@given(cases(stacked=False), st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES))
def test_linear_is_exact_for_any_rank_of_x(case, batch, dtype):
    """x.dtype need not be the weight's; the answer has x's."""
    x = exact_x(*batch, case.k, dtype=dtype)
    assert_close(F.linear(x, case.weight()), product(x, case.dense()), dtype)


@in_every_mode
@all_dtypes
@both_classes
@pytest.mark.parametrize("how", ["position", "keyword", "all keywords", "aten", "aten keyword"])
def test_linear_never_loses_its_bias(cls, dtype, mode, how):
    case = Case(cls, zero="integer", dtype=dtype)
    x = exact_x(3, 256, dtype=dtype)
    bias = torch.arange(24).to(dtype) * 100
    with mode():
        w = case.weight()
        y = {
            "position": lambda: F.linear(x, w, bias),
            "keyword": lambda: F.linear(x, w, bias=bias),
            "all keywords": lambda: F.linear(input=x, weight=w, bias=bias),
            "aten": lambda: aten.linear.default(x, w, bias),
            "aten keyword": lambda: aten.linear.default(x, w, bias=bias),
        }[how]()
    assert_close(y, product(x, case.dense(), bias), dtype)


@both_classes
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_a_bias_of_another_dtype_is_added_before_rounding(cls, bias_dtype):
    case, x = Case(cls), exact_x(3, 256, dtype=torch.bfloat16)
    bias = torch.arange(24).to(bias_dtype)
    y = F.linear(x, case.weight(), bias)
    assert_close(y, product(x, case.dense(), bias), torch.bfloat16)


@both_classes
@all_dtypes
def test_x_may_be_any_view(cls, dtype):
    case = Case(cls, zero="fractional", dtype=dtype)
    w, dense = case.weight(), case.dense()
    big = exact_x(8, 6, 512, dtype=dtype)
    for x in (
        big[::2, ::3, :256],
        big[..., ::2].contiguous()[:, 1],
        big.transpose(0, 1)[..., 256:],
        big[0, 0, :256].expand(3, 4, 256),
        exact_x(256, 5, dtype=dtype).t(),
        big[:0, :, :256],
        big[:, :0, 256:],
    ):
        if x.shape[-1] == 256:
            expected = product(x, dense) if cls is not Int4ActQuantTensor else None
            y = F.linear(x, w)
            assert torch.equal(y, F.linear(x.contiguous(), w))
            if expected is not None:
                assert_close(y, expected, dtype)


@both_classes
def test_a_bias_may_be_a_view(cls):
    case, x = Case(cls), exact_x(3, 256)
    for bias in (torch.arange(48.0)[::2], torch.ones(()).expand(24), torch.ones(24, 2)[:, 0]):
        assert_close(F.linear(x, case.weight(), bias), product(x, case.dense(), bias), x.dtype)


@both_classes
@pytest.mark.parametrize("act", [32, 64, 128, -1])
@all_dtypes
def test_activations_are_rounded_group_by_group_and_only_where_promised(cls, act, dtype):
    """Gaussian x, K not a multiple of the activation group."""
    case = Case(cls, k=208, group_size=16, zero="fractional", dtype=dtype)
    x = torch.randn(5, 208, generator=torch.Generator().manual_seed(0)).to(dtype)
    if cls is Int4ActQuantTensor:
        w = case.weight(act_group_size=act)
        codes, scales = round_activations(x.float().numpy(), act)
        each = np.arange(208) // (208 if act == -1 else act)
        x_hat = torch.from_numpy(codes.astype(np.float64) * scales[:, each])
    else:
        w, x_hat = case.weight(), x.double()
    size = x_hat.abs() @ case.dense().abs().T
    assert_close(F.linear(x, w), product(x_hat, case.dense()), dtype, size)


@both_classes
def test_linear_refuses_what_it_cannot_mean(cls):
    w, x = Case(cls, n=256).weight(), torch.randn(3, 256)
    stacked = Case(cls, stack=(2,)).weight()
    for op in (
        lambda: F.linear(x, w.t()),
        lambda: F.linear(w, x),
        lambda: F.linear(w, w),
        lambda: F.linear(torch.randn(2, 3, 256), stacked),
        lambda: aten.linear.default(w, x),
        lambda: aten.linear.default(x, w.t()),
        lambda: F.linear(x, torch.randn(256, 256), w),
        lambda: F.linear(x, w, Case(cls, n=1, k=256).weight()),
    ):
        with pytest.raises(MisdispatchError):
            op()
    with pytest.raises(Unsupported):
        F.linear(torch.randn(3, 255), w)
    with pytest.raises(Unsupported):
        F.linear(x, w, torch.randn(1))
    with pytest.raises(Unsupported):
        F.linear(x.double(), w)
    with pytest.raises(Unsupported):
        F.linear(x.to(torch.int8), w)
    with pytest.raises(PackingError):
        F.linear(x.to("meta"), w)


# autocast


@both_classes
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_lowers_x_as_it_does_for_plain_weights(cls, low, enabled):
    case = Case(cls)
    w, dense = case.weight(), case.dense().float()
    stacked = Case(cls, stack=(2,))
    x, bias = exact_x(4, 256), torch.arange(24.0)
    x3 = exact_x(2, 4, 256)
    offs = torch.tensor([1, 4], dtype=torch.int32)
    with torch.autocast("cpu", dtype=low, enabled=enabled):
        for op, d in (
            (lambda w: F.linear(x, w, bias), False),
            (lambda w: torch.mm(x, w.t()), False),
            (lambda w: x @ w.t(), False),
            (lambda w: torch.addmm(bias, x, w.t()), False),
            (lambda w: torch.bmm(x3, w.mT), True),
            (lambda w: torch._grouped_mm(x, w.mT, offs=offs), None),
        ):
            y = op(stacked.weight() if d is not False else w)
            if d is None:
                assert y.dtype == (low if enabled else torch.float32)
                continue
            plain = op(stacked.dense().float() if d else dense)
            assert y.dtype == plain.dtype == (low if enabled else torch.float32)
            assert torch.allclose(y.float(), plain.float(), rtol=0.02)


# two and three dimensions, either side, seen through transpose


def _pairs(case: Case, m: int, dtype) -> list:
    """(x, w, dense, how x meets w) for every legal order."""
    w, dense = case.weight(), case.dense()
    # summed over K: rounds x where the class does; over N: the dequantised weight
    over_k = exact_x(*case.stack, m, case.k, dtype=dtype)
    over_n = exact_x(*case.stack, m, case.n, dtype=dtype)
    return [
        (over_k, w.mT, dense.mT),
        (over_n, w, dense),
        (w, over_k.mT, dense),
        (w.mT, over_n.mT, dense.mT),
    ]


MM = {
    "torch.mm": torch.mm,
    "Tensor.mm": lambda a, b: a.mm(b),
    "aten.mm": aten.mm.default,
    "mm by keyword": lambda a, b: torch.mm(a, mat2=b),
}
BMM = {
    "torch.bmm": torch.bmm,
    "Tensor.bmm": lambda a, b: a.bmm(b),
    "aten.bmm": aten.bmm.default,
    "bmm by keyword": lambda a, b: torch.bmm(input=a, mat2=b),
}
MATMUL = {
    "torch.matmul": torch.matmul,
    "@": lambda a, b: a @ b,
    "Tensor.matmul": lambda a, b: a.matmul(b),
    "aten.matmul": aten.matmul.default,
    "matmul by keyword": lambda a, b: torch.matmul(a, other=b),
    "linalg.matmul": torch.linalg.matmul,
}


def _plain(t):
    return t.double() if type(t) is torch.Tensor else None


def check_products(case: Case, m: int, dtype, op) -> None:
    for a, b, dense in _pairs(case, m, dtype):
        left = dense if type(a) in CLASSES else a.double()
        right = dense if type(b) in CLASSES else b.double()
        y, expected = op(a, b), left @ right
        # the dequantised weight is rounded to x's dtype where the sum is over N
        size = 2**19 * 2**-8 * (left.abs() @ right.abs()) if dtype != torch.float32 else 0
        assert_close(y, expected, dtype, size)
        if dtype == torch.float32:
            assert torch.equal(y.double(), expected)


@in_every_mode
@both_classes
@all_dtypes
@pytest.mark.parametrize("op", [*MM.values(), *MATMUL.values()], ids=[*MM, *MATMUL])
@pytest.mark.parametrize("n", [24, 128])
def test_matrix_products_with_the_weight_on_either_side(cls, dtype, mode, op, n):
    """With N = K = 128 only the transposed flag tells the two senses apart."""
    with mode():
        check_products(Case(cls, n=n, k=128, zero="fractional", dtype=dtype), 5, dtype, op)


@in_every_mode
@both_classes
@all_dtypes
@pytest.mark.parametrize("op", [*BMM.values(), *MATMUL.values()], ids=[*BMM, *MATMUL])
@pytest.mark.parametrize("n", [24, 128])
def test_batched_products_with_the_weight_on_either_side(cls, dtype, mode, op, n):
    case = Case(cls, n=n, k=128, stack=(3,), zero="fractional", dtype=dtype)
    with mode():
        check_products(case, 5, dtype, op)


@given(cases(stacked=True, dtypes=(torch.float32,)), st.integers(1, 4))
def test_bmm_means_what_pytorch_says_for_every_shape(case, m):
    check_products(case, m, torch.float32, torch.bmm)


@given(cases(stacked=False, dtypes=(torch.float32,)), st.integers(1, 4))
def test_mm_means_what_pytorch_says_for_every_shape(case, m):
    check_products(case, m, torch.float32, torch.mm)


@both_classes
def test_n_equal_to_k_does_not_confuse_the_two_senses(cls):
    case = Case(cls, n=128, k=128, stack=(2,))
    x = exact_x(2, 3, 128)
    w, dense = case.weight(), case.dense()
    straight, through = torch.bmm(x, w), torch.bmm(x, w.mT)
    assert torch.equal(straight.double(), x.double() @ dense)
    assert torch.equal(through.double(), x.double() @ dense.mT)
    assert not torch.equal(straight, through)


@both_classes
def test_broadcasting_of_matmul(cls):
    flat, stacked = Case(cls), Case(cls, stack=(2,))
    w, dense = flat.weight(), flat.dense()
    w3, dense3 = stacked.weight(), stacked.dense()
    k, n = exact_x(256), exact_x(24)
    for got, expected in (
        (k @ w.t(), k.double() @ dense.T),
        (n @ w, n.double() @ dense),
        (w @ k, dense @ k.double()),
        (w.t() @ n, dense.T @ n.double()),
        (exact_x(2, 3, 5, 256) @ w.t(), exact_x(2, 3, 5, 256).double() @ dense.T),
        (exact_x(5, 256) @ w3.mT, exact_x(5, 256).double() @ dense3.mT),
        (exact_x(1, 5, 256) @ w3.mT, exact_x(1, 5, 256).double() @ dense3.mT),
        (w3 @ exact_x(5, 256).t(), dense3 @ exact_x(5, 256).double().T),
        (w @ exact_x(2, 5, 256).mT, dense @ exact_x(2, 5, 256).double().mT),
        (exact_x(2, 0, 256) @ w3.mT, torch.zeros(2, 0, 24)),
    ):
        assert torch.equal(got.double(), expected.double()) and got.shape == expected.shape


@both_classes
def test_products_that_do_not_fit_are_refused(cls):
    w, w3 = Case(cls).weight(), Case(cls, stack=(2,)).weight()
    for op in (
        lambda: torch.mm(torch.randn(3, 24), w.t()),
        lambda: torch.mm(torch.randn(3, 256), w),
        lambda: torch.mm(torch.randn(2, 3, 256), w.t()),
        lambda: torch.mm(torch.randn(256), w.t()),
        lambda: torch.bmm(torch.randn(3, 256), w.t()),
        lambda: torch.bmm(torch.randn(2, 3, 256), w.t()),
        lambda: torch.bmm(torch.randn(1, 3, 256), w3.mT),
        lambda: torch.bmm(torch.randn(3, 3, 256), w3.mT),
        lambda: torch.bmm(torch.randn(2, 3, 256), w3),
        lambda: torch.matmul(torch.randn(3, 3, 256), w3.mT),
        lambda: torch.randn(255) @ w.t(),
        lambda: torch.addmm(torch.zeros(24), torch.randn(2, 3, 256), w.t()),
        lambda: torch.addmm(torch.zeros(24), torch.randn(256), w.t()),
    ):
        with pytest.raises(Unsupported):
            op()
    for op in (
        lambda: w @ w.t(),
        lambda: torch.mm(w, w.t()),
        lambda: torch.bmm(w3, w3.mT),
        lambda: torch.randn(256) @ w3.mT,
    ):
        with pytest.raises(MisdispatchError):
            op()


@both_classes
def test_out_and_out_dtype_are_refused_and_never_ignored(cls):
    w, w3, x = Case(cls).weight(), Case(cls, stack=(2,)).weight(), torch.randn(3, 256)
    out = torch.full((3, 24), 7.0)
    out3 = torch.full((2, 3, 24), 7.0)
    for op in (
        lambda: torch.mm(x, w.t(), out=out),
        lambda: torch.matmul(x, w.t(), out=out),
        lambda: torch.addmm(torch.zeros(24), x, w.t(), out=out),
        lambda: torch.bmm(x.expand(2, 3, 256), w3.mT, out=out3),
        lambda: aten.mm.out(x, w.t(), out=out),
        lambda: torch.mm(x.bfloat16(), w.t(), torch.float32),
        lambda: torch.bmm(x.bfloat16().expand(2, 3, 256), w3.mT, out_dtype=torch.float32),
    ):
        with pytest.raises((Unsupported, MisdispatchError)):
            op()
    assert (out == 7).all() and (out3 == 7).all()


# addmm


@in_every_mode
@both_classes
@pytest.mark.parametrize("beta", [1, 0, 2])
@pytest.mark.parametrize("alpha", [1, -3])
def test_addmm(cls, mode, beta, alpha):
    case, x = Case(cls, zero="integer"), exact_x(3, 256)
    bias, full = torch.arange(24.0), torch.arange(72.0).view(3, 24)
    with mode():
        w = case.weight()
        for added, y in (
            (bias, torch.addmm(bias, x, w.t(), beta=beta, alpha=alpha)),
            (full, torch.addmm(full, x, w.t(), beta=beta, alpha=alpha)),
            (full, full.addmm(x, w.t(), beta=beta, alpha=alpha)),
            (bias, aten.addmm.default(bias, x, w.t(), beta=beta, alpha=alpha)),
            (bias, torch.addmm(input=bias, mat1=x, mat2=w.t(), beta=beta, alpha=alpha)),
        ):
            expected = beta * added.double() + alpha * product(x, case.dense())
            assert torch.equal(y.double(), expected) and y.dtype == x.dtype
        left = torch.addmm(torch.zeros(24, 3), w, x.t(), alpha=alpha)
        assert torch.equal(left.double(), alpha * product(x, case.dense()).T)


@both_classes
def test_addmm_with_beta_zero_ignores_nan(cls):
    bias = torch.full((24,), float("nan"))
    y = torch.addmm(bias, exact_x(3, 256), Case(cls).weight().t(), beta=0)
    assert y.isfinite().all()


@both_classes
def test_addmm_onto_a_weight_is_refused(cls):
    w = Case(cls, n=256).weight()
    with pytest.raises(MisdispatchError):
        torch.addmm(w, torch.randn(256, 2), torch.randn(2, 256))


# torch._grouped_mm


@in_every_mode
@both_classes
@all_dtypes
@pytest.mark.parametrize("call", ["torch", "functional", "aten"])
def test_grouped_mm(cls, mode, dtype, call):
    case = Case(cls, stack=(4,), zero="fractional", dtype=dtype)
    x = exact_x(9, 256, dtype=dtype)
    # the second expert has no rows; the last two rows have no expert
    offs = torch.tensor([2, 2, 5, 7], dtype=torch.int32)
    if call == "functional" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no F.grouped_mm")
    with mode():
        w = case.weight().transpose(-2, -1)
        op = {
            "torch": torch._grouped_mm,
            "functional": getattr(F, "grouped_mm", None),
            "aten": aten._grouped_mm.default,
        }[call]
        y = op(x, w, offs=offs)
    dense, start = case.dense(), 0
    assert y.shape == (9, 24)
    for expert, end in enumerate(offs.tolist()):
        assert_close(y[start:end], product(x[start:end], dense[expert]), dtype)
        start = end
    assert not y[7:].any()


@given(cases(stacked=True, dtypes=(torch.float32,)), st.data())
def test_grouped_mm_for_any_split(case, data):
    counts = [data.draw(st.integers(0, 3)) for _ in range(case.stack[0])]
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = exact_x(sum(counts), case.k)
    assume(len(x))
    y = torch._grouped_mm(x, case.weight().mT, offs)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = torch.einsum("tk,tnk->tn", x.double(), case.dense()[rows])
    assert torch.equal(y.double(), expected)


@both_classes
def test_grouped_mm_refuses_other_forms(cls):
    w = Case(cls, n=256, stack=(2,)).weight()
    x, offs = torch.randn(3, 256), torch.tensor([1, 3], dtype=torch.int32)
    for op in (
        lambda: torch._grouped_mm(x, w, offs=offs),
        lambda: torch._grouped_mm(x, w[0].t(), offs=offs),
        lambda: torch._grouped_mm(x.expand(2, 3, 256), w.mT),
        lambda: torch._grouped_mm(w, x.expand(2, 3, 256).mT),
        lambda: torch._grouped_mm(w[0], x.expand(2, 3, 256).mT, offs=offs),
        lambda: torch._grouped_mm(x, w.mT),
        lambda: torch._grouped_mm(x, w.mT, offs=offs, bias=torch.zeros(2, 256)),
    ):
        with pytest.raises((MisdispatchError, Unsupported)):
            op()
    y = torch._grouped_mm(x, w.mT, offs=offs, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16


# embedding


@in_every_mode
@all_dtypes
@both_classes
def test_embedding_looks_rows_up(cls, dtype, mode):
    case = Case(cls, zero="fractional", dtype=dtype)
    dense = case.dense().to(dtype)
    with mode():
        w = case.weight()
        module = nn.Embedding(24, 256, padding_idx=3)
        module.weight = nn.Parameter(w, requires_grad=False)
        for ids in (
            torch.tensor([[3, 23], [0, 3]]),
            torch.tensor(5),
            torch.zeros(0, dtype=torch.int64),
            torch.tensor([1, 2], dtype=torch.int32),
        ):
            assert torch.equal(F.embedding(ids, w), dense[ids.long()])
            assert torch.equal(module(ids), dense[ids.long()])
            assert torch.equal(aten.embedding.default(w, ids), dense[ids.long()])


@both_classes
def test_embedding_refuses_what_it_cannot_mean(cls):
    w = Case(cls, n=256, k=256).weight()
    ids = torch.tensor([1])
    for bad in (torch.tensor([256]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            F.embedding(bad, w)
    for op in (
        lambda: F.embedding(ids, w, max_norm=1.0),
        lambda: F.embedding(ids, w, None, 1.0),
        lambda: F.embedding(ids, w.t()),
        lambda: F.embedding(ids, Case(cls, stack=(2,)).weight()),
        lambda: F.embedding(w, torch.randn(4, 4)),
        lambda: F.embedding_bag(ids[None], w),
    ):
        with pytest.raises((Unsupported, MisdispatchError)):
            op()


# gradients flow to x


ROUTES = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "aten.linear": lambda x, w, b: aten.linear.default(x, w, b),
    "matmul": lambda x, w, b: x @ w.t() + b,
    "mm": lambda x, w, b: torch.mm(x, w.t()) + b,
    "aten.mm": lambda x, w, b: aten.mm.default(x, w.t()) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "from the left": lambda x, w, b: (w @ x.t()).t() + b,
}


@both_classes
@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_the_gradient_of_x_is_that_of_the_dequantised_weight(cls, route, parameter):
    case = Case(cls, zero="fractional")
    w = case.weight()
    w = nn.Parameter(w, requires_grad=False) if parameter else w
    x = exact_x(3, 256).requires_grad_()
    bias = torch.randn(24).requires_grad_()
    grad = exact_x(3, 24)
    got = torch.autograd.grad(route(x, w, bias), (x, bias), grad)
    expected = torch.autograd.grad(route(x, case.dense().float(), bias), (x, bias), grad)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b)


@both_classes
def test_the_gradient_through_bmm_and_grouped_mm(cls):
    case = Case(cls, stack=(2,), zero="fractional")
    x = exact_x(2, 3, 256).requires_grad_()
    for op in (lambda w: torch.bmm(x, w.mT), lambda w: (w @ x.mT).mT):
        (got,) = torch.autograd.grad(op(case.weight()).sum(), x)
        (expected,) = torch.autograd.grad(op(case.dense().float()).sum(), x)
        assert torch.allclose(got, expected)
    rows = exact_x(5, 256).requires_grad_()
    offs = torch.tensor([2, 4], dtype=torch.int32)
    y = torch._grouped_mm(rows, case.weight().mT, offs=offs)
    (got,) = torch.autograd.grad(y.sum(), rows)
    sums = case.dense().sum(1).float()
    expected = torch.stack((sums[0], sums[0], sums[1], sums[1], torch.zeros(256)))
    assert torch.allclose(got, expected)


def in_dual_level(call, x, tangent):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent)))
    return y.primal, y.tangent


# {how a gradient is asked for: (call, x, a vector) -> tensors}
DIFFERENTIATED = {
    "jvp": lambda call, x, v: torch.func.jvp(call, (x,), (v,)),
    "dual": in_dual_level,
    "grad": lambda call, x, v: [torch.func.grad(lambda x: call(x).sum())(x)],
    "vjp": lambda call, x, v: torch.func.vjp(call, x)[1](call(v)),
}


# {name: (x [2, 2, K], w [N, K], stack [2, N, K], bias [N]) -> a product}
PRODUCTS = {
    "linear": lambda x, w, stack, bias: F.linear(x, w, bias),
    "one token": lambda x, w, stack, bias: F.linear(x[0, 0], w),
    "matmul": lambda x, w, stack, bias: x @ w.t(),
    "weight first": lambda x, w, stack, bias: stack @ x.mT,
    "addmm": lambda x, w, stack, bias: torch.addmm(bias, x[0], w.t()),
    "gathered": lambda x, w, stack, bias: torch.bmm(x, stack[torch.tensor([1, 0])].mT),
}


def check_tangents(product_of, how, around=lambda call: call):
    one, two = Case(CudaCoalescedInt4Tensor), Case(CudaCoalescedInt4Tensor, stack=(2,))
    weights = as_linear_weight(one.weight()), two.weight()
    x, v, bias = exact_x(2, 2, 256), exact_x(2, 2, 256), torch.ones(24)
    got = around(lambda x, v: how(lambda x: product_of(x, *weights, bias), x, v))(x, v)
    dense = one.dense().float(), two.dense().float()
    expected = how(lambda x: product_of(x, *dense, bias), x, v)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
@pytest.mark.parametrize("product_of", PRODUCTS.values(), ids=PRODUCTS)
def test_no_tangent_is_lost(product_of, how):
    check_tangents(product_of, how)


@pytest.mark.parametrize("how", DIFFERENTIATED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_no_tangent_is_lost_in_a_compiled_function(product, how):
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager")
    check_tangents(PRODUCTS[product], DIFFERENTIATED[how], compiled)


@both_classes
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_with_a_dual_level_and_a_weight_that_is_a_tensor(fullgraph, cls):
    torch._dynamo.reset()
    case = Case(cls, stack=(2,))
    x, v = exact_x(2, 256), exact_x(2, 256)
    call = functools.partial(torch.compile, backend="aot_eager", fullgraph=fullgraph)(
        lambda w, x, v: in_dual_level(lambda x: F.linear(x, w[1]), x, v)
    )
    for _ in range(2):
        y, tangent = call(case.weight(), x, v)
        assert torch.equal(tangent, v @ case.dense()[1].float().t())


@pytest.mark.parametrize("how", ["jvp", "dual"])
@pytest.mark.parametrize("order", ["plain first", "tangents first"])
def test_a_compiled_function_is_right_with_tangents_and_without(order, how):
    torch._dynamo.reset()
    case = Case(CudaCoalescedInt4Tensor)
    w, dense = as_linear_weight(case.weight()), case.dense().float()
    call = torch.compile(lambda x: F.linear(x, w), backend="aot_eager")
    x, v = exact_x(2, 256), exact_x(2, 256)
    for turn in range(4):
        if (turn + (order == "plain first")) % 2:
            assert torch.equal(call(x), x @ dense.t())
        else:
            assert torch.equal(DIFFERENTIATED[how](call, x, v)[1], v @ dense.t())


@all_dtypes
@both_classes
def test_a_model_trains_around_quantised_weights(cls, dtype):
    """Biases and norms between two int4 linears get the gradients of the dequantised copy."""
    first, second = Case(cls, n=128, k=64), Case(cls, n=32, k=128)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 32))
    model = model.to(dtype)
    plain = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 32))
    plain = plain.to(dtype)
    plain.load_state_dict(model.state_dict())
    for index, case in ((0, first), (3, second)):
        model[index].weight = nn.Parameter(case.weight(), requires_grad=False)
        plain[index].weight = nn.Parameter(case.dense().to(dtype), requires_grad=False)
    x = exact_x(7, 64, dtype=dtype)
    for net in (model, plain):
        net(x).float().square().mean().backward()
    # rounding to int8 counts as the identity in the gradient but not in the forward pass
    near = 0.05 if cls is Int4ActQuantTensor or dtype != torch.float32 else 1e-4
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if "weight" in name and name != "1.weight":
            assert a.grad is None
        else:
            error = (a.grad.double() - b.grad.double()).norm() / b.grad.double().norm()
            assert error < near, (name, error)


# laws


@given(cases(stacked=False, dtypes=(torch.float32,)), st.integers(1, 9), st.integers(0, 3))
def test_linear_of_a_cat_is_the_cat_of_linears(case, rows, m):
    other = case.with_(n=rows, seed=case.seed + 1)
    x = exact_x(m, case.k)
    a, b = case.weight(), other.weight()
    whole = F.linear(x, torch.cat((a, b)))
    assert torch.equal(whole, torch.cat((F.linear(x, a), F.linear(x, b)), -1))


@both_classes
def test_the_sum_over_k_splits_on_block_borders(cls):
    case = Case(cls, k=512, zero="fractional")
    w, x = case.weight(), exact_x(3, 512)
    parts = [F.linear(x[:, s : s + 128], w[:, s : s + 128]) for s in range(0, 512, 128)]
    assert torch.equal(sum(parts), F.linear(x, w))


@both_classes
def test_experts_one_by_one_batched_and_grouped_agree(cls):
    """The three ways in which transformers runs a stack of experts."""
    case = Case(cls, stack=(4,), zero="integer")
    w = case.weight()
    ids = torch.tensor([2, 0, 3, 2, 0])
    x = exact_x(5, 256)
    one = torch.stack([F.linear(x[i], w[ids[i]]) for i in range(5)])
    batched = torch.bmm(w[ids], x[..., None]).squeeze(-1)
    order = ids.argsort(stable=True)
    offs = torch.bincount(ids, minlength=4).cumsum(0).to(torch.int32)
    grouped = torch._grouped_mm(x[order], w.transpose(-2, -1), offs=offs)[order.argsort()]
    assert torch.equal(one, batched) and torch.equal(one, grouped)
    expected = torch.einsum("tk,tnk->tn", x.double(), case.dense()[ids])
    assert torch.equal(one.double(), expected)


def eager_stack(n: int) -> CudaCoalescedInt4Tensor:
    return Case(CudaCoalescedInt4Tensor, n=n, stack=(3,)).weight()


@pytest.fixture
def eager(monkeypatch) -> list[str]:
    """As on CUDA: which products skip the dispatcher. They run on a CPU all the same."""
    skipped = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    for name in ("linear", "grouped_linear", "gathered_linear", "experts"):

        def run(*operands, name=name):
            skipped.append(name)
            return getattr(torch.ops.w4tensor, name)(*operands)

        monkeypatch.setattr(ops, f"cuda_{name}", run)
    return skipped


def test_eager_products_skip_the_dispatcher(eager):
    w, stack = Case(CudaCoalescedInt4Tensor).weight(), eager_stack(24)
    x, ids = exact_x(4, 256), torch.tensor([0, 1, 2, 1])
    F.linear(x, w)
    torch._grouped_mm(x, stack.mT, torch.tensor([1, 2, 4], dtype=torch.int32))
    torch.bmm(stack[ids], x[..., None])
    experts(x, ids[:, None], torch.ones(4, 1), eager_stack(512), eager_stack(256))
    assert eager == ["linear", "grouped_linear", "gathered_linear", "experts"]


def test_whoever_follows_a_product_sees_the_operator(eager):
    w, bias = Case(CudaCoalescedInt4Tensor).weight(), torch.ones(24)
    x = exact_x(4, 256)
    for operands in ((x.clone().requires_grad_(), w, bias), (x, w, bias.clone().requires_grad_())):
        assert F.linear(*operands).requires_grad and not eager
        with torch.no_grad():
            F.linear(*operands)
        assert eager.pop() == "linear"
    with BaseTorchDispatchMode():
        F.linear(x, w, bias)
    assert not eager


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("what", ["x", "bias", "offs", "ids"])
def test_a_transform_of_any_operand_sees_the_operator(eager, what):
    w, stack, x = Case(CudaCoalescedInt4Tensor).weight(), eager_stack(24), exact_x(4, 256)
    two = eager_stack(512), eager_stack(256)
    call, operand = {
        "x": (lambda x: F.linear(x, w), exact_x(2, 4, 256)),
        "bias": (lambda bias: F.linear(x, w, bias), exact_x(2, 24)),
        "offs": (
            lambda offs: torch._grouped_mm(x, stack.mT, offs),
            torch.tensor([[1, 2, 4], [0, 3, 4]], dtype=torch.int32),
        ),
        "ids": (
            lambda ids: experts(x, ids, torch.ones(4, 1), *two),
            torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])[..., None],
        ),
    }[what]
    y = torch.vmap(call)(operand)
    assert not eager
    assert torch.equal(y, torch.stack([call(one) for one in operand]))
    assert len(eager) == 2


# integer scales


@given(cases(cls=Int4ActQuantTensor), st.sampled_from(DTYPES), st.integers(1, 4))
def test_multiples_change_no_bit_of_a_product(case, dtype, m):
    case = case.with_(zero="symmetric")
    w, plain = case.integer_weight(), case.weight(act_group_size=-1)
    x = torch.randn(*case.stack, m, case.k, generator=torch.Generator().manual_seed(case.seed))
    x = x.to(dtype)
    assert torch.equal(x @ w.mT, x @ plain.mT)
    if not case.stack:
        bias = torch.arange(case.n).to(dtype)
        assert torch.equal(F.linear(x, w, bias), F.linear(x, plain, bias))
    over_n = torch.randn(*case.stack, m, case.n).to(dtype)
    assert torch.equal(over_n @ w, over_n @ plain)


def test_linear_hands_its_multiples_to_the_operator():
    class Seen(BaseTorchDispatchMode):
        multiples: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.w4tensor.linear.default:
                self.multiples.append(args[8] if len(args) > 8 else None)
            return super().__torch_dispatch__(func, types, args, kwargs)

    w, x = Case(Int4ActQuantTensor).integer_weight(), exact_x(3, 256)
    with Seen():
        F.linear(x, w)
        x @ w[8:].t()
        F.linear(x, Case(Int4ActQuantTensor).weight())
        F.linear(x, Case(CudaCoalescedInt4Tensor).weight())
    whole, part, *none = Seen.multiples
    assert torch.equal(whole, w.multiple) and torch.equal(part, w.multiple[8:])
    assert none == [None, None]


def test_the_gradient_of_x_with_multiples():
    case = Case(Int4ActQuantTensor)
    grads = []
    for w in (case.integer_weight(), case.weight(act_group_size=-1)):
        x = exact_x(5, 256).requires_grad_()
        F.linear(x, w).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and bool(grads[0].any())


def test_gathered_and_grouped_products_take_weights_with_multiples():
    case = Case(Int4ActQuantTensor, stack=(3,))
    ids = torch.tensor([2, 0, 0])
    x, offs = exact_x(3, 1, 256), torch.tensor([1, 1, 3], dtype=torch.int32)
    w, plain = case.integer_weight(), case.weight(act_group_size=-1)
    assert torch.equal(torch.bmm(x, w[ids].mT), torch.bmm(x, plain[ids].mT))
    assert torch.equal(
        torch._grouped_mm(x[:, 0], w.mT, offs=offs), torch._grouped_mm(x[:, 0], plain.mT, offs=offs)
    )
