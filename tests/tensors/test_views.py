"""Operators that move or show a weight: the same operator on the dequantised one, bit for bit."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.weights import CLASSES, Case, all_dtypes, assert_same, both_classes, cases
from w4tensor import Int4ActQuantTensor
from w4tensor.errors import MisdispatchError, PackingError, Unsupported
from w4tensor.layout import check_multiple_values

MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def assert_stands_for(w, dense: Tensor) -> None:
    """`w` is an int4 weight and its values are `dense`."""
    assert isinstance(w, CLASSES) and w.shape == dense.shape
    assert torch.equal(w.dequantize(torch.float64), dense)


VIEWS_2D = {
    "narrow": lambda w: w.narrow(0, 3, 8),
    "narrow of K": lambda w: w.narrow(1, 128, 128),
    "negative dim": lambda w: w.narrow(-2, 0, 5),
    "slice": lambda w: w[4:20],
    "slice with a step": lambda w: w[1:20:3],
    "slice from the end": lambda w: w[-5:],
    "slice of nothing": lambda w: w[7:7],
    "slice of both": lambda w: w[2:9, 128:],
    "ellipsis": lambda w: w[..., :128],
    "whole K": lambda w: w[:, :],
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose negative": lambda w: w.transpose(-1, -2),
    "transpose of itself": lambda w: w.transpose(1, 1),
    "permute": lambda w: w.permute(1, 0),
    "twice transposed": lambda w: w.t().t(),
    "rows of the transposed": lambda w: w.t()[:, 3:7],
    "K of the transposed": lambda w: w.t()[128:],
    "view": lambda w: w.view(24, 256),
    "view with -1": lambda w: w.view(-1, 256),
    "view of the transposed": lambda w: w.t().view(256, 24),
    "unflatten": lambda w: w.view(3, 8, 256),
    "reshape": lambda w: w.reshape(2, -1, 256),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "None": lambda w: w[None],
    "unsqueeze of the transposed": lambda w: w.t().unsqueeze(0),
    "squeeze of nothing": lambda w: w.squeeze(),
    "squeeze(0) of nothing": lambda w: w.squeeze(0),
    "detach": lambda w: w.detach(),
    "alias": lambda w: torch.ops.aten.alias.default(w),
    "data": lambda w: w.data,
    "tensor_split": lambda w: w.tensor_split(5)[2],
}
COPIES_2D = {
    "index": lambda w: w[torch.tensor([5, 0, 5])],
    "index by a mask": lambda w: w[torch.arange(24) % 3 == 0],
    "index into two dimensions": lambda w: w[torch.tensor([[1, 2], [3, 4]])],
    "index by a list": lambda w: w[[3, 1]],
    "index_select": lambda w: w.index_select(0, torch.tensor([2, 2])),
    "cat": lambda w: torch.cat((w, w)),
    "cat of K": lambda w: torch.cat((w, w, w), dim=1),
    "cat of the transposed": lambda w: torch.cat((w.t(), w.t()), dim=1),
    "vstack": lambda w: torch.vstack((w, w)),
    "clone": lambda w: w.clone(),
    "clone of the transposed": lambda w: w.t().clone(),
    "contiguous": lambda w: w[1::2, 128:].contiguous(),
}
VIEWS_3D = {
    "select": lambda w: w[1],
    "select from the end": lambda w: w.select(0, -1),
    "select negative dim": lambda w: w.select(-3, 2),
    "select of the transposed": lambda w: w.mT[2],
    "select then slice": lambda w: w[1, 2:5],
    "select then K": lambda w: w[2, :, 128:],
    "select by a 0-d tensor": lambda w: w[torch.tensor(1)],
    "unbind": lambda w: w.unbind(0)[2],
    "iterate": lambda w: list(w)[1],
    "narrow of E": lambda w: w.narrow(0, 1, 2),
    "narrow of N": lambda w: w.narrow(1, 3, 8),
    "narrow of K": lambda w: w.narrow(2, 128, 128),
    "all three": lambda w: w[:2, 3:, 128:],
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-2, -1),
    "permute": lambda w: w.permute(0, 2, 1),
    "flatten": lambda w: w.flatten(0, 1),
    "view": lambda w: w.view(-1, 256),
    "same view": lambda w: w.view(3, 24, 256),
    "same view of the transposed": lambda w: w.mT.view(3, 256, 24),
    "regroup": lambda w: w.view(6, 12, 256),
    "squeeze": lambda w: w[:1].squeeze(0),
    "squeeze of all": lambda w: w[:1].squeeze(),
    "squeeze of the transposed": lambda w: w[:1].mT.squeeze(0),
    "squeeze then select": lambda w: w[1:2].squeeze(0)[None],
    "detach": lambda w: w.detach(),
}
COPIES_3D = {
    "index": lambda w: w[torch.tensor([2, 0, 0, 1])],
    "index of the transposed": lambda w: w.mT[torch.tensor([2, 0])],
    "index by a mask": lambda w: w[torch.tensor([True, False, True])],
    "index of N": lambda w: w[:, torch.tensor([4, 1])],
    "index of E and N": lambda w: w[torch.tensor([0, 1, 1]), torch.tensor([4, 1, 3])],
    "mask of E and N": lambda w: w[torch.arange(72).view(3, 24) % 5 == 0],
    "index_select": lambda w: w.index_select(1, torch.tensor([2, 2])),
    "index_select of the transposed": lambda w: w.mT.index_select(-1, torch.tensor([2, 2])),
    "cat": lambda w: torch.cat((w, w)),
    "cat of N": lambda w: torch.cat((w, w[:, :5]), dim=1),
    "cat of K": lambda w: torch.cat((w, w[..., :128]), dim=-1),
    "clone": lambda w: w.clone(),
}
ALL = [((), name, op) for name, op in (VIEWS_2D | COPIES_2D).items()]
ALL += [((3,), name, op) for name, op in (VIEWS_3D | COPIES_3D).items()]
VIEWS = [((), name, op) for name, op in VIEWS_2D.items() if "nothing" not in name]
VIEWS += [((3,), name, op) for name, op in VIEWS_3D.items()]


def _id(value) -> str | None:
    return value if isinstance(value, str) else f"{len(value) + 2}-D" if value in ((), (3,)) else ""


@in_every_mode
@both_classes
@pytest.mark.parametrize(("stack", "name", "op"), ALL, ids=_id)
def test_it_shows_what_the_dequantised_tensor_shows(cls, mode, stack, name, op):
    case = Case(cls, stack=stack, zero="fractional")
    with mode():
        assert_stands_for(op(case.weight()), op(case.dense()))


@both_classes
@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize(("stack", "name", "op"), ALL, ids=_id)
def test_it_works_in_inference_mode_on_a_weight_made_outside(cls, parameter, stack, name, op):
    case = Case(cls, stack=stack, zero="fractional")
    w = case.weight()
    w = nn.Parameter(w, requires_grad=False) if parameter else w
    with torch.inference_mode():
        assert_stands_for(op(w), op(case.dense()))


def storages(w) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in (w.qdata, w.scale, w.zero_point)]


@in_every_mode
@both_classes
@pytest.mark.parametrize(("stack", "name", "op"), VIEWS, ids=_id)
def test_views_share_memory_with_the_weight(cls, mode, stack, name, op):
    w = Case(cls, stack=stack, zero="fractional").weight()
    with mode():
        assert storages(op(w)) == storages(w)


@both_classes
@pytest.mark.parametrize(("stack", "name", "op"), VIEWS, ids=_id)
def test_what_is_written_through_a_view_is_seen_in_the_weight(cls, stack, name, op):
    case = Case(cls, stack=stack, zero="fractional")
    w, expected = case.weight(), case.dense()
    new = case.with_(seed=1)
    with torch.no_grad():
        op(w).copy_(op(new.weight()))
        op(expected).copy_(op(new.dense()))
    assert_stands_for(w, expected)


@both_classes
@pytest.mark.parametrize("op", [*COPIES_2D.values()], ids=COPIES_2D)
def test_copies_share_no_memory(cls, op):
    w = Case(cls, zero="fractional").weight()
    assert not set(storages(op(w))) & set(storages(w))


@both_classes
def test_contiguous_of_a_contiguous_weight_is_free(cls):
    w = Case(cls, zero="fractional").weight()
    assert storages(w.contiguous()) == storages(w)


# laws of slices


@given(cases(), st.data())
def test_rows_of_the_packed_are_the_packed_rows(case, data):
    start = data.draw(st.integers(0, case.n))
    stop = data.draw(st.integers(start, case.n))
    q, scale, zero_point = case.codes()
    rows = slice(start, stop)
    alone = case.cls.from_codes(
        q[..., rows, :],
        scale[..., rows, :],
        None if zero_point is None else zero_point[..., rows, :],
        group_size=case.group_size,
    )
    assert_same(case.weight().narrow(-2, start, stop - start), alone)


@given(cases(), st.booleans())
def test_a_cut_along_k_is_right_on_borders_and_refused_elsewhere(case, transposed):
    w, dense, dim = case.weight(), case.dense(), -1
    if transposed:
        w, dense, dim = w.mT, dense.mT, -2
    border = max(128, case.g)
    cuts = sorted({*range(0, case.k, 16), 1, case.k - 1, case.k} & {*range(case.k + 1)})
    for start, stop in itertools.combinations_with_replacement(cuts, 2):
        size = stop - start
        if start % border == 0 and (stop % border == 0 or stop == case.k) and size:
            assert_stands_for(w.narrow(dim, start, size), dense.narrow(dim, start, size))
        else:
            with pytest.raises(Unsupported, match="along K"):
                w.narrow(dim, start, size)


@given(cases(), st.data())
def test_split_chunk_and_cat_undo_each_other(case, data):
    w, dense = case.weight(), case.dense()
    dim = data.draw(st.sampled_from([-2, 0]))
    size = data.draw(st.integers(1, w.shape[dim]))
    for parts, expected in (
        (w.split(size, dim), dense.split(size, dim)),
        (w.chunk(size, dim), dense.chunk(size, dim)),
        (w.split([size, w.shape[dim] - size], dim), dense.split([size, w.shape[dim] - size], dim)),
    ):
        assert len(parts) == len(expected)
        for part, dense_part in zip(parts, expected, strict=True):
            assert_stands_for(part, dense_part)
        assert_same(torch.cat(parts, dim), w)


@given(cases(stacked=False), cases(stacked=False))
def test_cat_along_n_holds_for_any_two_of_a_kind(a, b):
    b = b.with_(cls=a.cls, dtype=a.dtype, k=a.k, group_size=a.group_size)
    whole = torch.cat((a.weight(), b.weight()))
    assert_stands_for(whole, torch.cat((a.dense(), b.dense())))


@both_classes
@pytest.mark.parametrize("group_size", [16, 64, 128, 256, -1])
def test_cat_along_k_needs_whole_blocks(cls, group_size):
    for k in (100, 128, 192, 256, 300, 384, 512):
        if group_size != -1 and k % group_size:
            continue
        case = Case(cls, k=k, group_size=group_size, zero="integer")
        w = case.weight()
        assert_stands_for(torch.cat((w,), 1), case.dense())
        # a row's one group stays one group only if its width is a legal group size
        if k % 128 == 0 and (group_size != -1 or k in (128, 256)):
            assert_stands_for(torch.cat((w, w), 1), torch.cat((case.dense(),) * 2, 1))
        else:
            with pytest.raises(Unsupported, match="along K"):
                torch.cat((w, w), 1)


@both_classes
def test_cat_of_weights_with_and_without_zero_points(cls):
    a, b = Case(cls), Case(cls, zero="fractional")
    assert_stands_for(torch.cat((a.weight(), b.weight())), torch.cat((a.dense(), b.dense())))
    wide = b.weight()
    wide.zero_point = wide.zero_point.float() + 2**-12
    whole = torch.cat((a.weight(), wide))
    assert whole.zero_point.dtype == torch.float32
    assert torch.equal(whole[24:].zero_point, wide.zero_point)


# refusals


@both_classes
@pytest.mark.parametrize("stack", [(), (3,)])
def test_operators_that_would_cut_codes_or_reorder_k_are_refused(cls, stack):
    w = Case(cls, n=256, k=256, stack=stack).weight()
    for op in (
        lambda w: w[..., 3],
        lambda w: w[..., torch.tensor([1, 2])],
        lambda w: w[..., ::2],
        lambda w: w.index_select(-1, torch.tensor([0])),
        lambda w: w.mT.index_select(-2, torch.tensor([0])),
        lambda w: w.flatten(),
        lambda w: w.view(-1),
        lambda w: w.view(-1, 128),
        lambda w: w.view(*w.shape[:-2], 512, 128),
        lambda w: w.mT.view(-1, 2, 256, 128),
        lambda w: w.view(torch.int32),
        lambda w: w.unsqueeze(-1),
        lambda w: w.unsqueeze(1),
        lambda w: w[..., None],
        lambda w: w.expand(2, *w.shape),
        lambda w: w.repeat(2, 1),
        lambda w: w.flip(0),
        lambda w: w.roll(1),
        lambda w: torch.stack((w, w)),
        lambda w: w.gather(0, torch.zeros(w.shape, dtype=torch.int64)),
        lambda w: w.masked_fill(torch.zeros(256, dtype=torch.bool), 0),
        lambda w: w[torch.zeros(w.shape, dtype=torch.bool)],
        lambda w: w.mT[torch.zeros(w.shape[:-1], dtype=torch.bool)],
    ):
        with pytest.raises((MisdispatchError, Unsupported)):
            op(w)


@both_classes
def test_a_mask_over_k_of_a_transposed_stack_is_refused(cls):
    """[E, N] and [E, K] masks have one shape where N = K: the bytes would fit, not the sense."""
    w = Case(cls, n=128, k=128, stack=(2,)).weight()
    mask = torch.rand(2, 128) > 0.5
    assert w[mask].shape == (int(mask.sum()), 128)
    with pytest.raises(MisdispatchError):
        w.mT[mask]


@both_classes
def test_stacks_cannot_be_transposed_with_their_rows(cls):
    w = Case(cls, stack=(3,)).weight()
    for op in (
        lambda: w.transpose(0, 1),
        lambda: w.transpose(0, 2),
        lambda: w.permute(1, 0, 2),
        lambda: w.T,
        lambda: w[:, 0],
        lambda: w[0, 0],
        lambda: w.select(1, 0),
        lambda: w.t(),
        lambda: w.mT.flatten(0, 1),
        lambda: w.mT.view(-1, 24),
        lambda: w[torch.tensor([[0]])],
    ):
        with pytest.raises((MisdispatchError, PackingError, RuntimeError, Unsupported)):
            op()


@both_classes
def test_dimensions_out_of_range_are_index_errors(cls):
    w = Case(cls, stack=(1,)).weight()
    for op in (
        lambda: w.select(3, 0),
        lambda: w.select(0, 1),
        lambda: w.transpose(0, 3),
        lambda: w.narrow(3, 0, 1),
        lambda: w.squeeze(5),
        lambda: w.index_select(0, torch.tensor([1])),
        lambda: w[torch.tensor([1])],
        lambda: torch.cat((w, w), 3),
    ):
        with pytest.raises(IndexError):
            op()
    with pytest.raises(IndexError):
        w[0].unsqueeze(4)


@both_classes
def test_cat_of_different_formats_is_refused(cls):
    case = Case(cls)
    w = case.weight()
    other = case.with_(cls=CLASSES[1 - CLASSES.index(cls)])
    strangers = [
        other.weight(),
        case.dense().float(),
        case.with_(group_size=128).weight(),
        case.with_(dtype=torch.float16).weight(),
        case.with_(stack=(2,)).weight(),
        w.t(),
    ]
    for stranger in strangers:
        for pair in ((w, stranger), (stranger, w)):
            with pytest.raises(MisdispatchError):
                torch.cat(pair)
    with pytest.raises((PackingError, RuntimeError)):
        torch.cat((w, case.with_(k=128).weight()))


# copies between devices and dtypes


@all_dtypes
@both_classes
@pytest.mark.parametrize("how", ["to", "short", "module", "type", "both"])
def test_a_dtype_is_honoured(cls, dtype, how):
    case = Case(cls, zero="fractional")
    w = case.weight()
    if how == "module":
        linear = nn.Linear(256, 24)
        linear.weight = nn.Parameter(w, requires_grad=False)
        moved = linear.to(dtype).weight
        assert isinstance(moved, nn.Parameter)
    else:
        short = {torch.bfloat16: w.bfloat16, torch.float16: w.half, torch.float32: w.float}
        moved = {
            "to": lambda: w.to(dtype),
            "short": short[dtype],
            "type": lambda: w.type(dtype),
            "both": lambda: w.to("cpu", dtype),
        }[how]()
    assert moved.dtype == moved.scale.dtype == dtype
    assert_stands_for(moved, case.dense())
    if dtype == w.dtype and how != "module":
        assert moved is w


@both_classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_no_scale_has_is_refused(cls, dtype):
    w = Case(cls).weight()
    with pytest.raises(Unsupported, match="cannot become"):
        w.to(dtype)


@both_classes
@pytest.mark.parametrize("stack", [(), (2,)])
def test_meta_keeps_everything_but_the_data(cls, stack):
    w = Case(cls, stack=stack, zero="integer").weight()
    for moved in (w.to("meta"), w.mT.to("meta").mT, w.to("meta", torch.float16)):
        assert moved.device.type == "meta" and moved.shape == w.shape
        assert {t.device.type for t in (moved.qdata, moved.scale, moved.zero_point)} == {"meta"}
        assert moved[..., :128].shape == (*stack, 24, 128)
        y = torch.randn(*stack, 3, 256, device="meta") @ moved.mT
        assert y.shape == (*stack, 3, 24) and y.device.type == "meta"
    assert w.to("meta", torch.float16).dtype == torch.float16
    assert w.cpu() is w and w.to("cpu") is w
    assert_same(w.to("cpu", copy=True), w)


@both_classes
def test_without_an_accelerator_nothing_is_pinned(cls):
    w = Case(cls).weight()
    assert w.is_pinned() is False


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinning needs an accelerator")
@both_classes
def test_pinned_memory(cls):
    w = Case(cls, zero="integer").weight()
    pinned = w.pin_memory()
    assert pinned.is_pinned() and all(
        t.is_pinned() for t in (pinned.qdata, pinned.scale, pinned.zero_point)
    )
    assert_same(pinned, w)


@both_classes
def test_shared_memory(cls):
    w = Case(cls, zero="integer").weight()
    assert not w.is_shared()
    assert w.share_memory_() is w and w.is_shared()
    assert w.qdata.is_shared() and w.scale.is_shared() and w.zero_point.is_shared()
    assert_stands_for(w, Case(cls, zero="integer").dense())
    linear = nn.Linear(256, 24)
    linear.weight = nn.Parameter(Case(cls).weight(), requires_grad=False)
    assert linear.share_memory().weight.is_shared()


# writing


@in_every_mode
@all_dtypes
@both_classes
def test_copy_overwrites_every_field(cls, dtype, mode):
    case = Case(cls, zero="fractional", dtype=dtype)
    source = case.with_(seed=1)
    outside = case.weight()
    with mode():
        for target in (outside, case.weight()):
            pointer = target.qdata.data_ptr()
            assert target.copy_(source.weight()) is target
            assert_same(target, source.weight())
            assert target.qdata.data_ptr() == pointer
            target[:4].copy_(case.weight()[:4])
            assert_same(target[:4], case.weight()[:4])


@both_classes
def test_a_symmetric_weight_copies_into_one_with_zero_points(cls):
    target, source = Case(cls, zero="fractional").weight(), Case(cls, seed=1)
    target.copy_(source.weight())
    assert_stands_for(target, source.dense())
    with pytest.raises(PackingError) as caught:
        source.weight().copy_(Case(cls, zero="fractional").weight())
    assert caught.value.field == "zero_point"


@both_classes
def test_copy_refuses_what_would_not_mean_the_same(cls):
    case = Case(cls)
    target = case.weight()
    before = target.clone()
    other = CLASSES[1 - CLASSES.index(cls)]
    for source in (
        case.dense().float(),
        case.with_(cls=other).weight(),
        case.with_(group_size=128).weight(),
        case.with_(n=23).weight(),
        case.with_(n=1).weight(),
        case.with_(k=320).weight(),
        case.weight().t(),
        torch.zeros(()),
    ):
        with pytest.raises((MisdispatchError, PackingError)):
            target.copy_(source)
    with pytest.raises(MisdispatchError):
        case.dense().float().copy_(target)
    assert_same(target, before)


@both_classes
@pytest.mark.parametrize("dim", [0, 1])
def test_loading_shard_by_shard_like_vllm(cls, dim):
    """param.data.narrow(...).copy_(a shard): the parameter must see it."""
    case = Case(cls, k=512, zero="integer")
    param = nn.Parameter(case.with_(seed=9).weight(), requires_grad=False)
    full = case.weight()
    size = full.shape[dim] // 2
    with torch.no_grad():
        for shard in range(2):
            part = full.narrow(dim, shard * size, size)
            param.data.narrow(dim, shard * size, size).copy_(part)
    assert_same(param.data, full)


@both_classes
def test_assigning_data_moves_every_field(cls):
    case, new = Case(cls), Case(cls, n=8, zero="integer", seed=1)
    param = nn.Parameter(case.weight(), requires_grad=False)
    param.data = new.weight()
    assert isinstance(param, nn.Parameter)
    assert_stands_for(param, new.dense())
    x = torch.ones(1, 256)
    assert torch.equal(nn.functional.linear(x, param).double(), x.double() @ new.dense().T)


@both_classes
def test_assigning_foreign_data_is_refused(cls):
    case = Case(cls)
    param = nn.Parameter(case.weight(), requires_grad=False)
    other = case.with_(cls=CLASSES[1 - CLASSES.index(cls)]).weight()
    for foreign in (case.dense().float(), other):
        with pytest.raises(MisdispatchError):
            param.data = foreign
    broken = case.weight()
    broken.qdata = other.qdata
    with pytest.raises(PackingError):
        param.data = broken
    assert_same(param.data, case.weight())


@both_classes
def test_set_item_copies_weights_and_refuses_numbers(cls):
    case = Case(cls, zero="integer")
    w = case.weight()
    w[4:8] = case.weight()[:4]
    expected = case.dense()
    expected[4:8] = case.dense()[:4]
    assert_stands_for(w, expected)
    for value in (0.0, torch.zeros(4, 256)):
        with pytest.raises(MisdispatchError):
            w[:4] = value
    assert_stands_for(w, expected)


# integer scales

INTEGER = Case(Int4ActQuantTensor)


def assert_multiples(w, expected: Tensor) -> None:
    """`w` has multiples, which are `expected` and those of its scales."""
    assert torch.equal(w.multiple, expected)
    check_multiple_values(w.multiple, w.scale)


@in_every_mode
@pytest.mark.parametrize(("stack", "name", "op"), ALL, ids=_id)
def test_multiples_go_where_their_scales_go(mode, stack, name, op):
    case = INTEGER.with_(stack=stack)
    with mode():
        w = op(case.integer_weight())
        assert_stands_for(w, op(case.dense()))
        if name == "cat of K":
            # rows have as many units as there are parts
            assert w.multiple is None
        else:
            # scales are multiples of an eighth
            assert_multiples(w, w.scale.mul(8).to(torch.int8))


@pytest.mark.parametrize(("stack", "name", "op"), VIEWS, ids=_id)
def test_what_is_written_through_a_view_takes_its_multiples_along(stack, name, op):
    case = INTEGER.with_(stack=stack)
    w, expected, new = case.integer_weight(), case.dense(), case.with_(seed=1)
    with torch.no_grad():
        assert op(w).multiple.untyped_storage().data_ptr() == w.multiple.data_ptr()
        op(w).copy_(op(new.integer_weight()))
        op(expected).copy_(op(new.dense()))
    assert_stands_for(w, expected)
    assert_multiples(w, w.scale.mul(8).to(torch.int8))


def integer_cases():
    return cases(cls=Int4ActQuantTensor).map(lambda case: case.with_(zero="symmetric"))


@given(integer_cases(), st.booleans())
def test_a_cut_along_k_cuts_multiples(case, transposed):
    w, dense, dim = case.integer_weight(), case.dense(), -1
    if transposed:
        w, dense, dim = w.mT, dense.mT, -2
    border = max(128, case.g)
    for start, stop in itertools.combinations(sorted({*range(0, case.k, border), case.k}), 2):
        part = w.narrow(dim, start, stop - start)
        assert_stands_for(part, dense.narrow(dim, start, stop - start))
        assert_multiples(part, case.multiple()[..., start // case.g : -(-stop // case.g)])


@given(integer_cases(), st.data())
def test_split_and_cat_of_rows_undo_each_other_with_multiples(case, data):
    w = case.integer_weight()
    dim = data.draw(st.sampled_from([-2, 0]))
    parts = w.split(data.draw(st.integers(1, w.shape[dim])), dim)
    assert_same(torch.cat(parts, dim), w)
    without = case.weight(act_group_size=-1)
    for mixed in ((*parts, without), (without, *parts)):
        whole = torch.cat(mixed, dim)
        assert whole.multiple is None and whole.shape[dim] == 2 * w.shape[dim]


def test_cat_along_k_has_no_unit_for_a_row():
    case = INTEGER
    w = case.integer_weight()
    for whole in (torch.cat((w, w), 1), torch.cat((w.t(), w.t()), 0).t()):
        assert whole.multiple is None
        assert_stands_for(whole, torch.cat((case.dense(), case.dense()), 1))


def test_cat_with_zero_points_drops_multiples():
    case = INTEGER.with_(zero="fractional")
    w, other = INTEGER.integer_weight(), case.weight(act_group_size=-1)
    whole = torch.cat((w, other))
    assert whole.multiple is None
    assert_stands_for(whole, torch.cat((INTEGER.dense(), case.dense())))


def test_copy_between_weights_with_and_without_multiples():
    new = INTEGER.with_(seed=1)
    target = INTEGER.integer_weight()
    pointer = target.multiple.data_ptr()
    target.copy_(new.integer_weight())
    assert_same(target, new.integer_weight())
    assert target.multiple.data_ptr() == pointer
    # a weight that says nothing of multiples may have any
    target = INTEGER.weight(act_group_size=-1)
    target.copy_(new.integer_weight())
    assert_same(target, new.weight(act_group_size=-1))
    # but its scales are no multiples
    target = INTEGER.integer_weight()
    with pytest.raises(PackingError) as caught:
        target.copy_(new.weight(act_group_size=-1))
    assert caught.value.field == "multiple"
    assert_same(target, INTEGER.integer_weight())


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_load_with_their_multiples(dim):
    case = INTEGER.with_(k=512)
    param = nn.Parameter(case.with_(seed=9).integer_weight(), requires_grad=False)
    full = case.integer_weight()
    size = full.shape[dim] // 2
    with torch.no_grad():
        for shard in range(2):
            part = full.narrow(dim, shard * size, size)
            param.data.narrow(dim, shard * size, size).copy_(part)
    assert_same(param.data, full)


def test_parts_of_rows_are_not_written_with_other_units():
    q, scale, _ = INTEGER.codes()
    whole = INTEGER.integer_weight()
    options = dict(group_size=64, multiple=INTEGER.multiple())
    other = Int4ActQuantTensor.from_codes(q, scale * 2, **options)
    target = INTEGER.integer_weight()
    with pytest.raises(PackingError, match="unit"):
        target[:, :128].copy_(other[:, :128])
    assert_same(target, whole)
    # as rows in full they may be others, and so may parts of the same units
    target[:5].copy_(other[:5])
    target[5:, :128].copy_(whole[5:, :128])
    assert_same(target, torch.cat((other[:5], whole[5:])))


def test_assigning_data_moves_multiples():
    param = nn.Parameter(INTEGER.weight(act_group_size=-1), requires_grad=False)
    for new in (INTEGER.integer_weight(), INTEGER.with_(seed=1).weight(act_group_size=-1)):
        param.data = new
        assert_same(param.data, new)


@all_dtypes
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
def test_multiples_stay_where_scales_stay_exact(dtype, to):
    """fp16 has a smaller range than the others."""
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = Int4ActQuantTensor.from_hp(weight, 64, integer_scales=True)
    moved = w.to(to)
    assert moved.dtype == to and torch.equal(moved.scale, w.scale.to(to))
    if to == torch.float16 and dtype != to:
        assert moved.multiple is None
    else:
        assert_multiples(moved, w.multiple)
        assert torch.equal(moved.dequantize(torch.float64), w.dequantize(torch.float64))


def test_units_that_bf16_would_round_lose_their_multiples():
    q, _, _ = INTEGER.codes()
    multiple = INTEGER.multiple()
    scale = multiple * (1 + 2.0**-16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=64, multiple=multiple)
    assert w.to(torch.bfloat16).multiple is None
    assert_multiples(w.to("cpu", copy=True), multiple)


def test_multiples_on_meta_and_in_shared_memory():
    w = INTEGER.integer_weight()
    moved = w.to("meta")
    assert moved.multiple.device.type == "meta" and moved[:, :128].multiple.shape == (24, 2)
    assert w.share_memory_() is w and w.multiple.is_shared()
