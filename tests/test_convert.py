"""torchao's int4 tensors become ours, the same weights; what only looks like them is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization import (
    Int4Tensor,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerRow

from tests.weights import CLASSES, DTYPES, all_dtypes, both_classes
from w4tensor.errors import PackingError, Unsupported


def torchao_int4(
    n: int,
    k: int,
    group_size: int,
    stack: tuple[int, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **changes,
) -> tuple[Int4Tensor, torch.Tensor]:
    """An Int4Tensor as torchao fills it, and its fp64 values by torchao's formula q * s + z."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (*stack, n, k), generator=rng, dtype=torch.int8)
    # even k in the low nibble, two's complement
    qdata = (q[..., ::2] & 15) | (q[..., 1::2] << 4)
    scale = (torch.rand(*stack, n, k // group_size, generator=rng) / 64 + 1 / 64).to(dtype)
    zero = (torch.randn(*stack, n, k // group_size, generator=rng) / 16).to(dtype)
    each = torch.arange(k) // group_size
    dense = q.double() * scale.double()[..., each] + zero.double()[..., each]
    given_fields = {
        "qdata": qdata,
        "scale": scale.mT.contiguous(),
        "zero_point": zero.mT.contiguous(),
        "block_size": [1] * len(stack) + [1, group_size],
        "shape": torch.Size((*stack, n, k)),
    }
    return Int4Tensor(**(given_fields | changes)), dense


def steps(w, dense: torch.Tensor, group_size: int) -> float:
    """The largest error, in steps of its group."""
    each = torch.arange(w.shape[-1]) // group_size
    error = w.dequantize(torch.float32).double() - dense
    return float((error / w.scale.double()[..., each]).abs().max())


@given(
    st.sampled_from(CLASSES),
    st.integers(1, 20),
    st.sampled_from([32, 64, 128, 256]),
    st.integers(1, 3),
    st.sampled_from([(), (1,), (3,)]),
    st.sampled_from(DTYPES),
)
def test_an_int4tensor_keeps_its_values(cls, n, group_size, groups, stack, dtype):
    theirs, dense = torchao_int4(n, group_size * groups, group_size, stack, dtype)
    w = cls.from_torchao_int4(theirs)
    assert type(w) is cls and w.shape == theirs.shape and w.dtype == dtype
    assert w.group_size == group_size
    # bytes and scales bit for bit; the zero point costs one rounding of fp32
    assert torch.equal(w.scale, theirs.scale.mT)
    assert steps(w, dense, group_size) < 1 / 256
    assert steps(w, dense, group_size) < 1e-4


@both_classes
def test_their_convention_is_not_ours(cls):
    """Reading their zero point as ours would be off by far more than the bound above."""
    theirs, dense = torchao_int4(8, 128, 32)
    w = cls.from_torchao_int4(theirs)
    w.zero_point = theirs.zero_point.mT.float().contiguous()
    assert steps(w, dense, 32) > 4


@both_classes
def test_the_nibble_order_is_theirs(cls):
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(2)[None]
    theirs = Int4Tensor(
        (q[..., ::2] & 15) | (q[..., 1::2] << 4),
        torch.ones(1, 1),
        torch.zeros(1, 1),
        [1, 32],
        torch.Size([1, 32]),
    )
    assert cls.from_torchao_int4(theirs).dequantize()[0].tolist() == q[0].tolist()


@both_classes
def test_fields_of_the_class_are_passed_on(cls):
    theirs, _ = torchao_int4(4, 64, 32)
    if cls is CLASSES[1]:
        assert cls.from_torchao_int4(theirs, act_group_size=128).act_group_size == 128
    else:
        with pytest.raises(TypeError):
            cls.from_torchao_int4(theirs, act_group_size=128)


@both_classes
def test_executorch_bytes_in_an_int4tensor_are_refused(cls):
    """The same class, filled with unsigned codes in uint8: only the dtype tells."""
    theirs, _ = torchao_int4(8, 128, 64)
    foreign, _ = torchao_int4(8, 128, 64, qdata=theirs.qdata.view(torch.uint8))
    with pytest.raises(PackingError, match="ExecuTorch") as caught:
        cls.from_torchao_int4(foreign)
    assert caught.value.field == "qdata.dtype"


@both_classes
@pytest.mark.parametrize("n", [1, 4, 8])
def test_scales_of_the_other_orientation_are_refused(cls, n):
    """[N, n_groups] instead of [n_groups, N]: told wherever the two differ (not N = n_groups)."""
    theirs, _ = torchao_int4(n, 128, 64)
    for field in ("scale", "zero_point"):
        turned = getattr(theirs, field).t().contiguous()
        foreign, _ = torchao_int4(n, 128, 64, **{field: turned})
        with pytest.raises(PackingError) as caught:
            cls.from_torchao_int4(foreign)
        assert caught.value.field == f"{field}.shape"


@both_classes
def test_truncated_bytes_are_refused(cls):
    theirs, _ = torchao_int4(8, 128, 64)
    for qdata in (theirs.qdata[:, :-1], theirs.qdata[:-1], theirs.qdata[:, :32]):
        foreign, _ = torchao_int4(8, 128, 64, qdata=qdata.contiguous())
        with pytest.raises(PackingError) as caught:
            cls.from_torchao_int4(foreign)
        assert caught.value.field == "qdata.shape"


@both_classes
def test_tensors_that_do_more_to_activations_are_refused(cls):
    for changes in (
        {"act_pre_scale": torch.ones(128)},
        {"activation_dtype": torch.float8_e4m3fn},
    ):
        theirs, _ = torchao_int4(8, 128, 64, **changes)
        with pytest.raises(Unsupported, match="activations"):
            cls.from_torchao_int4(theirs)


@both_classes
def test_groups_across_rows_or_of_odd_width_are_refused(cls):
    theirs, _ = torchao_int4(8, 128, 64, block_size=[2, 64])
    with pytest.raises((Unsupported, PackingError)):
        cls.from_torchao_int4(theirs)
    theirs, _ = torchao_int4(8, 96, 48)
    with pytest.raises(Unsupported, match="group_size=48"):
        cls.from_torchao_int4(theirs)


# IntxUnpackedToInt8Tensor: what any CPU can make


def intx(weight, block, **kwargs) -> IntxUnpackedToInt8Tensor:
    return IntxUnpackedToInt8Tensor.from_hp(weight, block, torch.int4, **kwargs)


@both_classes
@all_dtypes
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_an_intx_tensor_keeps_its_values_bit_for_bit(cls, dtype, symmetric, group_size):
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = intx(weight, (1, group_size), mapping_type=mapping)
    w = cls.from_torchao_int4(theirs)
    assert (w.zero_point is None) == (not bool(theirs.zero_point.any()))
    each = torch.arange(256) // group_size
    codes = theirs.qdata.double() - theirs.zero_point.double()[:, each]
    expected = codes * theirs.scale.double()[:, each]
    assert torch.equal(w.dequantize(torch.float32), expected.float())


@both_classes
def test_a_model_quantised_by_torchao_converts_layer_by_layer(cls):
    model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerAxis(0)))
    theirs = model[0].weight
    w = cls.from_torchao_int4(theirs.data)
    assert w.group_size == 128
    assert torch.allclose(w.dequantize(), theirs.dequantize(), atol=1e-6)
    # and as a Parameter, which is how a model holds it
    assert torch.equal(cls.from_torchao_int4(theirs).qdata, w.qdata)


@both_classes
def test_an_intx_tensor_of_other_width_or_with_activations_is_refused(cls):
    weight = torch.randn(8, 128)
    for dtype in (torch.int8, torch.int3):
        theirs = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 32), dtype)
        with pytest.raises(Unsupported, match="only int4"):
            cls.from_torchao_int4(theirs)
    theirs = intx(weight, (1, 32), activation_quantization="int8_asym_per_token")
    with pytest.raises(Unsupported, match="only int4"):
        cls.from_torchao_int4(theirs)


