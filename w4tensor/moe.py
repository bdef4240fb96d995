"""The experts block on a CUDA device: from routed tokens to their sum, by the kernels of a plan.

    y[t] = sum over j of weight[t, j] * down[e](act(gate_up[e](x[t]))),    e = ids[t, j]

Where the weights have an act_group_size, x and h are rounded to int8 before they are multiplied,
at every number of tokens: int8 tiles take the codes, the other kernels what the codes mean.

experts() is the whole of it. A module with an activation of its own runs first_product(), its
activation on the rows it gets (in whatever order), then second_product().

Nothing here synchronises with the device: routing, sizes of tiles and sentinels (ids outside
0..E-1) stay on it, so that a CUDA graph may be replayed with other routings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w4tensor.dispatch_gemv import GemvPlan
from w4tensor.kernels.act_quant_grouped import multiply_act_quant_grouped
from w4tensor.kernels.combine import combine
from w4tensor.kernels.gather import gather_rows
from w4tensor.kernels.gemv import aligned, gemv
from w4tensor.kernels.grouped import multiply_grouped
from w4tensor.kernels.grouped_hopper import multiply_grouped_hopper
from w4tensor.kernels.grouped_int8_hopper import multiply_grouped_int8_hopper
from w4tensor.kernels.pairs import multiply_pairs, takes_word_order
from w4tensor.kernels.quantize_activation import quantize_activation, round_activation
from w4tensor.kernels.routing import route
from w4tensor.kernels.row_tiles import tiles_of
from w4tensor.plans_experts import (
    ExpertsPlan,
    FewPlan,
    GroupedPlan,
    HopperGroupedPlan,
    HopperInt8GroupedPlan,
    RowsPlan,
    fit_together,
)

__all__ = [
    "Routing",
    "Stack",
    "experts",
    "first_product",
    "gathered_linear",
    "grouped_linear",
    "second_product",
]


class Stack(NamedTuple):
    """Stacked weights [E, N, K] and what multiplies them.

    Fields:
        qdata: [E, N, *], COALESCED, or ACT_QUANT where there is an act_group_size.
        scale, zero_point: [E, N, groups]. bias: [E, N] or None.
        act_group_size: activations are rounded to int8 by such groups (-1: per token); None: not.
        multiple: of integer scales (layout.py), like scale, or None.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    bias: Tensor | None = None
    act_group_size: int | None = None
    multiple: Tensor | None = None


class Rows(NamedTuple):
    """Pairs sorted by expert, as kernels/routing.py makes them; order is None for rows as given."""

    order: Tensor | None
    offs: Tensor
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What both products of a block share.

    Fields:
        ids, weight: [T, top_k], contiguous.
        rows: None on the pairs path.
    """

    ids: Tensor
    weight: Tensor
    rows: Rows | None


def experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    gate_up: Stack,
    down: Stack,
    plan: ExpertsPlan,
    gate: str = "halves",
    act: str = "silu",
) -> Tensor:
    """x [T, H], ids and weight [T, top_k] -> y [T, H] of x's dtype; between, fp32 is bf16.

    Args:
        gate: how rows of gate_up alternate: "halves", "interleaved", or "none" for no gate.
        act: as kernels/gate.py names them.
    """
    h, routing = first_product(x, ids, weight, gate_up, plan, gate, act)
    return second_product(h, routing, down, plan).to(x.dtype)


def first_product(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    gate_up: Stack,
    plan: ExpertsPlan,
    gate: str = "none",
    act: str = "none",
) -> tuple[Tensor, Routing]:
    """h [T * top_k, N] (N / 2 with a gate), one row a pair, and the routing.

    Rows stand in the order that plan.second wants: pairs, or sorted. Those of sentinels are not
    written.
    """
    tokens, top_k = ids.shape
    n_experts, n = gate_up.scale.shape[:2]
    ids, weight = ids.contiguous(), weight.contiguous()
    dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    h = torch.empty(tokens * top_k, n if gate == "none" else n // 2, dtype=dtype, device=x.device)
    if isinstance(plan.first, FewPlan):
        _pairs(x, ids.view(-1, 1), gate_up, h, plan.first, x_div=top_k, gate=gate, act=act)
        return h, Routing(ids, weight, None)
    rows = _routed(ids, n_experts, plan.first, plan.first.pdl)
    scatter = isinstance(plan.second, FewPlan)
    fused = dict(scatter=scatter, gate=gate, act=act)
    _grouped(x, rows, gate_up, h, plan.first, x_div=top_k, **fused)
    return h, Routing(ids, weight, rows)


def second_product(h: Tensor, routing: Routing, down: Stack, plan: ExpertsPlan) -> Tensor:
    """y [T, H]: each token's pairs times down, weighted and summed in the order of its slots."""
    tokens, top_k = routing.ids.shape
    n_experts, n = down.scale.shape[:2]
    y = torch.empty(tokens, n, dtype=h.dtype, device=h.device)
    if isinstance(plan.second, FewPlan):
        return _pairs(h, routing.ids, down, y, plan.second, weight=routing.weight)
    assert routing.rows is not None and not isinstance(plan.first, FewPlan)
    assert fit_together(plan.first, plan.second), "the tiles are those of the first product"
    split_k = plan.second.split_k if isinstance(plan.second, HopperGroupedPlan) else 1
    if split_k > 1:
        pairs = torch.empty(split_k, tokens * top_k, n, dtype=torch.float32, device=h.device)
    else:
        pairs = torch.empty(tokens * top_k, n, dtype=h.dtype, device=h.device)
    _grouped(h, routing.rows, down, pairs, plan.second, scatter=True)
    return combine(pairs, routing.ids, routing.weight, y, n_experts, plan.second.pdl)


