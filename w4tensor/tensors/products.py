"""Operators that multiply by an int4 weight, and the embedding lookup.

A product that sums over K goes to torch.ops.w4tensor. One that sums over N (a gradient, x @ W)
cannot use codes packed along K and multiplies by the dequantised weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from w4tensor import ops
from w4tensor.errors import MisdispatchError, Unsupported
from w4tensor.tensors.packed import PackedInt4

__all__ = ["as_autocast", "bind", "eager_cuda", "is_differentiated", "register"]

aten = torch.ops.aten
_handlers: list[tuple[list[Any], list[Any], Callable]] = []


def register(cls: Any) -> None:
    """Give `cls` the operators of this file, as torch functions and as the aten ops below them."""
    cls._linear = staticmethod(_as_function(_f_linear))
    for functions, operators, handler in _handlers:
        # called by name, an aten op is a function too, and would decompose before it gets below
        cls.implements_torch_function(functions + operators)(_as_function(handler))
        cls.implements(operators)(handler)


def _implements(functions: list[Any], operators: list[Any]):
    def keep(handler: Callable) -> Callable:
        _handlers.append((functions, operators, handler))
        return handler

    return keep


def is_differentiated(*operands: Any) -> bool:
    """Whether forward mode or a gradient of torch.func follows what is called, of which our
    operators know nothing: their tangents would be zero."""
    # a graph that was made without a dual level is not for calls within one
    if _is_differentiated_now() or forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return False
    # forward_ad does not know of a level that a graph enters; below autograd there are no tangents
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView):
        return False
    return any(map(_has_tangent, operands))


def _has_tangent(t: Any) -> bool:
    if not isinstance(t, Tensor) or isinstance(t, PackedInt4):
        return False
    return forward_ad.unpack_dual(t, level=0).tangent is not None


# asked when a graph is made, in which the level may change
@torch.compiler.assume_constant_result
def _is_differentiated_now() -> bool:
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack()
    return any(each.key() in (kinds.Grad, kinds.Jvp) for each in stack)


def _as_function(handler: Callable) -> Callable:
    """`handler` of a function, above autograd. What it cannot follow goes to PyTorch's operators,
    which come back to the handlers below it, piece by piece."""

    @functools.wraps(handler)
    def called(func, types, args, kwargs):
        if is_differentiated(*args, *kwargs.values()):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return handler(func, types, args, kwargs)

    return called


def as_autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a matrix product: __torch_function__ runs before that cast."""
    device = x.device.type
    # autocast knows no meta device, and says so by raising
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device))
    return x


def eager_cuda(x: Tensor, other: Tensor | None = None) -> bool:
    """Whether nobody but the kernel waits for this product: no trace, no gradient, no mode and no
    transform of torch.func, whichever operand it may follow.

    The dispatcher and the autograd wrapper of an operator in Python take 15 us a call.
    """
    return (
        type(x) is Tensor
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (other is not None and other.requires_grad))
        )
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _linear(x: Tensor, w, bias: Tensor | None = None) -> Tensor:
    """x [.., K] times the stored [N, K] transposed, or [E, M, K] times [E, N, K]."""
    x = as_autocast(x)
    linear = ops.cuda_linear if eager_cuda(x, bias) else torch.ops.w4tensor.linear
    return linear(
        x,
        w.qdata,
        w.scale,
        w.zero_point,
        bias,
        w.group_size,
        w.act_group_size,
        w.layout_version,
        w.multiple,
    )


def _matmul(a: Any, b: Any) -> Tensor:
    """torch.matmul with the weight on either side, plain or seen through transpose."""
    if isinstance(a, PackedInt4) and isinstance(b, PackedInt4):
        raise MisdispatchError("a product of two int4 weights; dequantize() one of them first")
    if isinstance(b, PackedInt4):
        if b.transposed:
            return _linear(_stack_like(a, b), b)
        return torch.matmul(as_autocast(a), _plain(b, as_autocast(a)))
    if a.transposed:
        return torch.matmul(_plain(a, as_autocast(b)), as_autocast(b))
    if b.ndim == 1:
        return _linear(_stack_like(b, a), a)
    return _linear(_stack_like(b.mT, a), a).mT


def _plain(w, x: Tensor) -> Tensor:
    return w.dequantize(x.dtype)


def bind(func, args, kwargs, *names: tuple[str, ...]) -> list[Any]:
    """Operands by position or by one of their names; what no handler serves (out=) is refused."""
    rest = {name: value for name, value in kwargs.items() if value is not None}
    bound = list(args)
    for aliases in names[len(args) :]:
        bound.append(next((rest.pop(name) for name in aliases if name in rest), None))
    if rest or len(bound) > len(names):
        raise Unsupported(f"{func} with {sorted(rest) or 'more operands'} takes no int4 weight")
    return bound


