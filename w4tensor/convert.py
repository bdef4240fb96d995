"""torchao's own int4 tensors -> codes, scale, zero_point in the meaning of layout.py."""

from __future__ import annotations

import torch
from torch import Tensor

from w4tensor.errors import PackingError, Unsupported
from w4tensor.layout import SYMMETRIC_ZERO_POINT

__all__ = ["codes_of_torchao"]


def codes_of_torchao(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """q uint8 [.., N, K], scale [.., N, G], zero_point and group_size of a torchao tensor.

    See PackedInt4.from_torchao_int4 for the two conventions and what is refused.
    """
    from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor

    if type(weight) is Int4Tensor:
        return _of_int4(weight)
    if type(weight) is IntxUnpackedToInt8Tensor:
        return _of_intx(weight)
    raise PackingError(
        "weight",
        f"a {type(weight).__name__}",
        "torchao's Int4Tensor or IntxUnpackedToInt8Tensor",
        "for other formats, give their codes to from_codes()",
    )


def _group_size(block_size, k: int) -> int:
    if any(size != 1 for size in block_size[:-1]):
        raise Unsupported(f"block_size={list(block_size)} spans rows; groups run along K only")
    return min(block_size[-1], k)


def _of_int4(weight) -> tuple[Tensor, Tensor, Tensor, int]:
    # w = q * scale + zero, q in -8..7; byte j holds k = 2j in its low nibble; scale is [.., G, N]
    if weight.act_pre_scale is not None or weight.activation_dtype != torch.bfloat16:
        raise Unsupported(
            "the Int4Tensor scales or converts its activations; only plain ones convert"
        )
    if weight.qdata.dtype != torch.int8:
        raise PackingError(
            "qdata.dtype",
            weight.qdata.dtype,
            "torch.int8, as torchao makes it (uint8 is ExecuTorch's convention)",
            "unpack its codes and give them to from_codes()",
        )
    group_size = _group_size(weight.block_size, weight.shape[-1])
    n, k = weight.shape[-2:]
    expected = (*weight.shape[:-1], k // 2)
    if tuple(weight.qdata.shape) != expected:
        raise PackingError("qdata.shape", tuple(weight.qdata.shape), f"{expected}")
    expected = (*weight.shape[:-2], k // group_size, n)
    for field in ("scale", "zero_point"):
        if tuple(getattr(weight, field).shape) != expected:
            raise PackingError(f"{field}.shape", tuple(getattr(weight, field).shape), f"{expected}")
    b = weight.qdata.contiguous().view(torch.uint8)
    q = (torch.stack((b & 15, b >> 4), dim=-1) ^ 8).flatten(-2)
    scale = weight.scale.mT.contiguous()
    zero_point = SYMMETRIC_ZERO_POINT - weight.zero_point.mT.float() / scale.float()
    return q, scale, zero_point, group_size


def _of_intx(weight) -> tuple[Tensor, Tensor, Tensor | None, int]:
    # w = (q - zero) * scale, q in -8..7, one int8 a code; scale and zero are [.., G]
    int4 = torch.int4  # type: ignore[attr-defined]
    if weight.target_dtype != int4 or weight.activation_quantization is not None:
        raise Unsupported(
            f"the tensor is {weight.target_dtype} with "
            f"activation_quantization={weight.activation_quantization}; only int4 weights convert"
        )
    group_size = _group_size(weight.block_size, weight.shape[-1])
    q = (weight.qdata + SYMMETRIC_ZERO_POINT).to(torch.uint8)
    zero_point = None
    if bool((weight.zero_point != 0).any()):
        zero_point = (weight.zero_point.float() + SYMMETRIC_ZERO_POINT).half()
    scale = weight.scale
    if scale.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise PackingError("scale.dtype", scale.dtype, "bfloat16, float16 or float32")
    return q, scale, zero_point, group_size
