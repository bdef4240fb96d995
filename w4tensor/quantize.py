"""Float weight -> codes, scale, zero_point, in the meaning that layout.py states. Pure torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from w4tensor.errors import Unsupported
from w4tensor.layout import MAX_MULTIPLE, SYMMETRIC_ZERO_POINT, check_group_size, has_values

__all__ = ["ALGORITHMS", "Algorithm", "quantize_weight", "quantize_weight_by_multiples", "unit_of"]

Algorithm = Literal["symmetric", "min_max", "hqq"]
ALGORITHMS = ("symmetric", "min_max", "hqq")
MAX_CODE = 15
# rows quantised at once: bounds the fp32 temporaries to a few hundred MB
CHUNK_ELEMENTS = 1 << 25
# significant bits of a unit: with 4 for a multiple, their product is exact in bf16
UNIT_BITS = 4
# what keeps 1 .. 15 times a unit of so many bits exact in fp16, whose least number is 2**-24
LEAST_FP16_UNIT = 2.0**-21


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
    if algorithm not in ALGORITHMS:
        raise Unsupported(f"algorithm={algorithm!r} is not one of {ALGORITHMS}")
    return _by_chunks(weight, group_size, lambda rows, size: _quantize_rows(rows, size, algorithm))


def quantize_weight_by_multiples(
    weight: Tensor, group_size: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to codes with integer scales (layout.py): "symmetric", but that the scales of
    a row are multiples of one unit, its largest scale over 15, rounded up to four bits. Each group
    takes the multiple next above or next below its own scale, whichever has the smaller error.

    The idea of two levels of scales, integers within floats, is QServe's (arXiv:2405.04532).

    Args:
        weight, group_size: as quantize_weight.

    Returns:
        q and scale as quantize_weight; multiple int8, like scale.

    Raises:
        Unsupported: as quantize_weight.

    >>> weight = torch.tensor([[-8.0] * 16 + [-3.9] * 16])
    >>> q, scale, multiple = quantize_weight_by_multiples(weight, group_size=16)
    >>> scale.tolist(), multiple.tolist()
    ([[0.984375, 0.4921875]], [[14, 7]])
    """
    q, scale, multiple = _by_chunks(weight, group_size, _quantize_rows_by_multiples)
    assert multiple is not None
    return q, scale, multiple


def _by_chunks(
    weight: Tensor, group_size: int, quantize: Callable
) -> tuple[Tensor, Tensor, Tensor | None]:
    if weight.ndim < 2 or not weight.is_floating_point() or weight.element_size() not in (2, 4):
        raise Unsupported(
            f"a weight of shape {tuple(weight.shape)} and {weight.dtype} cannot be quantised; "
            "give [.., N, K] in bfloat16, float16 or float32"
        )
    k = weight.shape[-1]
    group_size = check_group_size(group_size, k)
    rows = weight.detach().reshape(-1, k)
    step = max(1, CHUNK_ELEMENTS // k)
    parts = [quantize(part, group_size) for part in rows.split(step)]
    shape = (*weight.shape[:-1], -1)
    q = torch.cat([part[0] for part in parts]).reshape(shape)
    scale = torch.cat([part[1] for part in parts]).reshape(shape)
    rest = [part[2] for part in parts if part[2] is not None]
    if has_values(scale) and not bool(scale.isfinite().all()):
        raise Unsupported("the weight holds Inf or NaN; int4 codes cannot")
    return q, scale, torch.cat(rest).reshape(shape) if rest else None


def _quantize_rows_by_multiples(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    w = rows.float().unflatten(-1, (-1, group_size))  # [rows, G, g]
    own = _symmetric_scale(w)
    unit = unit_of(own.abs().amax(-1, keepdim=True), rows.dtype)
    size = own.abs() / unit
    below, above = (n.clamp(1, MAX_MULTIPLE).copysign(own) for n in (size.floor(), size.ceil()))
    q, error = _round_by_multiple(w, below, unit)
    q_above, error_above = _round_by_multiple(w, above, unit)
    better = error_above < error
    q = torch.where(better[..., None], q_above, q)
    multiple = torch.where(better, above, below)
    return q.to(torch.uint8).flatten(-2), (multiple * unit).to(rows.dtype), multiple.to(torch.int8)


def _round_by_multiple(w: Tensor, multiple: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, G, g] for scales of so many units, and each group's error [rows, G]."""
    step = (multiple * unit)[..., None]
    q = (w / step + SYMMETRIC_ZERO_POINT).round_().clamp_(0, MAX_CODE)
    # in units: squares of very small weights would be zero
    error = (q - SYMMETRIC_ZERO_POINT) * multiple[..., None] - w / unit[..., None]
    return q, error.square_().sum(-1)


def unit_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What rows whose largest scale is this are multiples of, [.., 1] fp32, to four bits."""
    least = LEAST_FP16_UNIT if dtype == torch.float16 else torch.finfo(torch.float32).tiny * 256
    fraction, exponent = torch.frexp((largest / MAX_MULTIPLE).clamp(min=least))
    # a fraction is 0.5 .. 1
    steps = (fraction * 2**UNIT_BITS).ceil()
    return torch.ldexp(steps, exponent - UNIT_BITS)


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
