"""torch.ops.w4tensor.*: schemas, fakes, autograd, and what runs on which device.

    linear(x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version)
        x [.., K] and qdata [N, *] -> [.., N];  x [E, M, K] and qdata [E, N, *] -> [E, M, N].
        bias is [N] or None. The result has x's dtype.
    grouped_linear(x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version)
        x [T, K] sorted by expert, qdata [E, N, *], offs int32 [E]: the row at which each expert
        ends. -> [T, N]; rows from offs[-1] on are zero.
    grouped_linear_backward(grad, qdata, scale, zero_point, offs, group_size, act_group_size)
        the gradient of grouped_linear with respect to x; reads offs on the host.
    quantize_activation(x, act_group_size) -> (int8 [.., K], fp32 scale [.., groups])
        As reference.quantize_activation defines it.

act_group_size decides what qdata must be: None reads the COALESCED format, a number (or -1, per
token) quantises x to int8 first and reads ACT_QUANT. Every op refuses other bytes before anything
reads them, on every device. Kernels are imported inside functions: importing this module touches
neither triton nor a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w4tensor import reference
from w4tensor.errors import PackingError, Unsupported
from w4tensor.layout import ACT_QUANT, COALESCED, Layout, check_contract

__all__ = ["ACT_GROUP_SIZES", "check_act_group_size"]

ACT_GROUP_SIZES = (32, 64, 128, -1)

_library = torch.library.Library("w4tensor", "DEF")
_library.define(
    "linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int group_size, int? act_group_size, int layout_version) -> Tensor"
)
_library.define(
    "grouped_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor offs, "
    "int group_size, int? act_group_size, int layout_version) -> Tensor"
)
_library.define(
    "grouped_linear_backward(Tensor grad, Tensor qdata, Tensor scale, Tensor? zero_point, "
    "Tensor offs, int group_size, int? act_group_size) -> Tensor"
)
_library.define("quantize_activation(Tensor x, int act_group_size) -> (Tensor, Tensor)")


# what every op checks


def check_act_group_size(act_group_size: int) -> int:
    """`act_group_size` itself. Raises Unsupported unless it is one of ACT_GROUP_SIZES."""
    if not isinstance(act_group_size, int) or act_group_size not in ACT_GROUP_SIZES:
        raise Unsupported(
            f"act_group_size={act_group_size} is not one of {ACT_GROUP_SIZES} (-1: per token)"
        )
    return act_group_size


def _check_operands(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    act_group_size: int | None,
    layout_version: int,
) -> Layout:
    layout = COALESCED if act_group_size is None else ACT_QUANT
    check_contract(layout, qdata, scale, zero_point, group_size, layout_version)
    if act_group_size is not None:
        check_act_group_size(act_group_size)
    if not x.is_floating_point() or x.element_size() not in (2, 4):
        raise Unsupported(f"x has dtype {x.dtype}; give bfloat16, float16 or float32")
    k = scale.shape[-1] * group_size
    if x.ndim == 0 or x.shape[-1] != k:
        raise Unsupported(f"x has shape {tuple(x.shape)} but the weight has K={k}")
    if x.device != qdata.device:
        raise PackingError("qdata.device", qdata.device, f"{x.device}, as x", "move the model")
    return layout


def _check_linear(x: Tensor, qdata: Tensor, bias: Tensor | None) -> None:
    if qdata.ndim == 3:
        if x.ndim != 3 or x.shape[0] != qdata.shape[0]:
            raise Unsupported(
                f"x of shape {tuple(x.shape)} does not match {qdata.shape[0]} stacked weights; "
                f"give [{qdata.shape[0]}, M, K]"
            )
        if bias is not None:
            raise Unsupported("stacked weights take no bias; add it to the product")
    elif bias is not None and bias.shape != qdata.shape[:1]:
        raise Unsupported(
            f"bias has shape {tuple(bias.shape)}, expected ({qdata.shape[0]},), one a row of W"
        )
    if bias is not None and bias.device != x.device:
        raise Unsupported(f"bias is on {bias.device} and x on {x.device}; move the model")


def _check_grouped(x: Tensor, qdata: Tensor, offs: Tensor) -> None:
    if qdata.ndim != 3 or x.ndim != 2:
        raise Unsupported(
            f"a grouped product takes x [T, K] and W [E, N, K], not {x.ndim}-D and {qdata.ndim}-D"
        )
    if offs.dtype != torch.int32 or offs.shape != qdata.shape[:1]:
        raise Unsupported(
            f"offs is {offs.dtype} {tuple(offs.shape)}, expected torch.int32 ({qdata.shape[0]},)"
        )
    if offs.device != x.device:
        raise Unsupported(f"offs is on {offs.device} and x on {x.device}")


# without CUDA: reference.py


def _reference_linear(
    x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version
):
    layout = _check_operands(
        x, qdata, scale, zero_point, group_size, act_group_size, layout_version
    )
    _check_linear(x, qdata, bias)
    q = layout.unpack(qdata, k=x.shape[-1])
    if act_group_size is None:
        return reference.linear(x, reference.dequantize(q, scale, zero_point), bias)
    return reference.act_quant_linear(x, q, scale, zero_point, act_group_size, bias)


def _reference_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    _check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    _check_grouped(x, qdata, offs)
    y = x.new_zeros(x.shape[0], qdata.shape[1])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        zero = None if zero_point is None else zero_point[expert]
        y[start:end] = _reference_linear(
            x[start:end],
            qdata[expert],
            scale[expert],
            zero,
            None,
            group_size,
            act_group_size,
            layout_version,
        )
        start = end
    return y


def _reference_quantize_activation(x, act_group_size):
    return reference.quantize_activation(x, check_act_group_size(act_group_size))


# with CUDA: the kernel that dispatch names


def _cuda_linear(x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version):
    _check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    _check_linear(x, qdata, bias)
    from w4tensor import launch

    if act_group_size is None:
        return launch.coalesced_linear(x, qdata, scale, zero_point, bias, group_size)
    return launch.act_quant_linear(x, qdata, scale, zero_point, bias, group_size, act_group_size)


def _cuda_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    weight = (qdata, scale, zero_point)
    if act_group_size is not None:
        # its kernels skip the rounding of x for few rows, which the type promises
        return _reference_grouped_linear(
            x, *weight, offs, group_size, act_group_size, layout_version
        )
    _check_operands(x, *weight, group_size, act_group_size, layout_version)
    _check_grouped(x, qdata, offs)
    from w4tensor import launch

    return launch.coalesced_grouped_linear(x, *weight, offs, group_size)


def _cuda_quantize_activation(x, act_group_size):
    from w4tensor import launch

    return launch.quantize_activation(x, check_act_group_size(act_group_size))


# fakes


def _fake_linear(x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version):
    _check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    _check_linear(x, qdata, bias)
    return x.new_empty(*x.shape[:-1], qdata.shape[-2])


def _fake_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    _check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    _check_grouped(x, qdata, offs)
    return x.new_empty(x.shape[0], qdata.shape[1])


def _fake_quantize_activation(x, act_group_size):
    k = x.shape[-1]
    n_groups = 1 if check_act_group_size(act_group_size) == -1 else -(-k // act_group_size)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(*x.shape[:-1], n_groups, dtype=torch.float32),
    )


# gradients: with respect to x (and bias) only, through the dequantised weight; rounding
# activations to int8 counts as the identity


def _save_weight(ctx, inputs, output) -> None:
    _, qdata, scale, zero_point, last, ctx.group_size, ctx.act_group_size, _ = inputs
    ctx.has_zero_point = zero_point is not None
    saved = (qdata, scale) if zero_point is None else (qdata, scale, zero_point)
    offs = (last,) if last is not None and last.dtype == torch.int32 else ()
    ctx.save_for_backward(*saved, *offs)


def _saved_weight(ctx) -> tuple[Tensor, Tensor, Tensor | None]:
    qdata, scale = ctx.saved_tensors[:2]
    return qdata, scale, ctx.saved_tensors[2] if ctx.has_zero_point else None


def _dense(qdata, scale, zero_point, group_size, act_group_size) -> Tensor:
    layout = COALESCED if act_group_size is None else ACT_QUANT
    q = layout.unpack(qdata, k=scale.shape[-1] * group_size)
    return reference.dequantize(q, scale, zero_point)


def _linear_backward(ctx, grad):
    grad_x = None
    if ctx.needs_input_grad[0]:
        w = _dense(*_saved_weight(ctx), ctx.group_size, ctx.act_group_size)
        grad_x = grad @ w.to(grad.dtype)
    grad_bias = grad.sum_to_size(grad.shape[-1]) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None


def _grouped_linear_backward(ctx, grad):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight, offs = _saved_weight(ctx), ctx.saved_tensors[-1]
        grad_x = torch.ops.w4tensor.grouped_linear_backward(
            grad, *weight, offs, ctx.group_size, ctx.act_group_size
        )
    return grad_x, None, None, None, None, None, None, None


def _reference_grouped_linear_backward(
    grad, qdata, scale, zero_point, offs, group_size, act_group_size
):
    grad_x = grad.new_zeros(grad.shape[0], scale.shape[-1] * group_size)
    start = 0
    for expert, end in enumerate(offs.tolist()):
        zero = None if zero_point is None else zero_point[expert]
        w = _dense(qdata[expert], scale[expert], zero, group_size, act_group_size)
        grad_x[start:end] = grad[start:end] @ w.to(grad.dtype)
        start = end
    return grad_x


def _fake_grouped_linear_backward(grad, qdata, scale, zero_point, offs, group_size, act_group_size):
    return grad.new_empty(grad.shape[0], scale.shape[-1] * group_size)


for _name, _reference, _fake in (
    ("linear", _reference_linear, _fake_linear),
    ("grouped_linear", _reference_grouped_linear, _fake_grouped_linear),
    (
        "grouped_linear_backward",
        _reference_grouped_linear_backward,
        _fake_grouped_linear_backward,
    ),
    ("quantize_activation", _reference_quantize_activation, _fake_quantize_activation),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"w4tensor::{_name}", _fake, lib=_library)

for _name, _backward in (
    ("linear", _linear_backward),
    ("grouped_linear", _grouped_linear_backward),
):
    torch.library.register_autograd(
        f"w4tensor::{_name}", _backward, setup_context=_save_weight, lib=_library
    )

_library.impl("linear", _cuda_linear, "CUDA")
_library.impl("quantize_activation", _cuda_quantize_activation, "CUDA")
_library.impl("grouped_linear", _cuda_grouped_linear, "CUDA")
