"""F.linear in eager mode skips the dispatcher only where nobody else is waiting for the product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from w4tensor import CudaCoalescedInt4Tensor, PackingError

pytestmark = pytest.mark.gpu


@pytest.fixture
def weight():
    return CudaCoalescedInt4Tensor.from_hp(torch.randn(256, 512).bfloat16().cuda(), 128)


@pytest.fixture
def x():
    return torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)


def test_an_eager_call_and_the_operator_are_the_same_product(weight, x):
    fields = (weight.qdata, weight.scale, weight.zero_point)
    y = torch.ops.w4tensor.linear(x, *fields, None, 128, None, weight.layout_version)
    with torch.no_grad():
        assert torch.equal(F.linear(x, weight), y)
    with pytest.raises(PackingError):
        F.linear(x.cpu(), weight)


def test_a_gradient_goes_through_the_operator(weight, x):
    leaf = x.clone().requires_grad_()
    F.linear(leaf, weight).sum().backward()
    assert leaf.grad is not None
    expected = weight.dequantize().float().sum(0).expand(5, -1)
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_mode_sees_the_operator(weight, x):
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen(), torch.no_grad():
        F.linear(x, weight)
    assert any("w4tensor.linear" in name for name in seen)
