"""Every operator there is, given an int4 weight: it must refuse, or answer as for the dequantised.

Run by test_misuse.py in a process of its own, because PyTorch's own operators end it on some absurd
arguments; the last line on stderr then names the operator. Prints one line for each wrong answer.
"""

from __future__ import annotations

import faulthandler
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tests.weights import CLASSES, Case
from w4tensor.tensors.packed import PackedInt4

aten = torch.ops.aten

# not asked, each for a reason that has nothing to do with the weight
SKIPPED = {
    # ends the process on plain tensors too
    "_batch_norm_impl_index_backward",
    # draw random numbers, then multiply
    "lobpcg",
    "svd_lowrank",
    "pca_lowrank",
    # `plain.data = w` and its like: no dispatcher is asked, and reading the result ends the process
    "set_data",
    # hold the weight inside another tensor, unread
    "_add_batch_dim",
    "_sparse_bsc_tensor_unsafe",
    "_sparse_bsr_tensor_unsafe",
    "_sparse_csc_tensor_unsafe",
    "_sparse_csr_tensor_unsafe",
    "sparse_bsc_tensor",
    "sparse_bsr_tensor",
    "sparse_coo_tensor",
    "sparse_csc_tensor",
    "sparse_csr_tensor",
}
# answers about the wrapper, not about values
ABOUT_THE_OBJECT = {
    "_has_compatible_shallow_copy_type",
    "_version",
    "is_inference",
    "is_shared",
    "__hash__",
    "__repr__",
    "__dir__",
    "__reduce_ex__",
    "__deepcopy__",
    "const_data_ptr",
    "data_ptr",
    "mutable_data_ptr",
    "_cdata",
    "untyped_storage",
    "storage",
    "_typed_storage",
    "__dlpack_device__",
}


def _argument(schema_argument, w, plain: Tensor, turn: list[int]) -> Any:
    """A plausible value; the tensor argument whose turn it is gets the weight."""
    kind = str(schema_argument.type)
    if "Tensor" in kind:
        turn[0] -= 1
        value = w if turn[0] == -1 else plain
        if "List" in kind:
            return [value, value]
        return None if kind.startswith("Optional") and value is plain else value
    if schema_argument.has_default_value():
        return schema_argument.default_value
    if kind.startswith("Optional") or kind == "Generator":
        return None
    return {
        "float": 0.5,
        "bool": False,
        "str": "sum",
        "List[int]": list(w.shape),
        "List[SymInt]": list(w.shape),
        "List[bool]": [True] * 3,
        "Device": torch.device("cpu"),
        "ScalarType": torch.float32,
    }.get(kind, 0)


def overload_calls(op, w, plain) -> Iterator[tuple[tuple, dict]]:
    """One call for each tensor argument of an aten overload."""
    arguments = op._schema.arguments
    for position in range(sum("Tensor" in str(a.type) for a in arguments)):
        turn = [position]
        values = [(a, _argument(a, w, plain, turn)) for a in arguments]
        args = tuple(value for a, value in values if not a.kwarg_only)
        yield args, {a.name: value for a, value in values if a.kwarg_only}


def function_calls(w, plain) -> Iterator[tuple[tuple, dict]]:
    """What functions without a schema are tried with."""
    bias, index = torch.randn(w.shape[-2]), torch.tensor([1, 0])
    for args in (
        (w,),
        (plain, w),
        (w, plain),
        (w, w),
        (plain, w, bias),
        (bias, plain, w),
        (w, 0),
        (w, 0, 1),
        (w, 0, 0, 1),
        (w, -2, -1),
        (index, w),
        (w, index),
        (w, 0, index),
        ([w, w],),
        (w, w.shape),
        (w, *w.shape),
        (w, torch.float32),
    ):
        yield args, {}


def dense_of(value: Any, dense: Tensor) -> Any:
    return dense if isinstance(value, PackedInt4) else value


def wrong(out: Any, func, args: tuple, kwargs: dict, dense: Tensor) -> str | None:
    """Why `out` is not what `func` gives for the dequantised weight, or None if it is."""
    if out is NotImplemented:
        return None
    leaves = [t for t in tree_flatten(out)[0] if not isinstance(t, (str, type(None)))]
    try:
        plain_args, plain_kwargs = tree_map(lambda value: dense_of(value, dense), (args, kwargs))
        expected = func(*plain_args, **plain_kwargs)
    except Exception as error:
        return None if not leaves else f"gave {type(out).__name__} where dense raises {error!r:.80}"
    expected = [t for t in tree_flatten(expected)[0] if not isinstance(t, (str, type(None)))]
    if len(leaves) != len(expected):
        return f"gave {len(leaves)} values instead of {len(expected)}"
    for got, right in zip(leaves, expected, strict=True):
        if isinstance(got, Tensor) != isinstance(right, Tensor):
            return f"gave {type(got).__name__} instead of {type(right).__name__}"
        if not isinstance(got, Tensor):
            if got != right:
                return f"gave {got} instead of {right}"
            continue
        got = got.dequantize() if isinstance(got, PackedInt4) else got
        if got.shape != right.shape:
            return f"gave shape {tuple(got.shape)} instead of {tuple(right.shape)}"
        # int8 activations are off by a percent; bytes read as numbers, by more than all
        error = (got.double() - right.double()).norm()
        if not error <= 0.05 * right.double().norm() + 1e-6:
            return "gave other values"
    return None


def ask(name: str, func, call, args: tuple, kwargs: dict, dense: Tensor) -> int:
    """Call; print what is wrong. Returns 1 where there was an answer."""
    print(name, file=sys.stderr)
    try:
        out = call(*args, **kwargs)
    except Exception:
        return 0
    reason = wrong(out, func, args, kwargs, dense)
    if reason is not None:
        shapes = [type(a).__name__ for a in args]
        print(f"{name}({', '.join(shapes)}): {reason}")
    return 1


