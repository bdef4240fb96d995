"""Rounding a float weight to codes: what each algorithm promises, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.weights import DTYPES, all_dtypes
from w4tensor import quantize
from w4tensor.errors import Unsupported
from w4tensor.quantize import ALGORITHMS, quantize_weight

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
