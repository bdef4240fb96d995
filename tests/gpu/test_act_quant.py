"""Int4ActQuantTensor on a CUDA device, against its definition in fp64, on both sides of borders."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from w4tensor import Int4ActQuantTensor, reference

from .test_linear import MANY_TOKENS, TOKENS, _poison, codes, rel_err  # noqa: F401

pytestmark = pytest.mark.gpu


def definition(x, w, bias=None):
    """The product that the type promises, in fp64 on the int8 codes of x."""
    x_q, x_scale = reference.quantize_activation(x, w.act_group_size)
    k = x.shape[-1]
    group = k if w.act_group_size == -1 else w.act_group_size
    x_hat = x_q.double() * x_scale.double().repeat_interleave(group, -1)[..., :k]
    y = x_hat @ reference.dequantize(*w.to_codes()).double().mT
    return y if bias is None else y + bias.double()


def check(m, n, k, group_size, act_group_size, zero, dtype=torch.bfloat16, bias=False):
    q, scale, zero_point = codes(n, k, group_size, zero, dtype)
    w = Int4ActQuantTensor.from_codes(
        q, scale, zero_point, group_size=group_size, act_group_size=act_group_size
    )
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    y = F.linear(x, w, b)
    assert y.shape == (m, n) and y.dtype == dtype
    # only the rounding of the output, and fp32 sums, may differ from the definition
    budget = {torch.bfloat16: 3e-3, torch.float16: 6e-4}[dtype]
    error = rel_err(y, definition(x, w, b))
    assert error <= budget, (m, n, k, group_size, act_group_size, zero, error)
    assert torch.equal(y, F.linear(x, w, b)), "two runs differ"


@pytest.mark.parametrize("m", TOKENS + MANY_TOKENS)
def test_definition_at_every_border(m):
    check(m, 512, 1024, 128, 32, None, torch.float16)
    check(m, 512, 1024, 128, 128, None)


@pytest.mark.parametrize("zero", [None, "integer", "fractional"])
@pytest.mark.parametrize("act_group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("m", [1, 5, 16, 33, 130, 1100])
def test_every_pair_of_groups(m, group_size, act_group_size, zero):
    check(m, 320, 768, group_size, act_group_size, zero, torch.float16, bias=True)


@pytest.mark.parametrize("act_group_size", [32, -1])
@pytest.mark.parametrize(
    "n,k,group_size",
    [(1, 2048, 128), (3, 128, 128), (65, 2880, 64), (256, 100, -1), (77, 1000, -1), (33, 16, 16)],
)
@pytest.mark.parametrize("m", [1, 4, 16, 17, 100, 513])
def test_odd_shapes(m, n, k, group_size, act_group_size):
    check(m, n, k, group_size, act_group_size, "fractional")


@pytest.mark.parametrize("m", [1, 3, 16, 17, 64, 200, 1024])
def test_exact_on_integers(m):
    n, k = 200, 640
    q, _, _ = codes(n, k, 128, None, torch.bfloat16)
    scale = torch.ones(n, k // 128, device="cuda", dtype=torch.bfloat16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    # each act group holds +-127, so its scale is exactly 1 and its codes are x
    x = torch.zeros(m, k, device="cuda")
    x[:, ::32] = 127
    x[:, 1::32] = torch.randint(-127, 128, x[:, 1::32].shape, device="cuda").float()
    w_int = (q.int() - 8).double()
    assert torch.equal(F.linear(x, w).double(), x.double() @ w_int.mT)


@pytest.mark.parametrize("act_group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("k", [32, 100, 640, 2880, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activation_codes_are_the_definition_bit_for_bit(act_group_size, k, dtype):
    x = torch.randn(37, k, device="cuda", dtype=dtype)
    x[3] = 0
    x[4, : k // 2] = 0
    x[5, 7] = float("nan")
    x[6, 9] = float("inf")
    got = torch.ops.w4tensor.quantize_activation(x, act_group_size)
    want = reference.quantize_activation(x, act_group_size)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(
            a.nan_to_num(nan=-1) if a.is_floating_point() else a,
            b.nan_to_num(nan=-1) if b.is_floating_point() else b,
        )


@pytest.mark.parametrize("m", [2, 20, 300])
def test_nan_stays_in_its_token(m):
    q, scale, _ = codes(128, 512, 128, None, torch.bfloat16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    x[1, 100] = float("nan")
    y = F.linear(x, w)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_signal_to_noise_on_gaussian_inputs():
    q, scale, _ = codes(4096, 4096, 128, None, torch.bfloat16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    for m in (1, 16, 64, 1024):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        ref = x.double() @ reference.dequantize(*w.to_codes()).double().mT
        decibels = -20 * torch.log10(torch.tensor(rel_err(F.linear(x, w), ref))).item()
        assert decibels >= 38, (m, decibels)
