"""The tensor classes, one a file."""

from w4tensor.tensors.act_quant import Int4ActQuantTensor
from w4tensor.tensors.coalesced import CudaCoalescedInt4Tensor

__all__ = ["CudaCoalescedInt4Tensor", "Int4ActQuantTensor"]
