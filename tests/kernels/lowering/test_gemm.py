"""gemm.py as machine code, for GPUs that need not be there.

Weights must go from registers to wgmma (sm_90) or mma.sync (sm_80), never through shared memory
once unpacked; two programs must fit a multiprocessor where the tile says so; nothing may spill.
"""

from __future__ import annotations

import pytest
import triton

from tests.kernels.lowering.sass import Lowered, lower
from w4tensor.dispatch import HOPPER_TILES, KWIDTH_2_EVERYWHERE
from w4tensor.kernels.gemm import _gemm_kernel

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# of a Hopper multiprocessor
REGISTERS = 65536
SHARED_BYTES = 227 * 1024


def _lower(
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    group: int = 128,
    zero: str | None = None,
    dtype: str = "bf16",
    capability: int = 90,
    tma: bool = True,
    after: bool = False,
    kwidth: int = 2,
    **options: object,
) -> Lowered:
    parts = 128 // group if 0 < group < 128 else 1
    vector = 1
    while 2 * vector * SIZES[dtype] <= 16 and parts % (2 * vector) == 0:
        vector *= 2
    signature = {
        "x_ptr": f"tensordesc<{dtype}[{block_m}, 128]>" if tma else f"*{dtype}",
        "w_ptr": "*i32",
        "scale_ptr": f"*{dtype}",
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
        "GROUP_N": 8,
        "SPLIT_K": 1,
        "GROUP": group,
        "PARTS": parts,
        "VECTOR": vector,
        "SCALE_AFTER": after,
        "EVEN_K": True,
        "X_TMA": tma,
        "KWIDTH": kwidth if capability == 90 or RELEASE >= KWIDTH_2_EVERYWHERE else 4,
        "WARPS": num_warps,
        "STAGES": num_stages,
        "ASM": True,
    }
    if zero is None:
        fixed["zero_ptr"] = None
    unaligned = ("M", "n_vectors", "x_ptr") if tma else ("M", "n_vectors")
    return lower(
        _gemm_kernel, signature, fixed, num_warps, num_stages, capability, unaligned, **options
    )


def _weights_stay_in_registers(code: Lowered) -> bool:
    return code.stack == 0 and code.count("STS", "STSM") == 0


@pytest.mark.parametrize(
    ("tile", "budget"), [((16, 64, 4, 4), 3.0), ((32, 64, 4, 4), 3.3), ((64, 64, 4, 4), 3.6)]
)
def test_scales_after_the_dot(tile, budget):
    code = _lower(*tile, tma=False, after=True)
    assert _weights_stay_in_registers(code) and code.matrix == {"HGMMA"}, str(code)
    assert code.per_weight(tile[1] * 128) <= budget, str(code)


@pytest.mark.parametrize(
    ("tile", "programs", "budget"),
    [
        ((64, 128, 4, 4), 2, 3.1),
        ((128, 128, 4, 3), 2, 3.1),
        ((128, 256, 8, 3), 1, 3.1),
        ((256, 128, 8, 3), 1, 4.0),
    ],
)
def test_scales_before_the_dot_with_x_by_tma(tile, programs, budget):
    code = _lower(*tile)
    assert _weights_stay_in_registers(code) and code.matrix == {"HGMMA"}, str(code)
    assert code.per_weight(tile[1] * 128) <= budget, str(code)
    assert programs * code.threads * code.registers <= REGISTERS, str(code)
    # a kilobyte a program is the driver's
    assert programs * (code.shared + 1024) <= SHARED_BYTES, str(code)


@pytest.mark.parametrize(
    ("group", "zero", "budget"), [(32, None, 3.7), (128, "fp16", 3.7), (32, "fp16", 5.2)]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_weights(group, zero, budget, dtype):
    code = _lower(64, 128, 4, 4, group, zero, dtype)
    assert _weights_stay_in_registers(code) and code.matrix == {"HGMMA"}, str(code)
    assert code.per_weight(128 * 128) <= budget, str(code)


def test_two_programs_of_eight_warps_fit_with_a_register_limit():
    code = _lower(128, 128, 8, 3, maxnreg=128)
    assert _weights_stay_in_registers(code), str(code)


# mma.sync deals warps out over rows alone only where a tile has four times as many rows as tokens
@pytest.mark.parametrize("tile", [(16, 64, 4, 4), (32, 128, 4, 3)])
def test_on_ampere(tile):
    code = _lower(*tile, capability=80, tma=False)
    assert _weights_stay_in_registers(code) and code.matrix == {"HMMA"}, str(code)
    assert code.per_weight(tile[1] * 128) <= 4.3, str(code)


@pytest.mark.parametrize("tile", [(16, 64, 4, 4), (64, 128, 4, 4), (128, 128, 8, 3)])
def test_on_blackwell(tile):
    """Its matrix unit takes weights from tensor memory, where they go from registers."""
    code = _lower(*tile, capability=100, tma=False)
    assert code.stack == 0 and code.matrix == {"UTCHMMA"}, str(code)
    # what goes to shared memory, four bytes at a time, is x
    assert code.count("STTM") > 0 and code.count("STS") == code.opcodes["STS"], str(code)
    assert code.count("STS") * 4 * code.threads == tile[0] * 128 * 2, str(code)
    assert code.per_weight(tile[1] * 128) <= 4.6, str(code)


# scales change with each part of a block, and zero points with them
@pytest.mark.parametrize(("group", "zero"), [(128, None), (32, None), (128, "fp16")])
@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("tile", HOPPER_TILES, ids=lambda t: f"{t.block_m}x{t.block_n}")
def test_every_shipped_tile(tile, block_n, group, zero):
    if block_n > tile.block_n:
        pytest.skip("dispatch halves tiles, it does not double them")
    kwidth = 4 if tile.block_m < 16 and RELEASE < KWIDTH_2_EVERYWHERE else 2
    after = group == 128 and zero is None and tile.block_m <= 64
    code = _lower(
        tile.block_m, block_n, 4, tile.num_stages, group, zero, after=after, kwidth=kwidth
    )
    assert _weights_stay_in_registers(code), str(code)
    assert code.per_weight(block_n * 128) <= (5.6 if tile.block_m >= 128 else 5.2), str(code)
