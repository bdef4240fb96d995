"""kernels/grouped_hopper.py, which no interpreter runs, against its definition.

Every tile that dispatch takes, pipelined or not, with experts as in test_grouped_int8_hopper.py;
and slices of K in a block's second product. Outputs are NaN beforehand (test_linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.gpu.test_experts import Block
from tests.gpu.test_linear import _poison, needs_hopper, rel_err  # noqa: F401
from w4tensor import moe
from w4tensor.dispatch_experts import (
    HOPPER_TILES,
    UNPIPELINED_M,
    for_short_loops,
)
from w4tensor.layout import COALESCED
from w4tensor.moe import Stack
from w4tensor.plans_experts import ExpertsPlan
from w4tensor.testing import MOE_REL_ERR_BUDGET, random_codes

pytestmark = [pytest.mark.gpu, needs_hopper]

PIPELINED = [plan for _, plan in HOPPER_TILES]
FEW = [plan for plan in PIPELINED if plan.block_m <= UNPIPELINED_M]
TILES = PIPELINED + [for_short_loops(plan, k=128, mean_rows=1) for plan in FEW]

tiles = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    group: int
    zero: str = "symmetric"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.n}x{self.k}-g{self.group}-{self.zero}-{self.dtype}{'-bias' * self.bias}"


CASES = (
    Case(264, 1024, 128),
    Case(131, 1032, -1, bias=True),
    Case(200, 800, 32, "fractional", bias=True),
    Case(136, 1152, 64, "integer", torch.float16),
    # one step
    Case(96, 128, 128),
)


def expected(x, codes, offs, bias) -> torch.Tensor:
    y = torch.zeros(len(x), codes.q.shape[1], dtype=torch.float64, device="cuda")
    w, start = codes.dequantize().double(), 0
    for e, end in enumerate(offs.tolist()):
        y[start:end] = x[start:end].double() @ w[e].mT
        if bias is not None:
            y[start:end] += bias[e].double()
        start = end
    return y


@tiles
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(tile, case):
    counts = [1, 0, max(tile.narrow_m, 2), tile.block_m, 2 * tile.block_m + 5, tile.block_m // 2]
    options = dict(group_size=case.group, zero_point=case.zero, dtype=case.dtype, device="cuda")
    codes = random_codes(len(counts), case.n, case.k, **options)
    bias = None
    if case.bias:
        bias = torch.randint(-9, 9, (len(counts), case.n), device="cuda").to(case.dtype)
    offs = torch.tensor(counts, device="cuda").cumsum(0).int()
    # the last rows are nobody's
    x = torch.randn(sum(counts) + 3, case.k, device="cuda").to(case.dtype)

    def run(x, codes):
        packed = COALESCED.pack(codes.q)
        stack = Stack(packed, codes.scale, codes.zero_point, codes.group_size, bias)
        return moe.grouped_linear(x, offs, stack, tile)

    y = run(x, codes)
    assert rel_err(y, expected(x, codes, offs, bias)) < MOE_REL_ERR_BUDGET
    assert torch.equal(y, run(x, codes)) and not y[sum(counts) :].any()
    # integers, of which products and sums are exact
    whole = replace(codes, scale=torch.ones_like(codes.scale))
    if case.zero == "fractional":
        whole = replace(whole, zero_point=codes.zero_point.round())
    few = torch.zeros_like(x)
    few[:, ::97] = torch.randint(-2, 3, few[:, ::97].shape, device="cuda").to(x.dtype)
    assert torch.equal(run(few, whole), expected(few, whole, offs, bias).to(case.dtype))


@pytest.mark.parametrize("split_k", [2, 3, 4])
@tiles
def test_slices_of_the_second_product(tile, split_k):
    # 1288 k are ten steps and a part of one
    block = Block(6, 384, 1288, -1, "fractional")
    biases = (
        torch.randn(6, 2 * 1288, device="cuda").bfloat16(),
        torch.randn(6, 384, device="cuda").bfloat16(),
    )
    x, ids, weight = block.load(tile.block_m + 3, 3)
    # sentinels, and an expert twice in a token
    ids[::5, 1] = 6
    ids[-1, 2] = ids[-1, 0]
    stacks = [s._replace(bias=b) for s, b in zip(block.stacks(), biases, strict=True)]
    plan = ExpertsPlan(tile, replace(tile, split_k=split_k))
    y = moe.experts(x, ids, weight, *stacks, plan)
    assert rel_err(y, block.expected(x, ids, weight, None, biases)) < MOE_REL_ERR_BUDGET
    late = replace(tile, pdl=False)
    plan = ExpertsPlan(late, replace(late, split_k=split_k))
    assert torch.equal(y, moe.experts(x, ids, weight, *stacks, plan))
