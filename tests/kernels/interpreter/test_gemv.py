"""gemv.py in Triton's CPU interpreter, in fp16, against the oracle: exact where x is integral."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.interpreter import products
from tests.kernels.interpreter.products import expected, integral
from w4tensor.dispatch_gemv import GemvPlan
from w4tensor.kernels.gemv import aligned, gemv
from w4tensor.layout import COALESCED
from w4tensor.testing import REL_ERR_BUDGET, Int4Codes, random_codes, rel_err

PLAN = GemvPlan(rows=2, num_warps=1)
GROUPS = (32, 64, 128, 256, -1)


def _by_rows(x, qdata, scale, zero_point, bias, y, group_size, plan):
    rows = aligned(x.flatten(0, 1))
    gemv(rows, qdata, scale, zero_point, bias, y.flatten(0, 1), group_size, plan)


def run(x, codes, plan=PLAN, bias=None, dtype=torch.float32):
    return products.run(_by_rows, x, codes, plan, bias, dtype)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("ahead", [False, True])
def test_exact_for_every_group_size(ahead, group_size, zero_point):
    x, codes = integral(1, 1, 3, 1280, group_size, 0.25 if zero_point else None)
    y = run(x, codes, GemvPlan(2, 1, ahead))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("k,group_size", [(96, 32), (320, 64), (720, -1), (300, -1), (2, -1)])
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_exact_for_a_k_that_blocks_do_not_divide(k, group_size, zero_point):
    x, codes = integral(1, 1, 3, k, group_size, 0.25 if zero_point else None)
    assert torch.equal(run(x, codes).double(), expected(x, codes))


@pytest.mark.parametrize("rows,num_warps,n", [(1, 1, 2), (4, 2, 7), (8, 1, 8), (8, 2, 13)])
def test_exact_for_every_tile(n, num_warps, rows):
    x, codes = integral(1, 1, n, 1280, 128, 0.25)
    assert torch.equal(run(x, codes, GemvPlan(rows, num_warps)).double(), expected(x, codes))


def test_stacked_weights_each_meet_their_own_tokens():
    x, codes = integral(2, 2, 3, 256, 64, 0.25)
    assert torch.equal(run(x, codes).double(), expected(x, codes))


def test_bias_is_added():
    x, codes = integral(2, 1, 3, 256, 128, None)
    bias = torch.arange(3).half()
    assert torch.equal(run(x, codes, bias=bias).double(), expected(x, codes) + bias)


@pytest.mark.parametrize("first,stride", [(0, 514), (0, 513), (1, 514)])
def test_x_may_have_rows_that_lie_apart(first, stride):
    x, codes = integral(1, 2, 2, 512, 128, None)
    memory = torch.full((2 * stride + 1,), torch.nan, dtype=torch.float16)
    apart = memory.as_strided((1, 2, 512), (0, stride, 1), first)
    apart.copy_(x)
    assert torch.equal(run(apart, codes).double(), expected(x, codes))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_random_within_the_budget(group_size, zero_point, scale_dtype):
    codes = random_codes(
        1, 4, 1024, group_size=group_size, dtype=scale_dtype, zero_point=zero_point
    )
    x = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(1)).half()
    y = run(x, codes, dtype=torch.float16)
    assert rel_err(y, expected(x, codes)) <= REL_ERR_BUDGET[torch.float16]


@pytest.mark.parametrize("dtype,bits", [(torch.float16, 11), (torch.bfloat16, 8)])
@pytest.mark.parametrize("power", [-4, 0, 14])
def test_numbers_near_the_largest_are_exact_and_others_nearly(power, dtype, bits):
    # of a block of 128, x has its largest once and then ever smaller numbers, one a block
    span = 16 - bits
    sizes = 2.0 ** (power - torch.arange(20.0))
    full = 2 - 2.0 ** (1 - bits)
    x = torch.zeros(1, 1, 128 * len(sizes))
    x[0, 0, ::128] = full * 2.0**power
    x[0, 0, 5::128] = -full * sizes
    x = x.to(dtype)
    # a row for each block, which takes both numbers and nothing else
    q = torch.full((1, len(sizes), 128 * len(sizes)), 8, dtype=torch.uint8)
    for i in range(len(sizes)):
        q[0, i, 128 * i + 5] = 9
    codes = Int4Codes(q, torch.ones(1, len(sizes), len(sizes)), None)
    y = run(x, codes, GemvPlan(4, 1)).double()[0, 0]
    exact = x[0, 0, 5::128].double()
    assert torch.equal(y[:span], exact[:span])
    assert ((y - exact).abs() <= 2.0 ** (power - 15)).all()
    # beyond, they are lost: the test would see another width of integers
    assert not torch.equal(y, exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_gives_nan_for_that_row_alone(bad):
    codes = random_codes(1, 2, 512, dtype=torch.float16)
    x = torch.ones(1, 3, 512).half()
    x[0, 1, 300] = bad
    y = run(x, codes)[0]
    assert y[1].isnan().all() and y[::2].isfinite().all()


def test_rows_of_zeros_give_zeros_and_of_the_smallest_numbers_their_product():
    codes = random_codes(1, 2, 512, dtype=torch.float16)
    x = torch.zeros(1, 2, 512).half()
    x[0, 1] = 2.0**-24
    y = run(x, codes)
    assert torch.equal(y[0, 0], torch.zeros(2))
    assert rel_err(y[0, 1], expected(x, codes)[0, 1]) < 1e-6


def _experts(n):
    """(codes [4, n, 128], bias [4, n])."""
    codes = random_codes(4, n, 128, group_size=64, dtype=torch.float16)
    return codes, torch.randn(4, n, generator=torch.Generator().manual_seed(2)).half()


@pytest.mark.parametrize("gate", ["none", "halves", "interleaved"])
def test_each_pair_has_the_rows_of_its_expert(gate):
    # 5 outputs: the last program repeats some of the one before
    n = 5 if gate == "none" else 10
    codes, bias = _experts(n)
    # two slots a token; 4 and -1 are sentinels
    ids = torch.tensor([2, 4, 0, 2, -1, 3])
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).half()
    y = torch.full((6, 5), torch.nan, dtype=torch.float16)
    weight = COALESCED.pack(codes.q), codes.scale, None, bias
    options = dict(ids=ids[:, None], x_div=2, gate=gate, act="silu")
    gemv(x, *weight, y, 64, GemvPlan(4, 1), **options)
    w = codes.dequantize().double()
    for i, e in enumerate(ids.tolist()):
        if not 0 <= e < 4:
            assert torch.equal(y[i], torch.zeros_like(y[i]))
            continue
        v = w[e] @ x[i // 2].double() + bias[e].double()
        if gate == "none":
            v = F.silu(v)
        else:
            a, b = v.chunk(2) if gate == "halves" else (v[::2], v[1::2])
            v = F.silu(a) * b
        assert rel_err(y[i], v) < 1e-3


@pytest.mark.parametrize("num_warps,ahead", [(1, True), (2, False)])
def test_slots_of_a_token_are_weighted_and_summed(num_warps, ahead):
    # 9 slots of a block each: more than the 8 blocks that one warp takes a step
    codes, bias = _experts(5)
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 5, (2, 9), generator=g)
    weight = torch.rand(2, 9, generator=g)
    x = torch.randn(18, 128, generator=g).half()
    # what a sentinel's row holds was never written
    x[~((ids >= 0) & (ids < 4)).flatten()] = torch.nan
    y = torch.full((2, 5), torch.nan, dtype=torch.float16)
    stack = COALESCED.pack(codes.q), codes.scale, None, bias
    gemv(x, *stack, y, 64, GemvPlan(4, num_warps, ahead), ids=ids, weight=weight)
    w = codes.dequantize().double()
    for t in range(2):
        total = torch.zeros(5, dtype=torch.float64)
        for j, e in enumerate(ids[t].tolist()):
            if 0 <= e < 4:
                total += weight[t, j] * (w[e] @ x[9 * t + j].double() + bias[e].double())
        assert rel_err(y[t], total) < 1e-3


def test_two_runs_give_the_same_bits():
    codes = random_codes(1, 4, 1280, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 1, 1280, generator=torch.Generator().manual_seed(1)).half()
    plan = GemvPlan(4, 2, ahead=True)
    assert torch.equal(run(x, codes, plan), run(x, codes, plan))
