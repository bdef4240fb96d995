"""decode.py as machine code, for GPUs that need not be there.

What makes it fast is what it does not do: no shared memory and no barrier in the main loop, no
spill, and few instructions a weight. A wrong order of k or of a load's dimension loses all of that
without a wrong answer, and only these tests would notice.
"""

from __future__ import annotations

import pytest
import triton

from tests.kernels.lowering.sass import Lowered, lower
from w4tensor.dispatch import KWIDTH_2_EVERYWHERE
from w4tensor.kernels.decode import _decode_kernel

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
KWIDTH = 2 if RELEASE >= KWIDTH_2_EVERYWHERE else 4
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}

# block_m, block_n, block_k, num_warps
TILES = (
    (8, 16, 512, 4),
    (8, 16, 256, 8),
    (8, 32, 128, 4),
    (8, 32, 256, 4),
    (8, 64, 256, 4),
    (16, 32, 128, 8),
    (16, 64, 128, 4),
)


def _lower(
    tile: tuple[int, int, int, int],
    group: int = 128,
    zero: str | None = None,
    dtype: str = "bf16",
    scale: str = "bf16",
    capability: int = 90,
    kwidth: int = KWIDTH,
    **constants: object,
) -> Lowered:
    block_m, block_n, block_k, num_warps = tile
    segments = max(1, block_k // group) if group else 1
    widest = max(SIZES[t] for t in (scale, zero) if t)
    vector = 1
    while 2 * vector * widest <= 16 and segments % (2 * vector) == 0:
        vector *= 2
    signature = {
        "x_ptr": f"*{dtype}",
        "w_ptr": "*i32",
        "scale_ptr": f"*{scale}",
        "zero_ptr": f"*{zero}",
        "y_ptr": f"*{dtype}",
        **dict.fromkeys(("M", "N", "K", "n_vectors", "stride_xe", "stride_xm"), "i32"),
    }
    fixed = {
        "bias_ptr": None,
        "part_ptr": None,
        "counter_ptr": None,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCKS": block_k // 128,
        "WARPS": num_warps,
        "SPLIT_K": 1,
        "GROUP": group,
        "SEGMENTS": segments,
        "VECTOR": vector,
        "EVEN_K": True,
        "PAIRS": True,
        "STAGES": 1,
        "KWIDTH": kwidth,
        "X_AHEAD": False,
        "EVICT": "",
        "PDL": False,
        "ASM": True,
        **constants,
    }
    if zero is None:
        fixed["zero_ptr"] = None
    return lower(
        _decode_kernel,
        signature,
        fixed,
        num_warps,
        num_stages=fixed["STAGES"],
        capability=capability,
        unaligned=("M", "n_vectors"),
    )


def _per_weight(code: Lowered, tile: tuple[int, int, int, int]) -> float:
    return code.per_weight(tile[1] * tile[2] * tile[3])


def _goes_straight_to_registers(code: Lowered) -> bool:
    memory = code.count("STS", "LDS", "LDSM", "LDGSTS", "SHFL", "BAR")
    return code.stack == 0 and memory == 0 and code.matrix == {"HMMA"}


@pytest.mark.parametrize("capability", [90, 80, 100])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_symmetric_groups_of_128(tile, capability):
    code = _lower(tile, capability=capability)
    assert _goes_straight_to_registers(code), str(code)
    assert _per_weight(code, tile) <= 2.4, str(code)


@pytest.mark.parametrize(
    ("group", "zero", "budget"),
    [(128, "fp16", 2.5), (32, None, 2.5), (32, "fp16", 3.4), (64, None, 2.2), (0, None, 2.1)],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_weights(group, zero, budget, dtype):
    tile = (8, 32, 256, 4)
    code = _lower(tile, group, zero, dtype, scale=dtype)
    assert _goes_straight_to_registers(code), str(code)
    assert _per_weight(code, tile) <= budget, str(code)


def test_a_step_of_weights_comes_in_loads_of_16_bytes():
    block_m, block_n, block_k, num_warps = tile = (8, 32, 256, 4)
    code = _lower(tile)
    assert code.count("LDG.E.128") == block_n * block_k // 2 // 16 // 32


def test_the_scales_of_a_row_come_in_one_load():
    # four groups a step and row: one load of 8 bytes for each of a lane's two rows
    code = _lower((8, 16, 512, 4))
    assert code.count("LDG.E.64") == 2, str(code)


def test_half_a_tile_of_rows_costs_half_the_matrix_unit():
    # 8 rows fill half of an instruction of 16: for matrices too small for the card
    tile = (8, 8, 256, 8)
    code = _lower(tile)
    assert _goes_straight_to_registers(code), str(code)
    assert _per_weight(code, tile) <= 3.6, str(code)


def test_the_wrong_order_of_k_is_noticed():
    tile = (8, 32, 256, 4)
    code = _lower(tile, kwidth=6 - KWIDTH)
    assert not _goes_straight_to_registers(code)


@pytest.mark.parametrize(
    "switch",
    [{"X_AHEAD": True}, {"EVICT": "evict_first"}, {"PDL": True}, {"EVEN_K": False}],
    ids=str,
)
def test_switches_cost_little(switch):
    tile = (8, 32, 256, 4)
    code = _lower(tile, **switch)
    assert _goes_straight_to_registers(code), str(code)
    assert _per_weight(code, tile) <= 2.2, str(code)