def sweep_aten(w, dense: Tensor) -> int:
    answers = 0
    for packet_name in dir(aten):
        packet = getattr(aten, packet_name)
        if packet_name in SKIPPED | ABOUT_THE_OBJECT or not hasattr(packet, "overloads"):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            for args, kwargs in overload_calls(op, w.clone(), torch.randn(dense.shape)):
                answers += ask(str(op), op, op, args, kwargs, dense.clone())
    return answers


def sweep_torch_functions(w, dense: Tensor) -> int:
    answers = 0
    for func, stand_in in torch.overrides.get_testing_overrides().items():
        name = torch.overrides.resolve_name(func) or repr(func)
        owner = getattr(func, "__self__", None)
        bare = getattr(func, "__name__", "")
        bare = getattr(owner, "__name__", "") if bare == "__get__" else bare
        if {bare, name.rsplit(".", 1)[-1]} & (SKIPPED | ABOUT_THE_OBJECT) or "__set__" in name:
            continue
        needed = [
            p
            for p in inspect.signature(stand_in).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        plain = torch.randn(dense.shape)
        for position in range(len(needed)):
            args = tuple(w.clone() if i == position else plain for i in range(len(needed)))
            answers += ask(name, func, func, args, {}, dense.clone())
    return answers


def sweep_torchao_handlers(w, dense: Tensor) -> int:
    """Handlers of torchao's own classes, called past every dispatcher with our tensor."""
    answers = 0
    for cls in torchao_classes():
        for table in (cls._ATEN_OP_TABLE[cls], cls._TORCH_FN_TABLE[cls]):
            for func, handler in list(table.items()):
                plain = torch.randn(dense.shape)
                if isinstance(func, torch._ops.OpOverload):
                    calls = overload_calls(func, w.clone(), plain)
                else:
                    calls = function_calls(w.clone(), plain)
                if getattr(func, "__name__", "") in ABOUT_THE_OBJECT:
                    continue
                for args, kwargs in calls:

                    def call(*args, _func=func, _handler=handler, **kwargs):
                        return _handler(_func, (type(w),), args, kwargs)

                    name = f"{cls.__name__}'s {func}"
                    answers += ask(name, func, call, args, kwargs, dense.clone())
    return answers


def torchao_classes() -> list[type]:
    """Every tensor class of torchao that imports here, prototypes too."""
    import torchao.prototype.mx_formats  # noqa: F401
    import torchao.prototype.quantization.int8_lut_tensor  # noqa: F401
    import torchao.quantization  # noqa: F401
    from torchao.utils import TorchAOBaseTensor

    found, queue = [], [TorchAOBaseTensor]
    while queue:
        for cls in queue.pop().__subclasses__():
            queue.append(cls)
            if cls.__module__.startswith("torchao") and "_ATEN_OP_TABLE" in cls.__dict__:
                found.append(cls)
    return found


# as the real kernels declare them; these answer with numbers whatever they are given
NATIVE_KERNELS = {
    "bf16i4bf16_rowwise": "(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor",
    "bf16i4bf16_rowwise_batched": "(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor",
    "bf16i4bf16_shuffled": "(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor",
    "bf16i4bf16_shuffled_batched": "(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor",
    "f8i4bf16_rowwise": "(Tensor x, Tensor w, Tensor xs, Tensor scale, Tensor zero) -> Tensor",
    "f8i4bf16_shuffled": "(Tensor x, Tensor w, Tensor xs, Tensor scale, Tensor zero) -> Tensor",
}


def pretend_native_kernels() -> list[torch.library.Library]:
    """mslk and fbgemm as if installed: kernels that read any bytes they get."""
    libraries = []
    for namespace in ("mslk", "fbgemm"):
        library = torch.library.Library(namespace, "FRAGMENT")
        for name, schema in NATIVE_KERNELS.items():
            if hasattr(getattr(torch.ops, namespace), name):
                continue
            library.define(name + schema)
            library.impl(name, lambda x, w, *_: x.new_ones(*x.shape[:-1], w.shape[-2]), "CPU")
        libraries.append(library)
    return libraries


def sweep_native_kernels(w, dense: Tensor) -> int:
    answers = 0
    for namespace in ("mslk", "fbgemm"):
        for name in NATIVE_KERNELS:
            op = getattr(getattr(torch.ops, namespace), name).default
            for args, kwargs in overload_calls(op, w.clone(), torch.randn(dense.shape)):
                answers += ask(str(op), op, op, args, kwargs, dense.clone())
    return answers


def main() -> None:
    # the same operands in every run: a loss near 0 has no relative bound under int8 rounding
    torch.manual_seed(0)
    faulthandler.enable()
    keep = pretend_native_kernels()
    answers = 0
    with torch.no_grad():
        for cls in CLASSES:
            # N = K, so that no shape gives a misreading away; then a stack, transposed
            case = Case(cls, n=64, k=64, group_size=16, zero="integer")
            stacked = case.with_(stack=(2,))
            every = ((case.weight(), case.dense()), (stacked.weight().mT, stacked.dense().mT))
            for w, dense in every:
                dense = dense.float()
                answers += sweep_torchao_handlers(w, dense)
                answers += sweep_native_kernels(w, dense)
                if w.ndim == 2:
                    answers += sweep_aten(w, dense)
                    answers += sweep_torch_functions(w, dense)
    del keep
    print(f"{answers} answers", file=sys.stderr)


if __name__ == "__main__":
    main()
