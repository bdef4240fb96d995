"""gemm.py in Triton's CPU interpreter, in fp16, against the oracle: exact where x is integral."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels.interpreter.products import expected, integral, run
from w4tensor.dispatch import GemmPlan
from w4tensor.kernels.gemm import gemm
from w4tensor.testing import REL_ERR_BUDGET, random_codes, rel_err

GROUPS = (16, 32, 64, 128, 256, -1)
PLAN = GemmPlan(
    block_m=32,
    block_n=64,
    group_n=2,
    split_k=1,
    scale_after=False,
    kwidth=2,
    num_warps=4,
    num_stages=2,
)


def _plan(**fields):
    return dataclasses.replace(PLAN, **fields)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "whole"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("kwidth", [2, 4])
def test_exact_for_every_group_size(group_size, kwidth, zero_point):
    x, codes = integral(1, 20, 70, 512, group_size, 1.0 if zero_point else None)
    y = run(gemm, x, codes, _plan(kwidth=kwidth))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("group_size", [128, 256, -1])
def test_exact_with_scales_after_the_dot(group_size):
    x, codes = integral(1, 20, 70, 768, group_size, None)
    y = run(gemm, x, codes, _plan(scale_after=True))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (96, 32), (320, 64), (720, 16), (300, -1), (77, -1)]
)
@pytest.mark.parametrize("zero_step", [None, 1.0], ids=["symmetric", "whole"])
def test_exact_for_a_k_that_blocks_do_not_divide(k, group_size, zero_step):
    x, codes = integral(1, 18, 9, k, group_size, zero_step)
    assert torch.equal(run(gemm, x, codes, PLAN).double(), expected(x, codes))


@pytest.mark.parametrize("m", [1, 17, 32, 65])
@pytest.mark.parametrize("n", [1, 64, 129, 200])
def test_exact_for_odd_m_and_n(m, n):
    x, codes = integral(1, m, n, 256, 128, None)
    assert torch.equal(run(gemm, x, codes, PLAN).double(), expected(x, codes))


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize(("block_n", "num_warps"), [(64, 4), (128, 4), (128, 8), (256, 8)])
def test_exact_for_every_tile(block_m, block_n, num_warps):
    x, codes = integral(1, 70, 150, 256, 64, 1.0)
    plan = _plan(block_m=block_m, block_n=block_n, num_warps=num_warps)
    assert torch.equal(run(gemm, x, codes, plan).double(), expected(x, codes))


@pytest.mark.parametrize("split_k", [2, 3])
@pytest.mark.parametrize(("k", "group_size"), [(640, 32), (700, -1)])
def test_exact_however_k_is_cut(split_k, k, group_size):
    x, codes = integral(1, 33, 70, k, group_size, 1.0)
    y = run(gemm, x, codes, _plan(split_k=split_k))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("x_tma", [False, True])
def test_stacked_weights_each_meet_their_own_tokens(split_k, x_tma):
    x, codes = integral(3, 20, 66, 512, 64, 1.0)
    y = run(gemm, x, codes, _plan(split_k=split_k, x_tma=x_tma))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize(("m", "k"), [(33, 512), (20, 264)])
def test_exact_with_x_by_tma(m, k):
    x, codes = integral(1, m, 70, k, -1, None)
    assert torch.equal(run(gemm, x, codes, _plan(x_tma=True)).double(), expected(x, codes))


@pytest.mark.parametrize("split_k", [1, 2])
def test_bias_is_added_once(split_k):
    x, codes = integral(1, 18, 70, 512, 128, None)
    bias = torch.arange(70).half()
    y = run(gemm, x, codes, _plan(split_k=split_k), bias)
    assert torch.equal(y.double(), expected(x, codes) + bias)


@pytest.mark.parametrize("stride", [520, 513])
@pytest.mark.parametrize("x_tma", [False, True])
def test_x_may_have_rows_that_lie_apart(stride, x_tma):
    x, codes = integral(1, 19, 64, 512, 128, None)
    apart = torch.full((19, stride), torch.nan, dtype=torch.float16)
    apart[:, :512] = x[0]
    y = run(gemm, apart[None, :, :512], codes, _plan(x_tma=x_tma))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_random_within_the_budget(group_size, zero_point, scale_dtype):
    codes = random_codes(
        1, 70, 1024, group_size=group_size, dtype=scale_dtype, zero_point=zero_point
    )
    x = torch.randn(1, 20, 1024, generator=torch.Generator().manual_seed(1)).half()
    y = run(gemm, x, codes, PLAN, dtype=torch.float16)
    assert rel_err(y, expected(x, codes)) <= REL_ERR_BUDGET[torch.float16]


def test_fractional_zero_points_hold_where_x_is_all_of_one_sign():
    # an error that a whole group shares grows with the sum of x, which is large here
    codes = random_codes(1, 70, 1024, zero_point="fractional", dtype=torch.float16)
    x = 1 + 0.1 * torch.randn(1, 20, 1024, generator=torch.Generator().manual_seed(1)).half()
    y = run(gemm, x, codes, PLAN)
    assert rel_err(y, expected(x, codes)) <= REL_ERR_BUDGET[torch.float16]


def test_scales_that_fp16_holds_only_as_subnormals_lose_nothing():
    codes = random_codes(1, 70, 256, dtype=torch.float32)
    codes = dataclasses.replace(codes, scale=codes.scale * 2.0**-11)
    x = torch.randn(1, 20, 256, generator=torch.Generator().manual_seed(1)).half()
    y = run(gemm, x, codes, PLAN)
    assert rel_err(y, expected(x, codes)) <= REL_ERR_BUDGET[torch.float16]


def test_two_runs_give_the_same_bits():
    codes = random_codes(1, 70, 1024, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 20, 1024, generator=torch.Generator().manual_seed(1)).half()
    plan = _plan(split_k=3)
    assert torch.equal(run(gemm, x, codes, plan), run(gemm, x, codes, plan))
