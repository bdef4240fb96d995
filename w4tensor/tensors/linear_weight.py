"""Weights as nn.Linear holds them: to Dynamo no tensors, but objects with fields.

A tensor of a class of its own is dear in compiled code: at every call Dynamo guards each one and
AOT takes each one apart, in Python, which takes longer than most of its products do. An object with
__torch_function__ is followed into that function instead, and the fields that it reads are plain
inputs of the graph. That serves F.linear, which is all that nn.Linear asks of its weight; any other
operator on it breaks a compiled graph, so other weights stay tensors.

Dynamo guards each field that it reads, and then has to walk to every weight at every call. It skips
a module whose dicts are as they were if nothing below has more than guards on itself, so here one
guard on the weight, of the format of all its fields, takes their place. A dict of a module tells of
another Parameter, not of other fields in the same one: a change of a guarded format in place makes
all graphs with such weights invalid (`_epoch`). The bytes are read from the weight at every call.

From PyTorch 2.13 on, a setting of Dynamo is that of the thread which made it, here the importing
one. Compiled in another, these weights are tensors like any other.

The classes have the names of their parents: in files, messages and summary() they are those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from torch._dynamo.guards import install_guard
from torch._dynamo.source import (
    AttrSource,
    ChainedSource,
    TypeSource,
    is_from_unspecialized_nn_module_source,
)
from torch._guards import Guard, Source
from torch.compiler import is_dynamo_compiling

from w4tensor.tensors.act_quant import Int4ActQuantTensor
from w4tensor.tensors.coalesced import CudaCoalescedInt4Tensor
from w4tensor.tensors.packed import PackedInt4

__all__ = ["as_linear_weight", "wants"]

# every graph with one of these weights guards on it; not an int, which Dynamo may make symbolic
_epoch = "0"
# the handler of F.linear is the same in both classes
_product = CudaCoalescedInt4Tensor._linear
# what compiled code reads of a weight, beside its class
_READ = (
    *Int4ActQuantTensor.tensor_data_names,
    *Int4ActQuantTensor.tensor_attribute_names,
    *Int4ActQuantTensor.optional_tensor_data_names,
    *Int4ActQuantTensor.optional_tensor_attribute_names,
    "ndim",
    "__torch_function__",
)


class _LinearWeight(PackedInt4):
    """What both classes add: compiled code guards their fields as one."""

    @staticmethod
    def _linear(func, types, args, kwargs):  # type: ignore[override]
        y = _product(func, types, args, kwargs)
        # to read _epoch is to guard on it
        if is_dynamo_compiling() and _epoch:
            weight = args[1] if len(args) > 1 else kwargs["weight"]  # noqa: F841
            comptime(_guard_format)
        return y

    def __setattr__(self, name: str, value: Any) -> None:
        # swap_tensors, by which module.to(..) works, sets __dict__
        guarded = self.__dict__.get("_guarded")
        super().__setattr__(name, value)
        if guarded is not None:
            self.__dict__.pop("_guarded", None)
            if self._guarded_format() != guarded:
                _invalidate()

    def _guarded_format(self) -> tuple[Any, ...]:
        """The format, from now on watched: computed once and again when a field is set."""
        if "_guarded" not in self.__dict__:
            self.__dict__["_guarded"] = self._format()
        return self.__dict__["_guarded"]

    def _format(self) -> tuple[Any, ...]:
        """All that compiled code knows of the fields, which is all but their bytes."""
        names = (
            self.tensor_data_names
            + self.tensor_attribute_names
            + self.optional_tensor_data_names
            + self.optional_tensor_attribute_names
        )
        return (type(self).__qualname__, *(_known(getattr(self, name)) for name in names))


def _known(field: Any) -> Any:
    if not isinstance(field, Tensor):
        return field
    flags = field.requires_grad, field.is_inference(), field.is_conj(), field.is_neg()
    kind = type(field).__qualname__
    return kind, field.dtype, field.device, field.shape, field.stride(), flags


def _invalidate() -> None:
    global _epoch
    _epoch = str(int(_epoch) + 1)


def _guard_format(ctx: Any) -> None:
    """While Dynamo traces the product: one guard instead of those that it made of the fields."""
    traced = ctx.get_local("weight")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    source, weight = traced.source, getattr(traced, "value", None)
    # sizes of what a module does not hold may be symbolic; what is no _LinearWeight is a tensor
    if not isinstance(weight, _LinearWeight) or not is_from_unspecialized_nn_module_source(source):
        return
    guards = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.guards.inner
    since: list[Guard] = []
    for guard in reversed(guards):
        since.append(guard)
        if guard.originating_source == source and guard.create_fn_name() == "TYPE_MATCH":
            break
    for guard in since:
        if _is_of_format(guard, source):
            guards.discard(guard)
    if not any(guard.create_fn is _format_match for guard in since):
        install_guard(source.make_guard(_format_match))


def _is_of_format(guard: Guard, weight: Source) -> bool:
    """Whether the type and the format of `weight` say what this guard does."""
    source, kind = guard.originating_source, guard.create_fn_name()
    if source == weight:
        absent = getattr(guard.create_fn, "keywords", {}).get("attr")
        return kind == "NOT_PRESENT_IN_GENERIC_DICT" and absent in _READ
    depth = 0
    while isinstance(source, ChainedSource) and source.base != weight:
        source, depth = source.base, depth + 1
    if isinstance(source, TypeSource) or getattr(source, "member", None) == "__class__":
        return isinstance(source, ChainedSource)
    # that two weights have the same qdata is no format
    known = isinstance(source, AttrSource) and source.member in _READ and depth == 0
    return known and kind != "DUPLICATE_INPUT"


def _format_match(builder: Any, guard: Guard) -> None:
    known = builder.get(guard)._guarded_format()

    def match(weight: Any) -> bool:
        return isinstance(weight, _LinearWeight) and weight._guarded_format() == known

    what = f"{guard.name}._guarded_format() == {known}"
    builder.get_guard_manager(guard).add_lambda_guard(match, [what], guard.user_stack)


class CoalescedLinearWeight(_LinearWeight, CudaCoalescedInt4Tensor):
    """A CudaCoalescedInt4Tensor [N, K] that Dynamo looks into."""


class ActQuantLinearWeight(_LinearWeight, Int4ActQuantTensor):
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
