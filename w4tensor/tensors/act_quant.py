"""Int4ActQuantTensor: int4 weights for activations quantised to int8 on the fly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from w4tensor.checks import check_act_group_size
from w4tensor.errors import Unsupported
from w4tensor.layout import ACT_QUANT, check_multiple, check_multiple_values
from w4tensor.quantize import Algorithm, quantize_weight_by_multiples
from w4tensor.tensors import products, views
from w4tensor.tensors.packed import PackedInt4, check_plain

__all__ = ["Int4ActQuantTensor"]


class Int4ActQuantTensor(PackedInt4, TorchAOBaseTensor):
    """A weight [N, K] or [E, N, K] as int4 codes; x is rounded to int8 before every product.

    w[n, k] = (q[n, k] - zero_point[n, k // group_size]) * scale[n, k // group_size]
    x[m, k] ~ x_q[m, k] * x_scale[m, k // act_group_size], as reference.quantize_activation

    Tensor data:
        qdata: int64 [.., N, padded_k(K) / 16], the ACT_QUANT format of layout.py.
        scale: [.., N, K / group_size], bf16, fp16 or fp32; its dtype is the tensor's.

    Attributes:
        group_size: weights a scale, one of 16, 32, 64, 128, 256 or K.
        act_group_size: activations a scale, one of 32, 64, 128 or -1 (per token).
        layout_version: the version of the byte format.

    Optional tensor data:
        zero_point: like scale, fp16 or fp32, in code units; None is 8.
        multiple: like scale, int8: what scale is a multiple of its row's unit by (integer scales,
            layout.py). Only per token and without zero points. Products of many tokens are faster.

    Optional attributes:
        transposed: the tensor is seen as [.., K, N]; the bytes stay.

    Raises:
        PackingError: the fields are not of this format, however they were made.

    >>> w = Int4ActQuantTensor.from_hp(torch.randn(8, 256), group_size=128, act_group_size=32)
    >>> torch.nn.functional.linear(torch.randn(3, 256), w).shape
    torch.Size([3, 8])
    """

    packing = ACT_QUANT
    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["group_size", "act_group_size", "layout_version"]
    optional_tensor_data_names = ["zero_point", "multiple"]
    optional_tensor_attribute_names = ["transposed"]

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        act_group_size: int,
        layout_version: int,
        zero_point: Tensor | None = None,
        multiple: Tensor | None = None,
        transposed: bool = False,
    ):
        wrapper = cls._wrapper(qdata, scale, zero_point, group_size, layout_version, transposed)
        if multiple is not None:
            check_plain("multiple", multiple)
            check_multiple(multiple, scale, zero_point, act_group_size)
        return wrapper

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        act_group_size: int,
        layout_version: int,
        zero_point: Tensor | None = None,
        multiple: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.group_size = group_size
        self.act_group_size = check_act_group_size(act_group_size)
        self.layout_version = layout_version
        self.zero_point = zero_point
        self.multiple = multiple
        self.transposed = transposed

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        group_size: int = 128,
        algorithm: Algorithm = "symmetric",
        integer_scales: bool = False,
        **fields: Any,
    ):
        """As PackedInt4.from_hp; integer_scales: as quantize.quantize_weight_by_multiples."""
        if not integer_scales:
            return super().from_hp(weight, group_size, algorithm, **fields)
        if algorithm != "symmetric":
            raise Unsupported(f"integer scales with algorithm={algorithm!r}; use 'symmetric'")
        if weight.ndim not in (2, 3):
            raise Unsupported(f"weight has {weight.ndim} dimensions; give [N, K] or [E, N, K]")
        q, scale, multiple = quantize_weight_by_multiples(weight, group_size)
        return cls._pack(q, scale, None, multiple=multiple, **fields)

    @classmethod
    def _pack(cls, q: Tensor, scale: Tensor, zero_point: Tensor | None, **fields: Any):
        multiple = fields.pop("multiple", None)
        if multiple is not None:
            fields = {"act_group_size": -1} | fields
            check_multiple(multiple, scale, zero_point, fields["act_group_size"])
            check_multiple_values(multiple, scale)
            fields["multiple"] = multiple.contiguous()
        return super()._pack(q, scale, zero_point, **({"act_group_size": 32} | fields))

    def _check(self) -> None:
        super()._check()
        if self.multiple is not None:
            check_multiple(self.multiple, self.scale, self.zero_point, self.act_group_size)


views.register(Int4ActQuantTensor)
products.register(Int4ActQuantTensor)
torch.serialization.add_safe_globals([Int4ActQuantTensor])
