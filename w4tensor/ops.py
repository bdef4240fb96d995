"""torch.ops.w4tensor.*: schemas, fakes, autograd, and what runs on which device.

    linear(x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version, multiple)
        x [.., K] and qdata [N, *] -> [.., N];  x [E, M, K] and qdata [E, N, *] -> [E, M, N].
        bias is [N] or None. multiple: the integer scales of layout.py, or None. The result has x's
        dtype.
    grouped_linear(x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version)
        x [T, K] sorted by expert, qdata [E, N, *], offs int32 [E]: the row at which each expert
        ends. -> [T, N]; rows from offs[-1] on are zero.
    grouped_linear_backward(grad, qdata, scale, zero_point, offs, group_size, act_group_size)
        the gradient of grouped_linear with respect to x; reads offs on the host.
    gathered_linear(x, ids, qdata, scale, zero_point, group_size, act_group_size, layout_version)
        x [S, K], ids int32 or int64 [S], qdata [E, N, *] -> W[ids[s]] @ x[s], [S, N], without
        copying W. Ids outside 0..E-1 give zeros on CUDA, and raise IndexError on a CPU.
    experts(x, ids, weight, gate_up_*, down_*, gate_up_group_size, down_group_size, act_group_size,
            gate, act, layout_version)
        y[t] = sum over j of weight[t, j] * (down[e] @ h + down_bias[e]),    e = ids[t, j]
                     h = act(gate_up[e] @ x[t] + gate_up_bias[e]), rounded to x's dtype
        x [T, H], ids int32 or int64 and weight [T, top_k], gate_up [E, 2 I, H] (I rows without a
        gate), down [E, H, I], biases [E, N] or None -> [T, H] of x's dtype. Ids outside 0..E-1 are
        sentinels and add nothing; their weights must be finite. gate, act: of reference.activate.
        There is no gradient.
    quantize_activation(x, act_group_size) -> (int8 [.., K], fp32 scale [.., groups])
        As reference.quantize_activation defines it.

act_group_size decides what qdata must be: None reads the COALESCED format, a number (or -1, per
token) quantises x to int8 first and reads ACT_QUANT. Every op refuses other bytes before anything
reads them, on every device. Kernels are imported inside functions: importing this module touches
neither triton nor a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w4tensor import alike, reference
from w4tensor.checks import (
    Stack,
    check_act_group_size,
    check_experts,
    check_gathered,
    check_grouped,
    check_ids,
    check_linear,
    check_operands,
)
from w4tensor.layout import (
    ACT_QUANT,
    COALESCED,
    LAYOUT_VERSION,
    check_contract,
    check_multiple,
)

__all__ = ["cuda_experts", "cuda_gathered_linear", "cuda_grouped_linear", "cuda_linear"]

_library = torch.library.Library("w4tensor", "DEF")
_library.define(
    "linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int group_size, int? act_group_size, int layout_version, Tensor? multiple=None) -> Tensor"
)
_library.define(
    "grouped_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor offs, "
    "int group_size, int? act_group_size, int layout_version) -> Tensor"
)
_library.define(
    "grouped_linear_backward(Tensor grad, Tensor qdata, Tensor scale, Tensor? zero_point, "
    "Tensor offs, int group_size, int? act_group_size) -> Tensor"
)
_library.define(
    "gathered_linear(Tensor x, Tensor ids, Tensor qdata, Tensor scale, Tensor? zero_point, "
    "int group_size, int? act_group_size, int layout_version) -> Tensor"
)
_library.define(
    "experts(Tensor x, Tensor ids, Tensor weight, "
    "Tensor gate_up_qdata, Tensor gate_up_scale, Tensor? gate_up_zero_point, Tensor? gate_up_bias, "
    "Tensor down_qdata, Tensor down_scale, Tensor? down_zero_point, Tensor? down_bias, "
    "int gate_up_group_size, int down_group_size, int? act_group_size, str gate, str act, "
    "int layout_version, Tensor? gate_up_multiple=None, Tensor? down_multiple=None) -> Tensor"
)
_library.define("quantize_activation(Tensor x, int act_group_size) -> (Tensor, Tensor)")


def _experts(run: Callable) -> Callable:
    """An implementation of experts: checks the operands, then calls `run` with two stacks."""

    def implementation(
        x,
        ids,
        weight,
        gate_up_qdata,
        gate_up_scale,
        gate_up_zero_point,
        gate_up_bias,
        down_qdata,
        down_scale,
        down_zero_point,
        down_bias,
        gate_up_group_size,
        down_group_size,
        act_group_size,
        gate,
        act,
        layout_version,
        gate_up_multiple=None,
        down_multiple=None,
    ):
        first = (gate_up_qdata, gate_up_scale, gate_up_zero_point, gate_up_group_size)
        second = (down_qdata, down_scale, down_zero_point, down_group_size)
        layout = check_operands(x, *first, act_group_size, layout_version, gate_up_multiple)
        check_contract(layout, *second, layout_version)
        if down_multiple is not None:
            check_multiple(down_multiple, down_scale, down_zero_point, act_group_size)
        stacks = (
            (*first, gate_up_bias, act_group_size, gate_up_multiple),
            (*second, down_bias, act_group_size, down_multiple),
        )
        check_experts(x, ids, weight, *stacks, gate, act)
        return run(x, ids, weight, *stacks, gate, act)

    return implementation


# without CUDA: reference.py


def _reference_linear(
    x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version, multiple=None
):
    weight = qdata, scale, zero_point, group_size
    layout = check_operands(x, *weight, act_group_size, layout_version, multiple)
    check_linear(x, qdata, bias)
    q = layout.unpack(qdata, k=x.shape[-1])
    if act_group_size is None:
        return reference.linear(x, reference.dequantize(q, scale, zero_point), bias)
    return reference.act_quant_linear(x, q, scale, zero_point, act_group_size, bias)


def _reference_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    check_grouped(x, qdata, offs)
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


def _reference_gathered(x: Tensor, ids: Tensor, stack: Stack) -> Tensor:
    """x [S, K] and ids [S] -> W[ids[s]] @ x[s] + bias[ids[s]], [S, N]; sentinels give zeros."""
    qdata, scale, zero_point, group_size, bias, act_group_size, _ = stack
    y = x.new_zeros(x.shape[0], qdata.shape[1])
    for expert in ids.unique().tolist():
        if 0 <= expert < qdata.shape[0]:
            rows = ids == expert
            y[rows] = _reference_linear(
                x[rows],
                qdata[expert],
                scale[expert],
                None if zero_point is None else zero_point[expert],
                None if bias is None else bias[expert],
                group_size,
                act_group_size,
                LAYOUT_VERSION,
            )
    return y


def _reference_gathered_linear(
    x, ids, qdata, scale, zero_point, group_size, act_group_size, layout_version
):
    check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    check_gathered(x, ids, qdata)
    if ids.device.type == "cpu":
        check_ids(ids, qdata.shape[0])
    stack = qdata, scale, zero_point, group_size, None, act_group_size, None
    return _reference_gathered(x, ids, stack)


def _reference_experts(x, ids, weight, gate_up, down, gate, act):
    pairs, slots = ids.flatten(), ids.shape[1]
    h = _reference_gathered(x.float().repeat_interleave(slots, 0), pairs, gate_up)
    h = reference.activate(h, gate, act).to(x.dtype).float()
    y = _reference_gathered(h, pairs, down).unflatten(0, ids.shape)
    return (y * weight.float()[..., None]).sum(1).to(x.dtype)


def _reference_quantize_activation(x, act_group_size):
    return reference.quantize_activation(x, check_act_group_size(act_group_size))


# with CUDA: the kernel that dispatch names


def _run_linear(
    x, qdata, scale, zero_point, bias, multiple, group_size, act_group_size, layout_version
):
    weight = qdata, scale, zero_point
    check_operands(x, *weight, group_size, act_group_size, layout_version, multiple)
    check_linear(x, qdata, bias)
    from w4tensor import launch

    if act_group_size is None:
        return launch.coalesced_linear(x, *weight, bias, group_size)
    sizes = group_size, act_group_size
    return launch.act_quant_linear(x, *weight, bias, *sizes, multiple)


def _run_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    check_grouped(x, qdata, offs)
    from w4tensor import launch

    return launch.grouped_linear(x, qdata, scale, zero_point, offs, group_size, act_group_size)


def _run_gathered_linear(
    x, ids, qdata, scale, zero_point, group_size, act_group_size, layout_version
):
    check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    check_gathered(x, ids, qdata)
    from w4tensor import launch

    return launch.gathered_linear(x, ids, qdata, scale, zero_point, group_size, act_group_size)


def _run_experts(*operands):
    from w4tensor import launch

    y = launch.experts(*operands)
    return _reference_experts(*operands) if y is None else y


_run_checked_experts = _experts(_run_experts)


def _run_remembered_experts(*operands):
    """As alike.call has them: tensors, multiples last, and then the rest."""
    *tensors, gate_up_multiple, down_multiple = operands[:13]
    return _run_checked_experts(*tensors, *operands[13:], gate_up_multiple, down_multiple)


def _cuda_quantize_activation(x, act_group_size):
    from w4tensor import launch

    return launch.quantize_activation(x, check_act_group_size(act_group_size))


# the same by what alike.py remembers


def cuda_linear(
    x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version, multiple=None
):
    """What the operator `linear` runs on CUDA tensors, for callers that need no dispatcher."""
    rest = group_size, act_group_size, layout_version
    return alike.call(_run_linear, (x, qdata, scale, zero_point, bias, multiple), rest)


def cuda_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    """As cuda_linear, of the operator `grouped_linear`."""
    rest = group_size, act_group_size, layout_version
    return alike.call(_run_grouped_linear, (x, qdata, scale, zero_point, offs), rest)


def cuda_gathered_linear(
    x, ids, qdata, scale, zero_point, group_size, act_group_size, layout_version
):
    """As cuda_linear, of the operator `gathered_linear`."""
    rest = group_size, act_group_size, layout_version
    return alike.call(_run_gathered_linear, (x, ids, qdata, scale, zero_point), rest)


def cuda_experts(
    x,
    ids,
    weight,
    gate_up_qdata,
    gate_up_scale,
    gate_up_zero_point,
    gate_up_bias,
    down_qdata,
    down_scale,
    down_zero_point,
    down_bias,
    gate_up_group_size,
    down_group_size,
    act_group_size,
    gate,
    act,
    layout_version,
    gate_up_multiple=None,
    down_multiple=None,
):
    """As cuda_linear, of the operator `experts`."""
    gate_up = gate_up_qdata, gate_up_scale, gate_up_zero_point, gate_up_bias
    down = down_qdata, down_scale, down_zero_point, down_bias
    tensors = x, ids, weight, *gate_up, *down, gate_up_multiple, down_multiple
    rest = gate_up_group_size, down_group_size, act_group_size, gate, act, layout_version
    return alike.call(_run_remembered_experts, tensors, rest)


# fakes


def _fake_linear(
    x, qdata, scale, zero_point, bias, group_size, act_group_size, layout_version, multiple=None
):
    weight = qdata, scale, zero_point, group_size
    check_operands(x, *weight, act_group_size, layout_version, multiple)
    check_linear(x, qdata, bias)
    return x.new_empty(*x.shape[:-1], qdata.shape[-2])


def _fake_grouped_linear(
    x, qdata, scale, zero_point, offs, group_size, act_group_size, layout_version
):
    check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    check_grouped(x, qdata, offs)
    return x.new_empty(x.shape[0], qdata.shape[1])


def _fake_gathered_linear(
    x, ids, qdata, scale, zero_point, group_size, act_group_size, layout_version
):
    check_operands(x, qdata, scale, zero_point, group_size, act_group_size, layout_version)
    check_gathered(x, ids, qdata)
    return x.new_empty(x.shape[0], qdata.shape[1])


def _fake_experts(x, ids, weight, gate_up, down, gate, act):
    return x.new_empty(x.shape)


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
    # of a Linear, multiples come last
    _, qdata, scale, zero_point, last, ctx.group_size, ctx.act_group_size, *_ = inputs
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
    return grad_x, None, None, None, grad_bias, None, None, None, None


def _grouped_linear_backward(ctx, grad):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight, offs = _saved_weight(ctx), ctx.saved_tensors[-1]
        grad_x = torch.ops.w4tensor.grouped_linear_backward(
            grad, *weight, offs, ctx.group_size, ctx.act_group_size
        )
    return grad_x, None, None, None, None, None, None, None


def _save_gathered(ctx, inputs, output) -> None:
    _, ids, *weight, ctx.group_size, ctx.act_group_size, _ = inputs
    ctx.has_zero_point = weight[2] is not None
    ctx.save_for_backward(*(t for t in weight if t is not None), ids)


def _gathered_linear_backward(ctx, grad):
    """Through the dequantised weights of every row: S x N x K of them, but nothing synchronises."""
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight, ids = _saved_weight(ctx), ctx.saved_tensors[-1]
        sentinel = (ids < 0) | (ids >= weight[0].shape[0])
        at = ids.masked_fill(sentinel, 0)
        chosen = [None if t is None else t.index_select(0, at) for t in weight]
        w = _dense(*chosen, ctx.group_size, ctx.act_group_size).to(grad.dtype)
        grad_x = (grad[:, None] @ w)[:, 0].masked_fill(sentinel[:, None], 0)
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
    ("gathered_linear", _reference_gathered_linear, _fake_gathered_linear),
    ("experts", _experts(_reference_experts), _experts(_fake_experts)),
    ("quantize_activation", _reference_quantize_activation, _fake_quantize_activation),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"w4tensor::{_name}", _fake, lib=_library)

for _name, _backward, _save in (
    ("linear", _linear_backward, _save_weight),
    ("grouped_linear", _grouped_linear_backward, _save_weight),
    ("gathered_linear", _gathered_linear_backward, _save_gathered),
):
    torch.library.register_autograd(
        f"w4tensor::{_name}", _backward, setup_context=_save, lib=_library
    )

_library.impl("linear", cuda_linear, "CUDA")
_library.impl("quantize_activation", _cuda_quantize_activation, "CUDA")
_library.impl("grouped_linear", cuda_grouped_linear, "CUDA")
_library.impl("gathered_linear", cuda_gathered_linear, "CUDA")
_library.impl("experts", cuda_experts, "CUDA")
