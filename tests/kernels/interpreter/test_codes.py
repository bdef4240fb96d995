"""codes.py in Triton's CPU interpreter: the bits of the definition."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from w4tensor import reference
from w4tensor.kernels.codes import as_codes, load_slices

THREADS = 64


@triton.jit
def _codes_kernel(x_ptr, codes_ptr, sums_ptr, scale_ptr, K, T: tl.constexpr, GROUP: tl.constexpr):
    thread = tl.arange(0, T)
    x = load_slices(x_ptr, 0, thread * 0, thread, thread >= 0, K, False)
    codes, first, second, scale = as_codes(x, x_ptr.dtype.element_ty, GROUP, False)
    for i in tl.static_range(8):
        tl.store(codes_ptr + thread * 8 + i, codes[i])
    tl.store(sums_ptr + thread * 2, first)
    tl.store(sums_ptr + thread * 2 + 1, second)
    tl.store(scale_ptr + thread, scale)


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Groups of all sizes: the smallest numbers, the largest, and zeros."""
    g = torch.Generator().manual_seed(0)
    powers = (-24, 12) if dtype == torch.float16 else (-145, 120)
    sizes = 2.0 ** torch.randint(*powers, (THREADS, 1), generator=g)
    x = torch.randn(THREADS, 32, generator=g) * sizes
    # next to what rounds to an integer and a half
    x[::3] = (torch.randint(-127, 127, (len(x[::3]), 32), generator=g) + 0.5) / 128 * sizes[::3]
    x[5:9] = 0
    return x.flatten().to(dtype)


@pytest.mark.parametrize("k", [32 * THREADS, 32 * THREADS - 40])
@pytest.mark.parametrize("act_group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_and_scales_are_the_definition_bit_for_bit(dtype, act_group_size, k):
    x = numbers(dtype)
    codes = torch.full((32 * THREADS,), 99, dtype=torch.int8)
    sums = torch.full((THREADS, 2), -1, dtype=torch.int32)
    scale = torch.full((THREADS,), torch.nan)
    _codes_kernel[(1,)](x, codes.view(torch.int32), sums, scale, k, THREADS, act_group_size)
    x[k:] = 0
    want, want_scale = reference.quantize_activation(x, act_group_size)
    assert torch.equal(codes, want)
    assert torch.equal(scale, want_scale.repeat_interleave(act_group_size // 32))
    assert torch.equal(sums, want.view(THREADS, 2, 16).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_finite_makes_its_group_nan(dtype, bad):
    x = torch.ones(32 * THREADS, dtype=dtype)
    x[700] = bad
    out = torch.empty(32 * THREADS, dtype=torch.int8), torch.empty(THREADS, 2, dtype=torch.int32)
    scale = torch.zeros(THREADS)
    _codes_kernel[(1,)](x, out[0].view(torch.int32), out[1], scale, len(x), THREADS, 64)
    # slices 20 and 21
    assert scale.isnan().nonzero().flatten().tolist() == [20, 21]
