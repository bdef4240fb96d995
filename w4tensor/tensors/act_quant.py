"""Int4ActQuantTensor: int4 weights for activations quantised to int8 on the fly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from w4tensor.checks import check_act_group_size
from w4tensor.layout import ACT_QUANT
from w4tensor.tensors import products, views
from w4tensor.tensors.packed import PackedInt4

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
    optional_tensor_data_names = ["zero_point"]
    optional_tensor_attribute_names = ["transposed"]

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        act_group_size: int,
        layout_version: int,
        zero_point: Tensor | None = None,
        transposed: bool = False,
    ):
        return cls._wrapper(qdata, scale, zero_point, group_size, layout_version, transposed)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        act_group_size: int,
        layout_version: int,
        zero_point: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.group_size = group_size
        self.act_group_size = check_act_group_size(act_group_size)
        self.layout_version = layout_version
        self.zero_point = zero_point
        self.transposed = transposed

    @classmethod
    def _pack(cls, q: Tensor, scale: Tensor, zero_point: Tensor | None, **fields: Any):
        return super()._pack(q, scale, zero_point, **({"act_group_size": 32} | fields))


views.register(Int4ActQuantTensor)
products.register(Int4ActQuantTensor)
torch.serialization.add_safe_globals([Int4ActQuantTensor])
