"""What every op refuses before anything reads its operands, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from w4tensor import reference
from w4tensor.errors import PackingError, Unsupported
from w4tensor.layout import ACT_QUANT, COALESCED, Layout, check_contract, check_multiple

__all__ = [
    "ACT_GROUP_SIZES",
    "Stack",
    "check_act_group_size",
    "check_experts",
    "check_gathered",
    "check_grouped",
    "check_ids",
    "check_linear",
    "check_operands",
]

ACT_GROUP_SIZES = (32, 64, 128, -1)
# stacked weights, in the order of moe.Stack:
# qdata, scale, zero_point, group_size, bias, act_group_size, multiple
Stack = tuple[Tensor, Tensor, Tensor | None, int, Tensor | None, int | None, Tensor | None]


def check_act_group_size(act_group_size: int) -> int:
    """`act_group_size` itself. Raises Unsupported unless it is one of ACT_GROUP_SIZES."""
    if not isinstance(act_group_size, int) or act_group_size not in ACT_GROUP_SIZES:
        raise Unsupported(
            f"act_group_size={act_group_size} is not one of {ACT_GROUP_SIZES} (-1: per token)"
        )
    return act_group_size


def check_ids(ids: Tensor, n_experts: int, first: int = 0) -> None:
    """Refuse ids outside first..n_experts - 1, as indexing does. Reads them.

    Raises:
        IndexError: the first of them.
    """
    wrong = ids[(ids < first) | (ids >= n_experts)]
    if len(wrong):
        raise IndexError(
            f"index {int(wrong[0])} is out of bounds for dimension 0 with size {n_experts}"
        )


def check_operands(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    act_group_size: int | None,
    layout_version: int,
    multiple: Tensor | None = None,
) -> Layout:
    """The format that qdata is in. Raises PackingError and Unsupported."""
    layout = COALESCED if act_group_size is None else ACT_QUANT
    check_contract(layout, qdata, scale, zero_point, group_size, layout_version)
    if act_group_size is not None:
        check_act_group_size(act_group_size)
    if multiple is not None:
        check_multiple(multiple, scale, zero_point, act_group_size)
    if not x.is_floating_point() or x.element_size() not in (2, 4):
        raise Unsupported(f"x has dtype {x.dtype}; give bfloat16, float16 or float32")
    k = scale.shape[-1] * group_size
    if x.ndim == 0 or x.shape[-1] != k:
        raise Unsupported(f"x has shape {tuple(x.shape)} but the weight has K={k}")
    if x.device != qdata.device:
        raise PackingError("qdata.device", qdata.device, f"{x.device}, as x", "move the model")
    return layout


def check_linear(x: Tensor, qdata: Tensor, bias: Tensor | None) -> None:
    """Raises Unsupported where shapes or devices do not fit, as the others here do."""
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


def check_grouped(x: Tensor, qdata: Tensor, offs: Tensor) -> None:
    if qdata.ndim != 3 or x.ndim != 2:
        raise Unsupported(
            f"a grouped product takes x [T, K] and W [E, N, K], not {x.ndim}-D and {qdata.ndim}-D"
        )
    if offs.dtype != torch.int32 or offs.shape != qdata.shape[:1]:
        raise Unsupported(
            f"offs is {offs.dtype} {tuple(offs.shape)}, expected torch.int32 ({qdata.shape[0]},)"
        )
    if offs.device != x.device:
        raise Unsupported(f"offs is on {offs.device} and x on {x.device}; move it there")


def check_gathered(x: Tensor, ids: Tensor, qdata: Tensor) -> None:
    if qdata.ndim != 3 or x.ndim != 2:
        raise Unsupported(
            f"a gathered product takes x [S, K] and W [E, N, K], not {x.ndim}-D and {qdata.ndim}-D"
        )
    if ids.dtype not in (torch.int32, torch.int64) or ids.shape != x.shape[:1]:
        raise Unsupported(
            f"ids is {ids.dtype} {tuple(ids.shape)}, expected int32 or int64 ({x.shape[0]},)"
        )
    if ids.device != x.device:
        raise Unsupported(f"ids is on {ids.device} and x on {x.device}; move it there")


def check_experts(
    x: Tensor, ids: Tensor, weight: Tensor, gate_up: Stack, down: Stack, gate: str, act: str
) -> None:
    if gate not in reference.GATES or act not in reference.ACTIVATIONS:
        raise Unsupported(
            f"gate={gate!r} with act={act!r}: gate is one of {reference.GATES} and act one of "
            f"{tuple(reference.ACTIVATIONS)}"
        )
    if gate == "none" and act == "clamped_swiglu":
        raise Unsupported("clamped_swiglu multiplies gate by up; give a gate, or another act")
    if x.ndim != 2 or gate_up[0].ndim != 3 or down[0].ndim != 3:
        raise Unsupported(
            f"an experts block takes x [T, H] and stacks [E, N, K], not {x.ndim}-D, "
            f"{gate_up[0].ndim}-D and {down[0].ndim}-D"
        )
    (n_experts, rows), hidden = gate_up[0].shape[:2], x.shape[1]
    inter = down[1].shape[-1] * down[3]
    fits = (n_experts, inter if gate == "none" else 2 * inter), (n_experts, hidden)
    if (n_experts, rows) != fits[0] or down[0].shape[:2] != fits[1]:
        raise Unsupported(
            f"gate_up [{n_experts}, {rows}, {hidden}] with gate={gate!r} does not fit down "
            f"[{', '.join(str(s) for s in down[0].shape[:2])}, {inter}]: it has to be "
            f"[E, {'I' if gate == 'none' else '2 I'}, H] before [E, H, I]"
        )
    # len() would make a symbolic T a constant
    tokens = x.shape[0]
    integers = ids.dtype in (torch.int32, torch.int64)
    if not integers or ids.ndim != 2 or ids.shape[0] != tokens:
        raise Unsupported(
            f"ids is {ids.dtype} {tuple(ids.shape)}, expected int32 or int64 ({tokens}, top_k)"
        )
    if not weight.is_floating_point() or weight.shape != ids.shape:
        raise Unsupported(
            f"weight is {weight.dtype} {tuple(weight.shape)}, expected floats {tuple(ids.shape)}, "
            "as ids has"
        )
    biases = (("gate_up_bias", gate_up), ("down_bias", down))
    for name, (qdata, _, _, _, bias, *_) in biases:
        if bias is not None and bias.shape != qdata.shape[:2]:
            raise Unsupported(
                f"{name} has shape {tuple(bias.shape)}, expected {tuple(qdata.shape[:2])}"
            )
    others = [("ids", ids), ("weight", weight), ("down", down[0])]
    for name, t in others + [(name, stack[4]) for name, stack in biases]:
        if t is not None and t.device != x.device:
            raise Unsupported(f"{name} is on {t.device} and x on {x.device}; move the model")
