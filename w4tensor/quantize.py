"""Float weight -> codes, scale, zero_point, in the meaning that layout.py states. Pure torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from w4tensor.errors import Unsupported
from w4tensor.layout import SYMMETRIC_ZERO_POINT, check_group_size, has_values

__all__ = ["ALGORITHMS", "Algorithm", "quantize_weight"]

Algorithm = Literal["symmetric", "min_max", "hqq"]
ALGORITHMS = ("symmetric", "min_max", "hqq")
MAX_CODE = 15
# rows quantised at once: bounds the fp32 temporaries to a few hundred MB
CHUNK_ELEMENTS = 1 << 25


def quantize_weight(
    weight: Tensor, group_size: int = 128, algorithm: Algorithm = "symmetric"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to 4-bit codes, group by group along its last dimension.

    Args:
        weight: [.., N, K], bf16, fp16 or fp32, finite; may be on meta.
        group_size: 16, 32, 64, 128, 256, or -1 for one group a row; must divide K.
        algorithm:
            "symmetric": zero point 8; the element of largest magnitude becomes -8, so that all 16
                codes are used (scale may be negative).
            "min_max": integer zero point; the group's range, widened to hold 0, becomes 0..15.
            "hqq": fractional zero point by half-quadratic optimisation, torchao's implementation.

    Returns:
        q uint8 [.., N, K] in 0..15; scale [.., N, K / group_size] in the weight's dtype;
        zero_point fp16 (fp32 for "hqq", whose zero points may leave 0..15), or None for 8.

    Raises:
        Unsupported: group_size, algorithm, dtype or rank outside the above; a weight not finite.

    >>> q, scale, zero_point = quantize_weight(torch.tensor([[1.0, -8.0] * 8]), group_size=16)
    >>> q[0, :2].tolist(), scale.tolist(), zero_point
    ([9, 0], [[1.0]], None)
    """
    if weight.ndim < 2 or not weight.is_floating_point() or weight.element_size() not in (2, 4):
        raise Unsupported(
            f"a weight of shape {tuple(weight.shape)} and {weight.dtype} cannot be quantised; "
            "give [.., N, K] in bfloat16, float16 or float32"
        )
    if algorithm not in ALGORITHMS:
        raise Unsupported(f"algorithm={algorithm!r} is not one of {ALGORITHMS}")
    k = weight.shape[-1]
    group_size = check_group_size(group_size, k)
    rows = weight.detach().reshape(-1, k)
    step = max(1, CHUNK_ELEMENTS // k)
    parts = [_quantize_rows(part, group_size, algorithm) for part in rows.split(step)]
    shape = (*weight.shape[:-1], -1)
    q = torch.cat([part[0] for part in parts]).reshape(shape)
    scale = torch.cat([part[1] for part in parts]).reshape(shape)
    zeros = [part[2] for part in parts if part[2] is not None]
    zero_point = torch.cat(zeros).reshape(shape) if zeros else None
    if has_values(scale) and not bool(scale.isfinite().all()):
        raise Unsupported("the weight holds Inf or NaN; int4 codes cannot")
    return q, scale, zero_point


def _quantize_rows(
    rows: Tensor, group_size: int, algorithm: Algorithm
) -> tuple[Tensor, Tensor, Tensor | None]:
    if algorithm == "hqq":
        return _hqq(rows, group_size)
    w = rows.float().unflatten(-1, (-1, group_size))  # [rows, G, g]
    choose = _symmetric_scale if algorithm == "symmetric" else _min_max_scale
    # codes are chosen against the scale as it will be stored
    scale = choose(w).to(rows.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    step = scale.float()
    if algorithm == "symmetric":
        zero_point = None
        zero = torch.full_like(step, SYMMETRIC_ZERO_POINT)
    else:
        zero = (-w.amin(-1).clamp(max=0) / step).round().clamp(0, MAX_CODE)
        zero_point = zero.half()
    q = (w / step[..., None] + zero[..., None]).round_().clamp_(0, MAX_CODE)
    return q.to(torch.uint8).flatten(-2), scale, zero_point


def _symmetric_scale(w: Tensor) -> Tensor:
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return extreme / -SYMMETRIC_ZERO_POINT


def _min_max_scale(w: Tensor) -> Tensor:
    return (w.amax(-1).clamp(min=0) - w.amin(-1).clamp(max=0)) / MAX_CODE


def _hqq(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    if not has_values(rows):
        # the optimiser reads its error to stop early
        groups = (rows.shape[0], rows.shape[1] // group_size)
        scale, zero = rows.new_empty(groups), rows.new_empty(groups, dtype=torch.float32)
        return rows.new_empty(rows.shape, dtype=torch.uint8), scale, zero
    q, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        rows.float(),
        nbits=4,
        group_size=group_size,
        compute_dtype=torch.float32,
        device=str(rows.device),
        raw_output=True,
    )
    shape = (rows.shape[0], -1)
    return (
        q.reshape(rows.shape).to(torch.uint8),
        scale.reshape(shape).to(rows.dtype),
        zero.reshape(shape).float(),
    )
