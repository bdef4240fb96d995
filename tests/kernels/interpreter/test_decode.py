"""decode.py in Triton's CPU interpreter, in fp16, against the oracle: exact where x is integral."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter.products import expected, integral, run
from w4tensor.dispatch import DecodePlan
from w4tensor.kernels.decode import decode
from w4tensor.testing import REL_ERR_BUDGET, random_codes, rel_err

GROUPS = (16, 32, 64, 128, 256, -1)


def _plan(block_m=8, block_n=16, block_k=128, num_warps=2, split_k=1, kwidth=4, **fields):
    return DecodePlan(block_m, block_n, block_k, num_warps, split_k, kwidth, **fields)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("kwidth", [2, 4])
def test_exact_for_every_group_size(group_size, kwidth, zero_point):
    x, codes = integral(1, 3, 20, 768, group_size, 0.25 if zero_point else None)
    y = run(decode, x, codes, _plan(kwidth=kwidth))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("group_size", GROUPS)
def test_exact_where_a_step_holds_several_blocks(group_size):
    x, codes = integral(1, 2, 16, 1280, group_size, 0.25)
    y = run(decode, x, codes, _plan(block_k=256))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (96, 32), (320, 64), (2880 // 4, 16), (300, -1), (77, -1)]
)
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "fractional"])
def test_exact_for_a_k_that_blocks_do_not_divide(k, group_size, zero_point):
    x, codes = integral(1, 5, 9, k, group_size, 0.25 if zero_point else None)
    y = run(decode, x, codes, _plan())
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("n", [1, 16, 33])
@pytest.mark.parametrize("x_ahead", [False, True])
def test_exact_for_odd_m_and_n(m, n, x_ahead):
    x, codes = integral(1, m, n, 512, 128, None)
    plan = _plan(block_m=8 if m <= 8 else 16, block_n=32, x_ahead=x_ahead)
    assert torch.equal(run(decode, x, codes, plan).double(), expected(x, codes))


@pytest.mark.parametrize("num_warps", [1, 4, 8])
@pytest.mark.parametrize("split_k", [1, 2, 3])
@pytest.mark.parametrize("k", [1024, 1408])
def test_exact_however_k_is_cut(num_warps, split_k, k):
    x, codes = integral(1, 2, 24, k, 32, 0.25)
    y = run(decode, x, codes, _plan(num_warps=num_warps, split_k=split_k))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("block_n", [8, 64])
def test_exact_for_narrow_and_wide_tiles(block_n):
    x, codes = integral(1, 5, 70, 512, 128, 0.25)
    y = run(decode, x, codes, _plan(block_n=block_n))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("split_k", [1, 2])
def test_stacked_weights_each_meet_their_own_tokens(split_k):
    x, codes = integral(3, 2, 18, 512, 64, 0.25)
    y = run(decode, x, codes, _plan(split_k=split_k))
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("split_k", [1, 2])
def test_bias_is_added_once(split_k):
    x, codes = integral(1, 2, 18, 512, 128, None)
    bias = torch.arange(18).half()
    y = run(decode, x, codes, _plan(split_k=split_k), bias)
    assert torch.equal(y.double(), expected(x, codes) + bias)


@pytest.mark.parametrize("stride", [514, 513])
def test_x_may_have_rows_that_lie_apart(stride):
    x, codes = integral(1, 4, 16, 512, 128, None)
    apart = torch.full((4, stride), torch.nan, dtype=torch.float16)
    apart[:, :512] = x[0]
    y = run(decode, apart[None, :, :512], codes, _plan())
    assert torch.equal(y.double(), expected(x, codes))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_random_within_the_budget(group_size, zero_point, scale_dtype):
    codes = random_codes(
        1, 40, 1024, group_size=group_size, dtype=scale_dtype, zero_point=zero_point
    )
    x = torch.randn(1, 6, 1024, generator=torch.Generator().manual_seed(1)).half()
    y = run(decode, x, codes, _plan(), dtype=torch.float16)
    assert rel_err(y, expected(x, codes)) <= REL_ERR_BUDGET[torch.float16]


def test_two_runs_give_the_same_bits():
    codes = random_codes(1, 40, 1024, zero_point="fractional", dtype=torch.float16)
    x = torch.randn(1, 6, 1024, generator=torch.Generator().manual_seed(1)).half()
    plan = _plan(split_k=3)
    assert torch.equal(run(decode, x, codes, plan), run(decode, x, codes, plan))
