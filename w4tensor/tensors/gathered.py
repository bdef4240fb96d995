"""W[ids] of stacked weights without a copy: what transformers' batched_mm multiplies by.

A subclass of its own for each tensor class, so that no reader of a weight's fields can meet bytes
that belong to other experts. It answers questions about its shape, dtype and device, can be seen
through transpose, and multiplies through gathered_linear. For everything else it becomes, there and
then, the indexed copy that W[ids] would have been: saved, made a Parameter, written to or detached,
it is one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from w4tensor import ops
from w4tensor.checks import check_ids
from w4tensor.layout import has_values
from w4tensor.tensors.packed import PackedInt4
from w4tensor.tensors.products import as_autocast, bind, eager_cuda, is_differentiated

__all__ = ["gather"]

aten = torch.ops.aten

# answered by the wrapper: of its shape, dtype, device and place, not of values
_QUESTIONS: set[Any] = {
    attribute.__get__
    for name, attribute in vars(torch._C.TensorBase).items()
    if inspect.isgetsetdescriptor(attribute)
    and name not in ("data", "T", "mT", "H", "mH", "real", "imag")
} | {
    getattr(Tensor, name)
    for name in (
        *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "__len__"),
        *("is_floating_point", "is_complex", "is_conj", "is_neg", "is_inference", "is_contiguous"),
        *("untyped_storage", "storage_offset", "get_device", "_is_view"),
    )
}
# of the last two dimensions, which are those of the stack
_VIEWS: set[Any] = {
    torch.transpose,
    Tensor.transpose,
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.permute,
    Tensor.permute,
    aten.transpose.int,
    aten.permute.default,
}
_PRODUCTS: set[Any] = {
    torch.bmm,
    Tensor.bmm,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    aten.bmm.default,
    aten.matmul.default,
}


def gather(stack: PackedInt4, ids: Tensor, from_end: bool) -> Tensor:
    """stack[ids] for a stacked weight and ids [S], lazily.

    What is written into `stack` later is seen through it. Where the ids are known, that is on a CPU
    outside of a graph, those out of range are refused; on CUDA the product gives zeros for them.

    Args:
        from_end: whether negative ids count from the end, as in indexing.

    Raises:
        IndexError: an id is out of range.
    """
    n_experts = stack.shape[0]
    if ids.device.type == "cpu" and has_values(ids):
        check_ids(ids, n_experts, first=-n_experts if from_end else 0)
    # a copy either way: what is written into ids later must not be seen
    ids = torch.where(ids < 0, ids + n_experts, ids) if from_end else ids.clone()
    cls: Any = type(stack)
    return _gathered_class(cls)(stack, ids)


@functools.cache
def _gathered_class(cls: type) -> Any:
    return type(f"Gathered{cls.__name__}", (_Gathered, cls), {})


class _Field:
    """A field of the copy, which is made when it is asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, w: Any, owner: type) -> Any:
        if w is None:
            return self
        w._become_a_copy()
        return getattr(w, self.name)

    def __set__(self, w: Any, value: Any) -> None:
        w._become_a_copy()
        setattr(w, self.name, value)


if TYPE_CHECKING:
    _Base = PackedInt4
else:
    _Base = object


class _Gathered(_Base):
    """Mixin over a tensor class: stack[ids], [S, N, K] (or [S, K, N], as the stack is seen).

    Tensor data:
        stack: the weight [E, N, K] that was indexed. ids: [S].
    """

    qdata: Any = _Field()
    scale: Any = _Field()
    zero_point: Any = _Field()
    multiple: Any = _Field()
    stack: PackedInt4
    ids: Tensor

    def __new__(cls, stack: PackedInt4, ids: Tensor):
        shape = (ids.shape[0], *stack.shape[1:])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=stack.dtype, device=stack.device, requires_grad=False
        )

    def __init__(self, stack: PackedInt4, ids: Tensor) -> None:
        self.stack, self.ids = stack, ids
        for name in stack.tensor_attribute_names + stack.optional_tensor_attribute_names:
            setattr(self, name, getattr(stack, name))

    def __tensor_flatten__(self):
        return ["stack", "ids"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        return cls(inner["stack"], inner["ids"])

    def _become_a_copy(self) -> None:
        """Change into the tensor class, as an UninitializedParameter does when it is given memory.

        The object stays, and with it what is said of it elsewhere: later writes find one copy.
        """
        copy = self.stack._map(lambda t: aten.index.Tensor(t, [self.ids]))
        del self.stack, self.ids
        self.__dict__.update(copy.__dict__)
        self.__class__ = type(copy)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _without_a_copy(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _without_a_copy(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, stack={self.stack!r})"


def _without_a_copy(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """func of gathered weights; it is given copies where it has to see them whole."""
    if func in _VIEWS and isinstance(args[0], _Gathered):
        stack = func(args[0].stack, *args[1:], **kwargs)
        return type(args[0])(stack, args[0].ids)
    if func in _PRODUCTS and not is_differentiated(*args, *kwargs.values()):
        a, b = bind(func, args, kwargs, ("input", "self"), ("mat2", "other", "tensor2"))
        y = _multiply(a, b)
        if y is not None:
            return y
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, _Gathered):
            value._become_a_copy()
    return func(*args, **kwargs)


def _multiply(a: Any, b: Any) -> Tensor | None:
    """a @ b for a gathered weight and x [S, M, K], or None for another product."""
    w, x = (a, b.mT) if isinstance(a, _Gathered) else (b, a)
    if isinstance(x, PackedInt4) or x.ndim != 3 or w.transposed == (w is a):
        return None
    n_rows, m, k = x.shape
    if n_rows != w.shape[0] or k != w.stack._k:
        return None
    rows = as_autocast(x).reshape(-1, k)
    run = ops.cuda_gathered_linear if eager_cuda(rows) else torch.ops.w4tensor.gathered_linear
    y = run(
        rows,
        w.ids if m == 1 else w.ids.repeat_interleave(m),
        w.stack.qdata,
        w.stack.scale,
        w.stack.zero_point,
        w.group_size,
        w.act_group_size,
        w.layout_version,
    ).reshape(n_rows, m, w.stack.scale.shape[-2])
    return y.mT if w is a else y
