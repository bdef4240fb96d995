"""routing.py and gather.py as machine code: nothing spills, and rows are copied 16 bytes a lane."""

from __future__ import annotations

import pytest
import triton

from tests.kernels.lowering.sass import lower
from w4tensor.kernels.gather import _gather_kernel
from w4tensor.kernels.routing import (
    BLOCK_CHUNKS,
    CHUNK,
    OTHERS,
    RUN,
    _count_kernel,
    _place_kernel,
    _route_kernel,
)
from w4tensor.kernels.row_tiles import BLOCK_SLOTS

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

TYPES = {"ids_ptr": "*i64"}
TYPES |= dict.fromkeys(("counts_ptr", "order_ptr", "offs_ptr", "tiles_ptr"), "*i32")
UNALIGNED = ("n_pairs", "n_tiles", "n_chunks", "n_rows", "n_experts")


def _lower(kernel, warps: int, **constants):
    types = {name: TYPES.get(name, "i32") for name in kernel.arg_names}
    unaligned = tuple(name for name in UNALIGNED if name in types)
    return lower(kernel, types, {**constants, "PDL": True}, warps, unaligned=unaligned)


@pytest.mark.parametrize("pairs,warps", [(128, 1), (2048, 4), (16384, 16)])
def test_one_launch(pairs, warps):
    sizes = dict(BLOCK_M=64, BLOCK_PAIRS=pairs, RUN=RUN, BLOCK_SLOTS=BLOCK_SLOTS)
    code = _lower(_route_kernel, warps, **sizes)
    assert code.stack == 0, str(code)


@pytest.mark.parametrize("experts", [32, 256, 512])
def test_two_launches(experts):
    sizes = dict(CHUNK=CHUNK, BLOCK_E=experts)
    assert _lower(_count_kernel, 8, **sizes).stack == 0
    sizes |= dict(BLOCK_M=64, OTHERS=OTHERS, BLOCK_CHUNKS=BLOCK_CHUNKS, BLOCK_SLOTS=BLOCK_SLOTS)
    code = _lower(_place_kernel, 8, **sizes)
    assert code.stack == 0, str(code)


@pytest.mark.parametrize(
    "dtype,block,rows", [("bf16", 2048, 1), ("bf16", 2048, 2), ("i8", 2048, 4)]
)
def test_rows_are_copied_in_lines(dtype, block, rows):
    sizes = dict(BLOCK_M=1, NARROW=0, BLOCK_E=32, BLOCK_SLOTS=BLOCK_SLOTS, tiles_ptr=None)
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "order_ptr": "*i32", "offs_ptr": "*i32"}
    types = {name: types.get(name, "i32") for name in _gather_kernel.arg_names}
    constants = dict(sizes, X_DIV=8, ROWS=rows, BLOCK=block, PDL=True)
    unaligned = tuple(name for name in UNALIGNED if name in types)
    code = lower(_gather_kernel, types, constants, 4, unaligned=unaligned)
    copies = rows * block * (1 if dtype == "i8" else 2) // 16 // code.threads
    assert code.stack == 0 and code.count("LDG.E.128") == code.count("STG.E.128") == copies, code
