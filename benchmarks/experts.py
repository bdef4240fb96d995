"""One experts block in each implementation that we compare; humming's is in peer_humming.py.

    y[t] = sum_j weights[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t, j]

An adapter is made from codes gate_up [E, 2 I, H] and down [E, H, I]. `route(ids, weights)` gives
the block for one routing, which takes x [T, H]; unless it says otherwise its time includes
sorting the routing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peer_humming import HummingExperts
from benchmarks.peers import OURS, Act, only
from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor
from w4tensor.tensors import experts
from w4tensor.testing import Int4Codes

__all__ = ["EXPERTS", "Block", "reference_block"]

Block = Callable[[Tensor], Tensor]


def grouped_block(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sorted, two torch._grouped_mm: what transformers' "grouped_mm" does, for any weight."""
    tokens, top_k = ids.shape
    expert_of_row, order = ids.flatten().sort(stable=True)
    experts = torch.arange(gate_up.shape[0], device=x.device)
    offs = torch.searchsorted(expert_of_row, experts, right=True).to(torch.int32)
    h = torch._grouped_mm(x[order // top_k], gate_up.transpose(-2, -1), offs=offs)
    gate, up = h.chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offs)
    y = y * weights.flatten()[order, None].to(y.dtype)
    row_of_pair = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=x.device)
    )
    return y[row_of_pair].view(tokens, top_k, -1).sum(1)


def batched_block(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Pair by pair, two torch.bmm: what transformers' "batched_mm" does, its way to decode."""
    tokens, top_k = ids.shape
    pairs = ids.flatten()
    h = torch.bmm(gate_up[pairs], x.repeat_interleave(top_k, 0)[..., None])[..., 0]
    gate, up = h.chunk(2, dim=-1)
    y = torch.bmm(down[pairs], (F.silu(gate) * up)[..., None])[..., 0]
    y = y * weights.flatten()[:, None].to(y.dtype)
    return y.view(tokens, top_k, -1).sum(1)


def fused_block(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Our own operator for the whole block."""
    return experts(x, ids, weights, gate_up, down)


def reference_block(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Int4Codes, down: Int4Codes
) -> Tensor:
    """The definition in fp32, expert by expert."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        one = (Int4Codes(c.q[e], c.scale[e], _at(c.zero_point, e)) for c in (gate_up, down))
        w1, w2 = (codes.dequantize() for codes in one)
        gate, up = (x[token].float() @ w1.mT).chunk(2, dim=-1)
        y.index_add_(0, token, weights[token, slot, None] * ((F.silu(gate) * up) @ w2.mT))
    return y


def _at(zero_point: Tensor | None, expert: int) -> Tensor | None:
    return None if zero_point is None else zero_point[expert]


class Stacked:
    """Two stacked weights, and a function of (x, ids, weights, gate_up, down) that uses them."""

    def __init__(self, block: Callable[..., Tensor], gate_up: Tensor, down: Tensor):
        self._block = block
        self._weights = (gate_up, down)

    def copy(self) -> Stacked:
        """The same weights in memory of their own."""
        return Stacked(self._block, *(weight.clone() for weight in self._weights))

    def route(self, ids: Tensor, weights: Tensor) -> Block:
        return lambda x: self._block(x, ids, weights, *self._weights)


def dense(block: Callable[..., Tensor], gate_up: Int4Codes, down: Int4Codes, act: Act) -> Stacked:
    only(act, "bf16")
    return Stacked(block, gate_up.dequantize(act.dtype), down.dequantize(act.dtype))


def ours(block: Callable[..., Tensor], gate_up: Int4Codes, down: Int4Codes, act: Act) -> Stacked:
    only(act, *OURS)

    def stack(c: Int4Codes) -> Tensor:
        fields = (c.q, c.scale, c.zero_point)
        if act.int8_group is None:
            return CudaCoalescedInt4Tensor.from_codes(*fields, group_size=c.group_size)
        kind = dict(act_group_size=act.int8_group, multiple=c.multiple)
        return Int4ActQuantTensor.from_codes(*fields, group_size=c.group_size, **kind)

    return Stacked(block, stack(gate_up), stack(down))


EXPERTS: dict[str, Callable[[Int4Codes, Int4Codes, Act], Stacked | HummingExperts]] = {
    "w4tensor": functools.partial(ours, fused_block),
    "w4tensor-grouped": functools.partial(ours, grouped_block),
    "w4tensor-batched": functools.partial(ours, batched_block),
    "bf16": functools.partial(dense, grouped_block),
    "bf16-batched": functools.partial(dense, batched_block),
    "humming": HummingExperts,
    "humming-grouped": functools.partial(HummingExperts, gemm_type="grouped_contiguous"),
}