def grouped_linear(x: Tensor, offs: Tensor, stack: Stack, plan: RowsPlan) -> Tensor:
    """torch._grouped_mm: x [T, K] sorted by expert, offs int32 [E] where each ends -> [T, N].

    Rows from offs[-1] on are zero.
    """
    y = torch.empty(x.shape[0], stack.scale.shape[1], dtype=x.dtype, device=x.device)
    narrow_m = plan.narrow_m if _is_shared(plan) else 0
    rows = Rows(None, offs, tiles_of(offs, x.shape[0], plan.block_m, narrow_m))
    return _grouped(x, rows, stack, y, plan)


def gathered_linear(x: Tensor, ids: Tensor, stack: Stack, plan: FewPlan | RowsPlan) -> Tensor:
    """x [S, K] and ids [S] -> W[ids[s]] @ x[s], [S, N], without copying W; sentinels give zeros."""
    n_experts, n = stack.scale.shape[:2]
    ids = ids.contiguous()
    if isinstance(plan, FewPlan):
        y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
        return _pairs(x, ids.view(-1, 1), stack, y, plan)
    # rows that chose no expert are in no tile
    y = torch.zeros(x.shape[0], n, dtype=x.dtype, device=x.device)
    rows = _routed(ids, n_experts, plan)
    return _grouped(x, rows, stack, y, plan, x_div=1, scatter=True)


def _routed(ids: Tensor, n_experts: int, plan: RowsPlan, pdl: bool = False) -> Rows:
    # tiles that programs share are listed when rows are gathered
    return Rows(*route(ids, n_experts, plan.block_m, pdl, listed=not _is_shared(plan)))


def _is_shared(plan: FewPlan | RowsPlan) -> bool:
    return isinstance(plan, HopperGroupedPlan) and plan.programs > 0


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sixteen_bit(x: Tensor, stack: Stack, word_order: bool = False, pdl: bool = False) -> Tensor:
    """x as kernels with 16-bit activations take it; fp32 becomes bf16, whose range is fp32's.

    word_order, pdl: as in round_activation, where there is an act_group_size.
    """
    if stack.act_group_size is not None:
        x = _rows(x)[None]
        return round_activation(x, stack.act_group_size, word_order=word_order, pdl=pdl)[0]
    return _rows(x.bfloat16() if x.dtype == torch.float32 else x)


def _pairs(x: Tensor, ids: Tensor, stack: Stack, y: Tensor, plan: FewPlan, **fused: Any) -> Tensor:
    weights = stack.qdata, stack.scale, stack.zero_point, stack.bias
    if isinstance(plan, GemvPlan):
        act_group_size = stack.act_group_size
        # int8 codes it makes itself
        x = aligned(_sixteen_bit(x, stack)) if act_group_size is None else aligned(_rows(x), 16)
        fused |= dict(ids=ids, act_group_size=act_group_size)
        gemv(x, *weights, y, stack.group_size, plan, **fused)
        return y
    word_order = takes_word_order(stack.qdata, stack.group_size)
    x = _sixteen_bit(x, stack, word_order, pdl=plan.pdl != "none")
    return multiply_pairs(x, ids, *weights, y, stack.group_size, plan, **fused)


def _grouped(
    x: Tensor,
    rows: Rows,
    stack: Stack,
    y: Tensor,
    plan: RowsPlan,
    x_div: int = 0,
    **fused: Any,
) -> Tensor:
    order, offs, tiles = rows
    weights = stack.qdata, stack.scale, stack.zero_point, stack.bias
    if isinstance(plan, HopperGroupedPlan):
        if plan.integer:
            assert stack.multiple is not None, "the plan is one for integer scales"
            codes, x_scale, _ = quantize_activation(_rows(x)[None], -1, pdl=plan.pdl)
            x = codes[0]
            fused |= dict(multiple=stack.multiple, x_scale=x_scale[0, 0], x_div=x_div)
        else:
            x = _sixteen_bit(x, stack, word_order=True, pdl=plan.pdl)
        if x_div > 0:
            assert order is not None, "rows as given are where they should be"
            listed = (tiles, plan.block_m, plan.narrow_m) if _is_shared(plan) else ()
            x = gather_rows(x, order, offs, x_div, plan.pdl, *listed)
        # tiles of routed rows are older than the launch ahead, a gathering or another product, but
        # for those that were listed by that gathering
        fused["wait_for_tiles"] = order is None or (x_div > 0 and _is_shared(plan))
        return multiply_grouped_hopper(
            x, order, tiles, *weights, y, stack.group_size, plan, **fused
        )
    if isinstance(plan, GroupedPlan):
        x = _sixteen_bit(x, stack)
        fused["x_div"] = x_div
        return multiply_grouped(x, order, tiles, *weights, y, stack.group_size, plan, **fused)
    act_group_size = stack.act_group_size
    assert act_group_size is not None, "these tiles are for int8 activations"
    sizes = stack.group_size, act_group_size
    sum_group = None if stack.zero_point is None else stack.group_size
    made = quantize_activation(_rows(x)[None], act_group_size, sum_group, pdl=plan.pdl)
    codes, scale, sums = made[0][0], made[1][0], None if made[2] is None else made[2][0]
    if isinstance(plan, HopperInt8GroupedPlan):
        if x_div > 0:
            assert order is not None, "rows as given are where they should be"
            codes = gather_rows(codes, order, offs, x_div, plan.pdl)
        fused |= dict(x_div=x_div, wait_for_tiles=order is None)
        return multiply_grouped_int8_hopper(
            codes, scale, sums, order, tiles, *weights, y, *sizes, plan, **fused
        )
    fused["x_div"] = x_div
    return multiply_act_quant_grouped(
        codes, scale, sums, order, tiles, *weights, y, *sizes, plan, **fused
    )
