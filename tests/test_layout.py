"""The bytes, against the bit diagrams of layout.py read anew in numpy, and the laws of packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.weights import cases
from w4tensor.errors import PackingError, Unsupported
from w4tensor.layout import (
    ACT_QUANT,
    COALESCED,
    GROUP_SIZES,
    LAYOUT_VERSION,
    check_contract,
    check_group_size,
    check_multiple,
    check_multiple_values,
    check_values,
    padded_k,
)

LAYOUTS = (COALESCED, ACT_QUANT)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def read_coalesced(qdata: np.ndarray, k: int) -> np.ndarray:
    """The first bit diagram: word 4 t + i of a block, its nibbles from bit 0 up."""
    words = qdata.view(np.uint32)
    codes = np.empty((*qdata.shape[:-1], k), np.uint8)
    for column in range(k):
        block, within = divmod(column, 128)
        i, rest = divmod(within, 32)
        t = rest % 8 // 2
        nibble = (0, 8, 16, 24, 1, 9, 17, 25).index(rest - 2 * t)
        codes[..., column] = words[..., 16 * block + 4 * t + i] >> 4 * nibble & 15
    return codes


def read_act_quant(qdata: np.ndarray, k: int) -> np.ndarray:
    """The second bit diagram: byte 16 i + j, two's complement nibbles of q - 8."""
    data = qdata.view(np.int8)
    codes = np.empty((*qdata.shape[:-1], k), np.uint8)
    for column in range(k):
        i, rest = divmod(column, 32)
        byte = data[..., 16 * i + rest % 16]
        high = (byte & -16) // 16
        low = ((byte << 4).astype(np.int8) & -16) // 16
        codes[..., column] = (high if rest >= 16 else low) + 8
    return codes


READERS = {COALESCED: read_coalesced, ACT_QUANT: read_act_quant}


def random_q(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, shape, generator=rng, dtype=torch.uint8)


