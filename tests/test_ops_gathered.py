"""torch.ops.w4tensor.gathered_linear: its answer, gradient, fake and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_ops import QUICK, _run, modes, packed
from tests.weights import CLASSES, DTYPES, Case, assert_close, both_classes, cases, exact_x
from w4tensor.errors import PackingError, Unsupported

op = torch.ops.w4tensor.gathered_linear


@given(cases(stacked=True), st.sampled_from(DTYPES), st.data())
def test_each_row_meets_the_weight_that_it_chose(case, dtype, data):
    ids = data.draw(st.lists(st.integers(0, case.stack[0] - 1), max_size=6), "ids")
    ids = torch.tensor(ids, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    x = exact_x(len(ids), case.k, dtype=dtype)
    y = op(x, ids, **packed(case))
    expected = torch.bmm(case.dense()[ids.long()], x.double()[..., None])[..., 0]
    assert_close(y, expected, dtype)


@both_classes
@pytest.mark.parametrize("bad", [-1, 3, 100])
def test_an_index_out_of_range_is_an_error_on_a_cpu(cls, bad):
    case = Case(cls, stack=(3,))
    with pytest.raises(IndexError, match=f"index {bad} is out of bounds .* size 3"):
        op(exact_x(2, 256), torch.tensor([0, bad]), **packed(case))


@both_classes
def test_the_gradient_is_that_of_the_dequantised_product(cls):
    case = Case(cls, n=12, k=192, stack=(3,), zero="fractional")
    x, ids = exact_x(4, 192).requires_grad_(), torch.tensor([2, 0, 2, 1])
    y = op(x, ids, **packed(case))
    grad = exact_x(4, 12)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(got.double(), (grad.double()[:, None] @ case.dense()[ids])[:, 0])


@both_classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes_opcheck(cls, dtype):
    weight = packed(Case(cls, n=12, k=192, stack=(3,), zero="fractional"))
    x = torch.randn(4, 192).to(dtype).requires_grad_()
    every = "ALL" if dtype == torch.float32 else QUICK
    torch.library.opcheck(op.default, (x, torch.tensor([2, 0, 2, 1])), weight, test_utils=every)


@modes
def test_what_does_not_fit_is_refused(mode):
    good = packed(Case(CLASSES[0], stack=(3,)))
    x, ids = torch.randn(2, 256), torch.tensor([0, 2])
    for bad_x, bad_ids, message in (
        (x[None], ids, "a gathered product takes x"),
        (x[:, :255], ids, "K=256"),
        (x, ids[:1], "ids is"),
        (x, ids[None], "ids is"),
        (x, ids.float(), "ids is"),
    ):
        with pytest.raises(Unsupported, match=message):
            _run(op, mode, bad_x, bad_ids, **good)
    with pytest.raises(Unsupported, match="a gathered product takes x"):
        _run(op, mode, x, ids, **packed(Case(CLASSES[0])))
    with pytest.raises(PackingError, match="qdata.dtype"):
        _run(op, mode, x, ids, **(good | {"qdata": good["qdata"].view(torch.int64)}))


def test_ids_on_another_device_are_refused():
    with pytest.raises(Unsupported, match="ids is on meta"):
        ids = torch.zeros(2, dtype=torch.int64, device="meta")
        op(torch.randn(2, 256), ids, **packed(Case(CLASSES[0], stack=(3,))))
