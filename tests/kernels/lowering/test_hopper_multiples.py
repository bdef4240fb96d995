"""Tiles of int8 x and integer scales as machine code: as test_gemm_hopper.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import triton

from tests.kernels.lowering import test_gemm_hopper, test_grouped_hopper
from tests.kernels.lowering.descriptors import stale_descriptors
from tests.kernels.lowering.sass import Lowered, messages
from tests.kernels.lowering.test_gemm_hopper import REGISTERS, SHARED_BYTES
from w4tensor.dispatch_experts import INTEGER_TILE
from w4tensor.dispatch_hopper import HopperTile
from w4tensor.dispatch_integer import TILES
from w4tensor.plans_experts import HopperGroupedPlan

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

# instructions a weight in the main loop by group size (0: the row), for warps of 16 and of 32 rows
BUDGET = {
    128: {16: 3.0, 32: 2.1},
    32: {16: 3.3, 32: 2.7},
    0: {16: 2.7, 32: 2.0},
}
# what groups add whose number a row is odd: their multiples are loaded one by one
ODD_GROUPS = 0.4
SHARED = [tile for tile in TILES if tile.shares]


def _name(tile: HopperTile) -> str:
    return f"{tile.block_m}x{tile.block_n}"


def _check(
    code: Lowered, tile: HopperTile | HopperGroupedPlan, group: int, n_groups: int = 64
) -> None:
    assert code.stack == 0, str(code)
    # outputs go through shared memory after the loop, weights never
    assert code.matrix == {"IGMMA"} and code.count("STS", "STSM") == 0, str(code)
    # 32 k each, for every 64 rows of a warpgroup and up to 128 tokens
    rows_of_a_warp = tile.block_n // tile.num_warps
    products = 4 * rows_of_a_warp // 16 * -(-tile.block_m // 128)
    assert code.count("IGMMA") == products, str(code)
    serialised = re.search(r"C75\d\d.*", messages(code))
    assert serialised is None, serialised
    assert stale_descriptors(code.text) == []
    # sums stay integers until all of K is done
    assert code.count("I2F", "I2FP", "FFMA", "FMUL") == 0, str(code)
    budget = BUDGET[group][rows_of_a_warp] + ODD_GROUPS * (n_groups % 4 > 0)
    assert code.per_weight(tile.block_n * 128) <= budget, str(code)


def _check_dense(tile: HopperTile, group: int = 128, n_groups: int = 64, **options) -> None:
    options |= dict(group=group, n_groups=n_groups, pdl=True)
    code = test_gemm_hopper.lowered(tile, integer=True, **options)
    _check(code, tile, group, n_groups)
    # registers are dealt out by eights, and a kilobyte of shared memory is the driver's
    registers = -(-code.registers // 8) * 8
    assert tile.resident * code.threads * registers <= REGISTERS, str(code)
    assert tile.resident * (code.shared + 1024) <= SHARED_BYTES, str(code)


@pytest.mark.parametrize("group", [128, 32, 0], ids=lambda group: f"groups of {group}")
@pytest.mark.parametrize("tile", TILES, ids=_name)
def test_every_tile(tile, group):
    for few in (False, True):
        _check_dense(tile, group=group, split=tile.pipelined, few=few)


@pytest.mark.parametrize("even", [False, True], ids=["", "even"])
@pytest.mark.parametrize("tile", SHARED, ids=_name)
def test_every_tile_that_programs_share(tile, even):
    _check_dense(tile, shared=True, split=even)
    _check_dense(tile, shared=True, split=even, group=32, n_groups=45, bias=True)


@pytest.mark.parametrize("tile", TILES, ids=_name)
def test_every_tile_with_what_costs_most_registers(tile):
    # an fp32 y with a bias, stored one by one, and groups that are not whole steps
    for n_groups in (45, 90, 64):
        options = dict(y="fp32", scale="fp32", bias=True, n_groups=n_groups)
        _check_dense(tile, group=32, split=tile.pipelined, **options)


@pytest.mark.parametrize("group", [128, 32, 0], ids=lambda group: f"groups of {group}")
@pytest.mark.parametrize("narrow_m", [0, 32])
def test_experts(narrow_m, group):
    plan = replace(INTEGER_TILE, narrow_m=narrow_m)
    second = dict(gate="none", act="none", scatter=True)
    gpt_oss = dict(gate="interleaved", act="clamped_swiglu")
    for options in ({}, second, gpt_oss, second | dict(y="fp32")):
        for bias in (False, True):
            code = test_grouped_hopper.lowered(plan, group=group, bias=bias, **options)
            _check(code, plan, group)
            registers = -(-code.registers // 8) * 8
            assert 2 * code.threads * registers <= REGISTERS, str(code)
            assert 2 * (code.shared + 1024) <= SHARED_BYTES, str(code)
