"""Weights as nn.Linear holds them: to Dynamo no tensors, but objects with fields.

A tensor of a class of its own is dear in compiled code: at every call Dynamo guards each one and
AOT takes each one apart, in Python, which takes longer than most of its products do. An object with
__torch_function__ is followed into that function instead, and the fields that it reads are plain
inputs of the graph. That serves F.linear, which is all that nn.Linear asks of its weight; any other
operator on it breaks a compiled graph, so other weights stay tensors.

Dynamo would guard each of the fields; one_guard.py makes one guard of them.

From PyTorch 2.13 on, a setting of Dynamo is that of the thread which made it, here the importing
one. Compiled in another, these weights are tensors like any other.

The classes have the names of their parents: in files, messages and summary() they are those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.config
from torch import nn

from w4tensor.tensors.act_quant import Int4ActQuantTensor
from w4tensor.tensors.coalesced import CudaCoalescedInt4Tensor
from w4tensor.tensors.one_guard import guard_as_one

__all__ = ["as_linear_weight", "wants"]


# the handler of F.linear is the same in both classes
_product = CudaCoalescedInt4Tensor._linear


class _OfLinear:
    @staticmethod
    def _linear(func, types, args, kwargs):
        y = _product(func, types, args, kwargs)
        guard_as_one(args[1] if len(args) > 1 else kwargs["weight"])
        return y


class CoalescedLinearWeight(_OfLinear, CudaCoalescedInt4Tensor):
    """A CudaCoalescedInt4Tensor [N, K] that Dynamo looks into."""


class ActQuantLinearWeight(_OfLinear, Int4ActQuantTensor):
    """An Int4ActQuantTensor [N, K] that Dynamo looks into."""


_OF_LINEAR: dict[type, type] = {
    CudaCoalescedInt4Tensor: CoalescedLinearWeight,
    Int4ActQuantTensor: ActQuantLinearWeight,
}
for _parent, _cls in _OF_LINEAR.items():
    _cls.__name__ = _parent.__name__
    torch._dynamo.config.nontraceable_tensor_subclasses.add(_cls)
    torch.serialization.add_safe_globals([_cls])


def wants(module: nn.Module, name: str) -> bool:
    """Whether parameter `name` of `module` meets F.linear and nothing else."""
    is_weight = isinstance(module, nn.Linear) and name == "weight"
    return is_weight and type(module).forward is nn.Linear.forward


def as_linear_weight(weight: Any) -> Any:
    """`weight` itself, from now on one that Dynamo looks into if it is a 2-D int4 tensor."""
    if type(weight) in _OF_LINEAR and weight.ndim == 2 and not weight.transposed:
        weight.__class__ = _OF_LINEAR[type(weight)]
    return weight
