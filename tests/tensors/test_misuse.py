"""Our tensors in the wrong hands: nothing may read their bytes as something else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor

from tests.tensors.sweep import (
    NATIVE_KERNELS,
    overload_calls,
    pretend_native_kernels,
    torchao_classes,
)
from tests.weights import CLASSES, Case, assert_same, both_classes, cases
from w4tensor.errors import MisdispatchError, PackingError

aten = torch.ops.aten


def test_no_operator_reads_a_weight_as_something_else():
    """All of aten, of torch's functions, of torchao's handlers; see sweep.py."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.tensors.sweep"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = [line for line in run.stderr.splitlines() if line]
    assert run.returncode == 0, "\n".join(said[-40:])
    assert run.stdout == ""
    # that it asked at all: thousands of calls, and hundreds of them right
    assert len(said) > 10_000 and int(said[-1].split()[0]) > 500


# the routes by name

NATIVE = (
    "_weight_int4pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "_weight_int4pack_mm_with_scales_and_zeros",
    "_convert_weight_to_int4pack",
    "_convert_weight_to_int4pack_for_cpu",
    "_dyn_quant_matmul_4bit",
    "_dyn_quant_pack_4bit_weight",
    "_weight_int8pack_mm",
    "_mixed_dtypes_linear",
    "_int_mm",
    "_scaled_mm",
    "_cslt_sparse_mm",
)


@both_classes
@pytest.mark.parametrize("name", NATIVE)
def test_native_aten_kernels_refuse_the_tensor(cls, name):
    w = Case(cls, n=128, k=128).weight()
    packet = getattr(aten, name)
    for overload in packet.overloads():
        op = getattr(packet, overload)
        for args, kwargs in overload_calls(op, w, torch.randn(128, 128)):
            with pytest.raises(MisdispatchError, match=cls.__name__):
                op(*args, **kwargs)


