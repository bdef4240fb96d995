"""Constructors and conversions of both classes, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.weights import (
    CLASSES,
    DTYPES,
    Case,
    all_dtypes,
    assert_same,
    both_classes,
    cases,
    fields,
)
from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor
from w4tensor.errors import MisdispatchError, PackingError, Unsupported
from w4tensor.layout import LAYOUT_VERSION, SCALE_DTYPES
from w4tensor.quantize import ALGORITHMS, quantize_weight_by_multiples


@given(cases())
def test_to_codes_undoes_from_codes(case):
    given_codes = case.codes()
    for got, given_field in zip(case.weight().to_codes(), given_codes, strict=True):
        if given_field is None:
            assert got is None
        else:
            assert got.dtype == given_field.dtype and torch.equal(got, given_field)


@given(cases(), st.sampled_from([None, *DTYPES]))
def test_dequantize_is_the_formula_rounded_once(case, dtype):
    w = case.weight()
    dense = w.dequantize(dtype)
    assert type(dense) is torch.Tensor and dense.dtype == (dtype or case.dtype)
    assert torch.equal(dense, case.dense().float().to(dense.dtype))
    assert torch.equal(w.mT.dequantize(dtype), dense.mT)


@given(cases())
def test_a_packed_weight_looks_like_the_weight_it_stands_for(case):
    w = case.weight()
    assert w.shape == (*case.stack, case.n, case.k) and w.ndim == len(w.shape)
    assert w.dtype == case.dtype and w.device.type == "cpu" and not w.requires_grad
    assert w.numel() == case.dense().numel() and w.layout == torch.strided
    assert w.group_size == case.g and w.layout_version == LAYOUT_VERSION


@both_classes
@all_dtypes
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_from_hp_stays_near_the_weight(cls, dtype, algorithm, stack):
    weight = torch.randn(*stack, 40, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = cls.from_hp(weight, 64, algorithm)
    assert type(w) is cls and w.shape == weight.shape and w.dtype == dtype
    # 16 levels over the range of 64 Gaussians
    error = (w.dequantize().double() - weight.double()).norm() / weight.double().norm()
    assert 0.05 < error < 0.13


@both_classes
def test_defaults_are_groups_of_128_and_symmetric(cls):
    w = cls.from_hp(torch.randn(8, 256))
    assert w.group_size == 128 and w.zero_point is None
    if cls is Int4ActQuantTensor:
        assert w.act_group_size == 32


@both_classes
@pytest.mark.parametrize("shape", [(256,), (2, 2, 8, 256), ()])
def test_only_two_and_three_dimensions_pack(cls, shape):
    with pytest.raises(Unsupported):
        cls.from_hp(torch.ones(shape), 64)
    if shape:
        q = torch.ones(shape, dtype=torch.uint8)
        with pytest.raises((PackingError, Unsupported)):
            cls.from_codes(q, torch.ones(*shape[:-1], 4), group_size=64)


@both_classes
def test_unknown_fields_are_refused(cls):
    with pytest.raises(TypeError):
        cls.from_hp(torch.ones(4, 64), 64, block_size=[1, 64])
    with pytest.raises(Unsupported):
        Int4ActQuantTensor.from_hp(torch.ones(4, 64), 64, act_group_size=48)
    if cls is not Int4ActQuantTensor:
        with pytest.raises(TypeError):
            cls.from_hp(torch.ones(4, 64), 64, act_group_size=32)


# corrupt codes and fields


def codes(**changes):
    good = {
        "q": torch.zeros(4, 128, dtype=torch.uint8),
        "scale": torch.ones(4, 2),
        "zero_point": torch.ones(4, 2),
        "group_size": 64,
    }
    return good | changes


@both_classes
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("codes.dtype", {"q": torch.zeros(4, 128, dtype=torch.int8)}),
        ("codes.dtype", {"q": torch.zeros(4, 128, dtype=torch.int64)}),
        ("codes", {"q": torch.full((4, 128), 16, dtype=torch.uint8)}),
        ("scale.dtype", {"scale": torch.ones(4, 2, dtype=torch.float64)}),
        ("scale.dtype", {"scale": torch.ones(4, 2, dtype=torch.int8)}),
        ("scale.shape", {"scale": torch.ones(2, 4)}),
        ("scale.shape", {"scale": torch.ones(4, 1)}),
        ("scale.shape", {"scale": torch.ones(4, 3)}),
        ("scale.shape", {"scale": torch.ones(8)}),
        ("scale", {"scale": torch.tensor([[1.0, float("nan")]] * 4)}),
        ("scale", {"scale": torch.tensor([[1.0, float("inf")]] * 4)}),
        ("scale.device", {"scale": torch.ones(4, 2, device="meta")}),
        ("zero_point.dtype", {"zero_point": torch.ones(4, 2, dtype=torch.bfloat16)}),
        ("zero_point.dtype", {"zero_point": torch.ones(4, 2, dtype=torch.int8)}),
        ("zero_point.shape", {"zero_point": torch.ones(2, 4)}),
        ("zero_point", {"zero_point": torch.full((4, 2), float("nan"))}),
        ("zero_point.device", {"zero_point": torch.ones(4, 2, device="meta")}),
    ],
)
def test_corrupt_codes_are_refused(cls, field, changes):
    with pytest.raises(PackingError) as caught:
        cls.from_codes(**codes(**changes))
    assert caught.value.field == field
    assert str(caught.value.found) and str(caught.value.expected)


@both_classes
@pytest.mark.parametrize("zero", [-4.0, -0.25, 3.7, 15.0, 19.5, 1000.0])
def test_any_finite_zero_point_is_exact_to_rounding(cls, zero):
    """Negative, fractional and far outside 0..15: documented as legal."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (4, 128), dtype=torch.uint8, generator=rng)
    for dtype in (torch.float16, torch.float32):
        zero_point = torch.full((4, 2), zero, dtype=dtype)
        w = cls.from_codes(q, torch.ones(4, 2), zero_point, group_size=64)
        expected = q.double() - zero_point[0, 0].double()
        assert torch.allclose(w.dequantize().double(), expected, rtol=2**-23, atol=0)


