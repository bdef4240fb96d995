"""From checked operands to kernels: W4A8 on gemm_hopper, for which the host stands in here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from w4tensor import arch, launch
from w4tensor.dispatch import Arch
from w4tensor.dispatch_hopper import HopperPlan
from w4tensor.dispatch_int8 import Int8Plan
from w4tensor.kernels.quantize_activation import round_activation
from w4tensor.layout import ACT_QUANT, COALESCED, padded_k
from w4tensor.reference import act_quant_linear
from w4tensor.testing import random_codes, rel_err


def gemm_on_words(x, qdata, scale, zero_point, bias, y, group_size, plan) -> None:
    """gemm_hopper's contract, in fp64: ACT_QUANT words read as COALESCED ones, by x as it comes."""
    assert isinstance(plan, HopperPlan) and qdata.dtype == ACT_QUANT.qdata_dtype
    assert x.is_contiguous() and x.dtype in (torch.bfloat16, torch.float16) and y.is_contiguous()
    (n, n_groups), width = scale.shape[-2:], x.shape[-1]
    assert width == padded_k(n_groups * group_size) and y.shape == (x.shape[0], n)
    words = qdata.view(torch.int32).view(n, -1) ^ -0x77777778
    q = COALESCED.unpack(words.view(torch.int16), width).double()
    # t, the slice of a word, is in k's bits 1 and 2
    k = torch.arange(width)
    group = ((k // 128 * 128 + k % 8 // 2 * 32) // group_size).clamp(max=n_groups - 1)
    zero = 8.0 if zero_point is None else zero_point.view(n, -1)[:, group].double()
    w = (q - zero) * scale.view(n, -1)[:, group].double()
    y.copy_(x.double() @ w.mT + (0 if bias is None else bias.double()))


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """The x that the stand-in was given, once a call."""
    target = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
    monkeypatch.setattr(arch, "current", lambda device=None: target)
    seen: list[Tensor] = []

    def stand_in(x, *rest):
        seen.append(x)
        gemm_on_words(x, *rest)
        assert early.pop() == rest[-1].pdl, "the product starts early, or is not waited for"

    early: list[bool] = []

    def rounded(*args, pdl, **kwargs):
        # an instruction that the interpreter does not know
        early.append(pdl)
        return round_activation(*args, **kwargs)

    monkeypatch.setattr(launch, "round_activation", rounded)
    monkeypatch.setattr(launch, "gemm_hopper", stand_in)
    launch._plan.cache_clear()
    yield seen
    launch._plan.cache_clear()


@pytest.mark.parametrize("act_group_size", [32, -1])
@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
@pytest.mark.parametrize("k,group_size", [(256, 32), (160, 32), (192, 64), (640, 128), (96, 96)])
@pytest.mark.parametrize("m", [17, 130])
def test_fine_scales_run_on_it(calls, m, k, group_size, zero_point, act_group_size):
    dtype = torch.float16
    codes = random_codes(9, k, group_size=group_size, dtype=dtype, zero_point=zero_point)
    rng = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, k, generator=rng).to(dtype), torch.randn(9, generator=rng).to(dtype)
    operands = ACT_QUANT.pack(codes.q), codes.scale, codes.zero_point
    fine = act_group_size == 32 or (group_size < 128 and group_size != k)
    problem = m, 9, k, group_size, "int8", codes.zero_point is None, 1, act_group_size
    if isinstance(launch._plan(0, *problem), Int8Plan):
        # another kernel's problem
        assert not fine
        return
    y = launch.act_quant_linear(x, *operands, bias, group_size, act_group_size)
    want = act_quant_linear(
        x.float(), codes.q, codes.scale, codes.zero_point, act_group_size, bias.float()
    )
    assert len(calls) == 1 and y.dtype == dtype and rel_err(y, want) <= 6e-4


def test_leading_dimensions_and_a_stack_of_one_and_fp32(calls):
    codes = random_codes(1, 40, 192, group_size=32, dtype=torch.float16)
    qdata = ACT_QUANT.pack(codes.q)
    x = torch.randn(1, 20, 192, generator=torch.Generator().manual_seed(0)).half()
    want = act_quant_linear(x[0].float(), codes.q[0], codes.scale[0], None, 32, None)
    stacked = launch.act_quant_linear(x, qdata, codes.scale, None, None, 32, 32)
    two_d = (qdata[0], codes.scale[0], None, None, 32, 32)
    folded = launch.act_quant_linear(x.view(4, 5, 192), *two_d)
    assert stacked.shape == (1, 20, 40) and folded.shape == (4, 5, 40)
    assert torch.equal(stacked.flatten(), folded.flatten()) and rel_err(stacked[0], want) <= 6e-4
    # rows of x that lie apart
    apart = torch.cat((x, x), -1)[0, :, :192]
    assert torch.equal(launch.act_quant_linear(apart, *two_d), stacked[0])
    assert len(calls) == 3
