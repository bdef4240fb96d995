"""Saving, loading, copying and faking weights; and bytes that come in where no `__init__` runs."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.weights import CLASSES, Case, assert_same, both_classes, cases, exact_x, fields
from w4tensor import Int4ActQuantTensor
from w4tensor.errors import MisdispatchError, PackingError
from w4tensor.layout import LAYOUT_VERSION, check_multiple_values


def save_and_load(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "old pickle": lambda w: pickle.loads(pickle.dumps(w, protocol=2)),
    "torch.save": save_and_load,
    "unflatten": lambda w: type(w).__tensor_unflatten__(
        {name: getattr(w, name) for name in w.__tensor_flatten__()[0]},
        w.__tensor_flatten__()[1],
        w.shape,
        w.stride(),
    ),
}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@given(cases(), st.sampled_from([*COPIES.values()]), st.booleans())
def test_a_copy_has_the_same_bits(case, copied, transposed):
    act = {"act_group_size": 64} if case.cls is Int4ActQuantTensor else {}
    w = case.weight(**act)
    w = w.mT if transposed else w
    assert_same(copied(w), w)
    x = exact_x(*case.stack, 2, w.shape[-2])
    assert torch.equal(x @ copied(w), x @ w)


@both_classes
@copies
def test_a_parameter_stays_a_parameter(cls, copied):
    param = nn.Parameter(Case(cls, zero="integer").weight(), requires_grad=False)
    again = copied(param)
    if copied is not COPIES["unflatten"]:
        assert isinstance(again, nn.Parameter) and not again.requires_grad
    assert_same(again, param)


@both_classes
def test_deepcopy_shares_nothing_and_keeps_ties(cls):
    linear = nn.Linear(256, 24)
    linear.weight = nn.Parameter(Case(cls, zero="integer").weight(), requires_grad=False)
    model = nn.ModuleDict({"a": linear, "b": nn.Linear(256, 24)})
    model["b"].weight = linear.weight
    twin = copy.deepcopy(model)
    assert twin["a"].weight is twin["b"].weight
    assert twin["a"].weight.qdata.data_ptr() != linear.weight.qdata.data_ptr()
    assert_same(twin["a"].weight, linear.weight)


@both_classes
def test_a_slice_saves_only_its_own_rows(cls):
    w = Case(cls, n=256, k=1024, group_size=128).weight()
    file = io.BytesIO()
    torch.save(w[:4].clone(), file)
    assert len(file.getvalue()) < w.qdata.nbytes // 8


def model_of(case: Case) -> nn.Module:
    model = nn.Sequential(nn.Linear(case.k, case.n), nn.LayerNorm(case.n))
    model[0].weight = nn.Parameter(case.weight(), requires_grad=False)
    return model


@both_classes
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_state_dict_goes_into_a_quantised_model(cls, assign, through_file):
    source = model_of(Case(cls, zero="integer"))
    target = model_of(Case(cls, zero="integer", seed=1))
    state = source.state_dict()
    state = save_and_load(state) if through_file else state
    before = target[0].weight
    assert target.load_state_dict(state, assign=assign).missing_keys == []
    assert_same(target[0].weight, source[0].weight)
    assert isinstance(target[0].weight, nn.Parameter)
    assert (target[0].weight is before) is not assign
    x = torch.randn(3, 256)
    assert torch.equal(target(x), source(x))


@both_classes
def test_a_quantised_state_dict_is_assigned_to_a_plain_model(cls):
    source = model_of(Case(cls))
    target = nn.Sequential(nn.Linear(256, 24), nn.LayerNorm(24))
    with pytest.raises(RuntimeError, match="int4|dequantise"):
        target.load_state_dict(source.state_dict())
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same(target[0].weight, source[0].weight)


@both_classes
def test_a_plain_state_dict_does_not_go_into_a_quantised_model(cls):
    target = model_of(Case(cls))
    before = target[0].weight.clone()
    plain = nn.Sequential(nn.Linear(256, 24), nn.LayerNorm(24)).state_dict()
    with pytest.raises(RuntimeError, match="copy_ of a Tensor"):
        target.load_state_dict(plain)
    assert_same(target[0].weight, before)


@both_classes
def test_the_other_class_does_not_load_by_copy(cls):
    other = model_of(Case(CLASSES[1 - CLASSES.index(cls)]))
    with pytest.raises(RuntimeError, match="copy_ of a"):
        model_of(Case(cls)).load_state_dict(other.state_dict())


@both_classes
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_model_on_meta_takes_its_weights_later(cls, how):
    source = model_of(Case(cls, zero="integer"))
    skeleton = copy.deepcopy(source).to("meta")
    assert skeleton[0].weight.device.type == "meta"
    assert isinstance(skeleton[0].weight, cls)
    assert skeleton(torch.randn(3, 256, device="meta")).shape == (3, 24)
    if how == "to_empty":
        with pytest.raises(MisdispatchError):
            skeleton.to_empty(device="cpu")
        return
    skeleton.load_state_dict(source.state_dict(), assign=True)
    assert_same(skeleton[0].weight, source[0].weight)


@both_classes
@pytest.mark.parametrize("algorithm", ["symmetric", "min_max", "hqq"])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_quantising_on_meta_makes_a_skeleton(cls, algorithm, stack):
    weight = torch.randn(*stack, 24, 256)
    meta = cls.from_hp(weight.to("meta"), 64, algorithm)
    real = cls.from_hp(weight, 64, algorithm)
    for name, value in fields(real).items():
        if isinstance(value, torch.Tensor):
            assert getattr(meta, name).shape == value.shape
            assert getattr(meta, name).dtype == value.dtype
            assert getattr(meta, name).device.type == "meta"
        else:
            assert getattr(meta, name) == value


@both_classes
@pytest.mark.parametrize("stack", [(), (2,)])
def test_fake_tensors_stand_in_for_weights(cls, stack):
    w = Case(cls, stack=stack, zero="integer").weight()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(w)
        assert type(fake) is cls and isinstance(fake.qdata, FakeTensor)
        x = mode.from_tensor(torch.randn(*stack, 3, 256))
        for y in (x @ fake.mT, x @ fake.clone().mT, x @ fake[..., :8, :].mT):
            assert isinstance(y, FakeTensor) and y.shape[:-1] == (*stack, 3)
        assert isinstance(fake.dequantize(), FakeTensor)


@both_classes
@pytest.mark.parametrize("algorithm", ["symmetric", "min_max", "hqq"])
def test_quantising_under_fake_tensors(cls, algorithm):
    with FakeTensorMode():
        w = cls.from_hp(torch.randn(24, 256), 64, algorithm)
        assert isinstance(w.qdata, FakeTensor) and w.shape == (24, 256)
        q, scale, zero_point = w.to_codes()
        assert cls.from_codes(q, scale, zero_point, group_size=64).shape == (24, 256)


@both_classes
def test_swap_tensors_exchanges_everything(cls):
    a, b = Case(cls), Case(cls, n=8, seed=1)
    first = nn.Parameter(a.weight(), requires_grad=False)
    second = nn.Parameter(b.weight(), requires_grad=False)
    torch.utils.swap_tensors(first, second)
    assert_same(first, nn.Parameter(b.weight(), requires_grad=False))
    assert_same(second, nn.Parameter(a.weight(), requires_grad=False))


# bytes that no constructor has seen


def smuggle(w, **changes):
    """`w` with fields replaced, and then pickled as it is."""
    for name, value in changes.items():
        setattr(w, name, value)
    return w


FOREIGN = {
    "the other class": lambda w, other: smuggle(w, qdata=other.qdata),
    "another version": lambda w, other: smuggle(w, layout_version=LAYOUT_VERSION + 1),
    "no version": lambda w, other: smuggle(w, layout_version=0),
    "int8": lambda w, other: smuggle(w, qdata=w.qdata.view(torch.int8)),
    "ExecuTorch": lambda w, other: smuggle(
        w, qdata=w.qdata.view(torch.uint8), scale=w.scale.mT.contiguous()
    ),
}
foreign = pytest.mark.parametrize("how", FOREIGN.values(), ids=FOREIGN)


@both_classes
@foreign
@pytest.mark.parametrize("stack", [(), (2,)])
@copies
def test_foreign_bytes_in_a_copy_are_refused_where_they_are_used(cls, how, stack, copied):
    other = Case(CLASSES[1 - CLASSES.index(cls)], stack=stack).weight()
    w = how(Case(cls, stack=stack).weight(), other)
    x = torch.randn(*stack, 3, 256)
    with pytest.raises(PackingError) as caught:
        w = copied(w)
        x @ w.mT
    assert caught.value.field in ("qdata.dtype", "layout_version")


@both_classes
@foreign
@pytest.mark.parametrize("assign", [False, True])
def test_foreign_bytes_in_a_state_dict_are_refused(cls, how, assign):
    source = model_of(Case(cls))
    how(source[0].weight, Case(CLASSES[1 - CLASSES.index(cls)]).weight())
    file = io.BytesIO()
    torch.save(OrderedDict((k, v) for k, v in source.named_parameters()), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    target = model_of(Case(cls))
    if assign:
        with pytest.raises(PackingError):
            target.load_state_dict(state, assign=True)
            target(torch.randn(3, 256))
    else:
        before = target[0].weight.clone()
        with pytest.raises(RuntimeError, match="layout_version|qdata"):
            target.load_state_dict(state)
        assert_same(target[0].weight, before)


@both_classes
def test_a_pickle_that_lacks_a_field_says_which(cls):
    w = Case(cls).weight()
    del w.__dict__["group_size"]
    again = pickle.loads(pickle.dumps(w))
    with pytest.raises(AttributeError, match="group_size"):
        F.linear(torch.randn(3, 256), again)


@both_classes
def test_a_pickle_from_before_an_optional_field_reads_it_as_none(cls):
    w = Case(cls).weight()
    del w.__dict__["zero_point"], w.__dict__["transposed"]
    again = pickle.loads(pickle.dumps(w))
    x = exact_x(3, 256)
    assert torch.equal(F.linear(x, again).double(), x.double() @ Case(cls).dense().T)


# integer scales

INTEGER = Case(Int4ActQuantTensor)


@copies
@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_has_the_same_multiples(copied, stack, transposed):
    case = INTEGER.with_(stack=stack)
    w, dense = case.integer_weight(), case.dense()
    w, dense = (w.mT, dense.mT) if transposed else (w, dense)
    again = copied(w)
    assert_same(again, w)
    assert torch.equal(again.multiple, case.multiple())
    check_multiple_values(again.multiple, again.scale)
    assert torch.equal(again.dequantize(torch.float64), dense)


def integer_model(seed: int = 0) -> nn.Module:
    model = model_of(INTEGER)
    weight = INTEGER.with_(seed=seed).integer_weight()
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_state_dict_with_multiples(assign, through_file):
    source, target = integer_model(), integer_model(seed=1)
    state = source.state_dict()
    state = save_and_load(state) if through_file else state
    target.load_state_dict(state, assign=assign)
    assert_same(target[0].weight, source[0].weight)
    assert target[0].weight.multiple is not None
    x = torch.randn(3, 256)
    assert torch.equal(target(x), source(x))


def test_a_state_dict_without_multiples_is_only_assigned():
    target, source = integer_model(), model_of(INTEGER)
    plain = INTEGER.weight(act_group_size=-1)
    source[0].weight = nn.Parameter(plain, requires_grad=False)
    with pytest.raises(RuntimeError, match="multiple"):
        target.load_state_dict(source.state_dict())
    assert_same(target[0].weight.data, INTEGER.integer_weight())
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same(target[0].weight.data, plain)


def test_a_pickle_from_before_multiples_has_none():
    w = INTEGER.weight(act_group_size=-1)
    del w.__dict__["multiple"]
    again = pickle.loads(pickle.dumps(w))
    assert again.multiple is None
    assert_same(again[:8], INTEGER.weight(act_group_size=-1)[:8])
    x = torch.randn(3, 256)
    assert torch.equal(F.linear(x, again), F.linear(x, INTEGER.integer_weight()))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_multiples_of_a_skeleton_and_of_fakes(stack):
    weight = torch.randn(*stack, 24, 256)
    real = Int4ActQuantTensor.from_hp(weight, 64, integer_scales=True)
    meta = Int4ActQuantTensor.from_hp(weight.to("meta"), 64, integer_scales=True)
    assert meta.multiple.shape == real.multiple.shape and meta.multiple.dtype == torch.int8
    assert meta.multiple.device.type == "meta"
    with FakeTensorMode() as mode:
        assert isinstance(mode.from_tensor(real).multiple, FakeTensor)
        fake = Int4ActQuantTensor.from_hp(torch.randn(*stack, 24, 256), 64, integer_scales=True)
        assert isinstance(fake.multiple, FakeTensor)