@both_classes
def test_scales_and_zero_points_need_not_be_contiguous(cls):
    case = Case(cls, zero="fractional")
    q, scale, zero_point = case.codes()
    strided = [t.mT.contiguous().mT for t in (q, scale, zero_point)]
    assert not strided[1].is_contiguous()
    w = cls.from_codes(*strided, group_size=case.group_size)
    assert_same(w, case.weight())
    assert w.scale.is_contiguous() and w.zero_point.is_contiguous()


@both_classes
@pytest.mark.parametrize("value", [None, 3, "qdata", [1.0]])
@pytest.mark.parametrize("field", ["qdata", "scale", "zero_point"])
def test_a_field_that_is_no_tensor_is_refused(cls, field, value):
    if field == "zero_point" and value is None:
        return
    with pytest.raises(PackingError) as caught:
        cls(**(fields(Case(cls, zero="integer").weight()) | {field: value}))
    assert caught.value.field == field


@both_classes
@pytest.mark.parametrize("n", [1, 24])
def test_fields_of_strided_memory_are_read_right(cls, n):
    """As a cut along K leaves them: every other row, a block further in."""
    case = Case(cls, n=2 * n, k=256, zero="fractional")
    w = case.weight()
    block = w.qdata.shape[-1] // 2
    part = cls(
        **fields(w)
        | {
            "qdata": w.qdata[::2, block:],
            "scale": w.scale[::2, 2:],
            "zero_point": w.zero_point[::2, 2:],
        }
    )
    assert not part.qdata.is_contiguous() or n == 1
    assert torch.equal(part.dequantize(torch.float64), case.dense()[::2, 128:])
    x = torch.ones(1, 128)
    expected = x.double() @ case.dense()[::2, 128:].T
    assert torch.equal(torch.nn.functional.linear(x, part).double(), expected)


# integer scales

INTEGER = Case(Int4ActQuantTensor)


@given(cases(cls=Int4ActQuantTensor))
def test_multiples_change_nothing_that_a_weight_means(case):
    case = case.with_(zero="symmetric")
    w = case.integer_weight()
    assert w.act_group_size == -1 and torch.equal(w.multiple, case.multiple())
    assert torch.equal(w.dequantize(torch.float64), case.dense())
    for got, expected in zip(w.to_codes(), case.codes(), strict=True):
        assert got is expected or torch.equal(got, expected)


