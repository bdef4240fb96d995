"""Eager products skip the dispatcher only where nobody else is waiting for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, PackingError, alike
from w4tensor.tensors import experts
from w4tensor.testing import random_routing

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


@pytest.mark.parametrize(
    "cls,fields", [(CudaCoalescedInt4Tensor, {}), (Int4ActQuantTensor, {"act_group_size": 32})]
)
@pytest.mark.parametrize("zero", ["symmetric", "min_max"])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("n,k", [(1024, 2048), (520, 640)])
def test_calls_that_are_alike_give_what_the_first_one_does(cls, fields, zero, group_size, n, k):
    weights = [
        cls.from_hp(torch.randn(n, k).bfloat16().cuda(), group_size, zero, **fields)
        for _ in range(2)
    ]
    bias = torch.randn(n, device="cuda").bfloat16()
    for m in (1, 2, 3, 16, 40, 65, 96, 300, 2048):
        xs = torch.randn(3, m, k, device="cuda").bfloat16()
        with torch.no_grad():
            alike._known.clear()
            expected = []
            for w in weights:
                for x in xs:
                    alike._known.clear()
                    expected.append((F.linear(x, w, bias), F.linear(off_by_one(x), w, bias)))
            for w in weights:
                for x in xs:
                    # freed at once: memory that the product may be given
                    torch.full((2, m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
                    y, moved = F.linear(x, w, bias), F.linear(off_by_one(x), w, bias)
                    first, first_moved = expected.pop(0)
                    assert torch.equal(y, first) and torch.equal(moved, first_moved)


@pytest.mark.parametrize(
    "cls,fields", [(CudaCoalescedInt4Tensor, {}), (Int4ActQuantTensor, {"act_group_size": 32})]
)
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_products_with_stacks_and_the_operators_are_the_same(cls, fields, rows):
    w = cls.from_hp(torch.randn(4, 192, 256).bfloat16().cuda(), 64, **fields)
    operands = (w.qdata, w.scale, w.zero_point)
    rest = 64, fields.get("act_group_size"), w.layout_version
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(rows, device="cuda") % 4
    offs = torch.tensor([0, rows // 2, rows // 2, rows], device="cuda", dtype=torch.int32)
    with torch.no_grad():
        grouped = torch.ops.w4tensor.grouped_linear(x, *operands, offs, *rest)
        gathered = torch.ops.w4tensor.gathered_linear(x, ids, *operands, *rest)
        for _ in range(3):
            torch.full((8, rows, 256), float("nan"), device="cuda")
            assert torch.equal(torch._grouped_mm(x, w.transpose(-2, -1), offs=offs), grouped)
            assert torch.equal(torch.bmm(w[ids], x[..., None])[..., 0], gathered)


@pytest.mark.parametrize(
    "cls,fields", [(CudaCoalescedInt4Tensor, {}), (Int4ActQuantTensor, {"act_group_size": 32})]
)
@pytest.mark.parametrize("zero", ["symmetric", "min_max"])
@pytest.mark.parametrize("n_experts,hidden,inter", [(8, 512, 256), (3, 192, 64)])
def test_experts_that_are_alike_give_what_the_first_ones_do(
    cls, fields, zero, n_experts, hidden, inter
):
    def stack(n: int, k: int):
        w = torch.randn(n_experts, n, k).bfloat16().cuda()
        return cls.from_hp(w, 64, zero, **fields)

    layers = [(stack(2 * inter, hidden), stack(hidden, inter)) for _ in range(2)]
    for tokens in (1, 2, 5, 40, 300, 2048):
        xs = torch.randn(2, tokens, hidden, device="cuda").bfloat16()
        routings = [random_routing(tokens, n_experts, 2, device="cuda", seed=i) for i in range(2)]
        calls = list(itertools.product(xs, routings, layers))
        with torch.no_grad():
            expected = []
            for x, routing, layer in calls:
                alike._known.clear()
                expected.append(experts(x, *routing, *layer))
            for x, routing, layer in calls:
                # freed at once: memory that the block may be given
                nans = torch.full((8, tokens, 2 * hidden), float("nan"), device="cuda")
                del nans
                assert torch.equal(experts(x, *routing, *layer), expected.pop(0))
        # the kind was not new after the first of them
        assert sum(replay is not None for replay in alike._known.values()) == 1


def off_by_one(x):
    """The same values, at an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("m", [1, 40])
def test_the_device_of_x_need_not_be_the_current_one(m):
    weight = CudaCoalescedInt4Tensor.from_hp(torch.randn(256, 512).bfloat16(), 128)
    x = torch.randn(m, 512).bfloat16()
    with torch.no_grad():
        here, there = (
            [F.linear(x.to(device), weight.to(device)).cpu() for _ in range(3)]
            for device in ("cuda:0", "cuda:1")
        )
    assert all(torch.equal(y, here[0]) for y in here + there)
