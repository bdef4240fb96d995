"""kernels/gemm_hopper_persistent.py against the oracle and its sibling of one tile a program.

Few programs share the tiles of small weights: each has several, cut in all ways that EVEN knows.
Outputs and partial sums are NaN beforehand, but where old memory is the point.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.test_gemm_hopper import (
    CASES,
    EMPTY,
    FULL,
    HALF,
    TWIN,
    TWIN_REL_ERR,
    Case,
    check_graphs_that_share_memory,
    check_the_same_bits_under_pdl,
    check_two_streams_at_once,
    name,
    plan_of,
    run,
    weight_of,
)
from tests.gpu.test_linear import (  # noqa: F401
    _poison,
    codes,
    needs_hopper,
    oracle,
    rel_err,
)
from w4tensor import CudaCoalescedInt4Tensor
from w4tensor.dispatch_hopper import MIN_SHARED_STEPS, TILES, HopperPlan, HopperTile
from w4tensor.testing import REL_ERR_BUDGET

pytestmark = [pytest.mark.gpu, needs_hopper]

SHARED = [tile for tile in TILES if tile.shares]
# weights that differ in what compiles apart: whole and ragged steps and groups; and one whose y
# goes one by one, which is not shared. With steps that may be
SHAPES = [
    replace(case, k=case.k % 128 + 128 * (MIN_SHARED_STEPS + i))
    for i, case in enumerate((*CASES[:5], Case(200, 1440, 32, zero=HALF, bias=True)))
]


def shared(tile: HopperTile, programs: int, even: bool, pdl: bool = False) -> HopperPlan:
    return replace(plan_of(tile, pdl=pdl), programs=programs, even=even)


def where_order_shows(n: int, m: int):
    """w [n, 2048] and x [m, 2048] of which the product is zero, but for what rounding leaves."""
    q, scale, _ = codes(n, 1024, 128, None, torch.bfloat16)
    q, scale = torch.cat((q, q), 1), torch.cat((scale, scale), 1)
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, None, group_size=128)
    return w, torch.cat((x, -x), 1)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("tile", SHARED, ids=name)
def test_oracle_and_siblings(tile, case):
    torch.manual_seed(0)
    # as ragged as the case is
    case = replace(case, n=4 * tile.block_n + case.n % tile.block_n)
    w, whole = weight_of(case), weight_of(case, exact=True)
    bias = torch.randint(-9, 9, (case.n,), device="cuda").to(case.x) if case.bias else None
    # five tiles that are not full, and fifteen
    for m in (tile.block_m // 2 + 1, 2 * tile.block_m + 3):
        x = torch.randn(m, case.k, device="cuda", dtype=case.x)
        x = x.bfloat16().to(case.x) if case.x == FULL else x
        few = torch.randint(-2, 3, (m, case.k), device="cuda").to(case.x)
        ref, exact = oracle(x, w, bias), oracle(few, whole, bias).to(case.x)
        twin = run(TWIN, x, w, bias, FULL)
        budget = REL_ERR_BUDGET[HALF if case.x == HALF else torch.bfloat16]
        one = run(plan_of(tile), x, w, bias)
        # rounds of whole tiles, and none; shares of more than a tile, and of nearly two
        for programs in (1, 2, 3, 4) if m < tile.block_m else (1, 2, 4, 8):
            y = run(shared(tile, programs, even=False), x, w, bias)
            assert torch.equal(y, one), programs
            assert rel_err(y, ref) <= budget, programs
            plan = shared(tile, programs, even=True)
            y = run(plan, x, w, bias)
            assert rel_err(y, ref) <= budget, programs
            assert torch.equal(y, run(plan, x, w, bias)), programs
            assert torch.equal(run(plan, few, whole, bias), exact), programs
            assert rel_err(run(plan, x, w, bias, FULL), twin.double()) <= TWIN_REL_ERR, programs


@pytest.mark.parametrize("tile", SHARED, ids=name)
def test_the_same_bits_under_programmatic_dependent_launch(tile, monkeypatch):
    # old memory, and no kernels in between that would hide what starts too early
    monkeypatch.setattr(torch, "empty", EMPTY)
    k = 1792
    w = weight_of(Case(k, k, 128))
    x = torch.randn(2 * tile.block_m - 3, k, device="cuda", dtype=torch.bfloat16)

    for programs, even in ((5, False), (7, True), (24, True)):
        check_the_same_bits_under_pdl(shared(tile, programs, even), x, w)


@pytest.mark.parametrize("tile", SHARED, ids=name)
def test_where_steps_are_shared_and_where_not(tile):
    # tiles of rounds before the last are whole, and so are all if programs have as many each
    w, x = where_order_shows(7 * tile.block_n, tile.block_m)
    one = run(plan_of(tile), x, w)
    assert torch.equal(run(shared(tile, 7, even=True), x, w), one)
    y = run(shared(tile, 2, even=True), x, w)
    whole = [
        torch.equal(y[:, i : i + tile.block_n], one[:, i : i + tile.block_n])
        for i in range(0, len(w), tile.block_n)
    ]
    # three tiles are left for the last two programs: the middle one is cut
    assert whole == [True, True, True, True, True, False, True]


@pytest.mark.parametrize("tile", SHARED, ids=name)
def test_a_tile_that_is_cut_leaves_the_tokens_of_those_that_are_not(tile):
    # of three tiles of tokens the middle one is cut, and the last one has three tokens
    w, x = where_order_shows(tile.block_n, 2 * tile.block_m + 3)
    one = run(plan_of(tile), x, w)
    y = run(shared(tile, 2, even=True), x, w)
    middle = slice(tile.block_m, 2 * tile.block_m)
    assert torch.equal(y[: middle.start], one[: middle.start])
    assert torch.equal(y[middle.stop :], one[middle.stop :])
    assert not torch.equal(y[middle], one[middle])


@pytest.mark.parametrize("even", [False, True], ids=["", "even"])
@pytest.mark.parametrize("tile", SHARED[1::2], ids=name)
def test_graphs_that_share_memory_replay_by_turns(tile, even, monkeypatch):
    # flags and sums of replays before are there, under the same tokens and those of the other
    monkeypatch.setattr(torch, "empty", EMPTY)
    shapes = ((7 * tile.block_n, 2048), (9 * tile.block_n - 8, 1664))
    check_graphs_that_share_memory(shared(tile, 5, even, pdl=True), shapes, tile.block_m + 3)


@pytest.mark.parametrize("tile", SHARED[1::2], ids=name)
def test_one_plan_on_two_streams_at_once(tile, monkeypatch):
    # together more programs than the card holds: nobody waits for one that has not started
    monkeypatch.setattr(torch, "empty", EMPTY)
    programs = tile.resident * torch.cuda.get_device_properties(0).multi_processor_count
    plan = shared(tile, programs, even=True)
    check_two_streams_at_once(plan, (programs + 50) * tile.block_n, 1536)


def test_too_few_tiles_or_steps_are_not_shared():
    tile = SHARED[0]
    x = torch.randn(tile.block_m, 2048, device="cuda", dtype=torch.bfloat16)
    for k, programs in ((2048, 6), (1024, 2)):
        w = weight_of(Case(5 * tile.block_n, k, 128))
        few = x[:, :k]
        assert torch.equal(
            run(shared(tile, programs, even=True), few, w), run(plan_of(tile), few, w)
        )
