"""What became of a model: its weights, their bytes, the kernels that serve them, and why not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from w4tensor import arch, dispatch, hf_experts
from w4tensor.config import EXPERTS, REASONS_ATTRIBUTE
from w4tensor.tensors.packed import PackedInt4

__all__ = ["Row", "Summary", "summary"]

TOKENS = (1, 16, 256, 4096)


@dataclass(frozen=True)
class Row:
    """One parameter of two or more dimensions.

    Fields:
        name: of the parameter. kind: its tensor class, or its module's where it is plain.
        shape: as the model sees it. bytes_before: in its dtype; bytes_after: as it is held.
        kernels: which kernel serves M = 1, 16, 256, 4096; empty where nothing was quantised.
        note: why it was left alone; of experts, what multiplies by them, and why; of int8
            activations, where they cost more than they save.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    kernels: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Summary:
    """The rows of summary(); printed, a table."""

    rows: tuple[Row, ...]
    device: str

    def __str__(self) -> str:
        tokens = (f"M={m}" for m in TOKENS)
        header: tuple[str, ...] = ("layer", "class", "shape", "before", "after", *tokens, "note")
        table = [header]
        for row in self.rows:
            sizes = (_mebibytes(row.bytes_before), _mebibytes(row.bytes_after))
            kernels = row.kernels or ("-",) * len(TOKENS)
            shape = "x".join(map(str, row.shape))
            table.append((row.name, row.kind, shape, *sizes, *kernels, row.note))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        before = sum(row.bytes_before for row in self.rows)
        after = sum(row.bytes_after for row in self.rows)
        quantised = sum(bool(row.kernels) for row in self.rows)
        lines.append(
            f"{quantised} of {len(self.rows)} weights are int4; {_mebibytes(before)} became "
            f"{_mebibytes(after)} ({self.device})"
        )
        return "\n".join(lines)


def summary(model: nn.Module, device: torch.device | str | int | None = None) -> Summary:
    """Describe every weight of two or more dimensions in `model`.

    Args:
        model: any module, quantised or not.
        device: whose kernels to name; by default the current CUDA device, or none. "cpu": none.

    >>> from torchao.quantization import quantize_
    >>> from w4tensor import W4CoalescedConfig
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 8))
    >>> quantize_(model, W4CoalescedConfig())
    >>> [row.note for row in summary(model).rows]
    ['', 'N=8 is below 64: a gate or router, nothing to gain']
    """
    device = torch.device("cuda" if device is None else device)
    target = arch.current(device.index) if device.type == "cuda" else None
    rows = []
    owner: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or weight.ndim < 2:
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            first = owner.setdefault(id(weight), full_name)
            rows.append(_row(full_name, module, name, weight, first, target))
    where = "no CUDA device: reference path" if target is None else f"kernels for {target}"
    return Summary(tuple(rows), where)


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"


def _row(full_name, module, name, weight, first, target) -> Row:
    before, after = weight.numel() * weight.element_size(), _bytes(weight)
    kind = type(module).__name__
    kernels: tuple[str, ...] = ()
    note = module.__dict__.get(REASONS_ATTRIBUTE, {}).get(name, "")
    if isinstance(weight, PackedInt4):
        kind = type(weight).__name__
        kernels = tuple(_kernel(weight, m, target) for m in TOKENS)
        note = (hf_experts.path_of(module) if weight.ndim == 3 else None) or note
        rounded = [f"M={m}" for m, name in zip(TOKENS, kernels, strict=True) if _is_rounded(name)]
        if rounded and not note:
            note = f"W4A16 would be faster at {', '.join(rounded)}"
    elif not note and weight.ndim == 3 and any(re.fullmatch(e, full_name) for e in EXPERTS):
        note = "experts: with_experts(config) would quantise them"
    elif not note and not isinstance(module, nn.Linear):
        note = f"{type(module).__name__}, not a Linear"
    if first != full_name:
        before, after, note = 0, 0, f"tied to {first}"
    return Row(full_name, kind, tuple(weight.shape), before, after, kernels, note)


def _bytes(weight: torch.Tensor) -> int:
    """As it is held: a wrapper of other tensors holds theirs."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return sum(_bytes(getattr(weight, name)) for name in names)
    return weight.numel() * weight.element_size()


def _kernel(weight: PackedInt4, m: int, target: dispatch.Arch | None) -> str:
    if target is None:
        return "reference"
    return dispatch.plan(problem_of(weight, m), target).name


def _is_rounded(kernel: str) -> bool:
    """Whether it is one of W4A16's, on activations that a launch before it has rounded."""
    return kernel.startswith("rounded x")


def problem_of(weight: PackedInt4, m: int, dtype: torch.dtype | None = None) -> dispatch.Problem:
    """The problem that `m` tokens times `weight` pose to dispatch."""
    half = (dtype or weight.dtype) == torch.float16
    act: Literal["bf16", "fp16", "int8"] = "fp16" if half else "bf16"
    n, k = weight.scale.shape[-2], weight.scale.shape[-1] * weight.group_size
    return dispatch.Problem(
        m=m,
        n=n,
        k=k,
        group_size=weight.group_size,
        act=act if weight.act_group_size is None else "int8",
        symmetric=weight.zero_point is None,
        batch=weight.scale.shape[0] if weight.ndim == 3 else 1,
        act_group_size=weight.act_group_size,
        integer_scales=weight.multiple is not None,
    )