@both_classes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_native_cpu_kernels_refuse_the_bytes(cls, dtype):
    """Even unwrapped: the dtype of qdata is none that they take."""
    w = Case(cls, n=128, k=128, dtype=dtype).weight()
    x = torch.randn(4, 128, dtype=dtype)
    both = torch.stack((w.scale, w.scale), -1).transpose(0, 1).contiguous()
    for qdata in (w.qdata, w.qdata[:, : 128 // 16]):
        for call in (
            lambda q: aten._weight_int4pack_mm_for_cpu(x, q, 64, both),
            lambda q: aten._weight_int4pack_mm(x, q, 64, both),
            lambda q: aten._weight_int8pack_mm(x, q, w.scale[:, 0]),
            lambda q: aten._dyn_quant_matmul_4bit(x, q, 64, 128, 128),
            lambda q: aten._int_mm(q, q.t()),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)):
                call(qdata)


@pytest.fixture(scope="module")
def native_kernels():
    """mslk's and fbgemm's operators, answering with numbers whatever they are given."""
    libraries = pretend_native_kernels()
    yield
    for library in libraries:
        library._destroy()


@both_classes
@pytest.mark.parametrize("name", NATIVE_KERNELS)
def test_mslk_and_fbgemm_refuse_the_tensor(cls, name, native_kernels):
    w = Case(cls, n=128, k=128).weight()
    for namespace in (torch.ops.mslk, torch.ops.fbgemm):
        op = getattr(namespace, name).default
        for args, kwargs in overload_calls(op, w, torch.randn(128, 128)):
            with pytest.raises(MisdispatchError):
                op(*args, **kwargs)


INT4_CLASSES = (
    "Int4Tensor",
    "Int4PreshuffledTensor",
    "Int4TilePackedTo4dTensor",
    "Int4PlainInt32Tensor",
)


@both_classes
@pytest.mark.parametrize("name", INT4_CLASSES)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_products_of_native_int4_classes_refuse_the_tensor(cls, name, stack, native_kernels):
    """Their own handlers, called past every dispatcher, with kernels that would answer."""
    (native,) = (c for c in torchao_classes() if c.__name__ == name)
    w = Case(cls, n=128, k=128, stack=stack, dtype=torch.bfloat16).weight()
    x = torch.randn(*stack, 4, 128, dtype=torch.bfloat16)
    asked = 0
    for table in (native._TORCH_FN_TABLE[native], native._ATEN_OP_TABLE[native]):
        for func in (F.linear, torch.bmm, aten.linear.default, aten.bmm.default):
            if func in table:
                with pytest.raises((MisdispatchError, AssertionError, NotImplementedError)):
                    table[func](func, (native,), (x, w), {})
                asked += 1
    assert asked >= 2


@both_classes
def test_fields_of_native_classes_are_not_there(cls):
    w = Case(cls).weight()
    for name in (
        "block_size,activation_dtype,scale_and_zero,act_pre_scale,group_scale,group_zero,row_scale"
    ).split(","):
        assert not hasattr(w, name)
        with pytest.raises(MisdispatchError, match=name):
            getattr(w, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = w.nothing


@both_classes
def test_it_is_an_instance_of_no_class_of_torchao_but_the_base(cls):
    w = Case(cls).weight()
    assert isinstance(w, TorchAOBaseTensor)
    classes = torchao_classes()
    assert len(classes) > 10
    assert not any(isinstance(w, native) for native in classes)
    other = CLASSES[1 - CLASSES.index(cls)]
    assert not isinstance(w, other) and not issubclass(cls, other)


# conversions


@both_classes
@pytest.mark.parametrize("stack", [(), (2,)])
def test_torchao_converts_nothing_of_ours(cls, stack):
    from torchao.prototype.tensor_conversion.api import (
        _convert_model_for_aarch64,
        convert_to_packed_tensor_based_on_current_hardware,
    )

    w = Case(cls, n=64, k=128, stack=stack, dtype=torch.bfloat16).weight()
    # it passes through what it does not know
    assert convert_to_packed_tensor_based_on_current_hardware(w) is w
    for convert in (
        Int4PreshuffledTensor.from_int4_tensor,
        lambda w: Int4Tensor.from_hp(w, [1] * len(stack) + [1, 64]),
        lambda w: IntxUnpackedToInt8Tensor.from_hp(w, (1, 64), torch.int4),
    ):
        with pytest.raises((MisdispatchError, AssertionError, ImportError)):
            convert(w)
    model = nn.Sequential(nn.Linear(128, 64), nn.Embedding(64, 128))
    for module in model:
        module.weight = nn.Parameter(w if not stack else w[0], requires_grad=False)
    converted = _convert_model_for_aarch64(model)
    assert all(isinstance(module.weight, cls) for module in converted)


@both_classes
@pytest.mark.parametrize(
    "config",
    [
        Int4WeightOnlyConfig(group_size=64),
        Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"),
        Int4WeightOnlyConfig(group_size=64, int4_packing_format="plain_int32"),
        Int8WeightOnlyConfig(),
        Int8DynamicActivationInt8WeightConfig(),
        Float8WeightOnlyConfig(),
        Float8DynamicActivationFloat8WeightConfig(),
        IntxWeightOnlyConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_torchao_does_not_quantise_a_weight_again(cls, config):
    case = Case(cls, n=64, k=128, dtype=torch.bfloat16)
    # hf.enable() decides which class a Linear's weight gets, and another test may have called it
    model, untouched = (nn.Sequential(nn.Linear(128, 64)) for _ in range(2))
    for linear in (model[0], untouched[0]):
        linear.weight = nn.Parameter(case.weight(), requires_grad=False)
    try:
        quantize_(model, config)
    except Exception:  # noqa: S110  (refusing is right, whatever the reason)
        pass
    assert isinstance(model[0].weight, cls)
    assert_same(model[0].weight.data, untouched[0].weight.data)


@given(cases(dtypes=(torch.bfloat16,)))
def test_no_shape_lets_a_native_product_take_our_tensor(case):
    """N = n_groups, N = K, N = 1 and odd sizes among them."""
    w = case.weight()
    x = torch.randn(*case.stack, 2, case.k, dtype=torch.bfloat16)
    for name in INT4_CLASSES:
        (native,) = (c for c in torchao_classes() if c.__name__ == name)
        for func in (F.linear, torch.bmm):
            handler = native._TORCH_FN_TABLE[native].get(func)
            if handler is not None:
                with pytest.raises(Exception):  # noqa: B017  (any refusal will do)
                    handler(func, (native,), (x, w), {})
    with pytest.raises(MisdispatchError):
        aten._weight_int4pack_mm(x, w, case.g, w)


# an operator we lack says what to do


@both_classes
def test_a_refusal_names_the_operator_the_class_and_the_way_out(cls):
    w = Case(cls).weight()
    for name, op in (
        ("aten.sum", lambda: w.sum()),
        ("aten.relu", lambda: torch.relu(w)),
        ("aten.equal", lambda: torch.equal(w, w)),
        ("aten.conv1d|aten.convolution", lambda: F.conv1d(torch.randn(1, 256, 8), w[..., None])),
        ("add", lambda: w + 1),
        ("mul", lambda: 2 * w),
        ("aten.zeros_like", lambda: torch.zeros_like(w)),
    ):
        with pytest.raises(MisdispatchError, match="dequantize") as caught:
            op()
        if "conv1d" not in name:
            assert name.removeprefix("aten.") in str(caught.value)
            assert cls.__name__ in str(caught.value)


@both_classes
def test_numbers_do_not_leak_through_python(cls):
    import numpy as np

    w = Case(cls, n=1, k=1, group_size=-1).weight()
    for op in (
        lambda: w.item(),
        lambda: float(w),
        lambda: int(w),
        lambda: bool(w),
        lambda: w.tolist(),
        lambda: w.numpy(),
        lambda: np.asarray(w),
        lambda: np.from_dlpack(w),
        lambda: torch.from_dlpack(w),
        lambda: list(w),
        lambda: w[0, 0],
        lambda: abs(w),
        lambda: -w,
        lambda: ~w,
        lambda: w << 1,
        lambda: w // 2,
        lambda: w % 2,
        lambda: 1.0 in w,
        lambda: torch.empty(1, 1).set_(w),
    ):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            op()


@both_classes
def test_in_place_arithmetic_is_refused_and_changes_nothing(cls):
    case = Case(cls, zero="integer")
    w = case.weight()

    def iadd(target):
        target += 1

    def imul(target):
        target *= 2

    for op in (
        iadd,
        imul,
        lambda w: w.zero_(),
        lambda w: w.fill_(0),
        lambda w: w.mul_(2),
        lambda w: w.add_(w),
        lambda w: w.clamp_(0),
        lambda w: w.normal_(),
        lambda w: nn.init.normal_(w),
        lambda w: w.t_(),
        lambda w: w.resize_(1),
        lambda w: w.set_(),
        lambda w: torch.zeros(24, 256).add_(w),
        lambda w: torch.zeros(24, 256).copy_(w),
    ):
        with pytest.raises(MisdispatchError):
            op(w)
    assert_same(w, case.weight())


@both_classes
def test_an_optimizer_cannot_step_on_a_weight(cls):
    case = Case(cls)
    param = nn.Parameter(case.weight(), requires_grad=True)
    param.grad = torch.ones(24, 256)
    with pytest.raises((MisdispatchError, RuntimeError)):
        torch.optim.SGD([param], lr=0.1).step()
    assert_same(param.data, case.weight())


# two classes of ours


@both_classes
@pytest.mark.parametrize("stack", [(), (2,)])
def test_each_class_refuses_the_others_fields(cls, stack):
    case = Case(cls, stack=stack)
    w = case.weight()
    other = case.with_(cls=CLASSES[1 - CLASSES.index(cls)]).weight()
    with pytest.raises(PackingError) as caught:
        w._with(qdata=other.qdata)
    assert caught.value.field == "qdata.dtype"
    with pytest.raises(MisdispatchError):
        w.copy_(other)
    with pytest.raises(MisdispatchError):
        torch.cat((w, other))
    with pytest.raises(MisdispatchError):
        torch.matmul(w, other.mT)
