"""What moe.py tells the kernels of an experts block, without a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from w4tensor import moe
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.plans_experts import (
    ExpertsPlan,
    HopperGroupedPlan,
    HopperInt8GroupedPlan,
)
from w4tensor.testing import random_codes, random_routing

TILE = HopperGroupedPlan(8, 64, 4, 4)
INT8_TILE = HopperInt8GroupedPlan(8, 128, 256, 4, 3)
EXPERTS, TOP_K, HIDDEN, INTER, TOKENS = 4, 2, 128, 128, 3


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """Names of what would be launched, and what the products were told; nothing runs."""
    seen: list[tuple[str, dict]] = []

    def stub(name, result):
        def run(*args, **told):
            seen.append((name, told))
            return result(*args)

        monkeypatch.setattr(moe, name, run)

    rows = TOKENS * TOP_K
    routed = torch.arange(rows), torch.zeros(EXPERTS, dtype=torch.int32), torch.zeros(rows, 3)
    stub("route", lambda *_: routed)
    stub("tiles_of", lambda *_: routed[2])
    stub("gather_rows", lambda x, order, *_: x.new_zeros(len(order), x.shape[1]))
    stub("multiply_grouped_hopper", lambda *args: args[7])
    stub("quantize_activation", lambda x, *_: (x.to(torch.int8), x[..., :1].mT, None))
    stub("multiply_grouped_int8_hopper", lambda *args: args[9])
    stub("combine", lambda pairs, ids, weight, y, *_: y)
    return seen


def _stack(n: int, k: int) -> moe.Stack:
    codes = random_codes(EXPERTS, n, k, group_size=128)
    return moe.Stack(COALESCED.pack(codes.q), codes.scale, None, 128)


def test_products_of_routed_rows_need_not_wait_for_their_tiles(launches):
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    routing = random_routing(TOKENS, EXPERTS, TOP_K)
    stacks = _stack(2 * INTER, HIDDEN), _stack(HIDDEN, INTER)
    moe.experts(x, *routing, *stacks, ExpertsPlan(TILE, TILE))
    names = [name for name, _ in launches]
    # a launch stands between the list of tiles and who reads it early
    product = "multiply_grouped_hopper"
    assert names == ["route", "gather_rows", product, product, "combine"]
    told = [told["wait_for_tiles"] for name, told in launches if name == product]
    assert told == [False, False]


def test_slices_of_the_second_product_are_fp32_and_added_by_the_sum_over_slots(
    launches, monkeypatch
):
    given = []

    def seen(name, result):
        monkeypatch.setattr(moe, name, lambda *args, **told: given.append(args) or result(*args))

    seen("multiply_grouped_hopper", lambda *args: args[7])
    seen("combine", lambda pairs, ids, weight, y, *_: y)
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    routing = random_routing(TOKENS, EXPERTS, TOP_K)
    stacks = _stack(2 * INTER, HIDDEN), _stack(HIDDEN, INTER)
    moe.experts(x, *routing, *stacks, ExpertsPlan(TILE, replace(TILE, split_k=3)))
    first, second, (pairs, *_) = given
    assert first[7].shape == (TOKENS * TOP_K, INTER) and first[7].dtype == torch.bfloat16
    assert second[7] is pairs
    assert pairs.shape == (3, TOKENS * TOP_K, HIDDEN) and pairs.dtype == torch.float32


def test_int8_products_find_the_scales_of_their_rows(launches):
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    routing = random_routing(TOKENS, EXPERTS, TOP_K)
    stacks = []
    for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER)):
        codes = random_codes(EXPERTS, n, k, group_size=128)
        stacks.append(moe.Stack(ACT_QUANT.pack(codes.q), codes.scale, None, 128, None, -1))
    moe.experts(x, *routing, *stacks, ExpertsPlan(INT8_TILE, INT8_TILE))
    product = "multiply_grouped_int8_hopper"
    # each token is quantised once, before its pairs are gathered; pairs are listed before both
    assert [name for name, _ in launches] == [
        *("route", "quantize_activation", "gather_rows", product),
        *("quantize_activation", product, "combine"),
    ]
    told = [told for name, told in launches if name == product]
    # scales of x stand by token, those of h by pair
    assert [t["x_div"] for t in told] == [TOP_K, 0]
    assert [t["wait_for_tiles"] for t in told] == [False, False]


def test_a_product_of_rows_as_given_waits_for_its_tiles(launches):
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    offs = torch.full((EXPERTS,), TOKENS, dtype=torch.int32)
    moe.grouped_linear(x, offs, _stack(INTER, HIDDEN), TILE)
    assert [name for name, _ in launches] == ["tiles_of", "multiply_grouped_hopper"]
    assert launches[-1][1]["wait_for_tiles"] is True
