"""gemv.py with ACT_QUANT weights in Triton's CPU interpreter, in fp16 and fp32: the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.interpreter.act_quant_products import REL_ERR, definition, integral
from w4tensor import reference
from w4tensor.dispatch_gemv import GemvPlan
from w4tensor.kernels.gemv import aligned, gemv
from w4tensor.layout import ACT_QUANT
from w4tensor.testing import random_codes, rel_err

PLAN = GemvPlan(rows=2, num_warps=1)
GROUPS = (32, 64, 128, 256, -1)
ACT_GROUPS = (32, 64, 128)


def run(x, codes, act_group_size, plan=PLAN, bias=None, dtype=torch.float32):
    """(y, the definition's) of x [E, M, K]; every element written and nothing behind them."""
    e, m, k = x.shape
    n = codes.q.shape[1]
    memory = torch.full((e * m * n + 64,), torch.nan, dtype=dtype)
    y = memory[: e * m * n].view(e * m, n)
    weight = ACT_QUANT.pack(codes.q), codes.scale, codes.zero_point
    rows = aligned(x.flatten(0, 1), 16)
    gemv(rows, *weight, bias, y, codes.group_size, plan, act_group_size=act_group_size)
    assert memory[e * m * n :].isnan().all()
    x_codes, x_scale = reference.quantize_activation(x, act_group_size)
    return y.view(e, m, n), definition(codes, x_codes, x_scale.mT, act_group_size)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_exact_for_every_pair_of_groups(group_size, act_group_size, zero_point):
    x, codes = integral(1, 1, 3, 1280, group_size, zero_point)
    y, want = run(x, codes, act_group_size)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_random_is_the_definition(dtype, act_group_size, ahead):
    codes = random_codes(1, 5, 1280, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 2, 1280, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, want = run(x, codes, act_group_size, GemvPlan(4, 1, ahead))
    assert rel_err(y, want) <= REL_ERR


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize(("k", "group_size"), [(8, -1), (96, 32), (320, 64), (712, -1), (304, -1)])
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_exact_for_a_k_that_blocks_do_not_divide(k, group_size, zero_point, act_group_size):
    x, codes = integral(1, 2, 3, k, group_size, zero_point)
    y, want = run(x, codes, act_group_size)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("rows,num_warps,n", [(1, 1, 2), (4, 2, 7), (8, 1, 8), (8, 2, 13)])
def test_exact_for_every_tile(n, num_warps, rows):
    x, codes = integral(1, 1, n, 1280, 128, True)
    y, want = run(x, codes, 32, GemvPlan(rows, num_warps))
    assert torch.equal(y.double(), want)


def test_stacked_weights_each_meet_their_own_tokens():
    x, codes = integral(2, 2, 3, 256, 64, True)
    y, want = run(x, codes, 64)
    assert torch.equal(y.double(), want)


def test_bias_is_added():
    x, codes = integral(2, 1, 3, 256, 128, False)
    bias = torch.arange(3).half()
    y, want = run(x, codes, 32, bias=bias)
    assert torch.equal(y.double(), want + bias)


@pytest.mark.parametrize("first,stride", [(0, 520), (0, 513), (1, 520)])
def test_x_may_have_rows_that_lie_apart(first, stride):
    x, codes = integral(1, 2, 2, 512, 128, False)
    memory = torch.full((2 * stride + 1,), torch.nan, dtype=torch.float16)
    apart = memory.as_strided((1, 2, 512), (0, stride, 1), first)
    apart.copy_(x)
    y, want = run(apart, codes, 32)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_finite_gives_nan_for_that_row_alone(dtype, bad):
    codes = random_codes(1, 2, 512, dtype=torch.float16)
    x = torch.ones(1, 3, 512, dtype=dtype)
    x[0, 1, 300] = bad
    y, _ = run(x, codes, 64)
    assert y[0, 1].isnan().all() and y[0, ::2].isfinite().all()


def test_slots_of_a_token_are_weighted_and_summed():
    # 9 slots of a block each: more than the 8 blocks that one warp takes a step
    codes = random_codes(4, 5, 128, group_size=64, dtype=torch.float16)
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 5, (2, 9), generator=g)
    weight = torch.rand(2, 9, generator=g)
    x = torch.randn(18, 128, generator=g).half()
    there = ((ids >= 0) & (ids < 4)).flatten()
    x_codes, x_scale = reference.quantize_activation(x, 32)
    x_hat = x_codes.double() * x_scale.double().repeat_interleave(32, -1)
    # what a sentinel's row holds was never written
    x[~there] = torch.nan
    y = torch.full((2, 5), torch.nan, dtype=torch.float32)
    stack = ACT_QUANT.pack(codes.q), codes.scale, None, None
    gemv(x, *stack, y, 64, GemvPlan(4, 1, True), act_group_size=32, ids=ids, weight=weight)
    w = codes.dequantize().double()
    for t in range(2):
        total = torch.zeros(5, dtype=torch.float64)
        for j, e in enumerate(ids[t].tolist()):
            if 0 <= e < 4:
                total += weight[t, j] * (w[e] @ x_hat[9 * t + j])
        assert rel_err(y[t], total) < 1e-6


@pytest.mark.parametrize("gate", ["halves", "interleaved"])
def test_each_pair_has_the_rows_of_its_expert(gate):
    codes = random_codes(4, 10, 128, group_size=64, dtype=torch.float16)
    ids = torch.tensor([2, 4, 0, 2, -1, 3])
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).half()
    x_codes, x_scale = reference.quantize_activation(x, 128)
    x_hat = x_codes.double() * x_scale.double()
    y = torch.full((6, 5), torch.nan, dtype=torch.float32)
    weight = ACT_QUANT.pack(codes.q), codes.scale, None, None
    options = dict(ids=ids[:, None], x_div=2, gate=gate, act="silu", act_group_size=128)
    gemv(x, *weight, y, 64, GemvPlan(4, 1), **options)
    w = codes.dequantize().double()
    for i, e in enumerate(ids.tolist()):
        if not 0 <= e < 4:
            assert torch.equal(y[i], torch.zeros_like(y[i]))
            continue
        v = w[e] @ x_hat[i // 2]
        a, b = v.chunk(2) if gate == "halves" else (v[::2], v[1::2])
        assert rel_err(y[i], F.silu(a) * b) < 1e-5