@all_dtypes
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_from_hp_with_integer_scales(dtype, group_size, stack):
    weight = torch.randn(*stack, 40, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = Int4ActQuantTensor.from_hp(weight, group_size, integer_scales=True)
    q, scale, multiple = quantize_weight_by_multiples(weight, group_size)
    fields = dict(act_group_size=-1, group_size=group_size, multiple=multiple)
    assert_same(w, Int4ActQuantTensor.from_codes(q, scale, **fields))
    assert w.zero_point is None and w.act_group_size == -1
    error = (w.dequantize().double() - weight.double()).norm() / weight.double().norm()
    assert 0.05 < error < 0.17


def test_integer_scales_are_symmetric_and_of_tokens():
    weight = torch.randn(8, 256)
    for algorithm in ("min_max", "hqq"):
        with pytest.raises(Unsupported, match="integer scales with algorithm"):
            Int4ActQuantTensor.from_hp(weight, 64, algorithm, integer_scales=True)
    for size in (32, 64, 128):
        with pytest.raises(PackingError, match=f"act_group_size={size}"):
            Int4ActQuantTensor.from_hp(weight, 64, integer_scales=True, act_group_size=size)
    for shape in ((256,), (2, 2, 8, 256)):
        with pytest.raises(Unsupported):
            Int4ActQuantTensor.from_hp(torch.ones(shape), 64, integer_scales=True)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("multiple.dtype", {"multiple": INTEGER.multiple().to(torch.uint8)}),
        ("multiple.dtype", {"multiple": INTEGER.multiple().float()}),
        ("multiple.shape", {"multiple": INTEGER.multiple()[:, :3]}),
        ("multiple.shape", {"multiple": INTEGER.multiple()[0]}),
        ("multiple.device", {"multiple": INTEGER.multiple().to("meta")}),
        ("multiple", {"zero_point": torch.full((24, 4), 8.0)}),
        ("multiple", {"act_group_size": 32}),
        ("multiple", {"multiple": torch.zeros(24, 4, dtype=torch.int8)}),
        ("multiple", {"multiple": torch.full((24, 4), 16, dtype=torch.int8)}),
        ("multiple", {"multiple": torch.full((24, 4), -128, dtype=torch.int8)}),
        ("scale", {"multiple": torch.ones(24, 4, dtype=torch.int8)}),
        ("scale", {"multiple": INTEGER.multiple().roll(1)}),
    ],
)
def test_corrupt_multiples_are_refused(field, changes):
    q, scale, _ = INTEGER.codes()
    good = dict(q=q, scale=scale, group_size=64, act_group_size=-1, multiple=INTEGER.multiple())
    assert_same(Int4ActQuantTensor.from_codes(**good), INTEGER.integer_weight())
    with pytest.raises(PackingError) as caught:
        Int4ActQuantTensor.from_codes(**(good | changes))
    assert caught.value.field == field
    assert str(caught.value.found) and str(caught.value.expected)


@pytest.mark.parametrize("value", [3, "qdata", [1.0], INTEGER.weight()])
def test_multiples_that_are_no_tensor_are_refused(value):
    with pytest.raises(PackingError) as caught:
        Int4ActQuantTensor(**(fields(INTEGER.integer_weight()) | {"multiple": value}))
    assert caught.value.field == "multiple"


def test_multiples_need_not_be_contiguous():
    q, scale, _ = INTEGER.codes()
    strided = INTEGER.multiple().mT.contiguous().mT
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=64, multiple=strided)
    assert_same(w, INTEGER.integer_weight())
    assert w.multiple.is_contiguous()


def test_multiples_assigned_from_outside_are_refused_where_they_are_read():
    x = torch.randn(3, 256)
    for name, value in (
        ("multiple", INTEGER.multiple().to(torch.uint8)),
        ("multiple", INTEGER.multiple()[:, :3]),
        ("multiple", INTEGER.multiple().to("meta")),
        ("act_group_size", 32),
        ("zero_point", torch.full((24, 4), 8.0)),
    ):
        w = INTEGER.integer_weight()
        setattr(w, name, value)
        for read in (
            lambda w=w: torch.nn.functional.linear(x, w),
            lambda w=w: w.dequantize(),
            lambda w=w: w[:8],
            lambda w=w: w.clone(),
            lambda w=w: w.to(torch.float16),
            lambda w=w: INTEGER.integer_weight().copy_(w),
            lambda w=w: copy.deepcopy(w).dequantize(),
        ):
            with torch.no_grad(), pytest.raises(PackingError):
                read()


def test_the_coalesced_class_has_no_multiples():
    case = INTEGER.with_(cls=CudaCoalescedInt4Tensor)
    assert case.weight().multiple is None
    with pytest.raises(TypeError):
        case.weight(multiple=case.multiple())
    with pytest.raises(TypeError):
        CudaCoalescedInt4Tensor.from_hp(torch.randn(8, 256), integer_scales=True)


# fields changed behind the tensor's back


