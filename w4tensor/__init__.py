"""int4 weights that make any PyTorch model faster: torchao tensor subclasses on Triton kernels.

    from torchao.quantization import quantize_
    from w4tensor import W4CoalescedConfig
    quantize_(model, W4CoalescedConfig())

Importing this package asks no device anything and does not import triton.
"""

from w4tensor.config import W4ActQuantConfig, W4CoalescedConfig, with_experts
from w4tensor.errors import MisdispatchError, PackingError, Unsupported
from w4tensor.summary import summary
from w4tensor.tensors import CudaCoalescedInt4Tensor, Int4ActQuantTensor

__all__ = [
    "CudaCoalescedInt4Tensor",
    "Int4ActQuantTensor",
    "MisdispatchError",
    "PackingError",
    "Unsupported",
    "W4ActQuantConfig",
    "W4CoalescedConfig",
    "summary",
    "with_experts",
]
__version__ = "0.1.0"
