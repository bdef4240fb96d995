"""gemm_hopper.py as machine code, for a GPU that need not be there.

Weights go from registers to wgmma, which must not be serialised; as many programs of a tile as its
row in dispatch says must fit a multiprocessor; nothing may spill.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import triton

from tests.kernels.lowering.descriptors import stale_descriptors
from tests.kernels.lowering.sass import Lowered, descriptor, lower, messages
from w4tensor.dispatch_hopper import NO_ZERO_POINTS, TILES, HopperTile
from w4tensor.kernels.gemm_hopper import (
    MAX_REGISTERS,
    MAX_REGISTERS_INT8,
    _gemm_hopper_kernel,
    boxes_of_tokens,
)
from w4tensor.kernels.gemm_hopper_persistent import gemm_hopper_persistent_kernel
from w4tensor.kernels.groups import groups_together

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

# of a Hopper multiprocessor
REGISTERS = 65536
SHARED_BYTES = 227 * 1024


def _tokens(tile: HopperTile, few: bool) -> int:
    return tile.block_m // 2 + 1 if few else tile.block_m


@functools.cache
def lowered(
    tile: HopperTile,
    dtype: str = "bf16",
    group: int = 128,
    zero: str | None = None,
    split: bool = False,
    # None: by tensor memory accelerator; else what is stored, one by one
    y: str | None = None,
    scale: str | None = None,
    bias: bool = False,
    pdl: bool = False,
    n_groups: int = 64,
    # for half of the tokens that the tile holds
    few: bool = False,
    # of programs that share tiles; with `split`, evenly
    shared: bool = False,
    # x is int8, and scales are integers
    integer: bool = False,
) -> Lowered:
    first, more = boxes_of_tokens(tile.block_m, _tokens(tile, few))
    signature = {
        "x_desc": descriptor([*first, 128], "i8" if integer else dtype),
        "more_x_desc": descriptor([*(more or first), 128], "i8" if integer else dtype),
        "w_desc": descriptor([tile.block_n, 16], "i32"),
        "y_desc": descriptor([*first, tile.block_n], dtype),
        "more_y_desc": descriptor([*(more or first), tile.block_n], dtype),
        "y_ptr": f"*{y or dtype}",
        "scale_ptr": f"*{scale or dtype}",
        "zero_ptr": f"*{zero}",
        "multiple_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "bias_ptr": f"*{dtype}",
        "part_ptr": "*fp32",
        "flag_ptr": "*i64",
        "token": "i64",
        **dict.fromkeys(("M", "N", "steps", "n_groups"), "i32"),
        **dict.fromkeys(("tiles", "rounds") if shared else ("split_k",), "i32"),
    }
    constants = {
        "GROUP_N": 8,
        "GROUP": group,
        "TOGETHER": groups_together(n_groups, group or 128, tile.block_m),
        "ACT_QUANT": integer,
        "WARPS": tile.num_warps,
        "STAGES": tile.num_stages,
        "PDL": pdl,
        "PIPELINED": tile.pipelined,
    }
    absent = {"y_desc": y, "zero_ptr": zero is None, "bias_ptr": not bias}
    absent |= {"more_x_desc": not more, "more_y_desc": y or not more}
    if shared:
        del signature["y_ptr"]
    absent |= dict.fromkeys(("part_ptr", "flag_ptr"), not split)
    absent |= dict.fromkeys(("multiple_ptr", "x_scale_ptr"), not integer)
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    unaligned = [name for name in signature if name.endswith("_desc")]
    unaligned += ["token", "M", "steps", *(("tiles", "rounds") if shared else ("split_k",))]
    # rows that the accelerator stores are multiples of 8, and mostly of 16
    unaligned += ["N", "n_groups"] if y else []
    short = dtype == "bf16" and zero is None and scale is None and group in (0, 128)
    short &= split and not shared
    registers = MAX_REGISTERS.get((tile.block_m, tile.block_n)) if short else None
    if integer and not shared:
        registers = MAX_REGISTERS_INT8.get((tile.block_m, tile.block_n, tile.num_warps))
    return lower(
        gemm_hopper_persistent_kernel if shared else _gemm_hopper_kernel,
        signature,
        constants,
        tile.num_warps,
        unaligned=tuple(unaligned),
        **({"maxnreg": registers} if registers else {}),
    )


@pytest.mark.parametrize("tile", MAX_REGISTERS, ids=str)
def test_tiles_that_share_a_multiprocessor_with_the_next_launch(tile):
    code = lowered(next(t for t in TILES if (t.block_m, t.block_n) == tile), pdl=True, split=True)
    assert REGISTERS // (code.threads * code.registers) >= 6, str(code)


@pytest.mark.parametrize("tile", [TILES[0], TILES[4], TILES[13], TILES[16]], ids=str)
def test_sums_of_slices_are_stored_and_loaded_in_lines(tile):
    code = lowered(tile, split=True)
    stores = re.findall(r"\bSTG\.E\.[0-9]+", code.text)
    loads = re.findall(r"\bLDG\.E\.[0-9]+\.STRONG\.GPU", code.text)
    # but for flags, 16 bytes a thread at a time
    sums = tile.block_m * tile.block_n // code.threads
    assert sorted(stores) == ["STG.E.128"] * (sums // 4) + ["STG.E.64"]
    assert loads.count("LDG.E.64.STRONG.GPU") == 1 and len(set(loads)) == 2


@pytest.mark.parametrize("tile", (TILES[0], TILES[6], TILES[7]), ids=lambda tile: _name(tile))
def test_small_tiles_ask_for_scales_before_they_wait_for_x(tile):
    ptx = lowered(tile, pdl=True).ptx
    early = ptx.index("ld.global") < ptx.index("griddepcontrol.wait")
    assert early == (tile.block_m * tile.block_n <= 64 * 64)


def _name(tile: HopperTile) -> str:
    how = "" if tile.pipelined else " unpipelined"
    return f"{tile.block_m}x{tile.block_n}x{tile.num_stages}{how}"


def _check(
    tile: HopperTile, dtype: str, group: int, zero: str | None, few: bool = False, **options
) -> None:
    code = lowered(tile, dtype, group, zero, few=few, **options)
    assert code.stack == 0, str(code)
    assert code.matrix == {"HGMMA"} and code.count("STS", "STSM") == 0, str(code)
    # 16 k each, for every 64 rows of a warpgroup and every run of tokens: the loop that was read is
    # the one that multiplies
    rows_of_a_warp = tile.block_n // tile.num_warps
    second_run = len(boxes_of_tokens(tile.block_m, _tokens(tile, few))[1])
    assert code.count("HGMMA") == 8 * rows_of_a_warp // 16 * (1 + second_run), str(code)
    serialised = re.search(r"C75\d\d.*", messages(code))
    assert serialised is None, serialised
    assert stale_descriptors(code.text) == []
    # registers are dealt out by eights, and a kilobyte of shared memory is the driver's
    registers = -(-code.registers // 8) * 8
    # zero points take registers, where a multiprocessor is to hold many programs: one fewer
    resident = tile.resident if zero is None or tile.resident < 3 else tile.resident - 1
    assert resident * code.threads * registers <= REGISTERS, str(code)
    assert resident * (code.shared + 1024) <= SHARED_BYTES, str(code)
    budget = BUDGETS[dtype, group, zero is not None][rows_of_a_warp] + SECOND_RUN * second_run
    assert code.per_weight(tile.block_n * 128) <= budget, str(code)


# instructions a weight in the main loop for warps of 16 and of 32 rows, by x, group size (0: the
# row) and whether there are zero points
BUDGETS = {
    ("bf16", 128, False): {16: 3.4, 32: 2.5},
    ("bf16", 64, False): {16: 3.8, 32: 2.9},
    ("bf16", 32, False): {16: 4.2, 32: 3.3},
    ("bf16", 0, False): {16: 3.1, 32: 2.3},
    ("fp16", 128, False): {16: 4.1, 32: 3.3},
    ("fp16", 64, False): {16: 4.7, 32: 3.8},
    ("fp16", 32, False): {16: 5.0, 32: 4.0},
    ("fp16", 0, False): {16: 3.8, 32: 3.1},
}
for dtype in ("bf16", "fp16"):
    BUDGETS |= {
        (dtype, 128, True): {16: 4.2, 32: 3.3},
        (dtype, 64, True): {16: 4.7, 32: 3.9},
        (dtype, 32, True): {16: 5.2, 32: 4.7},
        (dtype, 0, True): {16: 4.0, 32: 3.3},
    }
SHARED = [tile for tile in TILES if tile.shares]
# what a second run of tokens adds to them
SECOND_RUN = 0.8
OF_16_ROWS = next(tile for tile in TILES if (tile.block_m, tile.block_n) == (128, 128))
OF_32_ROWS = next(tile for tile in TILES if (tile.block_m, tile.block_n) == (64, 128))
WEIGHTS = [(dtype, group, "fp16" if zero else None) for dtype, group, zero in BUDGETS]


@pytest.mark.parametrize("few", [False, True], ids=["full", "few tokens"])
@pytest.mark.parametrize("tile", TILES, ids=_name)
def test_every_tile(tile, few):
    _check(tile, "bf16", 128, None, split=True, pdl=True, few=few)


@pytest.mark.parametrize("split", [False, True], ids=["", "even"])
@pytest.mark.parametrize("tile", SHARED, ids=_name)
def test_every_tile_that_programs_share(tile, split):
    for few in (False, True):
        _check(tile, "bf16", 128, None, shared=True, split=split, pdl=True, few=few)


@pytest.mark.parametrize("split", [False, True], ids=["", "even"])
@pytest.mark.parametrize("tile", SHARED, ids=_name)
def test_every_tile_that_programs_share_with_what_costs_most_registers(tile, split):
    options = dict(shared=True, split=split, pdl=True, bias=True)
    without_zero_points = (tile.block_m, tile.block_n) == NO_ZERO_POINTS
    for n_groups in (64,) if without_zero_points else (45, 64):
        zero = None if without_zero_points else "fp32"
        _check(tile, "bf16", 32, zero, n_groups=n_groups, **options)


@pytest.mark.parametrize("tile", TILES, ids=_name)
def test_every_tile_with_what_costs_most_registers(tile):
    # fp32 x with a bias, N of any size, K not whole steps or all of it, and zero points in fp32
    zero = None if (tile.block_m, tile.block_n) == NO_ZERO_POINTS else "fp32"
    for n_groups in (45, 90, 64):
        options = dict(y="fp32", bias=True, pdl=True, n_groups=n_groups)
        _check(tile, "bf16", 32, zero, split=True, **options)


@pytest.mark.parametrize("tile", [OF_16_ROWS, OF_32_ROWS], ids=_name)
def test_warps_await_sums_each_by_itself(tile):
    # they leave the loop at different times: a barrier in it would never be passed
    lines = lowered(tile, split=True, pdl=True).ptx.splitlines()
    (look,) = (i for i, line in enumerate(lines) if "ld.acquire.gpu" in line)
    begin = next(i for i in range(look, 0, -1) if lines[i].startswith("$L"))
    label = lines[begin].split(":")[0]
    end = next(
        i for i in range(look, len(lines)) if re.search(rf"bra.*{re.escape(label)}\b", lines[i])
    )
    assert not any("bar" in line or ".shared" in line for line in lines[begin:end])


def test_scales_are_loaded_with_their_neighbours():
    # a step has scales of four groups in each of a thread's two rows
    of_few = next(tile for tile in TILES if (tile.block_m, tile.block_n) == (64, 64))
    for tile, loads in ((of_few, (2, 4, 8)), (OF_16_ROWS, (2, 8, 8))):
        codes = [lowered(tile, group=32, n_groups=n) for n in (64, 90, 45)]
        assert tuple(code.count("LDG") for code in codes) == loads, tile


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_all_weights(weights):
    # warps of 16 and of 32 rows by turns, and every other pair of them stored through pointers
    i = WEIGHTS.index(weights)
    plain = i // 2 % 2 == 1
    _check((OF_16_ROWS, OF_32_ROWS)[i % 2], *weights, y=weights[0] if plain else None, bias=plain)


@pytest.mark.parametrize("scale", ["fp16", "fp32"])
def test_scales_that_are_not_bf16_beside_an_fp32_x(scale):
    code = lowered(OF_32_ROWS, scale=scale, y="fp32")
    assert code.stack == 0 and code.matrix == {"HGMMA"}, str(code)
    # bf16 scales would go straight to the weights, as bits
    assert code.count("FMUL") > lowered(OF_32_ROWS, y="fp32").count("FMUL"), str(code)


def test_ptxas_says_when_it_must_order_products_itself():
    code = lowered(OF_32_ROWS)
    unordered = re.sub(r"wgmma\.wait_group\.sync\.aligned \d;", "", code.ptx)
    assert "C7517" in messages(replace(code, ptx=unordered))
