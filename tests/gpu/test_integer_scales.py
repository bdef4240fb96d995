"""Products of int8 x with integer scales (kernels/hopper_multiples.py) on a Hopper.

Sums are integers, so outputs are known but for the rounding of what they are multiplied by: the
oracle is exact in int64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.gpu.test_gemm_hopper import name
from tests.gpu.test_linear import _poison, needs_hopper  # noqa: F401
from w4tensor import Int4ActQuantTensor, arch, moe, reference
from w4tensor.dispatch import Problem
from w4tensor.dispatch_act_quant import ActQuantIntegerPlan, plan_act_quant
from w4tensor.dispatch_experts import INTEGER_TILE, ExpertsProblem, plan_experts
from w4tensor.dispatch_hopper import MIN_SHARED_STEPS, HopperPlan, HopperTile, plan_of
from w4tensor.dispatch_integer import TILES
from w4tensor.kernels.gemm_hopper import gemm_hopper
from w4tensor.layout import ACT_QUANT
from w4tensor.plans_experts import ExpertsPlan
from w4tensor.tensors import experts
from w4tensor.testing import MOE_REL_ERR_BUDGET, random_routing, rel_err

pytestmark = [pytest.mark.gpu, needs_hopper]

# of y in its own dtype, rounded twice at most
REL_ERR = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
# h is quantised after it was rounded to 16 bits: some of its codes differ from the definition's
BLOCK_REL_ERR = 2 * MOE_REL_ERR_BUDGET


class Weight(NamedTuple):
    q: Tensor
    scale: Tensor
    multiple: Tensor
    group_size: int

    def tensor(self) -> Int4ActQuantTensor:
        fields = dict(group_size=self.group_size, act_group_size=-1, multiple=self.multiple)
        return Int4ActQuantTensor.from_codes(self.q, self.scale, **fields)

    def stack(self, bias: Tensor | None = None) -> moe.Stack:
        qdata = ACT_QUANT.pack(self.q)
        return moe.Stack(qdata, self.scale, None, self.group_size, bias, -1, self.multiple)

    def dequantized(self) -> Tensor:
        scale = self.scale.double().repeat_interleave(self.group_size, -1)
        return (self.q.double() - 8) * scale


def weight_of(*shape: int, group_size: int, dtype=torch.bfloat16, unit: float = 2.0**-14) -> Weight:
    g = torch.Generator("cuda").manual_seed(sum(shape))
    options = dict(device="cuda", generator=g)
    n_groups = shape[-1] // group_size
    q = torch.randint(0, 16, shape, dtype=torch.uint8, **options)
    multiple = torch.randint(1, 16, (*shape[:-1], n_groups), dtype=torch.int8, **options)
    multiple *= 2 * torch.randint(0, 2, multiple.shape, dtype=torch.int8, **options) - 1
    units = torch.randint(8, 16, (*shape[:-1], 1), **options) * unit
    return Weight(q, (units * multiple).to(dtype), multiple, group_size)


def rounded(x: Tensor) -> Tensor:
    codes, scale = reference.quantize_activation(x, -1)
    return codes.double() * scale.double()


def run(plan: HopperPlan, x: Tensor, w: Weight, bias: Tensor | None, dtype) -> Tensor:
    codes, scale = reference.quantize_activation(x, -1)
    codes = torch.nn.functional.pad(codes, (0, -x.shape[1] % 128))
    y = torch.empty(len(x), len(w.q), device="cuda", dtype=dtype)
    weight = ACT_QUANT.pack(w.q), w.scale, None
    rest = w.multiple, scale[:, 0].contiguous()
    gemm_hopper(codes, *weight, bias, y, w.group_size, plan, *rest)
    return y


SHAPES = [(256, 1536, 128), (136, 1568, 32), (200, 1600, 64), (131, 1792, 256), (72, 1640, 1640)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_every_tile_of_every_kind_of_weight(tile: HopperTile, shape, dtype):
    torch.manual_seed(0)
    n, k, group_size = shape
    n += 3 * tile.block_n
    w = weight_of(n, k, group_size=group_size, dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    for m in (tile.block_m // 2 + 1, tile.block_m, 2 * tile.block_m + 3):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        want = rounded(x) @ w.dequantized().T + bias.double()
        plans = [plan_of(tile, split, 0, False, pdl=False) for split in (1, 2, 3)]
        if tile.shares:
            assert k >= 128 * MIN_SHARED_STEPS
            plans += [
                plan_of(tile, 1, p, even, pdl=False) for p in (1, 3) for even in (False, True)
            ]
        whole = run(plans[0], x, w, bias, dtype)
        assert rel_err(whole, want) <= REL_ERR[dtype], plans[0]
        for plan in plans[1:]:
            y = run(plan, x, w, bias, dtype)
            # integers up to 2**24 are exact in fp32, in whatever order they are added
            assert torch.equal(y, whole), plan
            assert torch.equal(y, run(plan, x, w, bias, dtype)), plan


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_integers_are_exact(tile):
    g = torch.Generator("cuda").manual_seed(0)
    w = weight_of(2 * tile.block_n, 2048, group_size=32, dtype=torch.float32, unit=1.0)
    # products sum to less than 2**24
    x = torch.randint(-5, 6, (tile.block_m, 2048), device="cuda", generator=g).float()
    # the scale of each token is 1
    x[:, 0] = 127
    want = x.double() @ w.dequantized().T
    y = run(plan_of(tile, 1, 0, False, pdl=False), x, w, None, torch.float32)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("m", [1, 2, 16, 32, 33, 64, 65, 96, 200, 513, 1000])
@pytest.mark.parametrize(
    "shape", [(4096, 4096, 128), (2880, 4096, 32), (1032, 1000, 1000)], ids=str
)
def test_linear_at_the_borders_of_dispatch(shape, m):
    torch.manual_seed(0)
    n, k, group_size = shape
    w = weight_of(n, k, group_size=group_size)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    t = w.tensor()
    y = torch.nn.functional.linear(x, t)
    want = rounded(x) @ w.dequantized().T
    # a few tokens are rounded to 16 bits beside fine groups
    assert rel_err(y, want) <= 6e-3
    assert torch.equal(y, torch.nn.functional.linear(x, t))
    # remembered, and without multiples
    assert torch.equal(y, torch.nn.functional.linear(x, t))
    plain = torch.nn.functional.linear(x, t._with(multiple=None))
    assert rel_err(plain, want) <= 6e-3
    p = Problem(m, n, k, group_size, "int8", True, 1, -1, True)
    kinds = {type(plan_act_quant(p, arch.current()))}
    assert m > 32 or ActQuantIntegerPlan not in kinds


def test_a_graph_is_replayed_with_other_tokens():
    w = weight_of(8192, 4096, group_size=128)
    t = w.tensor()
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
    torch.nn.functional.linear(x, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.nn.functional.linear(x, t)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, torch.nn.functional.linear(x, t)), seed
    x[5, 7] = torch.nan
    graph.replay()
    assert y[5].isnan().all() and not y[:5].isnan().any() and not y[6:].isnan().any()


def definition(x, ids, weight, first, second, biases, gate, act):
    y = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for e in range(len(first.q)):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if len(token):
            h = rounded(x[token]) @ first.dequantized()[e].T + biases[0][e].double()
            h = reference.activate(h.float(), gate, act).to(x.dtype)
            out = rounded(h) @ second.dequantized()[e].T + biases[1][e].double()
            y.index_add_(0, token, weight[token, slot, None].double() * out)
    return y


@pytest.mark.parametrize("gate,act", [("halves", "silu"), ("interleaved", "clamped_swiglu")])
@pytest.mark.parametrize(
    "sizes", [(5, 512, 256, 128), (3, 288, 320, 32), (4, 1056, 96, 96)], ids=str
)
@pytest.mark.parametrize("tokens", [100, 333])
def test_experts(tokens, sizes, gate, act):
    torch.manual_seed(0)
    n_experts, hidden, inter, group_size = sizes
    # 96 is a whole row of the second product
    first_size = 32 if group_size == 96 else group_size
    first = weight_of(n_experts, 2 * inter, hidden, group_size=first_size, unit=2.0**-12)
    second = weight_of(n_experts, hidden, inter, group_size=group_size, unit=2.0**-12)
    biases = [torch.randn(n_experts, n, device="cuda").bfloat16() for n in (2 * inter, hidden)]
    stacks = [w.stack(bias) for w, bias in zip((first, second), biases, strict=True)]
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    ids, weight = random_routing(tokens, n_experts, 2, device="cuda")
    ids[3] = n_experts
    ids[4, 1] = ids[4, 0]
    want = definition(x, ids, weight, first, second, biases, gate, act)
    for tile in (INTEGER_TILE, replace(INTEGER_TILE, narrow_m=0), replace(INTEGER_TILE, pdl=False)):
        plan = ExpertsPlan(tile, tile)
        y = moe.experts(x, ids, weight, *stacks, plan, gate, act)
        assert rel_err(y, want) <= BLOCK_REL_ERR, rel_err(y, want)
        assert torch.equal(y, moe.experts(x, ids, weight, *stacks, plan, gate, act))


def test_blocks_of_many_rows_take_the_tile():
    n_experts, hidden, inter = 8, 1024, 512
    first = weight_of(n_experts, 2 * inter, hidden, group_size=128, unit=2.0**-12)
    second = weight_of(n_experts, hidden, inter, group_size=128, unit=2.0**-12)
    tensors = [w.tensor() for w in (first, second)]
    zeros = [torch.zeros(n_experts, n, device="cuda") for n in (2 * inter, hidden)]
    for tokens in (1, 8, 200, 241, 700):
        p = ExpertsProblem(tokens, 2, n_experts, hidden, inter, 128, -1, True, True)
        plan = plan_experts(p, arch.current())
        assert (plan.first == INTEGER_TILE) == (p.rows_an_expert > 60)
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        routing = random_routing(tokens, n_experts, 2, device="cuda")
        y = experts(x, *routing, *tensors)
        want = definition(x, *routing, first, second, zeros, "halves", "silu")
        assert rel_err(y, want) <= BLOCK_REL_ERR, tokens
        assert torch.equal(y, experts(x, *routing, *tensors))
