"""act_quant_dp4a.py in Triton's CPU interpreter: exact on integers, else the definition in fp32."""

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
from w4tensor.dispatch_act_quant import ActQuantDp4aPlan
from w4tensor.kernels.act_quant_dp4a import act_quant_dp4a
from w4tensor.testing import REL_ERR_BUDGET, random_codes, rel_err


def _plan(tokens=1, rows=2, block_n=2, block_slices=8):
    return ActQuantDp4aPlan(tokens, rows, block_n, block_slices, num_warps=1)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_exact_for_every_pair_of_groups(group_size, act_group_size, zero_point):
    x, codes = integral(1, 1, 7, 768, group_size, zero_point)
    y, want = run(act_quant_dp4a, x, codes, act_group_size, _plan())
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_random_is_the_definition(group_size, act_group_size, zero_point):
    zero = "fractional" if zero_point else "symmetric"
    codes = random_codes(1, 9, 768, group_size=group_size, zero_point=zero, dtype=torch.float16)
    x = torch.randn(1, 3, 768, generator=torch.Generator().manual_seed(1)).half()
    y, want = run(act_quant_dp4a, x, codes, act_group_size, _plan(tokens=4))
    assert rel_err(y, want) <= REL_ERR


@pytest.mark.parametrize("act_group_size", [32, 128, -1])
@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (96, 32), (320, 64), (720, 16), (300, -1), (77, -1)]
)
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_exact_for_a_k_that_blocks_do_not_divide(k, group_size, zero_point, act_group_size):
    x, codes = integral(1, 2, 5, k, group_size, zero_point)
    y, want = run(act_quant_dp4a, x, codes, act_group_size, _plan(tokens=2))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 8, 33])
@pytest.mark.parametrize("rows", [1, 4])
def test_exact_for_odd_m_and_n(m, n, rows):
    x, codes = integral(1, m, n, 512, 128, True)
    plan = _plan(tokens=next(t for t in (1, 2, 4) if m <= t), rows=rows, block_slices=32)
    y, want = run(act_quant_dp4a, x, codes, 32, plan)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_stacked_weights_each_meet_their_own_tokens(zero_point):
    x, codes = integral(3, 2, 5, 512, 64, zero_point)
    y, want = run(act_quant_dp4a, x, codes, 32, _plan(tokens=2))
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bias_is_added_once_and_the_result_rounded_once(dtype):
    codes = random_codes(1, 6, 256, dtype=torch.float16)
    x = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(1)).half()
    bias = torch.arange(6).half()
    y, want = run(act_quant_dp4a, x, codes, 32, _plan(), bias, dtype)
    assert rel_err(y, want + bias) <= (REL_ERR_BUDGET[dtype] if dtype in REL_ERR_BUDGET else 1e-6)


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
def test_what_is_not_finite_stays_in_its_token(act_group_size):
    x, codes = integral(1, 3, 5, 256, 128, True)
    x[0, 1, 40] = torch.nan
    y, want = run(act_quant_dp4a, x, codes, act_group_size, _plan(tokens=4))
    assert y[0, 1].isnan().all()
    assert torch.equal(y[0, ::2].double(), want[0, ::2])


def test_two_runs_give_the_same_bits():
    codes = random_codes(1, 9, 1024, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 2, 1024, generator=torch.Generator().manual_seed(1)).half()
    plan = _plan(tokens=2)
    first, second = (run(act_quant_dp4a, x, codes, 32, plan)[0] for _ in range(2))
    assert torch.equal(first, second)
