"""Machine code of kernels/gemm_hopper.py on ACT_QUANT words: as good as on COALESCED ones."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.lowering.sass import Lowered, _main_loop
from w4tensor.dispatch_hopper import TILES

gluon = pytest.importorskip("triton.experimental.gluon._runtime")

from triton.experimental.gluon import language as gl  # noqa: E402

from w4tensor.kernels.gemm_hopper import _gemm_hopper_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# what launches leave out, each at its own type
OPTIONAL = {"zero_ptr": "*fp16", "bias_ptr": "*bf16", "part_ptr": "*fp32", "flag_ptr": "*i64"}


@functools.cache
def lower(tile, group=32, act_quant=True, dtype="bf16", scale="bf16", given=(), whole=True):
    """The kernel for sm_90 with a tile of dispatch_hopper.py -> code, PTX, messages of ptxas."""
    block_m, block_n, warps, stages = tile
    element = gl.bfloat16 if dtype == "bf16" else gl.float16

    def descriptor(name, rows, columns, of):
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], of)
        return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"

    types = {name: OPTIONAL[name] for name in given}
    types |= dict(
        x_desc=descriptor(dtype, block_m, 128, element),
        w_desc=descriptor("i32", block_n, 16, gl.int32),
        y_desc=descriptor(dtype, block_m, block_n, element),
        y_ptr=f"*{dtype}",
        scale_ptr=f"*{scale}",
        token="i64",
    )
    constants: dict[str, object] = dict(GROUP_N=8, WHOLE_STEPS=whole, GROUP=group, PDL=True)
    constants |= dict(ACT_QUANT=act_quant, WARPS=warps, STAGES=stages)
    constants |= {name: None for name in OPTIONAL if name not in given}
    names = _gemm_hopper_kernel.arg_names
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = ("y_ptr", "scale_ptr", "zero_ptr", "bias_ptr", "part_ptr", "flag_ptr", "N")
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants}
    source = gluon.GluonASTSource(_gemm_hopper_kernel, types, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options=dict(num_warps=warps))
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(built.asm["cubin"])
        ptx.write_text(built.asm["ptx"])
        text = tool("cuobjdump", "-sass", cubin)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", cubin))
        messages = tool("ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", "/dev/null")
    assert usage is not None, "cuobjdump printed no resource usage"
    code = Lowered(
        opcodes=_main_loop(text),
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=built.metadata.shared,
        threads=32 * warps,
        text=text,
    )
    return code, built.asm["ptx"], messages


def tool(name: str, *args: str | Path) -> str:
    done = subprocess.run([BIN / name, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# instructions a weight in the main loop of an eight-warp or 64-row tile, and of one in which a warp
# has 32 rows; as many for scales of 32 k as for those of 128. Triton 3.6 to 3.9 differ by 0.1
BUDGET = {"bf16": (3.4, 2.6), "bf16 zero": (4.5, 3.8), "fp16": (3.9, 3.1), "fp16 zero": (4.5, 3.8)}
# what the last group of a row adds, where blocks do not divide K
ODD_K = 0.2
VARIANTS = {
    "bf16": dict(),
    "bf16 zero": dict(given=("zero_ptr",)),
    "fp16": dict(dtype="fp16", scale="fp16"),
    "fp16 zero": dict(dtype="fp16", scale="fp16", given=("zero_ptr",)),
}
# each tile, and how many programs of it share a multiprocessor
ALL_TILES = {(t.block_m, t.block_n, t.num_warps, t.num_stages): t.resident for t in TILES}


def check(tile, variant, **options):
    code, _, messages = lower(tile, **options)
    block_m, block_n, warps, _ = tile
    assert code.stack == 0, str(code)
    # weights stay in registers, and the matrix unit does not wait for each product
    assert code.count("STS", "STSM") == 0 and code.matrix == {"HGMMA"}, str(code)
    assert "C75" not in messages, messages
    budget = BUDGET[variant][block_n == 32 * warps] + ODD_K * (not options.get("whole", True))
    assert code.per_weight(block_n * 128) <= budget, (code.per_weight(block_n * 128), str(code))
    return code


@pytest.mark.parametrize("variant", ["bf16", "fp16 zero"])
@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda t: "x".join(map(str, t)))
def test_every_tile(tile, variant):
    code = check(tile, variant, **VARIANTS[variant])
    # a word's scale serves the four words that a lane has of a row
    rows_a_lane = tile[1] // (8 * tile[2])
    assert code.count("LDG") == rows_a_lane * (2 if "zero" in variant else 1), str(code)
    if variant == "bf16":
        # registers come by 8; zero points take more of them
        registers = code.threads * (-(-code.registers // 8) * 8)
        assert ALL_TILES[tile] * registers <= 65536, str(code)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_every_group_costs_the_same(group, variant):
    check((64, 128, 4, 4), variant, group=group, **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["bf16", "fp16 zero"])
def test_slices_of_k_and_rows_that_blocks_do_not_divide(variant):
    options = dict(VARIANTS[variant])
    given = (*options.pop("given", ()), "bias_ptr", "part_ptr", "flag_ptr")
    check((64, 128, 4, 4), variant, given=given, whole=False, **options)


def test_signs_of_nibbles_cost_no_instruction():
    tile = (64, 128, 4, 4)
    signed, plain = lower(tile, group=128)[0], lower(tile, group=128, act_quant=False)[0]
    assert signed.count("LOP3") == plain.count("LOP3")
    assert signed.instructions <= plain.instructions + 4, f"{signed}\n{plain}"


@pytest.mark.parametrize("scale", ["bf16", "fp16", "fp32"])
def test_only_scales_of_bf16_are_multiplied_as_bf16(scale):
    _, ptx, _ = lower((64, 64, 4, 4), scale=scale)
    # the factor that makes a subnormal of a code a normal number
    assert ("0x70007000" in ptx) == (scale == "bf16")
