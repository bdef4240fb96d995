"""Operators that move or show an int4 weight without reading its codes: slices, stacks, copies.

All data of a weight are cut along the same dimension, so every operator here is the plain
operator on each of them. Along N and E anything goes; along K only whole blocks and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from w4tensor.errors import MisdispatchError, PackingError, Unsupported
from w4tensor.layout import BLOCK_K, GROUP_SIZES, SCALE_DTYPES, has_values
from w4tensor.tensors.gathered import gather
from w4tensor.tensors.packed import PackedInt4

__all__ = ["register"]

aten = torch.ops.aten
_handlers: list[tuple[list[Any], Callable]] = []
_function_handlers: list[tuple[list[Any], Callable]] = []


def register(cls: Any) -> None:
    """Give `cls` the operators of this file."""
    for ops, handler in _handlers:
        cls.implements(ops)(handler)
    for functions, handler in _function_handlers:
        cls.implements_torch_function(functions)(handler)


def _implements(ops: list[Any]):
    def keep(handler: Callable) -> Callable:
        _handlers.append((ops, handler))
        return handler

    return keep


def _from_front(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(f"dimension {dim} of {ndim}")
    return dim % ndim


def _stored_dim(w, dim: int) -> int:
    """The dimension of the stored [.., N, K] that `dim` of the (transposed) view shows."""
    dim = _from_front(dim, w.ndim)
    if w.transposed and dim >= w.ndim - 2:
        return 2 * w.ndim - 3 - dim
    return dim


def _refuse_k(w, func) -> MisdispatchError:
    return MisdispatchError(
        f"{func} along K would cut packed codes of a {type(w).__name__}; dequantize() it first"
    )


def _swap_last_two(w):
    return w._map(torch.ops.aten.alias.default, transposed=not w.transposed)


@_implements([aten.t.default])
def _t(func, types, args, kwargs):
    if args[0].ndim != 2:
        raise Unsupported(f"t() takes a 2-D weight, this one has {args[0].ndim} dimensions")
    return return_and_correct_aliasing(func, args, kwargs, _swap_last_two(args[0]))


@_implements([aten.transpose.int])
def _transpose(func, types, args, kwargs):
    w, dims = args[0], {_from_front(dim, args[0].ndim) for dim in args[1:]}
    if len(dims) == 1:
        out = w._map(aten.alias.default)
    elif dims == {w.ndim - 2, w.ndim - 1}:
        out = _swap_last_two(w)
    else:
        raise MisdispatchError(
            f"transpose{args[1:]} of a {type(w).__name__} of shape {tuple(w.shape)}: only the last "
            "two dimensions can be seen swapped; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, out)


@_implements([aten.permute.default])
def _permute(func, types, args, kwargs):
    w, order = args[0], [_from_front(dim, args[0].ndim) for dim in args[1]]
    identity = list(range(w.ndim))
    if order == identity:
        out = w._map(aten.alias.default)
    elif order == identity[:-2] + [w.ndim - 1, w.ndim - 2]:
        out = _swap_last_two(w)
    else:
        raise MisdispatchError(
            f"permute{tuple(order)} of a {type(w).__name__}: only the last two dimensions can be "
            "seen swapped; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, out)


@_implements([aten.slice.Tensor])
def _slice(func, types, args, kwargs):
    w, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    size = w.shape[dim]
    stored = _stored_dim(w, dim)
    start, end, step = slice(start, end, step).indices(size)
    if stored < w.ndim - 1:
        out = w._map(lambda t: func(t, stored, start, end, step))
    else:
        out = _slice_k(w, func, start, end, step)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _slice_k(w, func, start: int, end: int, step: int):
    border = max(BLOCK_K, w.group_size)
    if step != 1 or start % border or (end % border and end != w._k) or start >= end:
        raise Unsupported(
            f"a cut {start}:{end}:{step} along K={w._k} is not on borders of {border} codes "
            f"(blocks of {BLOCK_K}, groups of {w.group_size}); move it there, or dequantize() first"
        )
    if (start, end) == (0, w._k):
        return w._map(aten.alias.default)
    # a row with one group keeps its scale only whole: borders of group_size above see to it
    groups = slice(start // w.group_size, end // w.group_size)
    words = slice(start // w.packing.codes, -(-end // BLOCK_K) * BLOCK_K // w.packing.codes)
    dim = w.ndim - 1
    data = {}
    for name, t in w._data():
        part = words if name == "qdata" else groups
        data[name] = func(t, dim, part.start, part.stop)
    return w._with(**data)


@_implements([aten.select.int])
def _select(func, types, args, kwargs):
    w, dim, index = args
    if w.ndim != 3 or _stored_dim(w, dim) != 0:
        raise MisdispatchError(
            f"select({dim}, {index}) of a {type(w).__name__} {tuple(w.shape)}: only one of "
            "stacked weights [E, ..] can be selected; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, w._map(lambda t: func(t, 0, index)))


@_implements([aten.unbind.int])
def _unbind(func, types, args, kwargs):
    w, dim = fill_defaults(args, 2, [0])
    return tuple(w.select(dim, index) for index in range(w.shape[dim]))


def _split(w, sizes: Sequence[int], dim: int) -> list[Tensor]:
    parts, start = [], 0
    for size in sizes:
        parts.append(aten.slice.Tensor(w, dim, start, start + size))
        start += size
    return parts


@_implements([aten.split.Tensor])
def _split_tensor(func, types, args, kwargs):
    w, size, dim = fill_defaults(args, 3, [0])
    whole = w.shape[dim]
    return _split(w, [min(size, whole - start) for start in range(0, whole, size)], dim)


@_implements([aten.split_with_sizes.default])
def _split_with_sizes(func, types, args, kwargs):
    w, sizes, dim = fill_defaults(args, 3, [0])
    if sum(sizes) != w.shape[dim]:
        raise Unsupported(f"split sizes {list(sizes)} do not add up to {w.shape[dim]}")
    return _split(w, sizes, dim)


@_implements([aten.index.Tensor])
def _index(func, types, args, kwargs):
    w, indices = args[0], list(args[1])
    while indices and indices[-1] is None:
        indices.pop()
    # a mask stands for as many dimensions as it has
    masks = (torch.bool, torch.uint8)
    reached = sum(1 if i is None or i.dtype not in masks else i.ndim for i in indices)
    if w.transposed and reached > w.ndim - 2:
        raise MisdispatchError(
            f"indexing rows of a transposed {type(w).__name__}; index, then .t()"
        )
    if reached > w.ndim - 1:
        raise _refuse_k(w, func)
    if len(indices) == 1 and _chooses(w, indices[0]):
        return gather(w, indices[0], from_end=True)
    return w._map(lambda t: func(t, indices))


def _chooses(w, ids: Tensor) -> bool:
    """Whether ids [S] choose experts of stacked weights, as each row of a product does."""
    integers = (torch.int32, torch.int64)
    return w.ndim == 3 and ids.ndim == 1 and ids.dtype in integers and ids.device == w.device


@_implements([aten.index_select.default])
def _index_select(func, types, args, kwargs):
    w, dim, index = args
    stored = _stored_dim(w, dim)
    if stored == w.ndim - 1:
        raise _refuse_k(w, func)
    if stored == 0 and _chooses(w, index):
        return gather(w, index, from_end=False)
    return w._map(lambda t: func(t, stored, index))


@_implements([aten.cat.default])
def _cat(func, types, args, kwargs):
    weights, dim = fill_defaults(args, 2, [0])
    first = next(w for w in weights if isinstance(w, PackedInt4))
    for w in weights:
        if not first._is_like(w):
            raise MisdispatchError(
                f"cat of a {type(first).__name__} with a {type(w).__name__}; dequantize() it first"
            )
        same = w.ndim == first.ndim and w.dtype == first.dtype
        for name in (*first.tensor_attribute_names, *first.optional_tensor_attribute_names):
            same = same and getattr(w, name) == getattr(first, name)
        if not same:
            raise MisdispatchError(f"cat of {first!r} with {w!r}: their formats differ")
    stored = _stored_dim(first, dim)
    if stored == first.ndim - 1:
        for w in weights[:-1]:
            if w._k % max(BLOCK_K, w.group_size):
                raise Unsupported(
                    f"cat along K after K={w._k}, which is not a multiple of {BLOCK_K} codes"
                )
        if len(weights) > 1 and first.group_size not in GROUP_SIZES:
            raise Unsupported(f"cat along K of weights whose one group is K={first._k} wide")
    explicit = any(w.zero_point is not None for w in weights)
    zero_points = [w._explicit_zero_point() for w in weights] if explicit else []
    if explicit:
        wide = (
            torch.float32 if any(z.dtype == torch.float32 for z in zero_points) else torch.float16
        )
        zero_points = [z.to(wide) for z in zero_points]
    changes = {"zero_point": func(zero_points, stored) if explicit else None}
    if "multiple" in first.optional_tensor_data_names:
        # units are of rows
        kept = stored < first.ndim - 1 and all(w.multiple is not None for w in weights)
        changes["multiple"] = func([w.multiple for w in weights], stored) if kept else None
    return first._with(
        qdata=func([w.qdata for w in weights], stored),
        scale=func([w.scale for w in weights], stored),
        **changes,
    )


@_implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _view(func, types, args, kwargs):
    w, size = args[0], list(args[1])
    if size.count(-1) == 1:
        at = size.index(-1)
        rest = w.numel() // max(1, -torch.Size(size).numel())
        size[at] = rest
    same = tuple(size) == tuple(w.shape)
    regrouped = not w.transposed and len(size) in (2, 3) and size[-1] == w.shape[-1]
    if not same and not (regrouped and torch.Size(size).numel() == w.numel()):
        raise MisdispatchError(
            f"view of a {type(w).__name__} {tuple(w.shape)} as {tuple(size)}: only what is before "
            "K can be regrouped, into 2 or 3; dequantize() it first"
        )
    lead = list(w.scale.shape[:-1]) if same else size[:-1]
    out = w._map(lambda t: aten.view.default(t, [*lead, t.shape[-1]]))
    return return_and_correct_aliasing(func, args, kwargs, out)


@_implements([aten.unsqueeze.default])
def _unsqueeze(func, types, args, kwargs):
    w, dim = args
    if w.ndim != 2 or _from_front(dim, w.ndim + 1) != 0:
        raise MisdispatchError(
            f"unsqueeze({dim}) of a {type(w).__name__} {tuple(w.shape)}: only a 2-D weight becomes "
            "[1, N, K]; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, w._map(lambda t: func(t, 0)))


@_implements([aten.expand.default])
def _expand(func, types, args, kwargs):
    w, size = args[:2]
    if tuple(w.shape[d] if new == -1 else new for d, new in enumerate(size)) != w.shape:
        raise MisdispatchError(
            f"expand of a {type(w).__name__} {tuple(w.shape)} to {tuple(size)}: only to its own "
            "shape; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, w._map(aten.alias.default))


@_implements([aten.squeeze.default, aten.squeeze.dim])
def _squeeze(func, types, args, kwargs):
    w = args[0]
    dims = [args[1]] if len(args) == 2 else range(w.ndim)
    gone = {_stored_dim(w, dim) for dim in dims if w.shape[dim] == 1}
    if not gone:
        out = w._map(aten.alias.default)
    elif gone == {0} and w.ndim == 3:
        out = w._map(lambda t: aten.squeeze.dim(t, 0))
    else:
        raise MisdispatchError(
            f"squeeze{tuple(args[1:])} of a {type(w).__name__} {tuple(w.shape)}: only [1, N, K] "
            "becomes [N, K]; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, out)


def _check_units(target, source) -> None:
    """Refuse to write into a part of rows whose other groups have another unit. Reads both."""
    left = target.scale[..., :1].double() * source.multiple[..., :1]
    right = source.scale[..., :1].double() * target.multiple[..., :1]
    if not torch.equal(left, right.to(left.device)):
        raise PackingError(
            "multiple",
            "of another unit than the target's rows",
            "the same unit: quantise whole rows and then cut them",
        )


@_implements([aten.copy_.default])
def _copy(func, types, args, kwargs):
    target, source = args[:2]
    if not (isinstance(target, PackedInt4) and target._is_like(source)):
        raise MisdispatchError(
            f"copy_ of a {type(source).__name__} into a {type(target).__name__}: quantise or "
            "dequantise it first"
        )
    target._check()
    source._check()
    for name in (*target.tensor_attribute_names, *target.optional_tensor_attribute_names):
        if getattr(target, name) != getattr(source, name):
            raise PackingError(
                name, getattr(source, name), f"{getattr(target, name)}, as the target"
            )
    if target.shape != source.shape:
        raise PackingError("shape", tuple(source.shape), f"{tuple(target.shape)}, as the target")
    if target.zero_point is None and source.zero_point is not None:
        raise PackingError("zero_point", "a tensor", "None (symmetric), as the target")
    if target.multiple is not None and source.multiple is None:
        raise PackingError("multiple", None, "a tensor (integer scales), as the target")
    if target.multiple is not None and target.multiple.stride(-2) != target.multiple.shape[-1]:
        _check_units(target, source)
    target.qdata.copy_(source.qdata)
    target.scale.copy_(source.scale)
    if target.zero_point is not None:
        target.zero_point.copy_(source._explicit_zero_point())
    if target.multiple is not None:
        target.multiple.copy_(source.multiple)
    return target


@_implements([aten._to_copy.default])
def _to_copy(func, types, args, kwargs):
    w = args[0]
    to = w._get_to_kwargs(*args[1:], **kwargs)
    device, dtype, non_blocking = to["device"], to["dtype"], to["non_blocking"]
    if dtype not in SCALE_DTYPES:
        raise Unsupported(f"a {type(w).__name__} cannot become {dtype}; give one of {SCALE_DTYPES}")
    w._check()

    data = {}
    for name, t in w._data():
        to_dtype = dtype if name == "scale" else t.dtype
        data[name] = t.to(device, dtype=to_dtype, non_blocking=non_blocking, copy=True)
    if w.multiple is not None and _may_round(w.scale, dtype):
        data["multiple"] = None
    return w._with(**data)


def _may_round(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales may be others in `dtype`. Those that quantize.py makes are exact in bf16."""
    if dtype in (scale.dtype, torch.float32):
        return False
    if dtype == torch.float16:
        return True
    return has_values(scale) and not torch.equal(scale.to(dtype).to(scale.dtype), scale)


