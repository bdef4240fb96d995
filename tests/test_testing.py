"""The shared test material: what random_codes, random_routing and the error measures promise."""

from __future__ import annotations

import math

import pytest
import torch

from w4tensor import reference
from w4tensor.testing import (
    DENSE_SHAPES,
    MOE_SHAPES,
    random_codes,
    random_routing,
    rel_err,
    sqnr_db,
)


@pytest.mark.parametrize("zero_point", ["symmetric", "integer", "fractional"])
def test_random_codes_give_products_of_unit_variance(zero_point):
    codes = random_codes(64, 1024, group_size=32, zero_point=zero_point)
    assert codes.group_size == 32 and codes.scale.dtype == torch.bfloat16
    y = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) @ codes.dequantize().mT
    assert 0.5 < y.std() < 2
    assert (codes.zero_point is None) == (zero_point == "symmetric")
    if zero_point == "fractional":
        assert (codes.zero_point != codes.zero_point.round()).any()


def test_random_codes_depend_on_the_seed_only():
    a, b, other = (random_codes(4, 128, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale)
    assert not torch.equal(a.q, other.q)
    assert a.q.unique().tolist() == list(range(16))


def test_dequantize_is_the_reference():
    codes = random_codes(2, 3, 64, group_size=16, zero_point="fractional")
    expected = reference.dequantize(codes.q, codes.scale, codes.zero_point)
    assert torch.equal(codes.dequantize(), expected)
    # half a byte a code, bf16 scales, fp16 zero points
    assert codes.nbytes == 2 * 3 * (32 + 4 * 2 + 4 * 2)


@pytest.mark.parametrize("zipf", [0.0, 1.2])
def test_a_token_chooses_different_experts(zipf):
    ids, weights = random_routing(500, experts=16, top_k=4, zipf=zipf)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(500))
    share = (ids == 0).any(-1).float().mean()
    assert share > 0.5 if zipf else share < 0.4


def test_rel_err_and_sqnr():
    expected = torch.tensor([3.0, 4.0])
    assert rel_err(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert sqnr_db(torch.tensor([3.0, 4.5]), expected) == pytest.approx(20)
    assert sqnr_db(expected, expected) == math.inf
    assert math.isnan(rel_err(torch.tensor([3.0, math.nan]), expected))


def test_shapes_are_within_the_domain():
    assert len({shape.name for shape in DENSE_SHAPES}) == len(DENSE_SHAPES)
    for shape in DENSE_SHAPES:
        assert shape.k % shape.group_size == 0, shape
    for shape in MOE_SHAPES:
        assert shape.hidden % shape.group_size == shape.inter % shape.group_size == 0, shape
