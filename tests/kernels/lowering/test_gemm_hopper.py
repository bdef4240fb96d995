"""gemm_hopper.py as machine code, for a GPU that need not be there.

Weights go from registers to wgmma, which must not be serialised; as many programs of a tile as its
row in dispatch says must fit a multiprocessor; nothing may spill.
"""

from __future__ import annotations

import functools
import re

import pytest
import triton
from triton.experimental.gluon import language as gl

from tests.kernels.lowering.sass import Lowered, lower, messages
from w4tensor.dispatch_hopper import TILES, HopperTile
from w4tensor.kernels.gemm_hopper import _gemm_hopper_kernel

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

# of a Hopper multiprocessor
REGISTERS = 65536
SHARED_BYTES = 227 * 1024
DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "i32": gl.int32}


def _descriptor(block: list[int], dtype: str) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


@functools.cache
def _lower(
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
    whole_steps: bool = True,
) -> Lowered:
    signature = {
        "x_desc": _descriptor([tile.block_m, 128], dtype),
        "w_desc": _descriptor([tile.block_n, 16], "i32"),
        "y_desc": _descriptor([tile.block_m, tile.block_n], dtype),
        "y_ptr": f"*{y or dtype}",
        "scale_ptr": f"*{scale or dtype}",
        "zero_ptr": f"*{zero}",
        "bias_ptr": f"*{dtype}",
        "part_ptr": "*fp32",
        "flag_ptr": "*i64",
        "token": "i64",
        **dict.fromkeys(("M", "N", "steps", "n_groups", "split_k"), "i32"),
    }
    constants = {
        "GROUP_N": 8,
        "GROUP": group,
        "WHOLE_STEPS": whole_steps,
        "WARPS": tile.num_warps,
        "STAGES": tile.num_stages,
        "PDL": pdl,
    }
    absent = {"y_desc": y, "zero_ptr": zero is None, "bias_ptr": not bias}
    absent |= dict.fromkeys(("part_ptr", "flag_ptr"), not split)
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    unaligned = ["x_desc", "w_desc", "y_desc", "token", "M", "steps", "split_k"]
    # rows that the accelerator stores are multiples of 8, and mostly of 16
    unaligned += ["N", "n_groups"] if y else []
    return lower(
        _gemm_hopper_kernel, signature, constants, tile.num_warps, unaligned=tuple(unaligned)
    )


def _check(code: Lowered, tile: HopperTile, resident: int, budget: float) -> None:
    assert code.stack == 0, str(code)
    assert code.matrix == {"HGMMA"} and code.count("STS", "STSM") == 0, str(code)
    # of 16 k each, by every 64 rows: the loop that was read is the one that multiplies
    warpgroups = tile.num_warps // 4
    assert code.count("HGMMA") == 8 * tile.block_n // (64 * warpgroups), str(code)
    serialised = re.search(r"C75\d\d.*", messages(code))
    assert serialised is None, serialised
    # registers come by 8, and a kilobyte of shared memory is the driver's
    registers = -(-code.registers // 8) * 8
    assert resident * code.threads * registers <= REGISTERS, str(code)
    assert resident * (code.shared + 1024) <= SHARED_BYTES, str(code)
    assert code.per_weight(tile.block_n * 128) <= budget, str(code)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile):
    _check(_lower(tile), tile, tile.resident, 4.0)
