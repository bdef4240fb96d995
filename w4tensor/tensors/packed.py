"""What both tensor classes are: constructors, conversions, conversion to other devices and dtypes.

A class adds its fields and its packing; its operators come from views.py and products.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from w4tensor import reference
from w4tensor.errors import MisdispatchError, PackingError, Unsupported
from w4tensor.layout import (
    LAYOUT_VERSION,
    SCALE_DTYPES,
    SYMMETRIC_ZERO_POINT,
    ZERO_POINT_DTYPES,
    Layout,
    check_contract,
    check_group_size,
    check_values,
)
from w4tensor.quantize import Algorithm, quantize_weight
from w4tensor.tensors.one_guard import Watched

__all__ = ["PackedInt4", "check_plain"]

# fields by which native int4 routes read their own tensors
_FOREIGN_FIELDS = (
    "block_size",
    "activation_dtype",
    "scale_and_zero",
    "act_pre_scale",
    "group_scale",
    "group_zero",
    "row_scale",
)


class _ForeignField(MisdispatchError, AttributeError):
    """A native int4 route asked for a field of its own. An AttributeError too: hasattr works."""


if TYPE_CHECKING:
    from torchao.utils import TorchAOBaseTensor as _Base
else:
    _Base = object


def check_plain(field: str, value: Any) -> None:
    """Refuse data that are no tensor, or one of a class with a meaning of its own."""
    if not isinstance(value, Tensor) or isinstance(value, TorchAOBaseTensor):
        raise PackingError(field, f"a {type(value).__name__}", "a plain torch.Tensor")


class PackedInt4(Watched, _Base):
    """Mixin over TorchAOBaseTensor; a class gives `packing` and the torchao field lists."""

    packing: ClassVar[Layout]
    # products.py's handler of F.linear
    _linear: ClassVar[Callable]
    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    # of Int4ActQuantTensor
    multiple: Tensor | None = None
    group_size: int
    act_group_size: int | None
    layout_version: int
    transposed: bool

    @classmethod
    def _wrapper(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        group_size: int,
        layout_version: int,
        transposed: bool,
    ) -> Tensor:
        """The empty wrapper that `__new__` returns: its shape follows from the fields."""
        for field, value in (("qdata", qdata), ("scale", scale), ("zero_point", zero_point)):
            if value is not None or field != "zero_point":
                check_plain(field, value)
        check_contract(cls.packing, qdata, scale, zero_point, group_size, layout_version)
        *stack, n, n_groups = scale.shape
        matrix = (n_groups * group_size, n) if transposed else (n, n_groups * group_size)
        return torch.Tensor._make_wrapper_subclass(
            cls, (*stack, *matrix), dtype=scale.dtype, device=qdata.device, requires_grad=False
        )

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        group_size: int = 128,
        algorithm: Algorithm = "symmetric",
        **fields: Any,
    ):
        """Quantise a weight.

        Args:
            weight: [N, K] or [E, N, K], bf16, fp16 or fp32; fp32 stays fp32 in meaning (scales and
                `dtype`), while products with fp32 x round x to bf16 on CUDA and not on CPU.
            group_size, algorithm: as quantize.quantize_weight.
            fields: what the class has beyond the shared ones (act_group_size).

        Raises:
            Unsupported: outside the domain of quantize_weight, or not 2-D or 3-D.
        """
        if weight.ndim not in (2, 3):
            raise Unsupported(f"weight has {weight.ndim} dimensions; give [N, K] or [E, N, K]")
        q, scale, zero_point = quantize_weight(weight, group_size, algorithm)
        return cls._pack(q, scale, zero_point, **fields)

    @classmethod
    def from_codes(
        cls,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        *,
        group_size: int,
        **fields: Any,
    ):
        """Pack codes that are already known.

        Args:
            q: uint8 [N, K] or [E, N, K], in 0..15.
            scale: [.., N, K / group_size], bf16, fp16 or fp32, finite. Its dtype is the tensor's.
            zero_point: None for 8, or like scale in fp16 or fp32, finite, in code units; any value
                is legal (outside 0..15 and fractional ones too). fp16 holds values up to 16 to
                1/256 of a code; use fp32 for more.
            group_size: weights a scale, or -1 for the whole row.

        Raises:
            PackingError: a field is not so. Unsupported: group_size does not fit K.
        """
        if scale.dtype not in SCALE_DTYPES:
            raise PackingError("scale.dtype", scale.dtype, f"one of {SCALE_DTYPES}")
        if zero_point is not None and zero_point.dtype not in ZERO_POINT_DTYPES:
            raise PackingError("zero_point.dtype", zero_point.dtype, f"one of {ZERO_POINT_DTYPES}")
        check_values(q, scale, zero_point)
        k = q.shape[-1]
        expected = (*q.shape[:-1], k // check_group_size(group_size, k))
        for field, value in (("scale", scale), ("zero_point", zero_point)):
            if value is not None and tuple(value.shape) != expected:
                raise PackingError(f"{field}.shape", tuple(value.shape), f"{expected}")
        return cls._pack(q, scale, zero_point, **fields)

    @classmethod
    def _pack(cls, q: Tensor, scale: Tensor, zero_point: Tensor | None, **fields: Any):
        return cls(
            qdata=cls.packing.pack(q),
            scale=scale.contiguous(),
            group_size=q.shape[-1] // scale.shape[-1],
            layout_version=LAYOUT_VERSION,
            zero_point=None if zero_point is None else zero_point.contiguous(),
            **fields,
        )

    @classmethod
    def from_torchao_int4(cls, weight: Tensor, **fields: Any):
        """Convert torchao's Int4Tensor or IntxUnpackedToInt8Tensor (int4), 2-D or 3-D.

        Int4Tensor means w = q * scale + zero with q in -8..7 and zero in the weight's units; that
        is zero_point = 8 - zero / scale here. IntxUnpackedToInt8Tensor means w = (q - zero) * scale
        with q in -8..7; that is zero_point = zero + 8. Codes and scales are kept bit for bit.

        An Int4Tensor that holds another system's convention (ExecuTorch stores unsigned codes in
        uint8) is told by its dtype and refused.

        Raises:
            PackingError: the tensor is of neither class, or not as torchao makes it.
            Unsupported: it quantises its activations or pre-scales them, or its groups do not fit.
        """
        from w4tensor.convert import codes_of_torchao

        q, scale, zero_point, group_size = codes_of_torchao(weight)
        return cls.from_codes(q, scale, zero_point, group_size=group_size, **fields)

    def to_codes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """q uint8 [.., N, K], scale and zero_point: what from_codes was given, exactly."""
        self._check()
        return self.packing.unpack(self.qdata, self._k), self.scale, self.zero_point

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a plain tensor of this shape, in `output_dtype` or this dtype.

        Computed in fp32 and rounded once.
        """
        w = reference.dequantize(*self.to_codes()).to(output_dtype or self.dtype)
        return w.mT if self.transposed else w

    # Compiled code asks every weight that it sees as a tensor for these at every call: not through
    # torchao's flatten, nor through __torch_function__ and back.

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        optional = (n for n in self.optional_tensor_data_names if getattr(self, n) is not None)
        data = [*self.tensor_data_names, *optional]
        names = (*self.tensor_attribute_names, *self.optional_tensor_attribute_names)
        return data, {name: getattr(self, name) for name in names}

    def size(self, *args, **kwargs):
        return torch._C._disabled_torch_function_impl(Tensor.size, (), (self, *args), kwargs)

    def stride(self, *args, **kwargs):
        return torch._C._disabled_torch_function_impl(Tensor.stride, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # Dynamo follows this (linear_weight.py), and no look-up by function
        if func is torch.nn.functional.linear:
            return cls._linear(func, types, args, kwargs or {})
        handlers = cls._TORCH_FN_TABLE[cls]
        if func in handlers:
            return handlers[func](func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_inference_mode_enabled():
                made_there = args and isinstance(args[0], Tensor) and args[0].is_inference()
                # a wrapper made there cannot be a view of one made outside
                with torch.inference_mode(bool(made_there)), torch.no_grad():
                    return func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is None:
            # tensors made in inference mode bring composite operators here in one piece
            if func._can_decompose():
                out = func.decompose(*args, **(kwargs or {}))
                if out is not NotImplemented:
                    return out
            raise MisdispatchError(
                f"{func} cannot read a {cls.__name__}: its bytes are packed int4. Use F.linear, "
                "matmul, bmm or torch._grouped_mm with it, or dequantize() it first"
            )
        return handler(func, types, args, kwargs or {})

    # what the operators build on

    @property
    def _k(self) -> int:
        return self.scale.shape[-1] * self.group_size

    def _check(self) -> None:
        """Refuse bytes that came past the constructor (unpickled, assigned) and are not ours."""
        check_contract(
            self.packing,
            self.qdata,
            self.scale,
            self.zero_point,
            self.group_size,
            self.layout_version,
        )
        k_n = (self._k, self.scale.shape[-2])
        shape = (*self.scale.shape[:-2], *(k_n if self.transposed else k_n[::-1]))
        if self.shape != shape:
            raise PackingError("shape", tuple(self.shape), f"{shape}, as its fields have")
        if self.dtype != self.scale.dtype:
            raise PackingError("scale.dtype", self.scale.dtype, f"{self.dtype}, as the tensor")

    def _is_like(self, other: Any) -> bool:
        """Whether the other's bytes are of this tensor's format."""
        return getattr(other, "packing", None) is self.packing

    def _with(self, **changes: Any):
        """The same tensor with some fields changed."""
        fields = {name: getattr(self, name) for name in self._field_names()}
        return type(self)(**fields | changes)

    @classmethod
    def _field_names(cls) -> list[str]:
        return [
            *cls.tensor_data_names,
            *cls.tensor_attribute_names,
            *cls.optional_tensor_data_names,
            *cls.optional_tensor_attribute_names,
        ]

    def _map(self, fn: Callable[[Tensor], Tensor], **changes: Any):
        """The same tensor with `fn` applied to all of its data."""
        data = {name: fn(t) for name, t in self._data()}
        return self._with(**data | changes)

    def _data(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of all data that there is."""
        names = (*self.tensor_data_names, *self.optional_tensor_data_names)
        data = [(name, getattr(self, name)) for name in names]
        return [(name, t) for name, t in data if t is not None]

    def _explicit_zero_point(self) -> Tensor:
        if self.zero_point is not None:
            return self.zero_point
        return torch.full_like(self.scale, SYMMETRIC_ZERO_POINT, dtype=ZERO_POINT_DTYPES[0])

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[call-overload]

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(other, self)  # type: ignore[call-overload]

    def __repr__(self) -> str:
        fields = [f"shape={tuple(self.shape)}", f"dtype={self.dtype}", f"device='{self.device}'"]
        for name in self.tensor_attribute_names + self.optional_tensor_attribute_names:
            fields.append(f"{name}={getattr(self, name)}")
        fields.append(f"zero_point={'8' if self.zero_point is None else self.zero_point.dtype}")
        return f"{type(self).__name__}({', '.join(fields)})"

    def _quantization_type(self) -> str:
        return f"shape={tuple(self.shape)}, group_size={self.group_size}, device={self.device}"

    def _stable_hash_for_caching(self) -> str:
        return repr(self)


def _foreign(name: str) -> property:
    def refuse(self):
        raise _ForeignField(
            f"{type(self).__name__} has no {name!r}: its bytes are not those of torchao's int4 "
            "tensors and their routes cannot read them; use F.linear, or dequantize() first"
        )

    return property(refuse)


# not through __getattr__: that would make every absent attribute dear, and Dynamo asks for some
for _name in _FOREIGN_FIELDS:
    setattr(PackedInt4, _name, _foreign(_name))


def _refuse(name: str) -> Callable:
    def refuse(self, *operands):
        raise MisdispatchError(
            f"{name} cannot read a {type(self).__name__}: its bytes are packed int4; "
            "dequantize() it first"
        )

    return refuse


# Tensor's own versions turn a TypeError into NotImplemented, and == would then answer False
for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    for _prefix in ("__", "__r", "__i"):
        setattr(PackedInt4, f"{_prefix}{_operator}__", _refuse(f"{_prefix}{_operator}__"))
for _operator in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(PackedInt4, f"__{_operator}__", _refuse(f"__{_operator}__"))
PackedInt4.__hash__ = object.__hash__  # type: ignore[method-assign]
