"""descriptors.py on machine code written by hand."""

from __future__ import annotations

from tests.kernels.lowering.descriptors import stale_descriptors

START = "ULDC.64 UR4, c[0x0][0x210]"
TURN = "USHF.L.U32 UR6, UR6, 0xd"
ONE = "HGMMA.64x8x16.F32.BF16 R28, R32, gdesc[UR20], R28"
OTHER = "HGMMA.64x32x16.F32.BF16 R40, R60, gdesc[UR20], R40"
MADE = "UIADD3.64 UR22, UR6, 0x2, URZ"


def text(*code: str) -> str:
    """`code` as cuobjdump prints it; `{n}` is the address of line n."""
    at = [f"0x{16 * i:x}" for i in range(len(code))]
    lines = (
        f"        /*{16 * i:04x}*/  {op.format(*at)} ;  /* 0x0 */" for i, op in enumerate(code)
    )
    return "\n".join([*lines, f"        /*{16 * len(code):04x}*/  EXIT ;"])


def test_what_a_turn_computes_is_its_own():
    assert stale_descriptors(text(START, TURN, MADE, ONE, "@P0 BRA {1}")) == []


def test_what_no_turn_computes_is_of_all():
    assert stale_descriptors(text(START, MADE, TURN, ONE, "@P0 BRA {2}")) == []


def test_what_the_turn_before_computed():
    found = stale_descriptors(text(START, TURN, ONE, MADE, "@P0 BRA {1}"))
    assert found == [f"0x20 {ONE}"]


def test_what_only_one_of_two_branches_computes():
    code = (START, TURN, "@P0 BRA {6}", MADE, OTHER, "BRA {7}", ONE, "@P1 BRA {1}")
    assert stale_descriptors(text(*code)) == [f"0x60 {ONE}"]
    # each its own
    code = (START, TURN, "@P0 BRA {6}", MADE, OTHER, "BRA {8}", MADE, ONE, "@P1 BRA {1}")
    assert stale_descriptors(text(*code)) == []
    # or before the branches
    code = (START, TURN, MADE, "@P0 BRA {6}", OTHER, "BRA {7}", ONE, "@P1 BRA {1}")
    assert stale_descriptors(text(*code)) == []


def test_half_of_a_descriptor():
    half = "UIADD3 UR22, UR6, 0x2, URZ"
    code = (START, TURN, half, ONE, "UMOV UR23, 0x40000000", "@P0 BRA {1}")
    assert stale_descriptors(text(*code)) == [f"0x30 {ONE}"]


def test_a_loop_in_a_loop():
    code = (START, TURN, MADE, ONE, MADE, "@P0 BRA {3}", ONE, "@P1 BRA {1}")
    assert stale_descriptors(text(*code)) == [f"0x30 {ONE}"]
    code = (START, TURN, MADE, ONE, "@P0 BRA {2}", ONE, "@P1 BRA {1}")
    assert stale_descriptors(text(*code)) == []
