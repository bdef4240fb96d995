"""The experts block of a mixture of experts as one call: torch.ops.w4tensor.experts on tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from w4tensor import ops
from w4tensor.errors import MisdispatchError, Unsupported
from w4tensor.tensors.one_guard import guard_as_one
from w4tensor.tensors.packed import PackedInt4
from w4tensor.tensors.products import eager_cuda, is_differentiated

__all__ = ["experts"]


def experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate: str = "halves",
    act: str = "silu",
) -> Tensor:
    """The whole block after the router: both products, the activation, the weighted sum.

    Args:
        x: [T, H]. ids, weight: [T, top_k], the router's; ids outside 0..E-1 add nothing.
        gate_up: stored as [E, 2 I, H], or [E, I, H] without a gate; down: as [E, H, I]. Stacked
            int4 weights of one class, plain or seen through transpose(-2, -1).
        gate_up_bias, down_bias: [E, N] or None.
        gate: "halves" (gate rows, then up rows), "interleaved" or "none".
        act: "silu", "gelu", "gelu_tanh", "relu2", "none", or "clamped_swiglu" (gpt-oss).

    Raises:
        MisdispatchError: a weight is not a stacked int4 tensor.
        Unsupported: sizes, classes or dtypes do not match, or a gradient would be lost.

    >>> from w4tensor import CudaCoalescedInt4Tensor
    >>> gate_up = CudaCoalescedInt4Tensor.from_hp(torch.randn(4, 256, 128))
    >>> down = CudaCoalescedInt4Tensor.from_hp(torch.randn(4, 128, 128))
    >>> ids, weight = torch.tensor([[0, 3], [1, 2]]), torch.full((2, 2), 0.5)
    >>> experts(torch.randn(2, 128), ids, weight, gate_up, down).shape
    torch.Size([2, 128])
    """
    for name, w in (("gate_up", gate_up), ("down", down)):
        if not isinstance(w, PackedInt4) or w.qdata.ndim != 3:
            raise MisdispatchError(
                f"{name} is a {type(w).__name__} of shape {tuple(w.shape)}; give a stacked int4 "
                "tensor [E, N, K], or use the model's own experts implementation"
            )
    assert isinstance(gate_up, PackedInt4) and isinstance(down, PackedInt4)
    if type(gate_up) is not type(down) or gate_up.act_group_size != down.act_group_size:
        raise Unsupported(
            f"gate_up is a {type(gate_up).__name__} with act_group_size={gate_up.act_group_size}, "
            f"down a {type(down).__name__} with {down.act_group_size}; quantise both alike, or use "
            "the model's own experts implementation"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise Unsupported(
            "the fused experts block has no gradient, and x or weight requires one; use the "
            "model's own experts implementation to train, or torch.no_grad()"
        )
    # tangents of what a graph is made with do not show
    if is_differentiated() and (
        torch.compiler.is_compiling()
        or any(
            t is not None and unpack_dual(t).tangent is not None
            for t in (x, weight, gate_up_bias, down_bias)
        )
    ):
        raise Unsupported(
            "the fused experts block has no gradient in forward mode; use the model's own experts "
            "implementation"
        )
    run = ops.cuda_experts if eager_cuda(x, weight) else torch.ops.w4tensor.experts
    y = run(
        x,
        ids,
        weight,
        gate_up.qdata,
        gate_up.scale,
        gate_up.zero_point,
        gate_up_bias,
        down.qdata,
        down.scale,
        down.zero_point,
        down_bias,
        gate_up.group_size,
        down.group_size,
        gate_up.act_group_size,
        gate,
        act,
        gate_up.layout_version,
        gate_up.multiple,
        down.multiple,
    )
    guard_as_one(gate_up)
    guard_as_one(down)
    return y
