"""What the answers are, in plain fp32 torch: the oracle of every test and the path without CUDA.

Reads beside the formula of layout.py. Imports no kernel, so that it inherits no kernel's bug.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from w4tensor.layout import SYMMETRIC_ZERO_POINT

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "act_quant_linear",
    "activate",
    "dequantize",
    "linear",
    "quantize_activation",
]

INT8_MAX = 127
# how gate and up alternate in the rows of an experts block's first product
GATES = ("halves", "interleaved", "none")


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)


# of one operand; clamped_swiglu (gpt-oss) needs both gate and up
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda v: v,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu2": lambda v: F.relu(v).square(),
    "clamped_swiglu": _clamped_swiglu,
}


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """w = (q - zero_point) * scale: codes [.., N, K] and [.., N, G] -> fp32 [.., N, K]."""
    zero = SYMMETRIC_ZERO_POINT if zero_point is None else zero_point.float()[..., None]
    w = q.unflatten(-1, (scale.shape[-1], -1)).float()
    return ((w - zero) * scale.float()[..., None]).flatten(-2)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., M, K] times fp32 w [.., N, K] transposed, summed in fp32, rounded once to x.dtype."""
    y = x.float() @ w.mT
    return (y if bias is None else y + bias.float()).to(x.dtype)


def quantize_activation(x: Tensor, act_group_size: int) -> tuple[Tensor, Tensor]:
    """x [.., K] -> int8 [.., K] and fp32 scale [.., ceil(K / act_group_size)].

    scale = absmax / 127 and q = round_half_even(x / scale), group by group; -1 is one group a
    token. A group of zeros has scale 0 and codes 0. A group that holds Inf or NaN has scale NaN
    and codes 0, and so makes its token NaN where it is used, and no other.
    """
    k = x.shape[-1]
    g = k if act_group_size == -1 else act_group_size
    n_groups = -(-k // g)
    groups = torch.nn.functional.pad(x.float(), (0, n_groups * g - k)).unflatten(-1, (n_groups, g))
    absmax = groups.abs().amax(-1)
    # by a tensor: torch divides by a number through its reciprocal on CUDA
    scale = absmax / torch.full_like(absmax, INT8_MAX)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    # subnormal scales are coarse enough to pass 127
    q = (groups / divisor).round().clamp(-INT8_MAX, INT8_MAX)
    q = torch.where(scale.isfinite()[..., None], q, 0.0).to(torch.int8)
    return q.flatten(-2)[..., :k].contiguous(), scale


def act_quant_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """linear() with x replaced by its int8 codes times their scales."""
    x_q, x_scale = quantize_activation(x, act_group_size)
    group = x.shape[-1] if act_group_size == -1 else act_group_size
    x_hat = x_q.float() * x_scale.repeat_interleave(group, -1)[..., : x.shape[-1]]
    return linear(x_hat, dequantize(q, scale, zero_point), bias).to(x.dtype)


def activate(h: Tensor, gate: str, act: str) -> Tensor:
    """What stands between an experts block's products: act(gate) * up, [.., 2 I] -> [.., I].

    Without a gate, act of all of h. gate and act are of GATES and ACTIVATIONS.
    """
    f = ACTIVATIONS[act]
    if gate == "none":
        return f(h)
    g, up = h.chunk(2, dim=-1) if gate == "halves" else (h[..., 0::2], h[..., 1::2])
    return f(g, up) if f is _clamped_swiglu else f(g) * up
