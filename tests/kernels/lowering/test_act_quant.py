"""Machine code of the W4A8 kernels: weights stay in registers, nothing spills, few instructions."""

from __future__ import annotations

import functools

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.lowering.sass import Lowered, lower
from w4tensor.dispatch import KWIDTH_2_EVERYWHERE
from w4tensor.kernels.act_quant_decode import _decode_kernel
from w4tensor.kernels.act_quant_dp4a import _dp4a_kernel
from w4tensor.kernels.act_quant_gemm import _gemm_kernel
from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.quantize_activation import _quantize_kernel

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# k in its own order for wgmma, and from some release on for mma.sync too
MMA_KWIDTH = 4 if TRITON >= KWIDTH_2_EVERYWHERE else 8
POINTERS = {"scale_ptr": "*bf16", "zero_ptr": "*fp16", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
POINTERS |= {"x_scale_ptr": "*fp32", "x_sum_ptr": "*fp32", "part_ptr": "*fp32"}
POINTERS |= {"counter_ptr": "*i32"}
# counts that no caller keeps to multiples of 16
UNALIGNED = ("M", "n_groups", "n_act_groups")


def signature(kernel, **pointers: str) -> dict[str, str]:
    types = POINTERS | pointers
    return {name: types.get(name, "i32") for name in kernel.arg_names}


def absent(zero: bool) -> dict[str, None]:
    return {"bias_ptr": None} if zero else {"bias_ptr": None, "zero_ptr": None, "x_sum_ptr": None}


@functools.cache
def lower_dp4a(tokens=1, rows=4, group=128, act_group=32, zero=False, capability=90) -> Lowered:
    constants = dict(GROUP=group, ACT_GROUP=act_group, TOKENS=tokens, ROWS=rows)
    constants |= dict(BLOCK_N=4, BLOCK_SLICES=32, PDL=capability >= 90, ASM=True)
    return lower(
        _dp4a_kernel,
        signature(_dp4a_kernel, x_ptr="*i32", w_ptr="*i32"),
        constants | absent(zero),
        num_warps=4,
        num_stages=1,
        capability=capability,
        unaligned=UNALIGNED,
    )


def decode_rows(group: int) -> int:
    """BLOCK_N: two products a cell leave registers for one tile of 16 rows."""
    return 16 if group == 16 else 32


@functools.cache
def lower_decode(
    block_m=8,
    group=128,
    act_group=32,
    zero=False,
    split_k=1,
    even_k=True,
    kwidth=MMA_KWIDTH,
    capability=90,
) -> Lowered:
    block_n = decode_rows(group)
    cell, span = cell_and_span(group, act_group)
    constants = dict(GROUP=group, ACT_GROUP=act_group, CELL=cell, SPAN=span, BLOCK_M=block_m)
    constants |= dict(BLOCK_N=block_n, BLOCK_K=512, SPLIT_K=split_k, EVEN_K=even_k, KWIDTH=kwidth)
    constants |= dict(STAGES=3, PDL=capability >= 90, ASM=True)
    return lower(
        _decode_kernel,
        signature(_decode_kernel, x_ptr="*i8", w_ptr="*u8"),
        constants | absent(zero),
        num_warps=4,
        capability=capability,
        unaligned=UNALIGNED,
    )


@functools.cache
def lower_gemm(
    block_m,
    block_n=128,
    num_warps=8,
    group=128,
    act_group=32,
    zero=False,
    split_k=1,
    even_k=True,
    kwidth=4,
    capability=90,
    block_k=128,
    x_tma=False,
    stages=3,
) -> Lowered:
    chain = group == act_group == 0
    cell, span = (block_k, block_k) if chain else cell_and_span(group, act_group)
    constants = dict(GROUP=group, ACT_GROUP=act_group, CELL=cell, SPAN=span, CHAIN=chain)
    constants |= dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split_k)
    constants |= dict(SCALE_ROWS=max(1, 32 * num_warps // block_m), TOKEN_TILES=32)
    constants |= dict(EVEN_K=even_k, X_TMA=x_tma, KWIDTH=kwidth, STAGES=stages, ASM=True)
    x_type = f"tensordesc<i8[{block_m}, {cell}]>" if x_tma else "*i8"
    return lower(
        _gemm_kernel,
        signature(_gemm_kernel, x_ptr=x_type, w_ptr="*u8"),
        constants | absent(zero),
        num_warps=num_warps,
        capability=capability,
        unaligned=(*UNALIGNED, "x_ptr") if x_tma else UNALIGNED,
    )


def weights_stay_in_registers(code: Lowered, weights: int) -> bool:
    """Whether the main loop stores less to shared memory than half the weights' packed bytes.

    What is stored are scales that change lanes. Weights would be, packed or not, half a byte or a
    byte each.
    """
    width = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    stored = sum(
        count * width.get(opcode.split(".")[-1], 4)
        for opcode, count in code.opcodes.items()
        if opcode.split(".")[0] == "STS"
    )
    return stored * code.threads < weights / 4


# instructions a weight in the main loop, for tokens, weight group, act group (0: per token);
# 4.0 is what an H200 can issue in the time in which it reads a weight
DP4A = {(1, 128, 32): 1.4, (1, 128, 128): 1.4, (1, 128, 0): 1.3, (1, 32, 32): 1.4}
DP4A |= {(1, 16, 32): 1.9, (1, 0, 0): 1.1, (2, 128, 32): 2.0, (4, 128, 32): 3.0}


@pytest.mark.parametrize(("tokens", "group", "act_group"), DP4A)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_dp4a(tokens, group, act_group, capability):
    code = lower_dp4a(tokens, 4, group, act_group, capability=capability)
    assert code.stack == 0
    # no synchronisation: four wide loads of weights, two of each token's activations
    assert code.count("STS", "LDS", "LDSM", "BAR") == 0
    assert code.count("LDG.E.128") == 4 + 2 * tokens
    assert code.count("IDP") == 32 * tokens
    assert code.per_weight(4 * 4 * 32 * 32) <= DP4A[tokens, group, act_group], str(code)


def test_dp4a_with_zero_points():
    code = lower_dp4a(zero=True)
    assert code.stack == 0 and code.count("STS", "LDS", "BAR") == 0
    assert code.per_weight(4 * 4 * 32 * 32) <= 2.0, str(code)


DECODE = {(8, 128, 32): 2.0, (8, 128, 128): 1.8, (8, 128, 0): 1.5, (8, 32, 32): 2.4}
DECODE |= {(8, 32, 128): 2.3, (8, 16, 32): 4.3, (8, 0, 0): 1.4, (8, 0, 32): 2.0}
DECODE |= {(16, 128, 32): 2.8, (16, 128, 128): 2.3, (16, 128, 0): 1.8}


@pytest.mark.parametrize(("block_m", "group", "act_group"), DECODE)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_decode(block_m, group, act_group, capability):
    code = lower_decode(block_m, group, act_group, capability=capability)
    assert code.stack == 0
    assert code.matrix == {"IMMA"}
    weights = decode_rows(group) * 512
    assert weights_stay_in_registers(code, weights), str(code)
    assert code.per_weight(weights) <= DECODE[block_m, group, act_group], str(code)


@pytest.mark.parametrize(
    "options", [dict(zero=True), dict(split_k=2), dict(even_k=False), dict(zero=True, group=64)]
)
def test_decode_variants(options):
    code = lower_decode(**options)
    assert code.stack == 0 and weights_stay_in_registers(code, 32 * 512), str(code)
    assert code.per_weight(32 * 512) <= 2.8, str(code)


# tokens, warps, weight group, act group
GEMM = {(32, 4, 128, 32): 4.5, (64, 8, 128, 32): 8.6, (64, 8, 32, 32): 11.0}
GEMM |= {(32, 4, 128, 128): 2.3, (64, 4, 128, 128): 3.1, (128, 8, 128, 128): 5.6}
GEMM |= {(32, 4, 128, 0): 2.0, (64, 4, 128, 0): 2.4, (128, 8, 128, 0): 4.1}
GEMM |= {(128, 8, 0, 0): 1.8, (256, 8, 0, 0): 2.1, (64, 8, 32, 128): 8.0}


@pytest.mark.parametrize(("block_m", "num_warps", "group", "act_group"), GEMM)
def test_gemm_on_hopper(block_m, num_warps, group, act_group):
    code = lower_gemm(block_m, 128, num_warps, group, act_group)
    assert code.stack == 0
    assert code.matrix == {"IGMMA"}
    assert weights_stay_in_registers(code, 128 * 128), str(code)
    assert code.per_weight(128 * 128) <= GEMM[block_m, num_warps, group, act_group], str(code)


# tokens, rows, warps, act group
GEMM_TMA = {(64, 128, 4, 128): 3.1, (64, 128, 4, 0): 2.4, (64, 64, 4, 0): 3.1}
GEMM_TMA |= {(128, 64, 4, 128): 5.7, (128, 64, 4, 0): 4.1, (128, 128, 8, 128): 5.7}


@pytest.mark.parametrize(("block_m", "block_n", "num_warps", "act_group"), GEMM_TMA)
def test_gemm_where_x_comes_by_tma(block_m, block_n, num_warps, act_group):
    code = lower_gemm(block_m, block_n, num_warps, act_group=act_group, x_tma=True)
    assert code.stack == 0
    assert "UTMALDG" in code.text and code.matrix == {"IGMMA"}
    assert weights_stay_in_registers(code, block_n * 128), str(code)
    budget = GEMM_TMA[block_m, block_n, num_warps, act_group]
    assert code.per_weight(block_n * 128) <= budget, str(code)
    # two programs of four warps share a multiprocessor
    assert num_warps == 8 or code.registers * code.threads * 2 <= 65536


@pytest.mark.parametrize(("group", "act_group"), [(128, 32), (128, 128), (128, 0), (0, 0)])
@pytest.mark.parametrize("block_m", [32, 64])
def test_gemm_before_hopper(block_m, group, act_group):
    code = lower_gemm(block_m, 64, 4, group, act_group, kwidth=MMA_KWIDTH, capability=80)
    assert code.stack == 0
    assert code.matrix == {"IMMA"}
    assert weights_stay_in_registers(code, 64 * 128), str(code)


@pytest.mark.parametrize(
    "options", [dict(zero=True), dict(split_k=2), dict(even_k=False), dict(block_k=256)]
)
def test_gemm_variants(options):
    code = lower_gemm(64, act_group=128, **options)
    assert code.stack == 0 and weights_stay_in_registers(code, 128 * 128), str(code)


def test_the_wrong_order_would_be_seen():
    assert not weights_stay_in_registers(lower_gemm(64, kwidth=8), 128 * 128)
    assert not weights_stay_in_registers(lower_decode(kwidth=12 - MMA_KWIDTH), 32 * 512)


def test_quantizing_divides_as_ieee_does():
    constants = dict(BLOCK=1024, GROUP=32, SUM_GROUP=128, PER_TOKEN=False, SILU_MUL=True)
    constants |= dict(WORD_ORDER=False, PDL=True, OVERLAP=True, ASM=True)
    types = signature(_quantize_kernel, x_ptr="*bf16", out_ptr="*i8", sum_ptr="*fp32")
    types["scale_ptr"] = "*fp32"
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=_quantize_kernel, signature=types, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx and "div.approx" not in ptx and ".ftz" not in ptx


def test_quantizing_divides_once_a_group():
    """And not once an activation: that would be three times the instructions."""
    constants = dict(BLOCK=1024, GROUP=32, SUM_GROUP=None, PER_TOKEN=False, SILU_MUL=False)
    constants |= dict(WORD_ORDER=False, PDL=True, OVERLAP=True, ASM=True, sum_ptr=None)
    types = signature(_quantize_kernel, x_ptr="*bf16", out_ptr="*i8", scale_ptr="*fp32")
    code = lower(_quantize_kernel, types, constants, num_warps=4, unaligned=("M", "n_groups"))
    # a group's scale, and its reciprocal: each a fast path and the call of a slow one
    assert code.stack == 0 and code.count("MUFU.RCP") <= 4, str(code)


@pytest.mark.parametrize("group", [32, 64, 128, 1024])
def test_word_order_is_stored_by_16_bytes(group):
    constants = dict(BLOCK=1024, GROUP=group, SUM_GROUP=None, PER_TOKEN=group == 1024)
    constants |= dict(SILU_MUL=False, WORD_ORDER=True, PDL=True, OVERLAP=True, ASM=True)
    constants |= dict(scale_ptr=None, sum_ptr=None)
    types = signature(_quantize_kernel, x_ptr="*bf16", out_ptr="*bf16")
    unaligned = ("M", "n_groups", "n_sum_groups")
    code = lower(_quantize_kernel, types, constants, num_warps=4, unaligned=unaligned)
    assert code.stack == 0 and code.count("STG") == code.count("STG.E.128") == 1, str(code)