@both_classes
def test_corrupt_intx_codes_are_refused(cls):
    theirs = intx(torch.randn(8, 128), (1, 32))
    for value in (8, 100, -9, -128):
        theirs.qdata[3, 5] = value
        with pytest.raises(PackingError) as caught:
            cls.from_torchao_int4(theirs)
        assert caught.value.field == "codes"
    theirs.qdata[3, 5] = 0
    theirs.scale[0, 0] = float("nan")
    with pytest.raises(PackingError, match="not finite"):
        cls.from_torchao_int4(theirs)


@both_classes
def test_anything_else_is_refused(cls):
    class Child(Int4Tensor):
        pass

    theirs, _ = torchao_int4(8, 128, 64)
    names = Int4Tensor.tensor_data_names + Int4Tensor.tensor_attribute_names
    child = Child(*(getattr(theirs, name) for name in names))
    for weight in (
        torch.randn(8, 128),
        torch.zeros(8, 64, dtype=torch.int8),
        Int8Tensor.from_hp(torch.randn(8, 128), granularity=PerRow()),
        CLASSES[0].from_hp(torch.randn(8, 128)),
        CLASSES[1].from_hp(torch.randn(8, 128)),
        child,
        None,
    ):
        with pytest.raises(PackingError, match="from_codes") as caught:
            cls.from_torchao_int4(weight)
        assert caught.value.field == "weight"