def _broken(w, name: str):
    """`w` with one field that is not its own any more; no constructor runs."""
    other = Case(CLASSES[1 - CLASSES.index(type(w))], n=24).weight()
    changes = {
        "other class": ("qdata", other.qdata),
        "native int8": ("qdata", w.qdata.view(torch.int8)),
        "native int32": ("qdata", w.qdata.view(torch.int32)),
        "truncated": ("qdata", w.qdata[:, :-1]),
        "version": ("layout_version", LAYOUT_VERSION + 1),
        "group_size": ("group_size", 32),
        "scale transposed": ("scale", w.scale.t()),
        "scale int8": ("scale", w.scale.to(torch.int8)),
        "zero_point": ("zero_point", torch.zeros(4, 24)),
        "meta": ("scale", w.scale.to("meta")),
    }
    setattr(w, *changes[name])
    return w


BROKEN = (
    "other class,native int8,native int32,truncated,version,group_size,"
    "scale transposed,scale int8,zero_point,meta"
).split(",")


@both_classes
@pytest.mark.parametrize("how", BROKEN)
def test_fields_assigned_from_outside_are_refused_where_they_are_read(cls, how):
    w = _broken(Case(cls).weight(), how)
    x = torch.randn(3, 256)
    for read in (
        lambda: torch.nn.functional.linear(x, w),
        lambda: x @ w.t(),
        lambda: torch.randn(3, 24) @ w,
        lambda: w.dequantize(),
        lambda: w.to_codes(),
        lambda: w[:8],
        lambda: w.detach(),
        lambda: w.clone(),
        lambda: w.to(torch.float16),
        lambda: torch.cat((w, w)),
        lambda: torch.nn.functional.embedding(torch.tensor([1]), w),
        lambda: Case(cls).weight().copy_(w),
        lambda: w.copy_(Case(cls).weight()),
        lambda: copy.deepcopy(w).dequantize(),
    ):
        with torch.no_grad(), pytest.raises(PackingError) as caught:
            read()
        assert caught.value.field and str(caught.value.found) and str(caught.value.expected)


@both_classes
def test_rows_that_one_field_has_lost_are_not_read(cls):
    w = Case(cls).weight()
    w.qdata = w.qdata[:-1]
    for read in (lambda: torch.nn.functional.linear(torch.randn(3, 256), w), w.dequantize):
        with pytest.raises(PackingError) as caught:
            read()
        assert caught.value.field == "scale.shape"
    # the other rows are still whole
    assert torch.equal(w[:8].dequantize(torch.float64), Case(cls).dense()[:8])
    with pytest.raises(PackingError):
        w[16:]


@both_classes
def test_fields_that_agree_with_each_other_but_not_with_the_tensor_are_refused(cls):
    w = Case(cls, k=100, group_size=-1).weight()
    w.group_size = 101
    with pytest.raises(PackingError) as caught:
        w.dequantize()
    assert caught.value.field == "shape"
    w = Case(cls).weight()
    w.scale = w.scale.half()
    with pytest.raises(PackingError) as caught:
        w.dequantize()
    assert caught.value.field == "scale.dtype"


@both_classes
def test_a_scale_that_became_nan_gives_nan_and_never_a_number(cls):
    """Values are not read where weights are used: what comes out says so."""
    w = Case(cls).weight()
    w.scale[3, 1] = float("nan")
    y = torch.nn.functional.linear(torch.ones(2, 256), w)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()


# how it shows itself


@both_classes
def test_repr_is_short_and_says_what_it_is(cls):
    text = repr(torch.nn.Parameter(Case(cls, stack=(3,)).weight(), requires_grad=False))
    assert cls.__name__ in text and "(3, 24, 256)" in text and "group_size=64" in text
    assert len(text) < 250


@both_classes
def test_two_weights_are_never_compared_by_their_bytes(cls):
    w, v = Case(cls).weight(), Case(cls).weight()
    for compare in (
        lambda: w == v,
        lambda: w != v,
        lambda: w == 0,
        lambda: w < v,
        lambda: torch.equal(w, v),
        lambda: torch.allclose(w, v),
    ):
        with pytest.raises(MisdispatchError):
            compare()
    assert hash(w) == hash(w) and {w: 1}[w] == 1


@both_classes
def test_weights_of_one_kind_share_a_cache_key_and_others_do_not(cls):
    key = Case(cls).weight()._stable_hash_for_caching()
    assert key == Case(cls, seed=1).weight()._stable_hash_for_caching()
    others = [Case(cls, n=25), Case(cls, zero="integer"), Case(cls, group_size=128)]
    others += [Case(cls, dtype=torch.float16), Case(CLASSES[1 - CLASSES.index(cls)])]
    assert key not in {other.weight()._stable_hash_for_caching() for other in others}
    assert Case(cls).weight().t()._stable_hash_for_caching() != key


def test_scale_dtypes_are_those_that_a_weight_may_have():
    assert set(SCALE_DTYPES) == set(DTYPES)
