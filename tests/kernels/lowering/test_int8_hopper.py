"""Machine code of kernels/int8_hopper.py: nothing spills, few instructions, full residency."""

from __future__ import annotations

import functools

import pytest
import triton

from tests.kernels.lowering.sass import Lowered, descriptor, lower, messages
from w4tensor.dispatch_int8 import RUNS_REGISTERS, TILES, Int8Tile
from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.int8_hopper import _int8_hopper_kernel

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

# what launches leave out, each at its own type
OPTIONAL = {"zero_ptr": "*fp16", "bias_ptr": "*bf16", "part_ptr": "*fp32", "flag_ptr": "*i64"}
SHARED_OF_A_MULTIPROCESSOR = 227 * 1024


@functools.cache
def built(tile: Int8Tile, group=128, act=0, given=(), whole=True) -> Lowered:
    """The kernel for sm_90; group and act: 0 where a row, and where a token, is one group."""
    rows = tile.block_m
    types = {name: OPTIONAL[name] for name in given}
    constants: dict[str, object] = {name: None for name in OPTIONAL if name not in given}

    def of_tokens(name: str, size: int) -> None:
        if size:
            groups = max(1, tile.block_k // size, 32 // rows)
            types[f"{name}_desc"] = descriptor([groups, rows], "fp32")
            constants[f"{name}_ptr"] = None
        else:
            types[f"{name}_ptr"] = "*fp32"
            constants[f"{name}_desc"] = None

    of_tokens("x_scale", act)
    if "zero_ptr" in given:
        of_tokens("x_sum", group)
    else:
        constants |= dict(x_sum_desc=None, x_sum_ptr=None)
    types |= dict(
        x_desc=descriptor([rows, 128], "i8"),
        w_desc=descriptor([tile.block_n, tile.block_k // 2], "u8"),
        y_desc=descriptor([rows, tile.block_n], "bf16"),
        y_ptr="*bf16",
        scale_ptr="*bf16",
        token="i64",
    )
    types = {n: types.get(n, "i32") for n in _int8_hopper_kernel.arg_names}
    constants |= dict(GROUP_N=8, GROUP=group, ACT_GROUP=act, CELL=cell_and_span(group, act)[0])
    constants |= dict(WHOLE_STEPS=whole, WARPS=tile.num_warps, STAGES=tile.num_stages)
    constants |= dict(PDL=True, RUNS=tile.runs)
    unaligned = tuple(name for name in types if name.endswith("_desc"))
    unaligned += ("token", "M", "steps", "n_groups", "whole", "split_k")
    cap = {"maxnreg": RUNS_REGISTERS} if tile.runs > 1 else {}
    options = dict(unaligned=unaligned, **cap)
    return lower(_int8_hopper_kernel, types, constants, tile.num_warps, **options)


def check(tile: Int8Tile, budget: float, **options) -> Lowered:
    code = built(tile, **options)
    assert code.stack == 0 and code.matrix == {"IGMMA"}, str(code)
    # weights stay in registers, and no multiplication waits for another
    assert code.count("STS", "STSM") == 0, str(code)
    assert "C75" not in messages(code), messages(code)
    weights = tile.block_n * tile.block_k
    assert code.per_weight(weights) <= budget, (code.per_weight(weights), str(code))
    return code


# instructions a weight of the main loop: a scale a token, and one for each 128 k of a token
BUDGET = {
    "8x64x256": (1.7, 1.9),
    "8x128x256": (1.25, 1.4),
    "16x64x256": (1.8, 2.1),
    "16x128x256": (1.4, 1.6),
    "32x64x256": (2.1, 2.6),
    "64x64x128": (3.0, 3.9),
    "64x128x128": (2.4, 3.4),
    "128x64x128": (4.0, 5.6),
    "2*64x64x128": (4.3, None),
}


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_every_tile(tile):
    for act, budget in zip((0, 128), BUDGET[tile.name], strict=True):
        if budget is None:
            # dispatch does not choose it
            continue
        code = check(tile, budget, act=act)
        # registers come by 8
        registers = code.threads * (-(-code.registers // 8) * 8)
        if act == 0:
            assert tile.resident * registers <= 65536, str(code)
            assert tile.resident * (code.shared + 1024) <= SHARED_OF_A_MULTIPROCESSOR, code.shared


@pytest.mark.parametrize("slices", [(), ("part_ptr", "flag_ptr")], ids=["whole", "slices"])
@pytest.mark.parametrize("bias", [(), ("bias_ptr",)], ids=["plain", "bias"])
@pytest.mark.parametrize("group,spilled", [(128, 0), (256, 0), (0, 1)])
def test_runs_of_tokens_have_the_registers_of_four_programs(group, spilled, bias, slices):
    """Where a row is one group, one pair of registers goes to memory in a step."""
    tile = next(t for t in TILES if t.runs > 1)
    code = built(tile, group=group, given=bias + slices)
    assert code.registers <= RUNS_REGISTERS and code.matrix == {"IGMMA"}, str(code)
    assert code.count("STL") <= spilled and code.count("LDL") <= spilled, str(code)
    assert code.count("STS", "STSM") == 0 and "C75" not in messages(code), str(code)


@pytest.mark.parametrize("tile", [t for t in TILES if t.fine], ids=lambda tile: tile.name)
@pytest.mark.parametrize(
    "group,act,budget", [(128, 32, 2.4), (32, 32, 2.8), (64, 128, 2.4), (32, 0, 2.4)]
)
def test_scales_that_change_within_128_k(tile, group, act, budget):
    check(tile, budget, group=group, act=act)


@pytest.mark.parametrize("group,act", [(128, 128), (256, 0), (0, 0), (0, 128)])
def test_slices_zero_points_and_rows_that_blocks_do_not_divide(group, act):
    tile = next(t for t in TILES if t.name == "16x128x256")
    given = ("zero_ptr", "bias_ptr", "part_ptr", "flag_ptr")
    check(tile, 2.2, group=group, act=act, given=given, whole=False)
