"""act_quant_decode.py in Triton's CPU interpreter: exact on integers, else the definition."""

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
from w4tensor.dispatch_act_quant import ActQuantDecodePlan
from w4tensor.kernels.act_quant_decode import act_quant_decode
from w4tensor.testing import random_codes, rel_err


def _plan(block_m=8, block_n=16, block_k=256, split_k=1, kwidth=8, num_warps=2):
    return ActQuantDecodePlan(block_m, block_n, block_k, split_k, kwidth, num_warps, num_stages=2)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("kwidth", [4, 8])
def test_exact_for_every_pair_of_groups(group_size, act_group_size, zero_point, kwidth):
    x, codes = integral(1, 3, 20, 768, group_size, zero_point)
    y, want = run(act_quant_decode, x, codes, act_group_size, _plan(kwidth=kwidth))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_random_is_the_definition(group_size, act_group_size, zero_point):
    zero = "fractional" if zero_point else "symmetric"
    codes = random_codes(1, 40, 768, group_size=group_size, zero_point=zero, dtype=torch.float16)
    x = torch.randn(1, 6, 768, generator=torch.Generator().manual_seed(1)).half()
    y, want = run(act_quant_decode, x, codes, act_group_size, _plan())
    assert rel_err(y, want) <= REL_ERR


@pytest.mark.parametrize("act_group_size", [32, 128, -1])
@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (96, 32), (320, 64), (720, 16), (300, -1), (77, -1)]
)
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_exact_for_a_k_that_steps_do_not_divide(k, group_size, zero_point, act_group_size):
    x, codes = integral(1, 5, 9, k, group_size, zero_point)
    y, want = run(act_quant_decode, x, codes, act_group_size, _plan())
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("n", [1, 16, 33])
def test_exact_for_odd_m_and_n(m, n):
    x, codes = integral(1, m, n, 512, 128, True)
    y, want = run(act_quant_decode, x, codes, 32, _plan(block_m=8 if m <= 8 else 16))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("num_warps", [1, 4, 8])
@pytest.mark.parametrize("block_k", [256, 512])
@pytest.mark.parametrize("split_k", [1, 2, 3])
def test_exact_however_k_is_cut(num_warps, block_k, split_k):
    x, codes = integral(1, 2, 24, 1408, 64, True)
    plan = _plan(num_warps=num_warps, block_k=block_k, split_k=split_k)
    y, want = run(act_quant_decode, x, codes, 32, plan)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("group_size", [64, -1])
def test_stacked_weights_each_meet_their_own_tokens(split_k, group_size):
    x, codes = integral(3, 2, 18, 512, group_size, True)
    y, want = run(act_quant_decode, x, codes, 32, _plan(split_k=split_k))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("split_k", [1, 2])
def test_bias_is_added_once(split_k):
    x, codes = integral(1, 2, 18, 512, 128, False)
    bias = torch.arange(18).half()
    y, want = run(act_quant_decode, x, codes, -1, _plan(split_k=split_k), bias)
    assert torch.equal(y.double(), want + bias)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
def test_what_is_not_finite_stays_in_its_token(act_group_size, split_k):
    x, codes = integral(1, 3, 5, 512, 128, True)
    x[0, 1, 40] = torch.inf
    y, want = run(act_quant_decode, x, codes, act_group_size, _plan(split_k=split_k))
    assert y[0, 1].isnan().all()
    assert torch.equal(y[0, ::2].double(), want[0, ::2])


def test_two_runs_give_the_same_bits():
    codes = random_codes(1, 40, 1024, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 6, 1024, generator=torch.Generator().manual_seed(1)).half()
    plan = _plan(split_k=3)
    first, second = (run(act_quant_decode, x, codes, 32, plan)[0] for _ in range(2))
    assert torch.equal(first, second)
