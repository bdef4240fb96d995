"""CudaCoalescedInt4Tensor: int4 weights for bf16 and fp16 activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from w4tensor.layout import COALESCED
from w4tensor.tensors import products, views
from w4tensor.tensors.packed import PackedInt4

__all__ = ["CudaCoalescedInt4Tensor"]


class CudaCoalescedInt4Tensor(PackedInt4, TorchAOBaseTensor):
    """A weight [N, K] or [E, N, K] as int4 codes; products with x run in x's dtype.

    w[n, k] = (q[n, k] - zero_point[n, k // group_size]) * scale[n, k // group_size]

    Tensor data:
        qdata: int16 [.., N, padded_k(K) / 4], the COALESCED format of layout.py.
        scale: [.., N, K / group_size], bf16, fp16 or fp32; its dtype is the tensor's.

    Attributes:
        group_size: weights a scale, one of 16, 32, 64, 128, 256 or K.
        layout_version: the version of the byte format.

    Optional tensor data:
        zero_point: like scale, fp16 or fp32, in code units; None is 8.

    Optional attributes:
        transposed: the tensor is seen as [.., K, N]; the bytes stay.

    Raises:
        PackingError: the fields are not of this format, however they were made.

    >>> w = CudaCoalescedInt4Tensor.from_hp(torch.randn(8, 256), group_size=128)
    >>> torch.nn.functional.linear(torch.randn(3, 256), w).shape
    torch.Size([3, 8])
    """

    packing = COALESCED
    act_group_size = None
    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["group_size", "layout_version"]
    optional_tensor_data_names = ["zero_point"]
    optional_tensor_attribute_names = ["transposed"]

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
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
        layout_version: int,
        zero_point: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.group_size = group_size
        self.layout_version = layout_version
        self.zero_point = zero_point
        self.transposed = transposed


views.register(CudaCoalescedInt4Tensor)
products.register(CudaCoalescedInt4Tensor)
torch.serialization.add_safe_globals([CudaCoalescedInt4Tensor])
