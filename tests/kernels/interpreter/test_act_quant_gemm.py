"""act_quant_gemm.py in Triton's CPU interpreter: exact on integers, else the definition in fp32."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter.act_quant_products import (
    ACT_GROUPS,
    GROUPS,
    REL_ERR,
    integral,
    run,
)
from w4tensor.dispatch_act_quant import ActQuantGemmPlan
from w4tensor.kernels import act_quant_gemm as module
from w4tensor.kernels.act_quant_gemm import act_quant_gemm
from w4tensor.kernels.act_quant_tile import MAX_CHAINED_K
from w4tensor.testing import Int4Codes, random_codes, rel_err


def _plan(block_m=32, block_n=32, block_k=128, split_k=1, kwidth=4, x_tma=False):
    return ActQuantGemmPlan(block_m, block_n, block_k, split_k, kwidth, 4, 2, x_tma)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("block_k", "kwidth"), [(128, 4), (256, 8)])
def test_exact_for_every_pair_of_groups(group_size, act_group_size, zero_point, block_k, kwidth):
    x, codes = integral(1, 20, 40, 768, group_size, zero_point)
    plan = _plan(block_k=block_k, kwidth=kwidth)
    y, want = run(act_quant_gemm, x, codes, act_group_size, plan)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_random_is_the_definition(group_size, act_group_size, zero_point):
    zero = "fractional" if zero_point else "symmetric"
    codes = random_codes(1, 40, 768, group_size=group_size, zero_point=zero, dtype=torch.float16)
    x = torch.randn(1, 37, 768, generator=torch.Generator().manual_seed(1)).half()
    y, want = run(act_quant_gemm, x, codes, act_group_size, _plan())
    assert rel_err(y, want) <= REL_ERR


@pytest.mark.parametrize("block_k", [128, 256])
@pytest.mark.parametrize("act_group_size", [32, 128, -1])
@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (96, 32), (320, 64), (720, 16), (300, -1), (77, -1)]
)
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_exact_for_a_k_that_steps_do_not_divide(k, group_size, zero_point, act_group_size, block_k):
    x, codes = integral(1, 18, 9, k, group_size, zero_point)
    y, want = run(act_quant_gemm, x, codes, act_group_size, _plan(block_k=block_k))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("m", [1, 17, 64, 101])
@pytest.mark.parametrize("n", [1, 33, 64])
def test_exact_for_odd_m_and_n(m, n):
    x, codes = integral(1, m, n, 256, 128, True)
    y, want = run(act_quant_gemm, x, codes, 32, _plan())
    assert torch.equal(y.double(), want)


def test_every_tile_is_computed_once_in_bands(monkeypatch):
    # five tiles of tokens in bands of two, three of rows
    monkeypatch.setattr(module, "TOKEN_TILES", 2)
    x, codes = integral(1, 150, 70, 128, 128, False)
    y, want = run(act_quant_gemm, x, codes, 32, _plan())
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("group_size", [16, 64, 256, -1])
@pytest.mark.parametrize("act_group_size", [32, -1])
@pytest.mark.parametrize("split_k", [2, 3])
def test_exact_however_k_is_cut(group_size, act_group_size, split_k):
    x, codes = integral(1, 20, 24, 1280, group_size, True)
    y, want = run(act_quant_gemm, x, codes, act_group_size, _plan(split_k=split_k))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("block_k", [128, 256])
@pytest.mark.parametrize("act_group_size", [32, -1])
@pytest.mark.parametrize(("e", "m", "k"), [(1, 40, 512), (3, 18, 384), (1, 101, 1280)])
def test_exact_where_x_comes_by_tma(e, m, k, act_group_size, block_k):
    x, codes = integral(e, m, 24, k, 128, True)
    plan = _plan(block_k=block_k, x_tma=True)
    y, want = run(act_quant_gemm, x, codes, act_group_size, plan)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("group_size", [64, -1])
def test_stacked_weights_each_meet_their_own_tokens(split_k, group_size):
    x, codes = integral(3, 18, 18, 512, group_size, True)
    y, want = run(act_quant_gemm, x, codes, 32, _plan(split_k=split_k))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("split_k", [1, 2])
def test_bias_is_added_once(split_k):
    x, codes = integral(1, 20, 18, 512, 128, False)
    bias = torch.arange(18).half()
    y, want = run(act_quant_gemm, x, codes, 128, _plan(split_k=split_k), bias)
    assert torch.equal(y.double(), want + bias)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
def test_what_is_not_finite_stays_in_its_token(act_group_size, group_size, split_k):
    x, codes = integral(1, 40, 5, 512, group_size, True)
    x[0, 33, 40] = torch.nan
    y, want = run(act_quant_gemm, x, codes, act_group_size, _plan(split_k=split_k))
    others = torch.arange(40) != 33
    assert y[0, 33].isnan().all()
    assert torch.equal(y[0, others].double(), want[0, others])


@pytest.mark.parametrize("k", [MAX_CHAINED_K // 128 * 128, MAX_CHAINED_K // 128 * 128 + 128])
def test_the_longest_sums_fit(k):
    # the largest product of every k, so that one more block passes 2**31
    codes = Int4Codes(torch.zeros(1, 1, k, dtype=torch.uint8), torch.ones(1, 1, 1), None)
    x = torch.full((1, 1, k), -127.0)
    y, want = run(act_quant_gemm, x, codes, -1, _plan(block_m=16, block_n=16, block_k=4096))
    assert want.item() == 8 * 127 * k
    assert rel_err(y, want) <= REL_ERR


def test_two_runs_give_the_same_bits():
    codes = random_codes(1, 40, 1024, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 20, 1024, generator=torch.Generator().manual_seed(1)).half()
    plan = _plan(split_k=3)
    first, second = (run(act_quant_gemm, x, codes, 32, plan)[0] for _ in range(2))
    assert torch.equal(first, second)