@layouts
@pytest.mark.parametrize("k", [1, 16, 31, 100, 128, 129, 384])
def test_bytes_are_those_of_the_bit_diagram(layout, k):
    q = random_q(3, k, seed=k)
    qdata = layout.pack(q)
    assert qdata.dtype == layout.qdata_dtype
    assert qdata.shape == (3, padded_k(k) // layout.codes)
    assert np.array_equal(READERS[layout](qdata.numpy(), k), q.numpy())


@layouts
def test_padding_is_code_8(layout):
    q = random_q(2, 130)
    codes = READERS[layout](layout.pack(q).numpy(), 256)
    assert (codes[:, 130:] == 8).all()


def test_the_marks_are_dtypes_of_no_native_int4_format():
    marks = {layout.qdata_dtype for layout in LAYOUTS}
    assert len(marks) == 2 and not marks & {torch.int8, torch.uint8, torch.int32, torch.bfloat16}


@given(st.sampled_from(LAYOUTS), st.integers(1, 300), st.integers(1, 5), st.integers(0, 3))
def test_unpack_undoes_pack(layout, k, n, e):
    q = random_q(*[e] * (e > 0), n, k, seed=k)
    assert torch.equal(layout.unpack(layout.pack(q), k), q)


@given(st.sampled_from(LAYOUTS), st.integers(1, 300), st.data())
def test_rows_stand_alone(layout, k, data):
    q = random_q(7, k, seed=k)
    rows = data.draw(st.lists(st.integers(0, 6), min_size=1))
    assert torch.equal(layout.pack(q)[rows], layout.pack(q[rows]))


@given(st.sampled_from(LAYOUTS), st.integers(1, 4), st.integers(1, 300))
def test_blocks_stand_alone(layout, blocks, k):
    left, right = random_q(2, 128 * blocks), random_q(2, k, seed=1)
    whole = layout.pack(torch.cat((left, right), -1))
    assert torch.equal(whole, torch.cat((layout.pack(left), layout.pack(right)), -1))


def coalesced_k(k: int) -> int:
    """Of the code that an ACT_QUANT row has at k: its k for a reader of COALESCED words."""
    block, within = divmod(k, 128)
    t, within = divmod(within, 32)
    high, within = divmod(within, 16)
    i, byte = divmod(within, 4)
    return 128 * block + 32 * i + 16 * (byte % 2) + 8 * high + 2 * t + byte // 2


@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_act_quant_words_are_coalesced_ones_in_another_order(k, n, seed):
    """What kernels/gemm_hopper.py builds on: the law of unpack_act_quant.py's word order."""
    q = random_q(n, k, seed=seed)
    words = ACT_QUANT.pack(q).view(torch.int32) ^ -0x77777778
    seen = COALESCED.unpack(words.view(torch.int16), padded_k(k))
    assert torch.equal(seen[:, [coalesced_k(column) for column in range(k)]], q)
    # the other places are the padding's
    assert (seen == 8).sum() == (q == 8).sum() + n * (padded_k(k) - k)


def test_a_word_of_act_quant_is_of_one_slice():
    for column in range(256):
        # word (t, i) of a COALESCED reader has k = 32 i + .. + 2 t + ..
        t = coalesced_k(column) % 8 // 2
        assert column // 32 % 4 == t


@layouts
def test_unpack_reads_a_view_that_is_not_contiguous(layout):
    q = random_q(6, 384)
    qdata = layout.pack(q)
    block = 128 // layout.codes
    assert torch.equal(layout.unpack(qdata[::2, block:], 200), q[::2, 128:328])


@pytest.mark.parametrize("k", [1, 7, 48, 128, 300])
def test_a_group_size_is_legal_exactly_when_it_divides_k_or_is_the_row(k):
    for group_size in (*range(-3, 300), 512, 1024):
        legal = group_size in (-1, k) or (group_size in GROUP_SIZES and k % group_size == 0)
        if legal:
            assert check_group_size(group_size, k) == (k if group_size == -1 else group_size)
        else:
            with pytest.raises(Unsupported, match=r"group_size="):
                check_group_size(group_size, k)


@pytest.mark.parametrize("group_size", [128.0, "128", None, True, [128]])
def test_a_group_size_is_an_int(group_size):
    with pytest.raises(Unsupported, match="group_size"):
        check_group_size(group_size)


@pytest.mark.parametrize("k", [0, -128])
def test_a_row_of_nothing_is_refused(k):
    with pytest.raises(Unsupported, match="K="):
        check_group_size(-1, k)


# the contract: each field, one thing wrong at a time

GOOD = {"group_size": 64, "layout_version": LAYOUT_VERSION}


def contract(layout, *, qdata=None, scale=None, zero_point="good", **changes):
    """Check a legal [E=2, N=4, K=192] weight with some fields changed."""
    good = layout.pack(random_q(2, 4, 192))
    args = GOOD | changes
    check_contract(
        layout,
        good if qdata is None else qdata(good),
        torch.ones(2, 4, 3) if scale is None else scale(torch.ones(2, 4, 3)),
        torch.ones(2, 4, 3).half() if zero_point == "good" else zero_point,
        args["group_size"],
        args["layout_version"],
    )


@layouts
def test_a_legal_weight_passes(layout):
    contract(layout)
    contract(layout, zero_point=None)
    contract(layout, zero_point=torch.ones(2, 4, 3))
    for dtype in (torch.bfloat16, torch.float16):
        contract(layout, scale=lambda s, dtype=dtype: s.to(dtype))


OTHER_DTYPES = (torch.int8, torch.uint8, torch.int32, torch.bfloat16, torch.bool)
ZEROS = torch.ones(2, 4, 3).half()
WRONG = {
    "layout_version": [{"layout_version": v} for v in (0, 2, -1)],
    "qdata.dtype": [{"qdata": lambda q, d=d: q.to(d)} for d in OTHER_DTYPES]
    + [{"qdata": lambda q: q.view(torch.uint8)}, {"qdata": lambda q: q.view(torch.int32)}],
    "qdata.ndim": [{"qdata": lambda q: q[0, 0]}, {"qdata": lambda q: q[None]}],
    "scale.dtype": [
        {"scale": lambda s, d=d: s.to(d)} for d in (torch.float64, torch.int32, torch.uint8)
    ],
    "scale.shape": [
        {"scale": lambda s: s.mT},
        {"scale": lambda s: s[:, :3]},
        {"scale": lambda s: s[0]},
        {"scale": lambda s: s[None]},
        {"scale": lambda s: s[..., 0]},
    ],
    "group_size": [{"group_size": g} for g in (0, -1, 8, 96, 512, 192)],
    "qdata.shape": [
        {"group_size": 16},
        {"group_size": 256},
        {"qdata": lambda q: q[..., :-1]},
        {"qdata": lambda q: q[..., : q.shape[-1] // 2]},
        {"qdata": lambda q: torch.cat((q, q), -1)},
        {"scale": lambda s: s[..., :2]},
        {"scale": lambda s: s[..., :0].repeat(1, 1, 1)},
    ],
    "scale.device": [{"scale": lambda s: s.to("meta")}],
    "qdata.device": [],
    "zero_point.dtype": [
        {"zero_point": ZEROS.to(d)} for d in (torch.bfloat16, torch.int8, torch.float64)
    ],
    "zero_point.shape": [{"zero_point": ZEROS.mT}, {"zero_point": ZEROS[..., :2]}],
    "zero_point.device": [{"zero_point": ZEROS.to("meta")}],
}


@layouts
@pytest.mark.parametrize(
    ("field", "changes"),
    [(field, changes) for field, every in WRONG.items() for changes in every],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_wrong_field_is_refused(layout, field, changes):
    with pytest.raises(PackingError) as caught:
        contract(layout, **changes)
    if not (field == "qdata.shape" and caught.value.field == "group_size"):
        assert caught.value.field == field
    assert str(caught.value.found) and str(caught.value.expected)
    assert str(caught.value.found) in str(caught.value)
    assert str(caught.value.expected) in str(caught.value)


@given(cases())
def test_the_other_layout_never_passes(case):
    q, scale, zero = case.codes()
    for layout, other in (LAYOUTS, LAYOUTS[::-1]):
        check_contract(layout, layout.pack(q), scale, zero, case.g, LAYOUT_VERSION)
        with pytest.raises(PackingError) as caught:
            check_contract(other, layout.pack(q), scale, zero, case.g, LAYOUT_VERSION)
        assert caught.value.field == "qdata.dtype"


def test_values_out_of_range_are_refused():
    q, one = random_q(2, 16), torch.ones(2, 1)
    check_values(q, one, None)
    check_values(q, one, torch.full((2, 1), -3.5))
    for bad_q in (q + 16, torch.full_like(q, 255)):
        with pytest.raises(PackingError, match="0..15"):
            check_values(bad_q, one, None)
    with pytest.raises(PackingError, match="uint8"):
        check_values(q.to(torch.int8), one, None)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = torch.tensor([[1.0], [bad]])
        with pytest.raises(PackingError, match="scale is not finite"):
            check_values(q, broken, None)
        with pytest.raises(PackingError, match="zero_point is not finite"):
            check_values(q, one, broken)


def test_values_on_meta_are_not_read():
    q = random_q(2, 16)
    check_values(q.to("meta"), torch.ones(2, 1, device="meta"), None)
    check_values(q, torch.ones(2, 1, device="meta"), torch.ones(2, 1, device="meta"))


# integer scales


def test_multiples_that_are_legal_pass():
    for shape in ((4, 3), (2, 4, 1)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            scale = torch.ones(shape, dtype=dtype)
            check_multiple(torch.ones(shape, dtype=torch.int8), scale, None, -1)


MULTIPLE = torch.ones(2, 4, 3, dtype=torch.int8)
WRONG_MULTIPLES = {
    "multiple.dtype": [{"multiple": MULTIPLE.to(d)} for d in (torch.uint8, torch.int16, torch.bool)]
    + [{"multiple": MULTIPLE.to(torch.bfloat16)}],
    "multiple.shape": [
        {"multiple": m} for m in (MULTIPLE.mT, MULTIPLE[0], MULTIPLE[..., :2], MULTIPLE[..., :1])
    ],
    "multiple.device": [{"multiple": MULTIPLE.to("meta")}],
    "multiple": [{"zero_point": torch.full((2, 4, 3), 8.0)}]
    + [{"act_group_size": size} for size in (32, 64, 128, None)],
}


@pytest.mark.parametrize(
    ("field", "changes"),
    [(field, changes) for field, every in WRONG_MULTIPLES.items() for changes in every],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_multiples_that_are_not_of_the_scale_are_refused(field, changes):
    good = {
        "multiple": MULTIPLE,
        "scale": torch.ones(2, 4, 3),
        "zero_point": None,
        "act_group_size": -1,
    }
    with pytest.raises(PackingError) as caught:
        check_multiple(**(good | changes))
    assert caught.value.field == field
    assert str(caught.value.found) in str(caught.value)
    assert str(caught.value.expected) in str(caught.value)


@given(st.data(), st.integers(1, 4), st.integers(1, 6))
def test_any_unit_of_a_row_is_legal_and_another_in_one_group_is_not(data, n, n_groups):
    multiples = st.integers(-15, 15).filter(bool)
    row = st.lists(multiples, min_size=n_groups, max_size=n_groups)
    multiple = torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n)), dtype=torch.int8)
    unit = torch.tensor([[data.draw(st.integers(1, 1 << 20))] for _ in range(n)])
    scale = (unit * multiple).float() / 1024
    check_multiple_values(multiple, scale)
    check_multiple_values(multiple[:0], scale[:0])
    at = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n_groups - 1))
    for wrong in (0, 16, -16, 127, -128):
        changed = multiple.clone()
        changed[at] = wrong
        with pytest.raises(PackingError, match="multiple is .*1..15"):
            check_multiple_values(changed, scale)
    if n_groups > 1:
        for factor in (-1, 2, 1 + 2**-20):
            changed = scale.clone()
            changed[at] *= factor
            with pytest.raises(PackingError, match="scale is not its multiples"):
                check_multiple_values(multiple, changed)


@given(st.integers(-15, 15).filter(bool), st.floats(2**-20, 2**20, width=32))
def test_a_unit_need_not_be_a_number_that_a_float_has(multiple, scale):
    scales = torch.tensor([[scale, 2 * scale, -scale]])
    multiples = torch.tensor([[multiple, 2 * multiple, -multiple]], dtype=torch.int8)
    used = 3 if abs(multiple) <= 7 else 1
    check_multiple_values(multiples[:, :used], scales[:, :used])


def test_multiples_on_meta_are_not_read():
    meta = torch.zeros(2, 3, dtype=torch.int8, device="meta")
    check_multiple_values(meta, torch.ones(2, 3, device="meta"))
