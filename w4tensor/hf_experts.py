"""Experts modules of transformers: how their weights lie, and our own implementation for them.

transformers keeps the experts of a layer as 3-D parameters of one module and looks up, by the name
in its config, the function that multiplies by them: grouped_mm, batched_mm or the module's own
forward ("eager"). All of these run on int4 weights. experts_forward is one more, "w4tensor": the
whole block as one operator, for every module that fused_form knows. Nothing here imports
transformers before a module that came from it is there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from w4tensor.tensors import CudaCoalescedInt4Tensor, Int4ActQuantTensor, experts
from w4tensor.tensors.packed import PackedInt4

__all__ = ["IMPLEMENTATION", "choose", "fused_form", "is_transposed", "path_of", "register"]

# the name under which transformers knows experts_forward
IMPLEMENTATION = "w4tensor"
# tokens up to which a device takes batched_mm where experts_forward cannot, as generate decodes
BATCHED_TOKENS = 16
# limit and alpha of the operator's clamped_swiglu
CLAMPED_SWIGLU = (7.0, 1.702)

# transformers.integrations.moe and transformers.activations, once _import_transformers() ran:
# Dynamo traces what is below, and up to PyTorch 2.11 no import of a lazy module
_moe: Any = None
_activations: Any = None


def _import_transformers() -> None:
    global _moe, _activations
    from transformers import activations
    from transformers.integrations import moe

    _moe, _activations = moe, activations


def is_transposed(module: nn.Module, weight: Tensor) -> bool:
    """Whether `module` holds its stacked `weight` as [E, K, N]."""
    if weight.ndim != 3:
        return False
    if getattr(module, "is_transposed", False) is True:
        return True
    # the one class that multiplies by [E, K, N] and has no attribute to say so
    llama4 = _class_of("llama4", "Llama4TextExperts")
    return llama4 is not None and isinstance(module, llama4)


def _class_of(model: str, name: str) -> Any:
    """A class of transformers, or None if its model is not loaded."""
    return getattr(sys.modules.get(f"transformers.models.{model}.modeling_{model}"), name, None)


def fused_form(module: Any) -> tuple[str, str] | str:
    """The (gate, act) of tensors.experts that `module` means, or why it means none."""
    if not hasattr(module, "has_gate"):
        return "the module has a forward of its own"
    first, down = _weights(module)
    if not isinstance(first, PackedInt4) or type(first) is not type(down):
        return "its two weights are not both int4 of one class"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows its experts"
    if not module.has_gate:
        return _with_activation("none", module)
    # the functions themselves: a class may define a gate of any name and meaning
    gate = type(module)._apply_gate
    if gate is _moe._default_apply_gate:
        return _with_activation("halves", module)
    if gate is getattr(_class_of("gpt_oss", "GptOssExperts"), "_apply_gate", None):
        if (module.limit, module.alpha) == CLAMPED_SWIGLU:
            return "interleaved", "clamped_swiglu"
        return f"its limit and alpha are not {CLAMPED_SWIGLU}"
    return "its gate is its own"


def _weights(module: Any) -> tuple[Any, Any]:
    return module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj


def _with_activation(gate: str, module: Any) -> tuple[str, str] | str:
    act_fn = module.act_fn
    if act_fn is nn.functional.silu or isinstance(act_fn, (nn.SiLU, _activations.SiLUActivation)):
        return gate, "silu"
    if isinstance(act_fn, _activations.GELUActivation):
        return gate, "gelu"
    if isinstance(act_fn, (_activations.GELUTanh, _activations.NewGELUActivation)):
        return gate, "gelu_tanh"
    if isinstance(act_fn, _activations.ReLUSquaredActivation):
        return gate, "relu2"
    return "its activation is none of silu, gelu, gelu_tanh and relu2"


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts implementation of transformers: x [T, H], ids and weights [T, top_k] -> [T, H].

    What fused_form does not know, and gradients, go to an implementation of transformers.
    """
    form = fused_form(self)
    biases: tuple[Any, Any] = (None, None)
    if getattr(self, "has_bias", False):
        first_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        biases = first_bias, self.down_proj_bias
    operands = (hidden_states, top_k_weights, *biases)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if isinstance(form, str) or gradient:
        built_in = _built_in(hidden_states)
        return built_in(self, hidden_states, top_k_index, top_k_weights)
    gate, act = form
    return experts(
        hidden_states, top_k_index, top_k_weights, *_weights(self), *biases, gate=gate, act=act
    )


def _built_in(hidden_states: Tensor) -> Any:
    if hidden_states.device.type != "cpu" and hidden_states.shape[0] <= BATCHED_TOKENS:
        return _moe.batched_mm_experts_forward
    return _moe.grouped_mm_experts_forward


def register() -> None:
    """Make "w4tensor" known to transformers, and our tensors to its own grouped product."""
    _import_transformers()
    if IMPLEMENTATION in _moe.ALL_EXPERTS_FUNCTIONS:
        return
    _moe.ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    # under torch.compile grouped_mm calls it for weights that are not bf16
    fallback = torch.ops.transformers.grouped_mm_fallback
    for cls in (CudaCoalescedInt4Tensor, Int4ActQuantTensor):
        cls.implements_torch_function([fallback])(_grouped_mm)


def _grouped_mm(func, types, args, kwargs):
    bound = dict(zip(("input", "weight", "offs"), args, strict=False)) | kwargs
    return torch._grouped_mm(bound["input"], bound["weight"], offs=bound["offs"])


class _Registration:
    """register(), now and wherever the model that holds it is unpickled."""

    def __init__(self) -> None:
        register()

    def __reduce__(self) -> tuple[type, tuple]:
        return _Registration, ()


def choose(module: Any) -> None:
    """Have transformers call experts_forward for `module`, unless a user chose another function."""
    # what transformers' use_experts_implementation gives a module
    if not hasattr(module, "has_gate") or not hasattr(module, "config"):
        return
    module.__dict__["_w4tensor_registration"] = _Registration()
    # the default; a config is that of all layers, which may differ: experts_forward sees each
    if module.config._experts_implementation == "grouped_mm":
        first, down = _weights(module)
        # one operator rounds activations in one way; Dynamo could not read it in fused_form
        alike = getattr(first, "act_group_size", None) == getattr(down, "act_group_size", None)
        if alike and isinstance(fused_form(module), tuple):
            module.config._experts_implementation_internal = IMPLEMENTATION


def path_of(module: Any) -> str:
    """What multiplies by the int4 experts of `module`, and why."""
    if hasattr(module, "has_gate"):
        _import_transformers()
    form = fused_form(module)
    if not hasattr(module, "has_gate"):
        return f"experts: {form}"
    name = module.config._experts_implementation
    if name != IMPLEMENTATION:
        return f"experts: {name}, as the model's config says"
    if isinstance(form, tuple):
        return f"experts: one fused operator (gate: {form[0]}, act: {form[1]})"
    return f"experts: grouped_mm or batched_mm, as {form}"
