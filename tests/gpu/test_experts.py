"""The experts block on a CUDA device, against its definition, at both sides of each border."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from w4tensor import arch, moe
from w4tensor.dispatch_experts import (
    ExpertsPlan,
    ExpertsProblem,
    GroupedPlan,
    PairsPlan,
    plan_experts,
    plan_grouped,
    plan_pairs,
)
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.moe import Stack
from w4tensor.testing import (
    ACT_QUANT_SQNR_DB,
    MOE_REL_ERR_BUDGET,
    Int4Codes,
    random_codes,
    random_routing,
    rel_err,
    sqnr_db,
)

pytestmark = pytest.mark.gpu

# a block quantises twice, and an activation lies between
BLOCK_SQNR_DB = ACT_QUANT_SQNR_DB[32] - 2
TOKENS = (1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 64, 100, 256, 300, 700, 1600)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every torch.empty starts as NaN (or a large integer), so that an unwritten output shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(85)

    monkeypatch.setattr(torch, "empty", poisoned)


class Block:
    def __init__(
        self, n_experts, hidden, inter, group_size, zero="symmetric", dtype=torch.bfloat16
    ):
        self.sizes = n_experts, hidden, inter
        self.dtype = dtype
        options = dict(dtype=dtype, zero_point=zero, device="cuda")
        self.codes = (
            random_codes(n_experts, 2 * inter, hidden, group_size=group_size, **options),
            random_codes(n_experts, hidden, inter, group_size=group_size, seed=1, **options),
        )

    def stacks(self, act_group_size=None) -> list[Stack]:
        layout = COALESCED if act_group_size is None else ACT_QUANT
        return [
            Stack(layout.pack(c.q), c.scale, c.zero_point, c.group_size, None, act_group_size)
            for c in self.codes
        ]

    def plan(self, tokens, top_k, act_group_size=None) -> ExpertsPlan:
        n_experts, hidden, inter = self.sizes
        group_size = self.codes[0].group_size
        sizes = n_experts, hidden, inter, group_size, act_group_size
        plan = plan_experts(ExpertsProblem(tokens, top_k, *sizes), arch.current())
        assert plan is not None
        return plan

    def load(self, tokens, top_k, seed=0):
        n_experts, hidden, _ = self.sizes
        g = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(tokens, hidden, device="cuda", generator=g).to(self.dtype)
        return x, *random_routing(tokens, n_experts, top_k, device="cuda", seed=seed)

    def expected(self, x, ids, weight) -> torch.Tensor:
        """The definition in fp32, expert by expert."""
        y = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
        for e in range(self.sizes[0]):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                w1, w2 = (_one(c, e).dequantize() for c in self.codes)
                gate, up = (x[token].float() @ w1.mT).chunk(2, dim=-1)
                y.index_add_(0, token, weight[token, slot, None] * ((F.silu(gate) * up) @ w2.mT))
        return y


def _one(codes: Int4Codes, e: int) -> Int4Codes:
    zero = None if codes.zero_point is None else codes.zero_point[e]
    return Int4Codes(codes.q[e], codes.scale[e], zero)


@pytest.fixture(autouse=True)
def _fp32_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def blocks() -> dict[str, Block]:
    return {
        "qwen": Block(64, 2048, 512, 128),
        "gpt-oss": Block(8, 2880, 2880, 64, "fractional"),
        "fp16 small groups": Block(16, 1024, 768, 32, "fractional", torch.float16),
    }


@pytest.mark.parametrize("name", ["qwen", "gpt-oss", "fp16 small groups"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_block(blocks, name, tokens):
    block, top_k = blocks[name], 4
    case = block.load(tokens, top_k, seed=tokens)
    y = moe.experts(*case, *block.stacks(), block.plan(tokens, top_k))
    assert rel_err(y, block.expected(*case)) < MOE_REL_ERR_BUDGET


@pytest.mark.parametrize("act_group_size", [32, 128, -1])
@pytest.mark.parametrize("tokens", TOKENS)
def test_block_with_int8_activations(blocks, tokens, act_group_size):
    block, top_k = blocks["qwen"], 4
    case = block.load(tokens, top_k, seed=tokens)
    plan = block.plan(tokens, top_k, act_group_size)
    y = moe.experts(*case, *block.stacks(act_group_size), plan)
    # fewer scales, more noise
    wanted = BLOCK_SQNR_DB if act_group_size == 32 else BLOCK_SQNR_DB - 8
    assert sqnr_db(y, block.expected(*case)) > wanted


@pytest.mark.parametrize("tokens", [1, 6, 40, 300])
def test_sentinels_empty_and_crowded_experts(blocks, tokens):
    block, top_k = blocks["qwen"], 4
    x, ids, weight = block.load(tokens, top_k)
    ids[:, 1] = 5
    ids[::2, 2] = 64
    ids[0] = 70
    y = moe.experts(x, ids, weight, *block.stacks(), block.plan(tokens, top_k))
    # a token with sentinels only
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    if tokens > 1:
        assert rel_err(y, block.expected(x, ids, weight)) < MOE_REL_ERR_BUDGET


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 40, 600])
def test_graph_replays_with_other_routings_give_the_bits_of_eager(blocks, tokens, pdl):
    block, top_k = blocks["qwen"], 4
    plan, stacks = block.plan(tokens, top_k), block.stacks()
    if pdl:
        pairs = isinstance(plan.first, PairsPlan)
        first, second = ("first", "second") if pairs else (True, True)
        plan = ExpertsPlan(replace(plan.first, pdl=first), replace(plan.second, pdl=second))
    x, ids, weight = block.load(tokens, top_k)
    moe.experts(x, ids, weight, *stacks, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # several in a row, as layers are: buffers are handed from one to the next
        y = x
        for _ in range(3):
            y = moe.experts(y, ids, weight, *stacks, plan)
    for seed in range(1, 6):
        case = block.load(tokens, top_k, seed=seed)
        for into, value in zip((x, ids, weight), case, strict=True):
            into.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        eager = case[0]
        for _ in range(3):
            eager = moe.experts(eager, *case[1:], *stacks, replace_pdl(plan))
        assert torch.equal(y, eager)


def replace_pdl(plan: ExpertsPlan) -> ExpertsPlan:
    off = "none" if isinstance(plan.first, PairsPlan) else False
    return ExpertsPlan(replace(plan.first, pdl=off), replace(plan.second, pdl=off))


@pytest.mark.parametrize("act_group_size", [None, 32])
def test_integers_are_exact(act_group_size):
    g = torch.Generator("cuda").manual_seed(0)

    def codes(*shape):
        q = torch.randint(7, 10, shape, dtype=torch.uint8, device="cuda", generator=g)
        scale = torch.full((*shape[:-1], shape[-1] // 64), 0.5, device="cuda").bfloat16()
        return Int4Codes(q, scale, None)

    codes = codes(6, 96, 320)
    layout = COALESCED if act_group_size is None else ACT_QUANT
    stack = Stack(layout.pack(codes.q), codes.scale, None, 64, None, act_group_size)
    ids = torch.randint(0, 6, (70,), device="cuda", generator=g)
    # activations of 127 have codes of 127 and a scale of 1
    x = torch.zeros(70, 320, device="cuda", dtype=torch.bfloat16)
    x.scatter_(1, torch.randint(0, 320, (70, 12), device="cuda", generator=g), 127.0)
    exact = torch.bmm(codes.dequantize(torch.float64)[ids], x.double()[..., None])[..., 0]
    target = arch.current()
    for plan in (
        plan_pairs(1, 320, target),
        *(plan_grouped(70 * m, 70, 64, target, act_group_size) for m in (1, 8, 20, 60, 200)),
    ):
        y = moe.gathered_linear(x, ids, stack, plan)
        assert torch.equal(y, exact.to(y.dtype)), plan


@pytest.mark.parametrize("act_group_size", [None, 32])
@pytest.mark.parametrize("rows", [1, 9, 64, 1000])
def test_grouped_linear_is_grouped_mm(blocks, rows, act_group_size):
    block = blocks["qwen"]
    stack = block.stacks(act_group_size)[0]
    g = torch.Generator("cuda").manual_seed(rows)
    ends = torch.randint(0, rows + 1, (64,), device="cuda", generator=g).sort().values
    x = torch.randn(rows, 2048, device="cuda", generator=g).bfloat16()
    plan = plan_grouped(rows, 64, 128, arch.current(), act_group_size)
    y = moe.grouped_linear(x, ends.int(), stack, plan)
    expert = torch.searchsorted(ends, torch.arange(rows, device="cuda"), right=True)
    exact = torch.zeros(rows, 1024, device="cuda", dtype=torch.float64)
    for e in expert[expert < 64].unique().tolist():
        at = expert == e
        exact[at] = x[at].double() @ _one(block.codes[0], e).dequantize(torch.float64).mT
    assert torch.equal(y[expert == 64], torch.zeros_like(y[expert == 64]))
    sixteen_bit = isinstance(plan, GroupedPlan)
    assert rel_err(y, exact) < (3e-3 if sixteen_bit else 10 ** (-ACT_QUANT_SQNR_DB[32] / 20))
