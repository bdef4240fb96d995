"""Rounding a float weight to codes: what each algorithm promises, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.weights import DTYPES, all_dtypes
from w4tensor import quantize
from w4tensor.errors import Unsupported
from w4tensor.layout import check_multiple_values
from w4tensor.quantize import ALGORITHMS, quantize_weight, quantize_weight_by_multiples

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps_off(w, q, scale, zero_point):
    """|w - (q - z) s| in steps of its group, fp64 [.., N, G, g]; and the codes in that shape."""
    w = w.double().unflatten(-1, (scale.shape[-1], -1))
    q = q.double().unflatten(-1, (scale.shape[-1], -1))
    s = scale.double()[..., None]
    z = 8.0 if zero_point is None else zero_point.double()[..., None]
    return ((w - (q - z) * s) / s).abs(), q


@given(
    st.sampled_from(["symmetric", "min_max"]),
    st.sampled_from(DTYPES),
    st.sampled_from([16, 32, 64, 128, 256, -1]),
    st.integers(1, 5),
    st.integers(0, 2),
    st.floats(1e-3, 1e3),
    st.floats(-2.0, 2.0),
)
def test_no_weight_is_off_by_more_than_its_step(algorithm, dtype, group, n, e, size, shift):
    k = 100 if group == -1 else 2 * group
    w = ((gaussian(*[e] * (e > 0), n, k, seed=n) + shift) * size).to(dtype)
    q, scale, zero_point = quantize_weight(w, group, algorithm)
    assert q.dtype == torch.uint8 and q.shape == w.shape and int(q.max()) <= 15
    groups = 1 if group == -1 else k // group
    assert scale.dtype == dtype and scale.shape == (*w.shape[:-1], groups)
    off, q = steps_off(w, q, scale, zero_point)
    # half a step where the code is inside the range; at its ends the stored scale may fall short:
    # symmetric codes stop at +7, and a scale rounded to bf16 moves the ends by 15 / 512 of a step
    inside = (q > 0) & (q < 15)
    assert bool((off[inside] <= 0.5 + 1e-4).all())
    assert float(off.max()) <= (1.05 if algorithm == "symmetric" else 0.56)


def test_symmetric_uses_all_sixteen_codes_and_no_zero_point():
    w = torch.tensor([[-8.0 + i % 16 for i in range(32)], [8.0 - i % 16 for i in range(32)]])
    q, scale, zero_point = quantize_weight(w, 16, "symmetric")
    assert zero_point is None
    assert scale.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert torch.equal((q.float() - 8) * scale.repeat_interleave(16, 1), w)


def test_min_max_is_exact_where_the_weight_is_on_a_grid():
    w = torch.tensor([[float(i % 16 - 3) / 4 for i in range(32)]])
    q, scale, zero_point = quantize_weight(w, 16, "min_max")
    assert zero_point.dtype == torch.float16
    assert scale.tolist() == [[0.25, 0.25]] and zero_point.tolist() == [[3.0, 3.0]]
    assert torch.equal(q, (w * 4 + 3).to(torch.uint8))


@pytest.mark.parametrize("sign", [1, -1])
def test_min_max_holds_zero_even_if_all_weights_have_one_sign(sign):
    w = sign * torch.linspace(100, 101, 16)[None]
    q, scale, zero_point = quantize_weight(w, 16, "min_max")
    assert zero_point.item() == (0 if sign > 0 else 15)
    off, _ = steps_off(w, q, scale, zero_point)
    assert float(off.max()) <= 0.5


def test_hqq_stores_fractional_zero_points_and_beats_rounding():
    w = gaussian(64, 256) ** 3
    error = {}
    for algorithm in ALGORITHMS:
        q, scale, zero_point = quantize_weight(w, 64, algorithm)
        off, _ = steps_off(w, q, scale, zero_point)
        error[algorithm] = (off * scale.double()[..., None]).square().mean().item()
    assert zero_point.dtype == torch.float32
    assert bool((zero_point != zero_point.round()).any())
    assert error["hqq"] < error["min_max"]


@algorithms
@all_dtypes
def test_stacked_weights_are_quantised_row_by_row(algorithm, dtype):
    w = gaussian(3, 5, 128, dtype=dtype)
    stacked = quantize_weight(w, 64, algorithm)
    for e in range(3):
        for whole, one in zip(stacked, quantize_weight(w[e], 64, algorithm), strict=True):
            if algorithm == "hqq" and whole is not None:
                # its early stop looks at the mean error of all rows: close, not equal
                assert torch.allclose(whole[e].float(), one.float(), rtol=0.05, atol=1.0)
            else:
                assert (whole is None and one is None) or torch.equal(whole[e], one)


@pytest.mark.parametrize("algorithm", ["symmetric", "min_max"])
def test_rows_in_chunks_give_the_same(algorithm, monkeypatch):
    w = gaussian(13, 128)
    whole = quantize_weight(w, 32, algorithm)
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 300)
    for a, b in zip(whole, quantize_weight(w, 32, algorithm), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@algorithms
@all_dtypes
def test_a_group_of_zeros_stays_zero(algorithm, dtype):
    w = torch.zeros(2, 64, dtype=dtype)
    w[1, :32] = 1
    q, scale, zero_point = quantize_weight(w, 32, algorithm)
    assert bool(scale.isfinite().all()) and bool((scale != 0).all())
    z = 8.0 if zero_point is None else zero_point.double()[..., None]
    dense = (q.double().unflatten(-1, (2, 32)) - z) * scale.double()[..., None]
    assert float(dense[0].abs().max()) <= 1e-3 and float(dense[1, 1].abs().max()) <= 1e-3
    assert float((dense[1, 0] - 1).abs().max()) < 0.01


@algorithms
def test_meta_weights_become_meta_codes(algorithm):
    w = torch.empty(3, 5, 128, dtype=torch.bfloat16, device="meta")
    q, scale, zero_point = quantize_weight(w, 32, algorithm)
    real = quantize_weight(gaussian(3, 5, 128, dtype=torch.bfloat16), 32, algorithm)
    for a, b in zip((q, scale, zero_point), real, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype


@algorithms
def test_a_view_and_a_parameter_quantise_like_their_values(algorithm):
    w = gaussian(128, 6)
    expected = quantize_weight(w.t().contiguous(), 64, algorithm)
    for same in (w.t(), torch.nn.Parameter(w).t()):
        for a, b in zip(quantize_weight(same, 64, algorithm), expected, strict=True):
            assert (a is None and b is None) or (torch.equal(a, b) and not a.requires_grad)


@algorithms
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(algorithm, bad):
    w = gaussian(4, 64)
    w[2, 33] = bad
    with pytest.raises(Unsupported, match="Inf or NaN"):
        quantize_weight(w, 32, algorithm)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(128),
        torch.ones(4, 128, dtype=torch.float64),
        torch.ones(4, 128, dtype=torch.int8),
        torch.ones(4, 128, dtype=torch.complex64),
        torch.ones(4, 128).to(torch.float8_e4m3fn),
        torch.ones(4, 0),
    ],
    ids=lambda w: f"{w.dtype}-{tuple(w.shape)}",
)
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(Unsupported):
        quantize_weight(weight, -1)


def test_unknown_algorithms_and_groups_are_refused():
    w = gaussian(4, 96)
    with pytest.raises(Unsupported, match="algorithm='best'"):
        quantize_weight(w, 32, "best")
    with pytest.raises(Unsupported, match="K=96.*group_size=64.*group_size=32"):
        quantize_weight(w, 64)


# integer scales


def sparse_gaussian(rng: int, *shape: int, group: int) -> torch.Tensor:
    """Groups of any size, some of them of zeros, as are some rows."""
    w = gaussian(*shape, seed=rng).unflatten(-1, (-1, group))
    generator = torch.Generator().manual_seed(rng + 1)
    w *= torch.rand(*w.shape[:-1], 1, generator=generator).square()
    w *= torch.rand(*w.shape[:-1], 1, generator=generator) > 0.2
    w *= torch.rand(*w.shape[:-2], 1, 1, generator=generator) > 0.2
    return w.flatten(-2)


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([32, 128, -1]),
    st.integers(1, 5),
    st.integers(0, 2),
    st.integers(-30, 12),
    st.floats(-2.0, 2.0),
    st.integers(0, 99),
)
def test_scales_are_multiples_of_one_unit_a_row(dtype, group, n, e, exponent, shift, seed):
    """Down to numbers that fp16 hardly has."""
    k = 100 if group == -1 else 4 * group
    g = k if group == -1 else group
    w = sparse_gaussian(seed, *[e] * (e > 0), n, k, group=g)
    w = ((w + shift * (w != 0)) * 2.0**exponent).to(dtype)
    q, scale, multiple = quantize_weight_by_multiples(w, group)
    assert q.dtype == torch.uint8 and q.shape == w.shape and int(q.max()) <= 15
    assert scale.dtype == dtype and multiple.dtype == torch.int8
    assert scale.shape == multiple.shape == (*w.shape[:-1], k // g)
    # one unit a row, of so few bits that scales are the same in every dtype that has their range
    check_multiple_values(multiple, scale)
    unit = scale.double() / multiple
    assert bool((unit > 0).all()) and torch.equal(unit, unit[..., :1].expand_as(unit))
    assert torch.equal(scale.float().bfloat16().double(), scale.double())
    # a code's weight is as near as codes come, or beyond the last of them
    off, q = steps_off(w, q, scale, None)
    inside = (q > 0) & (q < 15)
    assert bool((off[inside] <= 0.5 + 1e-4).all())
    # a scale is no further than a unit from the group's own, where it has one of that size
    groups = w.double().unflatten(-1, (-1, g))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    own = (extreme.abs() / 8).maximum(unit)
    assert bool(((scale.double().abs() - own).abs() < unit * (1 + 1e-6)).all())
    # and makes the group's extreme negative, for which there is a code more
    assert bool((extreme * scale <= 0).all())


@given(st.sampled_from(["bf16", "fp32"]), st.integers(-100, 100), st.integers(0, 99))
def test_a_weight_times_a_power_of_two_has_the_same_codes_and_multiples(name, exponent, seed):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    w = gaussian(5, 256, dtype=dtype, seed=seed)
    w[:, ::7] *= 3
    q, scale, multiple = quantize_weight_by_multiples(w, 32)
    moved = quantize_weight_by_multiples(torch.ldexp(w, torch.tensor(exponent)).to(dtype), 32)
    assert torch.equal(moved[0], q) and torch.equal(moved[2], multiple)
    assert torch.equal(moved[1].double(), scale.double() * 2.0**exponent)


@all_dtypes
@pytest.mark.parametrize("group", [32, 128, -1])
def test_integer_scales_lose_nothing_on_gaussians(group, dtype):
    """0.97 to 0.99 of the error of "symmetric": of two scales the better one is taken."""
    w = gaussian(256, 2048 if group > 0 else 128, dtype=dtype)
    assert error_by_multiples(w, group) < 1.0


@all_dtypes
def test_integer_scales_lose_little_where_groups_differ(dtype):
    """1.04 with many outliers, which make units coarse; a group that is small in its row loses."""
    for w in (gaussian(256, 2048) ** 3, sparse_gaussian(0, 256, 2048, group=32)):
        assert error_by_multiples(w.to(dtype), 32) < 1.06


def error_by_multiples(w: torch.Tensor, group: int) -> float:
    """Of all weights, in the Frobenius norm, over that of "symmetric"."""
    errors = []
    for q, scale, _ in (quantize_weight_by_multiples(w, group), quantize_weight(w, group)):
        off, _ = steps_off(w, q, scale, None)
        errors.append(float((off * scale.double()[..., None]).norm()))
    return errors[0] / errors[1]


def test_a_grid_of_integer_scales_is_kept():
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 4)
    multiple = torch.tensor([[15, -3, 8, 1]], dtype=torch.int8)
    w = (codes.float() - 8) * multiple.repeat_interleave(16, 1) / 4
    q, scale, found = quantize_weight_by_multiples(w, 16)
    assert torch.equal(q, codes) and torch.equal(found, multiple)
    assert torch.equal(scale, multiple / 4)


@all_dtypes
def test_rows_and_groups_of_zeros_have_legal_multiples(dtype):
    w = torch.zeros(3, 128, dtype=dtype)
    w[1, :32], w[2, 64:96] = 1, -3
    q, scale, multiple = quantize_weight_by_multiples(w, 32)
    check_multiple_values(multiple, scale)
    dense = (q.double().unflatten(-1, (4, 32)) - 8) * scale.double()[..., None]
    assert not dense.flatten(-2)[w == 0].any() and bool((q[w == 0] == 8).all())
    assert float((dense.flatten(-2) - w.double()).abs().max()) < 0.05


def test_the_least_weights_of_fp16_keep_their_multiples():
    """They are few times the least number that there is, 2**-24."""
    w = (gaussian(64, 256) * 2.0**-20).half()
    q, scale, multiple = quantize_weight_by_multiples(w, 32)
    check_multiple_values(multiple, scale)
    off, _ = steps_off(w, q, scale, None)
    assert float(scale.abs().min()) == 2.0**-21 and float(off.max()) < 1


def test_multiples_of_rows_in_chunks_stacks_views_and_parameters(monkeypatch):
    w = gaussian(3, 5, 128)
    whole = quantize_weight_by_multiples(w, 32)
    views = [w, torch.nn.Parameter(w), w.mT.contiguous().mT]
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 300)
    for view in views:
        for a, b in zip(quantize_weight_by_multiples(view, 32), whole, strict=True):
            assert torch.equal(a, b) and not a.requires_grad
    for e in range(3):
        for a, b in zip(quantize_weight_by_multiples(w[e], 32), whole, strict=True):
            assert torch.equal(a, b[e])


def test_meta_weights_have_meta_multiples():
    w = torch.empty(3, 5, 128, dtype=torch.bfloat16, device="meta")
    real = quantize_weight_by_multiples(gaussian(3, 5, 128, dtype=torch.bfloat16), 32)
    for a, b in zip(quantize_weight_by_multiples(w, 32), real, strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@all_dtypes
def test_no_multiples_of_what_is_not_finite(dtype, bad):
    w = gaussian(4, 64, dtype=dtype)
    w[2, 33] = bad
    with pytest.raises(Unsupported, match="Inf or NaN"):
        quantize_weight_by_multiples(w, 32)


def test_no_multiples_of_what_is_no_weight():
    for weight in (torch.ones(128), torch.ones(4, 128, dtype=torch.float64), torch.ones(4, 0)):
        with pytest.raises(Unsupported):
            quantize_weight_by_multiples(weight, -1)
    with pytest.raises(Unsupported, match="K=96.*group_size=64"):
        quantize_weight_by_multiples(gaussian(4, 96), 64)
