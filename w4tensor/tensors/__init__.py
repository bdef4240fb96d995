"""The tensor classes, one a file, and the experts block that takes two of them."""

from w4tensor.tensors.act_quant import Int4ActQuantTensor
from w4tensor.tensors.coalesced import CudaCoalescedInt4Tensor
from w4tensor.tensors.experts_block import experts

__all__ = ["CudaCoalescedInt4Tensor", "Int4ActQuantTensor", "experts"]