@_implements([aten._pin_memory.default])
def _pin_memory(func, types, args, kwargs):
    return args[0]._map(lambda t: t.pin_memory())


@_implements([aten.is_pinned.default])
def _is_pinned(func, types, args, kwargs):
    return args[0].qdata.is_pinned()


def _set_data(func, types, args, kwargs):
    """`param.data = other`: the fields move along, so that no stale weight stays behind."""
    target, source = args
    if isinstance(source, PackedInt4):
        # a gathered weight becomes a copy when its fields are read
        source._check()
    if not (isinstance(target, PackedInt4) and target._is_like(source)):
        raise MisdispatchError(
            f"a {type(source).__name__} assigned to the data of a {type(target).__name__}; use a "
            "new Parameter instead"
        )
    with torch._C.DisableTorchFunctionSubclass():
        func(target, source)
    for name in (
        *target.tensor_data_names,
        *target.tensor_attribute_names,
        *target.optional_tensor_data_names,
        *target.optional_tensor_attribute_names,
    ):
        setattr(target, name, getattr(source, name))


def _share_memory(func, types, args, kwargs):
    w = args[0]
    for _, t in w._data():
        t.share_memory_()
    return w


def _is_shared(func, types, args, kwargs):
    return args[0].qdata.is_shared()


def _no_memory(func, types, args, kwargs):
    raise MisdispatchError(
        f"{func} wants memory with values in it, an int4 weight has codes; use its fields, or "
        "dequantize() it first"
    )


_function_handlers += [
    ([torch.Tensor.data.__set__], _set_data),  # type: ignore[attr-defined]
    ([torch.Tensor.share_memory_], _share_memory),
    ([torch.Tensor.is_shared], _is_shared),
    ([torch.Tensor.__dlpack__, aten.set_.source_Tensor_storage_offset], _no_memory),
    # these ask no dispatcher, and end the process on a tensor without memory
    ([torch.Tensor.set_, torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_], _no_memory),
]
