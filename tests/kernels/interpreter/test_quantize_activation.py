"""quantize_activation.py in Triton's CPU interpreter against its definition, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from w4tensor.kernels.quantize_activation import quantize_activation, round_activation
from w4tensor.layout import ACT_QUANT, COALESCED, padded_k
from w4tensor.testing import random_codes, rel_err

ACT_GROUPS = (32, 64, 128, -1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def definition(x: Tensor, act_group_size: int) -> tuple[Tensor, Tensor]:
    """Codes [E, M, K] and scale [E, G, M], group by group; a group that is not finite has NaN."""
    k = x.shape[-1]
    width = k if act_group_size == -1 else act_group_size
    groups = F.pad(x.float(), (0, -k % width)).unflatten(-1, (-1, width))
    finite = groups.isfinite().all(-1)
    scale = groups.abs().amax(-1) / 127
    codes = (groups / torch.where(scale > 0, scale, 1.0)[..., None]).round().clamp(-127, 127)
    codes = torch.where(finite[..., None], codes, 0.0).to(torch.int8)
    scale = torch.where(finite, scale, torch.nan)
    return codes.flatten(-2)[..., :k], scale.mT


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


def random(e: int, m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    # magnitudes from 1e-3 to 1e3
    size = 10.0 ** (6 * torch.rand(e, m, k, generator=g) - 3)
    return (size * torch.randn(e, m, k, generator=g)).to(dtype)


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 100, 128, 300, 1152, 4128])
def test_the_definition_bit_for_bit(k, dtype, act_group_size):
    x = random(2, 3, k, dtype)
    codes, scale, sums = quantize_activation(x, act_group_size)
    want_codes, want_scale = definition(x, act_group_size)
    assert codes.shape == (2, 3, padded_k(k)) and sums is None
    assert torch.equal(codes[..., :k], want_codes) and not codes[..., k:].any()
    assert torch.equal(scale, want_scale)


def test_halves_round_to_even():
    # absmax 127 makes the scale 1, so that x is what is rounded
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5])
    codes, _, _ = quantize_activation(F.pad(x, (0, 22))[None, None], 32)
    assert codes[0, 0, :10].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, 126, -126]


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
def test_zeros_have_scale_and_codes_zero(act_group_size):
    codes, scale, _ = quantize_activation(torch.zeros(1, 2, 256), act_group_size)
    assert not codes.any() and not scale.any()


def test_subnormal_scales_stay_in_range():
    x = torch.full((1, 1, 32), 190 * 2.0**-149)
    codes, scale, _ = quantize_activation(x, 32)
    assert scale.item() == 2.0**-149 and (codes[..., :32] == 127).all()


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_group(bad, act_group_size, dtype):
    x = random(1, 3, 256, dtype)
    x[0, 1, 70] = bad
    codes, scale, _ = quantize_activation(x, act_group_size)
    want_codes, want_scale = definition(x, act_group_size)
    assert torch.equal(codes, want_codes) and same(scale, want_scale)
    assert scale[0, :, 1].isnan().sum() == 1 and scale[0, :, [0, 2]].isfinite().all()


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("sum_group_size", [16, 32, 64, 128, 256, 768])
def test_sums_are_of_each_weight_group(sum_group_size, act_group_size):
    x = random(2, 5, 768, torch.float32)
    codes, scale, sums = quantize_activation(x, act_group_size, sum_group_size)
    means = codes.double()
    if act_group_size != -1:
        means *= scale.mT.double().repeat_interleave(act_group_size, -1)
    want = means.unflatten(-1, (-1, sum_group_size)).sum(-1).mT
    size = means.abs().unflatten(-1, (-1, sum_group_size)).sum(-1).mT
    assert sums.shape == want.shape
    assert ((sums - want).abs() <= 1e-6 * size).all()


def test_sums_of_a_row_that_blocks_do_not_divide():
    x = random(1, 2, 300, torch.float32)
    codes, _, sums = quantize_activation(x, -1, 300)
    assert torch.equal(sums[:, 0], codes.float().sum(-1))


@pytest.mark.parametrize("act_group_size", [32, -1])
def test_silu_mul_quantises_the_gated_halves(act_group_size):
    # halves of a row that is longer still
    x = torch.randn(1, 4, 700, generator=torch.Generator().manual_seed(0))[..., :600]
    codes, scale, _ = quantize_activation(x, act_group_size, silu_mul=True)
    gate, up = x.chunk(2, dim=-1)
    want_codes, want_scale = definition(F.silu(gate) * up, act_group_size)
    # exp differs in the last bit from one library to another
    assert torch.allclose(scale, want_scale, rtol=1e-6, atol=0)
    assert (codes[..., :300].int() - want_codes.int()).abs().max() <= 1
    assert (codes[..., :300] != want_codes).float().mean() < 1e-2


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("k", [100, 1152])
def test_rounded_is_codes_times_scale(k, act_group_size):
    x = random(1, 3, k, torch.float16)
    x[0, 1, 7] = torch.nan
    codes, scale = definition(x, act_group_size)
    width = k if act_group_size == -1 else act_group_size
    want = codes.float() * scale.mT.repeat_interleave(width, -1)[..., :k]
    got = round_activation(x, act_group_size)
    assert got.dtype == x.dtype and same(got, want.to(x.dtype))


@given(
    st.sampled_from((32, 64, 128)),
    st.sampled_from(ACT_GROUPS),
    st.integers(1, 40),
    st.sampled_from((torch.float16, torch.float32)),
)
def test_word_order_multiplies_act_quant_words_read_as_coalesced(
    group, act_group_size, groups, dtype
):
    k = group * groups
    codes = random_codes(3, k, group_size=group, zero_point="integer")
    x = random(1, 4, k, torch.float16).to(dtype)
    got = round_activation(x, act_group_size, word_order=True)[0]
    assert got.shape == (4, padded_k(k))
    plain = round_activation(x, act_group_size)[0]

    words = ACT_QUANT.pack(codes.q).view(torch.int32) ^ -0x77777778
    w = COALESCED.unpack(words.view(torch.int16), padded_k(k)).double()
    # a word's scale is that of slice t, and t is in k's bits 1 and 2
    column = torch.arange(padded_k(k))
    at = ((column // 128 * 128 + column % 8 // 2 * 32) // group).clamp(max=groups - 1)
    w = (w - codes.zero_point[:, at].double()) * codes.scale[:, at].double()
    want = plain.double() @ codes.dequantize().double().mT
    assert rel_err(got.double() @ w.mT, want) <= 1e-12


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("k", [32, 100, 128, 300, 1152, 4128])
def test_word_order_is_bit_for_bit_and_padded_with_zeros(k, act_group_size):
    x = random(2, 3, k, torch.float16)
    plain = F.pad(round_activation(x, act_group_size), (0, padded_k(k) - k))
    got = round_activation(x, act_group_size, word_order=True)
    # [block, t, q', i, r, p] -> [block, i, p, q', t, r]
    want = plain.reshape(2, 3, -1, 4, 2, 4, 2, 2).permute(0, 1, 2, 5, 7, 4, 3, 6).flatten(2)
    assert torch.equal(got, want)


def test_rows_may_lie_apart_and_tokens_may_be_none():
    x = random(1, 4, 512, torch.float16)
    whole = quantize_activation(x[..., :256].contiguous(), 32)
    apart = quantize_activation(x[..., :256], 32)
    assert torch.equal(whole[0], apart[0]) and torch.equal(whole[1], apart[1])
    codes, scale, _ = quantize_activation(x[:, :0], 32)
    assert codes.shape == (1, 0, 512) and scale.shape == (1, 16, 0)
