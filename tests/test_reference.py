"""The oracle itself, against numpy that reads the formulas anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.weights import DTYPES, assert_close, cases, exact_x
from w4tensor import reference
from w4tensor.testing import ACT_QUANT_SQNR_DB, sqnr_db


def round_activations(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and fp32 scales, element by element."""
    rows, k = x.shape
    group = k if group == -1 else group
    codes = np.zeros((rows, k), np.int8)
    scales = np.zeros((rows, -(-k // group)), np.float32)
    for row in range(rows):
        for g, start in enumerate(range(0, k, group)):
            values = x[row, start : start + group].astype(np.float32)
            scales[row, g] = np.abs(values).max() / np.float32(127)
            if scales[row, g]:
                codes[row, start : start + group] = np.rint(values / scales[row, g])
    return codes, scales


@given(cases())
def test_dequantize_is_the_formula(case):
    q, scale, zero_point = case.codes()
    assert torch.equal(reference.dequantize(q, scale, zero_point).double(), case.dense())


@given(cases(stacked=False), st.integers(0, 5))
def test_linear_is_a_product_with_the_transpose(case, m):
    x = exact_x(m, case.k)
    bias = torch.arange(case.n).float()
    w = reference.dequantize(*case.codes())
    y = reference.linear(x, w, bias)
    assert torch.equal(y.double(), x.double() @ case.dense().T + bias.double())


@given(st.sampled_from(DTYPES), st.sampled_from([32, 64, 128, -1]), st.integers(1, 300))
def test_activations_round_as_defined(dtype, group, k):
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    q, scale = reference.quantize_activation(x, group)
    expected_q, expected_scale = round_activations(x.float().numpy(), group)
    assert q.dtype == torch.int8 and q.is_contiguous() and scale.dtype == torch.float32
    assert np.array_equal(q.numpy(), expected_q)
    assert np.array_equal(scale.numpy(), expected_scale)


def test_ties_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = reference.quantize_activation(x, -1)
    assert scale.item() == 1 and q.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("group", [32, -1])
def test_a_group_of_zeros_has_scale_zero(group):
    q, scale = reference.quantize_activation(torch.zeros(2, 64), group)
    assert not q.any() and not scale.any()


def test_subnormal_activations_stay_within_127():
    x = torch.full((1, 32), 1e-43)
    x[0, 0] = 1.9e-43
    q, scale = reference.quantize_activation(x, 32)
    assert scale.item() > 0 and int(q.abs().max()) <= 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", [32, -1])
def test_a_group_that_is_not_finite_spoils_its_token_and_no_other(bad, group):
    clean = torch.randn(3, 64)
    x = clean.clone()
    x[1, 40] = bad
    q, scale = reference.quantize_activation(x, group)
    expected_q, expected_scale = reference.quantize_activation(clean, group)
    spoilt = slice(32, 64) if group == 32 else slice(0, 64)
    assert scale[1, -1].isnan() and not q[1, spoilt].any()
    scale[1, -1], expected_scale[1, -1], expected_q[1, spoilt] = 0, 0, 0
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    y = reference.act_quant_linear(x, codes, torch.ones(5, 1), None, group)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@given(cases(stacked=False), st.sampled_from([32, 64, 128, -1]), st.sampled_from(DTYPES))
def test_act_quant_linear_is_the_product_of_the_rounded(case, group, dtype):
    x = torch.randn(4, case.k, generator=torch.Generator().manual_seed(case.seed)).to(dtype)
    codes, scales = round_activations(x.float().numpy(), group)
    each = np.arange(case.k) // (case.k if group == -1 else group)
    x_hat = codes.astype(np.float64) * scales[:, each].astype(np.float64)
    expected = torch.from_numpy(x_hat) @ case.dense().T
    y = reference.act_quant_linear(x, *case.codes(), group)
    assert_close(y, expected, dtype, size=torch.from_numpy(np.abs(x_hat)) @ case.dense().abs().T)


def test_int8_activations_keep_38_decibels():
    w = torch.randn(256, 1024)
    x = torch.randn(64, 1024)
    q = torch.randint(0, 16, (256, 1024), dtype=torch.uint8)
    scale = torch.rand(256, 8) + 0.5
    w = reference.dequantize(q, scale, None)
    y, expected = reference.act_quant_linear(x, q, scale, None, 32), x.double() @ w.double().T
    assert sqnr_db(y, expected) >= ACT_QUANT_SQNR_DB[32]
