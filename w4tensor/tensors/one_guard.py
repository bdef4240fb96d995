"""One guard on a weight's format where Dynamo would make one on each field that it reads.

Guarding fields, Dynamo has to walk to every weight at every call. It skips a module whose dicts are
as they were if nothing below has more than guards on itself (torch/_dynamo/guards.py,
find_tag_safe_roots), so here one guard on the weight, of the format of all its fields, takes their
place. A dict of a module tells of another Parameter, not of other fields in the same one: a change
of a guarded format in place makes all graphs with such weights invalid, until it is changed back
(`_epoch`). The bytes are read from the weight at every call.

guard_as_one() is for weights of modules, where what is traced reads no more of them than fields:
the F.linear of linear_weight.py, to whose weights Dynamo sees objects, and the experts block, to
which they are tensors of a class of their own.

Made with what PyTorch 2.11 to 2.13 have inside. Where a release lacks it, Dynamo's guards stay.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

try:
    from torch._dynamo.comptime import comptime
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import (
        AttrSource,
        ChainedSource,
        SubclassAttrListSource,
        TypeSource,
        is_from_unspecialized_nn_module_source,
    )
except ImportError:
    comptime = None  # type: ignore[assignment]
try:
    # from 2.13 on: guards of a region that is compiled once and used again
    from torch._dynamo.guards import GUARD_VALUE_DISPATCH, GuardCheckSpec
except ImportError:
    GUARD_VALUE_DISPATCH = None  # type: ignore[assignment]

__all__ = ["Watched", "guard_as_one"]

# every graph with one of these guards depends on it: hashes of the changes so far, xor-ed, so that
# one there and one back cancel; not an int, which Dynamo may make symbolic
_epoch = "0"
_losses = itertools.count()
_lock = threading.Lock()
# what compiled code reads of a weight beside its fields, and its class says
_READ = ("act_group_size", "multiple", "ndim", "__torch_function__")


class Watched:
    """A mixin: a format that compiled code guards as one, and a watch on it."""

    @classmethod
    def _field_names(cls) -> list[str]:
        raise NotImplementedError

    # {id of a weight: its guarded format}, in its __dict__, which swap_tensors (by which
    # module.to(..) works) gives to another one: for a moment it is that of both
    _guarded: dict[int, tuple[Any, ...]]

    def __setattr__(self, name: str, value: Any) -> None:
        guarded, cls = self.__dict__.get("_guarded"), type(self)
        super().__setattr__(name, value)
        # swap_tensors sets the class first, mostly to what it is
        if guarded is None or (name == "__class__" and type(self) is cls):
            return
        # not earlier: to set data is to set the fields
        before = guarded.pop(id(self), None)
        if before is None:
            return
        after = None
        try:
            if type(self) is cls:
                after = self._guarded_format()
        finally:
            _note(id(self), before, after)

    def __getstate__(self) -> dict[str, Any]:
        # what is loaded may be elsewhere (map_location), and no file tells whether it was compiled
        return {name: value for name, value in self.__dict__.items() if name != "_guarded"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        # of a weight whose id another one may have some day
        copied.__dict__.pop("_guarded", None)
        return copied

    def _guarded_format(self) -> tuple[Any, ...]:
        """The format, from now on watched: computed once and again when a field is set."""
        guarded = self.__dict__.setdefault("_guarded", {})
        if id(self) not in guarded:
            guarded[id(self)] = self._format()
        return guarded[id(self)]

    def _format(self) -> tuple[Any, ...]:
        """All that compiled code knows of the fields, which is all but their bytes."""
        fields = (_known(getattr(self, name)) for name in self._field_names())
        return (type(self).__qualname__, *fields)


def guard_as_one(weight: Any) -> None:
    """Where Dynamo traces a product with a Watched weight, after it: one guard for its fields."""
    # to read _epoch is to guard on it
    if is_dynamo_compiling() and _epoch and comptime is not None:
        comptime(_guard_format)


def _known(field: Any) -> Any:
    if not isinstance(field, Tensor):
        return field
    flags = field.requires_grad, field.is_inference(), field.is_conj(), field.is_neg()
    kind = type(field).__qualname__
    return kind, field.dtype, field.device, field.shape, field.stride(), flags


def _note(weight: int, before: tuple[Any, ...], after: tuple[Any, ...] | None) -> None:
    """after: None where the weight is watched no more, and nothing will tell of its way back."""
    global _epoch
    if before == after:
        return
    with _lock:
        now = ("lost", next(_losses)) if after is None else (weight, repr(after))
        _epoch = str(int(_epoch) ^ hash((weight, repr(before))) ^ hash(now))


def _guard_format(ctx: Any) -> None:
    """One guard instead of those that Dynamo made of the fields of guard_as_one's `weight`."""
    try:
        traced = ctx.get_local("weight")
        traced = traced._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
        # an object, or a tensor, of which there is no more than a fake one
        is_object = hasattr(traced, "value")
        source, kind = traced.source, type(traced.value) if is_object else traced.class_type
        # sizes of what a module does not hold may be symbolic
        if not is_from_unspecialized_nn_module_source(source) or not issubclass(kind, Watched):
            return
        first = "TYPE_MATCH" if is_object else "TENSOR_MATCH"
        read = (*kind._field_names(), *_READ)
        guards = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.guards.inner
        since = []
        for guard in reversed(guards):
            since.append(guard)
            if guard.originating_source == source and guard.create_fn_name() == first:
                break
        of_format = [guard for guard in since if _is_of_format(guard, source, read)]
        ours = source.make_guard(_format_match)
        known = any(g.create_fn is _format_match and g.originating_source == source for g in since)
    except AttributeError:
        # of another release: every guard stays
        return
    for guard in of_format:
        guards.discard(guard)
    if not known:
        install_guard(ours)


def _is_of_format(guard: Any, weight: Any, read: tuple[str, ...]) -> bool:
    """Whether the type and the format of `weight` say what this guard does."""
    source, kind = guard.originating_source, guard.create_fn_name()
    if source == weight:
        if kind == "TENSOR_SUBCLASS_METADATA_MATCH":
            return True
        asked = getattr(guard.create_fn, "keywords", {}).get("attr")
        return kind in ("NOT_PRESENT_IN_GENERIC_DICT", "HASATTR") and asked in read
    depth = 0
    while isinstance(source, ChainedSource) and source.base != weight:
        source, depth = source.base, depth + 1
    # what AOT takes a tensor apart into follows from its fields too
    of_type = (TypeSource, SubclassAttrListSource)
    if isinstance(source, of_type) or getattr(source, "member", None) == "__class__":
        return isinstance(source, ChainedSource)
    # that two weights have the same qdata is no format
    known = isinstance(source, AttrSource) and source.member in read and depth == 0
    return known and kind != "DUPLICATE_INPUT"


def _matches(weight: Any, known: tuple[Any, ...]) -> bool:
    return isinstance(weight, Watched) and weight._guarded_format() == known


def _format_match(builder: Any, guard: Any) -> None:
    known = builder.get(guard)._guarded_format()
    what = f"{guard.name}._guarded_format() == {known}"
    manager = builder.get_guard_manager(guard)
    manager.add_lambda_guard(lambda weight: _matches(weight, known), [what], guard.user_stack)


if GUARD_VALUE_DISPATCH is not None:
    GUARD_VALUE_DISPATCH[_format_match.__name__] = GuardCheckSpec(
        get_metadata_fn=lambda guard, weight: weight._guarded_format(), eval_fn=_matches
    )