def _stack_like(x: Tensor, w) -> Tensor:
    """x with the leading E of a stacked weight, as matmul's broadcasting would give it."""
    if w.ndim == 2:
        return x
    if x.ndim == 1:
        raise MisdispatchError("a vector times stacked int4 weights; give [E, M, K]")
    if x.ndim > 3 or (x.ndim == 3 and x.shape[0] not in (1, w.shape[0])):
        raise Unsupported(
            f"x of shape {tuple(x.shape)} does not broadcast over {w.shape[0]} stacked weights"
        )
    return x.expand(w.shape[0], *x.shape[-2:])


@_implements([torch.nn.functional.linear], [aten.linear.default])
def _f_linear(func, types, args, kwargs):
    x = args[0] if args else kwargs["input"]
    w = args[1] if len(args) > 1 else kwargs["weight"]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    # not w.ndim, which goes through __torch_function__
    if not isinstance(w, PackedInt4) or w.transposed or w.qdata.ndim != 2:
        raise MisdispatchError(
            f"F.linear takes an int4 tensor as its weight [N, K] only; dequantize() {w!r} first"
        )
    return _linear(x, w, bias)


@_implements(
    [
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.linalg.matmul,
        torch.mm,
        torch.Tensor.mm,
        torch.bmm,
        torch.Tensor.bmm,
    ],
    [aten.matmul.default, aten.mm.default, aten.bmm.default],
)
def _f_matmul(func, types, args, kwargs):
    a, b = bind(func, args, kwargs, ("input", "self"), ("mat2", "other", "tensor2"))
    rank = {"mm": 2, "bmm": 3}.get(func.__name__.split(".")[0])
    if rank is not None and (a.ndim != rank or b.ndim != rank):
        raise Unsupported(f"{func.__name__} takes {rank}-D operands, not {a.ndim}-D and {b.ndim}-D")
    if a.shape[-1] != b.shape[-2 if b.ndim > 1 else -1] or (rank == 3 and a.shape[0] != b.shape[0]):
        raise Unsupported(f"{tuple(a.shape)} @ {tuple(b.shape)}: the shapes do not match")
    return _matmul(a, b)


@_implements([torch.Tensor.__rmatmul__], [])
def _f_rmatmul(func, types, args, kwargs):
    return _matmul(args[1], args[0])


@_implements([torch.addmm, torch.Tensor.addmm], [aten.addmm.default])
def _f_addmm(func, types, args, kwargs):
    kwargs = dict(kwargs)
    beta, alpha = kwargs.pop("beta", 1), kwargs.pop("alpha", 1)
    bias, a, b = bind(func, args, kwargs, ("input", "self"), ("mat1",), ("mat2",))
    if isinstance(bias, PackedInt4):
        raise MisdispatchError("addmm onto an int4 weight; dequantize() it first")
    if a.ndim != 2 or b.ndim != 2:
        raise Unsupported(f"addmm takes 2-D operands, not {a.ndim}-D and {b.ndim}-D")
    fused = isinstance(b, PackedInt4) and b.transposed and bias.shape == b.shape[-1:]
    if fused and alpha == beta == 1:
        return _linear(a, b, bias)
    y = _matmul(a, b)
    if alpha != 1:
        y = alpha * y
    # beta = 0 ignores even a bias that is not finite
    return y if beta == 0 else (y + beta * bias).to(y.dtype)


@_implements([torch._grouped_mm], [aten._grouped_mm.default])
def _f_grouped_mm(func, types, args, kwargs):
    x, w = args[:2]
    rest = dict(zip(("offs", "bias", "out_dtype"), args[2:], strict=False)) | kwargs
    stacked = isinstance(w, PackedInt4) and w.ndim == 3 and w.transposed
    if not stacked or x.ndim != 2 or rest.get("offs") is None or rest.get("bias") is not None:
        raise MisdispatchError(
            "torch._grouped_mm takes x [T, K], int4 weights [E, N, K] under transpose(-2, -1), "
            "offs and no bias; dequantize() for other forms"
        )
    x = as_autocast(x)
    run = ops.cuda_grouped_linear if eager_cuda(x) else torch.ops.w4tensor.grouped_linear
    y = run(
        x,
        w.qdata,
        w.scale,
        w.zero_point,
        rest["offs"],
        w.group_size,
        w.act_group_size,
        w.layout_version,
    )
    return y if rest.get("out_dtype") is None else y.to(rest["out_dtype"])


@_implements([torch.nn.functional.embedding], [])
def _f_embedding(func, types, args, kwargs):
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    indices, w, _, max_norm, *_ = bind(
        func, args, kwargs, *((name,) for name in names), ("sparse",)
    )
    if max_norm is not None:
        raise Unsupported("max_norm would renormalise quantised rows in place")
    return _look_up(indices, w)


@_implements([], [aten.embedding.default])
def _embedding(func, types, args, kwargs):
    return _look_up(args[1], args[0])


def _look_up(indices: Tensor, w) -> Tensor:
    if not isinstance(w, PackedInt4) or w.ndim != 2 or w.transposed:
        raise MisdispatchError("an embedding looks rows up in a 2-D int4 weight [N, K] only")
    # index_select refuses negative indices, as an embedding does
    found = w.index_select(0, indices.reshape(-1)).dequantize()
    return found.reshape(*indices.shape, w._k)
