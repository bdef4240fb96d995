"""Machine code of kernels/gemm_hopper.py on ACT_QUANT words: as good as on COALESCED ones."""

from __future__ import annotations

import functools

import pytest
import triton
from triton.experimental.gluon import language as gl

from tests.kernels.lowering.sass import Lowered, lower, messages
from w4tensor.dispatch_hopper import TILES
from w4tensor.kernels.gemm_hopper import _gemm_hopper_kernel, boxes_of_tokens
from w4tensor.kernels.gemm_hopper_persistent import gemm_hopper_persistent_kernel
from w4tensor.kernels.groups import groups_together

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

# what launches leave out, each at its own type
OPTIONAL = {"zero_ptr": "*fp16", "bias_ptr": "*bf16", "part_ptr": "*fp32", "flag_ptr": "*i64"}


@functools.cache
def built(
    tile,
    group=32,
    act_quant=True,
    dtype="bf16",
    scale="bf16",
    given=(),
    n_groups=64,
    shared=False,
) -> Lowered:
    """The kernel for sm_90 with a tile of dispatch_hopper.py; of programs that share tiles."""
    kernel = gemm_hopper_persistent_kernel if shared else _gemm_hopper_kernel
    block_m, block_n, warps, stages, pipelined = tile
    element = gl.bfloat16 if dtype == "bf16" else gl.float16

    def descriptor(name, rows, columns, of):
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], of)
        return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"

    first, more = (sum(box) for box in boxes_of_tokens(block_m, block_m))
    types = {name: OPTIONAL[name] for name in given}
    types |= dict(
        x_desc=descriptor(dtype, first, 128, element),
        more_x_desc=descriptor(dtype, more or first, 128, element),
        w_desc=descriptor("i32", block_n, 16, gl.int32),
        y_desc=descriptor(dtype, first, block_n, element),
        more_y_desc=descriptor(dtype, more or first, block_n, element),
        **({} if shared else {"y_ptr": f"*{dtype}"}),
        scale_ptr=f"*{scale}",
        token="i64",
    )
    types = {n: types.get(n, "i32") for n in kernel.arg_names}
    together = groups_together(n_groups, group or 128, block_m)
    constants: dict[str, object] = dict(GROUP_N=8, TOGETHER=together, GROUP=group, PDL=True)
    constants |= dict(ACT_QUANT=act_quant, WARPS=warps, STAGES=stages, PIPELINED=pipelined)
    constants |= {name: None for name in OPTIONAL if name not in given}
    constants |= {"multiple_ptr": None, "x_scale_ptr": None}
    constants |= {} if more else {"more_x_desc": None, "more_y_desc": None}
    unaligned = tuple(name for name in types if name.endswith("_desc"))
    unaligned += ("token", "M", "steps", "n_groups")
    unaligned += ("tiles", "rounds") if shared else ("split_k",)
    return lower(kernel, types, constants, warps, unaligned=unaligned)


# instructions a weight in the main loop of an eight-warp or 64-row tile, and of one in which a warp
# has 32 rows; as many for scales of 32 k as for those of 128. Triton 3.6 to 3.9 differ by 0.1
BUDGET = {"bf16": (3.4, 2.6), "bf16 zero": (4.5, 3.8), "fp16": (3.9, 3.1), "fp16 zero": (4.5, 3.8)}
# what the last group of a row adds, where blocks do not divide K; and a second run of tokens
ODD_K = 0.2
SECOND_RUN = 0.8
VARIANTS = {
    "bf16": dict(),
    "bf16 zero": dict(given=("zero_ptr",)),
    "fp16": dict(dtype="fp16", scale="fp16"),
    "fp16 zero": dict(dtype="fp16", scale="fp16", given=("zero_ptr",)),
}
# each tile, and how many programs of it share a multiprocessor
ALL_TILES = {
    (t.block_m, t.block_n, t.num_warps, t.num_stages, t.pipelined): t.resident for t in TILES
}
SHARED = [tile for tile, t in zip(ALL_TILES, TILES, strict=True) if t.shares]
TILE = (64, 128, 4, 4, True)


def check(tile, variant, **options):
    code = built(tile, **options)
    _, block_n, warps, *_ = tile
    assert code.stack == 0, str(code)
    # weights stay in registers, and the matrix unit does not wait for each product
    assert code.count("STS", "STSM") == 0 and code.matrix == {"HGMMA"}, str(code)
    assert "C75" not in messages(code), messages(code)
    budget = BUDGET[variant][block_n == 32 * warps] + ODD_K * ("n_groups" in options)
    budget += SECOND_RUN * len(boxes_of_tokens(tile[0], tile[0])[1])
    assert code.per_weight(block_n * 128) <= budget, (code.per_weight(block_n * 128), str(code))
    return code


@pytest.mark.parametrize("variant", ["bf16", "fp16 zero"])
@pytest.mark.parametrize("tile", ALL_TILES, ids=str)
def test_every_tile(tile, variant):
    code = check(tile, variant, **VARIANTS[variant])
    # a word's scale serves the four words that a lane has of a row
    rows_a_lane = tile[1] // (8 * tile[2])
    assert code.count("LDG") == rows_a_lane * (2 if "zero" in variant else 1), str(code)
    if variant == "bf16":
        # registers come by 8; zero points take more of them
        registers = code.threads * (-(-code.registers // 8) * 8)
        assert ALL_TILES[tile] * registers <= 65536, str(code)


@pytest.mark.parametrize("given", [(), ("part_ptr", "flag_ptr")], ids=["", "even"])
@pytest.mark.parametrize("tile", SHARED, ids=str)
def test_every_tile_that_programs_share(tile, given):
    check(tile, "bf16", shared=True, given=given)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_every_group_costs_the_same(group, variant):
    check(TILE, variant, group=group, **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["bf16", "fp16 zero"])
def test_slices_of_k_and_rows_that_blocks_do_not_divide(variant):
    options = dict(VARIANTS[variant])
    given = (*options.pop("given", ()), "bias_ptr", "part_ptr", "flag_ptr")
    check(TILE, variant, given=given, n_groups=45, **options)


def test_signs_of_nibbles_cost_no_instruction():
    signed, plain = built(TILE, group=128), built(TILE, group=128, act_quant=False)
    assert signed.count("LOP3") == plain.count("LOP3")
    assert signed.instructions <= plain.instructions + 4, f"{signed}\n{plain}"


@pytest.mark.parametrize("scale", ["bf16", "fp16", "fp32"])
def test_only_scales_of_bf16_are_multiplied_as_bf16(scale):
    ptx = built((64, 64, 4, 4, True), scale=scale).ptx
    # the factor that makes a subnormal of a code a normal number
    assert ("0x70007000" in ptx) == (scale == "bf16")
