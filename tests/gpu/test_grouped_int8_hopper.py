"""kernels/grouped_int8_hopper.py, which no interpreter runs, against its definition.

Every tile, with experts of no rows, of one, of as many as the narrow tile has, and of more than one
tile; first rows of experts are odd. Outputs are NaN beforehand (test_linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.gpu.test_act_quant import definition
from tests.gpu.test_experts import BLOCK_SQNR_DB, Block
from tests.gpu.test_linear import _poison, codes, needs_hopper, rel_err  # noqa: F401
from w4tensor import Int4ActQuantTensor, moe
from w4tensor.dispatch_experts import HOPPER_INT8_TILES
from w4tensor.layout import ACT_QUANT
from w4tensor.moe import Stack
from w4tensor.plans_experts import ExpertsPlan
from w4tensor.testing import random_codes, sqnr_db

pytestmark = [pytest.mark.gpu, needs_hopper]

TILES = [plan for _, plan in HOPPER_INT8_TILES]
HALF, FULL = torch.float16, torch.float32
# sums of fp32 in another order than fp64
REL_ERR = 1e-5

tiles = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    group: int
    act_group: int
    zero: torch.dtype | None = None
    bias: bool = False

    def __str__(self) -> str:
        zero = "" if self.zero is None else "-zero-fp16" if self.zero == HALF else "-zero-fp32"
        return f"{self.n}x{self.k}-g{self.group}-a{self.act_group}{zero}{'-bias' * self.bias}"


CASES = (
    Case(264, 1024, 128, -1),
    Case(264, 1152, 128, 128, bias=True),
    Case(136, 2048, 256, 128, zero=HALF, bias=True),
    Case(131, 1280, 256, -1, zero=HALF),
    Case(200, 1032, -1, -1, zero=FULL),
    # one step
    Case(96, 128, 128, 128, zero=HALF),
    Case(65, 40, -1, -1, zero=FULL),
)


def weight_of(case: Case, experts: int, exact: bool = False) -> Int4ActQuantTensor:
    zero = None if case.zero is None else "integer" if exact else "fractional"
    stack = (experts,)
    q, scale, zero_point = codes(case.n, case.k, case.group, zero, torch.bfloat16, stack=stack)
    if exact:
        scale = torch.ones_like(scale)
        scale[:, ::2] = 0.5
    if zero_point is not None:
        zero_point = zero_point.to(case.zero)
    sizes = dict(group_size=case.group, act_group_size=case.act_group)
    return Int4ActQuantTensor.from_codes(q, scale, zero_point, **sizes)


def integers(rows: int, k: int, act_group: int) -> torch.Tensor:
    """x whose scales are 1 and whose codes are x."""
    x = torch.randint(-2, 3, (rows, k), device="cuda", dtype=torch.float32)
    x[:, :: k if act_group == -1 else act_group] = 127
    return x


def expected(x, w, offs, bias) -> torch.Tensor:
    y = torch.zeros(len(x), w.shape[-2], dtype=torch.float64, device="cuda")
    start = 0
    for e, end in enumerate(offs.tolist()):
        b = None if bias is None else bias[e]
        y[start:end] = definition(x[start:end], w[e], b)
        start = end
    return y


@tiles
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(tile, case):
    torch.manual_seed(0)
    counts = [1, 0, max(tile.narrow_m, 2), tile.block_m, 2 * tile.block_m + 5, tile.block_m // 2]
    w, whole = weight_of(case, len(counts)), weight_of(case, len(counts), exact=True)
    bias = None
    if case.bias:
        bias = torch.randint(-9, 9, (len(counts), case.n), device="cuda").bfloat16()
    offs = torch.tensor(counts, device="cuda").cumsum(0).int()
    # the last rows are nobody's
    rows = sum(counts) + 3
    x, few = torch.randn(rows, case.k, device="cuda"), integers(rows, case.k, case.act_group)

    def run(x, w):
        stack = Stack(w.qdata, w.scale, w.zero_point, w.group_size, bias, case.act_group)
        return moe.grouped_linear(x, offs, stack, tile)

    y = run(x, w)
    assert rel_err(y, expected(x, w, offs, bias)) <= REL_ERR
    assert torch.equal(y, run(x, w)) and not y[sum(counts) :].any()
    assert torch.equal(run(few, whole).double(), expected(few, whole, offs, bias))


@tiles
def test_a_token_with_nan_stays_by_itself(tile):
    case = Case(136, 256, 128, -1, zero=HALF)
    w = weight_of(case, 2)
    x = torch.randn(2 * tile.block_m, 256, device="cuda", dtype=torch.bfloat16)
    x[1, 100], x[3] = torch.nan, 0
    offs = torch.tensor([tile.block_m - 1, len(x)], device="cuda", dtype=torch.int32)
    stack = Stack(w.qdata, w.scale, w.zero_point, w.group_size, None, case.act_group)
    y = moe.grouped_linear(x, offs, stack, tile)
    assert y[1].isnan().all() and not y[3].any()
    assert y[[0, 2]].isfinite().all() and y[4:].isfinite().all()


def rows_of(block: Block, act_group_size: int, biases=(None, None)) -> list[Stack]:
    stacks = block.stacks(act_group_size)
    return [s._replace(bias=b) for s, b in zip(stacks, biases, strict=True)]


@tiles
@pytest.mark.parametrize("act_group_size", [128, -1])
@pytest.mark.parametrize("gate,act", [("halves", "silu"), ("interleaved", "clamped_swiglu")])
def test_a_block_with_sentinels_and_biases(tile, act_group_size, gate, act):
    block = Block(6, 384, 264, -1, "fractional")
    biases = (
        torch.randn(6, 2 * 264, device="cuda").bfloat16(),
        torch.randn(6, 384, device="cuda").bfloat16(),
    )
    x, ids, weight = block.load(2 * tile.block_m + 3, 3)
    # sentinels, and an expert twice in a token
    ids[::5, 1] = 6
    ids[-1, 2] = ids[-1, 0]
    stacks = rows_of(block, act_group_size, biases)
    y = moe.experts(x, ids, weight, *stacks, ExpertsPlan(tile, tile), gate, act)
    ref = block.expected(x, ids, weight, act_group_size, biases, gate, act)
    assert sqnr_db(y, ref) > BLOCK_SQNR_DB
    late = replace(tile, pdl=False)
    again = moe.experts(x, ids, weight, *stacks, ExpertsPlan(late, late), gate, act)
    assert torch.equal(y, again)


@tiles
def test_a_graph_whose_routing_changes_gives_the_bits_of_eager(tile):
    codes = [
        random_codes(8, n, k, group_size=128, device="cuda") for n, k in ((512, 256), (256, 256))
    ]
    stacks = [Stack(ACT_QUANT.pack(c.q), c.scale, None, 128, None, -1) for c in codes]
    tokens = 3 * tile.block_m
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(tokens, 2, device="cuda", dtype=torch.int64)
    weight = torch.rand(tokens, 2, device="cuda")

    def run():
        return moe.experts(x, ids, weight, *stacks, ExpertsPlan(tile, tile))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for most in (1, 3, 9):
        ids.copy_(torch.randint(0, most, ids.shape, device="cuda"))
        graph.replay()
        assert torch.equal(y, run())
