"""gemv.py as machine code, for GPUs that need not be there.

A thread's weights come in 16-byte loads and stay where they are: no shared memory and no barrier in
the main loop, no spill, and few instructions a weight, of which half are x becoming integers, paid
once for all rows of a program.
"""

from __future__ import annotations

import functools

import pytest
import triton

from tests.kernels.lowering.sass import Lowered, lower
from w4tensor.dispatch_gemv import warps_per_sm
from w4tensor.kernels.gemv import MAX_REGISTERS, _gemv_kernel

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing is compiled under TRITON_INTERPRET"
)

ROWS = 8
REGISTERS = 1 << 16


@functools.cache
def _lower(
    num_warps: int = 1,
    ahead: bool = False,
    group: int = 128,
    zero: bool = False,
    dtype: str = "bf16",
    top_k: int = 1,
    gate: str = "none",
    ids: bool = False,
    whole: bool = True,
    act: int | None = None,
    capability: int = 90,
) -> Lowered:
    pointers = {"x_ptr": f"*{dtype}", "w_ptr": "*i32", "scale_ptr": f"*{dtype}"}
    pointers |= {"zero_ptr": "*fp16", "ids_ptr": "*i64", "weight_ptr": "*fp32"}
    pointers |= {"bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    absent = {"bias_ptr"} | (set() if zero else {"zero_ptr"}) | (set() if ids else {"ids_ptr"})
    absent |= set() if top_k > 1 else {"weight_ptr"}
    return lower(
        _gemv_kernel,
        {name: pointers.get(name, "i32") for name in _gemv_kernel.arg_names},
        dict.fromkeys(absent)
        | dict(X_DIV=1, TOP_K=top_k, GROUP=group, ACT_GROUP=act, WHOLE_BLOCKS=whole, ROWS=ROWS)
        | dict(THREADS=32 * num_warps, AHEAD=ahead, GATE=gate, ACT="silu" if ids else "none")
        | dict(PDL="second" if capability >= 90 else "none", ASM=True),
        num_warps=num_warps,
        num_stages=1,
        capability=capability,
        unaligned=tuple(_gemv_kernel.do_not_specialize),
        **({"maxnreg": MAX_REGISTERS} if ahead and (group >= 128 or act) and not zero else {}),
    )


def _check(budget: float, **kind) -> None:
    code = _lower(**kind)
    assert code.stack == 0, code
    # what dispatch takes for granted
    fine = kind.get("group", 128) < 128 and not kind.get("act")
    room = warps_per_sm(fine or kind.get("zero", False), kind.get("ahead", False))
    if kind.get("act") and not kind.get("ahead"):
        # dispatch was measured on Hopper
        room -= 4 * (kind.get("capability", 90) < 90)
    assert code.registers * 32 * room <= REGISTERS, code.registers
    assert code.count("STS", "LDS", "BAR") == 0, code
    # a row's weights of a step are one load, and 32 numbers of x for int8 four
    loads = [o for o in code.opcodes if o.startswith("LDG") and o.endswith(".128")]
    assert sum(code.opcodes[o] for o in loads) == ROWS + 4 * bool(kind.get("act")), code.opcodes
    assert code.count("IDP") >= (8 if kind.get("act") else 16) * ROWS, code
    assert code.per_weight(ROWS * code.threads * 32) <= budget, code


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("num_warps,ahead", [(1, False), (2, True), (4, True), (4, False)])
def test_one_scale_a_thread(num_warps, ahead, capability):
    _check(2.6, num_warps=num_warps, ahead=ahead, capability=capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("ahead", [False, True])
def test_one_scale_a_word(ahead, capability):
    # scaled four times as often
    _check(3.3, num_warps=2, ahead=ahead, group=32, capability=capability)


def test_scales_of_a_block_are_one_load():
    assert _lower(1, group=32).opcodes["LDG.E.64"] == ROWS


@pytest.mark.parametrize("num_warps,ahead", [(1, False), (2, True), (4, False)])
def test_zero_points(num_warps, ahead):
    _check(2.8, num_warps=num_warps, ahead=ahead, zero=True)
    _check(3.9, num_warps=num_warps, ahead=ahead, zero=True, group=32)


@pytest.mark.parametrize("group,budget", [(128, 2.7), (32, 3.5)])
def test_a_k_that_blocks_do_not_divide(group, budget):
    _check(budget, num_warps=2, ahead=True, group=group, whole=False)


def test_fp16():
    _check(2.6, dtype="fp16")


@pytest.mark.parametrize("gate", ["none", "halves", "interleaved"])
def test_experts_first_product(gate):
    _check(2.7, ahead=True, ids=True, gate=gate)


def test_experts_second_product():
    # each chunk has a slot to find
    _check(3.6, num_warps=4, ahead=True, ids=True, top_k=8)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("act", [32, 128])
@pytest.mark.parametrize("num_warps,ahead", [(2, False), (2, True), (4, True), (4, False)])
def test_int8_activations(num_warps, ahead, act, capability):
    # codes take as many instructions as planes, and each word four instead of eight; finer groups
    # of weights cost nothing, as a thread's slice has one scale
    kind = dict(num_warps=num_warps, ahead=ahead, group=32, act=act, capability=capability)
    _check(2.9 if capability < 90 else 2.6, **kind)


def test_int8_activations_on_blackwell():
    _check(2.6, num_warps=2, ahead=True, group=32, act=32, capability=100)


def test_int8_activations_of_other_kinds():
    _check(2.9, num_warps=2, act=32, zero=True)
    _check(2.4, num_warps=2, act=32, dtype="fp16", ahead=True)
    _check(2.7, num_warps=2, act=32, ids=True, gate="halves", ahead=True)
    _check(2.9, num_warps=4, act=32, ids=True, top_k=8, ahead=True)


def test_x_is_read_through_one_address():
    # sixteen loads a thread, a step: an address each would cost two instructions a load
    assert _lower().count("LEA.HI") <= 24, _lower().opcodes
