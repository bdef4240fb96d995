"""unpack.py in Triton's CPU interpreter: the twins of its assembly against layout.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from w4tensor.kernels.unpack import (
    CODE_UNIT,
    FP16_LIFT,
    join8,
    permute_x,
    unpack_operand,
    unpack_scaled,
    use_asm,
)
from w4tensor.layout import COALESCED


@triton.jit
def _operand_kernel(w_ptr, out_ptr, R: tl.constexpr, K: tl.constexpr, KWIDTH: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    words = tl.load(w_ptr + row * (K // 8) + tl.arange(0, K // 8)[None, :])
    z = unpack_operand(words, KWIDTH, tl.float16, False)
    tl.store(out_ptr + row * K + tl.arange(0, K)[None, :], z)


@triton.jit
def _permute_kernel(x_ptr, out_ptr, R: tl.constexpr, K: tl.constexpr, KWIDTH: tl.constexpr):
    at = tl.arange(0, R)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + at, permute_x(tl.load(x_ptr + at), KWIDTH))


@triton.jit
def _scaled_kernel(w_ptr, scale_ptr, zero_ptr, out_ptr, WORDS: tl.constexpr):
    i = tl.arange(0, WORDS)
    w = tl.load(w_ptr + i)
    s0 = tl.load(scale_ptr + i)
    z0 = None
    if zero_ptr is not None:
        z0 = tl.load(zero_ptr + i)
    e0, e1, e2, e3, e4, e5, e6, e7 = unpack_scaled(w, s0, s0 * 2, z0, z0, tl.float16, False)
    z = join8(e0, e1, e2, e3, e4, e5, e6, e7).reshape(WORDS, 8)
    tl.store(out_ptr + i[:, None] * 8 + tl.arange(0, 8)[None, :], z)


def _codes(*shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, shape, dtype=torch.uint8, generator=g)


def _words(q: torch.Tensor) -> torch.Tensor:
    return COALESCED.pack(q).view(torch.int32)


def test_the_interpreter_takes_the_twin():
    assert not use_asm()


@pytest.mark.parametrize("k", [128, 512])
def test_operand_of_kwidth_2_is_the_weight_itself(k):
    q = _codes(4, k)
    out = torch.full((4, k), torch.nan, dtype=torch.float16)
    _operand_kernel[(1,)](_words(q), out, 4, k, 2)
    assert torch.equal(out.float(), (q.float() - 8) * CODE_UNIT.value)


@pytest.mark.parametrize("k", [128, 512])
def test_operand_and_x_of_kwidth_4_are_permuted_alike(k):
    q = _codes(4, k)
    w = torch.full((4, k), torch.nan, dtype=torch.float16)
    _operand_kernel[(1,)](_words(q), w, 4, k, 4)
    position = torch.arange(k, dtype=torch.int32).expand(4, k).contiguous()
    order = torch.full_like(position, -1)
    _permute_kernel[(1,)](position, order, 4, k, 4)
    assert sorted(order[0].tolist()) == list(range(k))
    assert order[0].tolist() != list(range(k))
    assert torch.equal(w.float(), ((q.float() - 8) * CODE_UNIT.value).gather(1, order.long()))


@pytest.mark.parametrize("zero", [None, 8.0, 0.0, 15.0, 7.25, 9.5])
def test_scaled_elements_have_each_its_scale_and_zero_point(zero):
    q = _codes(1, 128)
    w = _words(q)[0]
    scale = 2.0 ** torch.randint(-3, 3, (16,), generator=torch.Generator().manual_seed(1))
    zeros = None if zero is None else torch.full((16,), zero)
    out = torch.full((16, 8), torch.nan, dtype=torch.float16)
    _scaled_kernel[(1,)](w, scale, zeros, out, 16)
    # word 4 t + i, element (p, q', r) is k = 32 i + 16 p + 8 q' + 2 t + r
    k = torch.arange(128).reshape(4, 2, 2, 4, 2).permute(3, 0, 1, 2, 4).reshape(16, 8)
    factor = scale[:, None] * torch.tensor([1.0] * 4 + [2.0] * 4) * FP16_LIFT.value
    assert torch.equal(out.float(), (q[0].float()[k] - (8 if zero is None else zero)) * factor)
