"""The experts block on a CUDA device, against its definition, at both sides of each border."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, arch, moe, reference
from w4tensor.dispatch_experts import (
    ExpertsProblem,
    plan_experts,
    plan_gathered,
    plan_grouped,
    plan_pairs,
)
from w4tensor.dispatch_gemv import plan_gemv
from w4tensor.layout import ACT_QUANT, COALESCED, LAYOUT_VERSION
from w4tensor.moe import Stack
from w4tensor.plans_experts import ExpertsPlan, FewPlan
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

# h is quantised after it was rounded to 16 bits: some of its codes differ from the definition's
BLOCK_SQNR_DB = ACT_QUANT_SQNR_DB[32] - 2
ACT_GROUPS = (None, 32, 128, -1)
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
        symmetric = self.codes[0].zero_point is None
        sizes = n_experts, hidden, inter, group_size, act_group_size, symmetric
        plan = plan_experts(ExpertsProblem(tokens, top_k, *sizes), arch.current())
        assert plan is not None
        return plan

    def load(self, tokens, top_k, seed=0):
        n_experts, hidden, _ = self.sizes
        g = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(tokens, hidden, device="cuda", generator=g).to(self.dtype)
        return x, *random_routing(tokens, n_experts, top_k, device="cuda", seed=seed)

    def expected(
        self, x, ids, weight, act_group_size=None, biases=(None, None), gate="halves", act="silu"
    ) -> torch.Tensor:
        """The definition in fp32, expert by expert; h is rounded where int8 codes follow."""
        y = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
        b1, b2 = biases
        for e in range(self.sizes[0]):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                w1, w2 = (_one(c, e).dequantize() for c in self.codes)
                h = rounded(x[token], act_group_size) @ w1.mT
                h = reference.activate(h if b1 is None else h + b1[e].float(), gate, act)
                h = h if act_group_size is None else rounded(h.to(x.dtype), act_group_size)
                out = h @ w2.mT if b2 is None else h @ w2.mT + b2[e].float()
                y.index_add_(0, token, weight[token, slot, None].float() * out)
        return y

    def operands(self, act_group_size=None, biases=(None, None), gate="halves", act="silu") -> dict:
        """What torch.ops.w4tensor.experts takes beside x, ids and weight."""
        found = dict(act_group_size=act_group_size, gate=gate, act=act)
        found["layout_version"] = LAYOUT_VERSION
        parts = zip(("gate_up", "down"), self.stacks(act_group_size), biases, strict=True)
        for name, stack, bias in parts:
            found |= {f"{name}_{f}": getattr(stack, f) for f in ("qdata", "scale", "zero_point")}
            found |= {f"{name}_bias": bias, f"{name}_group_size": stack.group_size}
        return found

    def tensors(self, act_group_size=None):
        """gate_up and down, as a model has them."""
        cls, fields = CudaCoalescedInt4Tensor, {}
        if act_group_size is not None:
            cls, fields = Int4ActQuantTensor, {"act_group_size": act_group_size}
        return [
            cls.from_codes(c.q, c.scale, c.zero_point, group_size=c.group_size, **fields)
            for c in self.codes
        ]


def rounded(x: torch.Tensor, act_group_size: int | None) -> torch.Tensor:
    """x, or what its int8 codes mean, in fp32."""
    if act_group_size is None:
        return x.float()
    codes, scale = reference.quantize_activation(x, act_group_size)
    group = x.shape[-1] if act_group_size == -1 else act_group_size
    return codes.float() * scale.repeat_interleave(group, -1)[..., : x.shape[-1]]


def assert_close(y, expected, act_group_size) -> None:
    if act_group_size is None:
        assert rel_err(y, expected) < MOE_REL_ERR_BUDGET
    else:
        assert sqnr_db(y, expected) > BLOCK_SQNR_DB


def borders(plan_of, most: int = 2000) -> list[int]:
    """1, and both sides of each number of tokens at which `plan_of` changes."""
    plans = [plan_of(tokens) for tokens in range(1, most + 1)]
    changes = [t for t in range(1, most) if plans[t - 1] != plans[t]]
    return sorted({1, most} | {t for change in changes for t in (change, change + 1)})


@contextlib.contextmanager
def no_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(run, into, cases) -> None:
    """run() in a CUDA graph gives, for each case copied into `into`, the bits that eager gives."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for case in cases:
        for target, value in zip(into, case, strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, run())


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
    assert_close(y, block.expected(*case, act_group_size), act_group_size)


# operators


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
@pytest.mark.parametrize("name", ["qwen", "gpt-oss", "fp16 small groups"])
def test_the_operator_on_both_sides_of_each_border(blocks, name, act_group_size):
    block, top_k = blocks[name], 4
    n_experts, hidden, inter = block.sizes
    options = {"biases": (None, None), "gate": "halves", "act": "silu"}
    if name == "gpt-oss":
        biases = (
            torch.randn(n_experts, 2 * inter, device="cuda").to(block.dtype),
            torch.randn(n_experts, hidden, device="cuda").to(block.dtype),
        )
        options = {"biases": biases, "gate": "interleaved", "act": "clamped_swiglu"}
    operands = block.operands(act_group_size, **options)
    for tokens in borders(lambda t: block.plan(t, top_k, act_group_size)):
        x, ids, weight = block.load(tokens, top_k, seed=tokens)
        # a sentinel, and an expert twice in a token
        ids[tokens // 2, 1] = n_experts
        ids[-1, 2] = ids[-1, 3]
        y = torch.ops.w4tensor.experts(x, ids, weight, **operands)
        assert y.dtype == block.dtype
        expected = block.expected(x, ids, weight, act_group_size, **options)
        assert_close(y, expected, act_group_size)
        with no_sync():
            again = torch.ops.w4tensor.experts(x, ids.int(), weight, **operands)
        assert torch.equal(y, again)


@pytest.mark.parametrize("act_group_size", [None, 32, -1])
def test_the_operator_takes_no_token_no_slot_and_fp32(blocks, act_group_size):
    block = blocks["qwen"]
    operands = block.operands(act_group_size)
    x, ids, weight = block.load(5, 4)
    empty = torch.ops.w4tensor.experts(x[:0], ids[:0], weight[:0], **operands)
    assert empty.shape == (0, 2048) and empty.dtype == x.dtype
    y = torch.ops.w4tensor.experts(x, ids[:, :0], weight[:, :0], **operands)
    assert torch.equal(y, torch.zeros_like(x))
    for tokens in (1, 5, 300):
        x, ids, weight = block.load(tokens, 4)
        y = torch.ops.w4tensor.experts(x.float(), ids, weight.bfloat16(), **operands)
        assert y.dtype == torch.float32
        expected = block.expected(x.float(), ids, weight.bfloat16(), act_group_size)
        assert_close(y, expected, act_group_size)


@pytest.mark.parametrize("act_group_size", [None, 32, -1])
@pytest.mark.parametrize("tokens", [1, 4, 40, 600])
def test_the_operator_in_a_graph_whose_routing_changes(blocks, tokens, act_group_size):
    block, top_k = blocks["qwen"], 4
    operands = block.operands(act_group_size)
    load = block.load(tokens, top_k)
    loads = [block.load(tokens, top_k, seed=seed) for seed in range(1, 4)]
    # all on one expert, and none
    crowded = [torch.full_like(load[1], e) for e in (3, 64)]
    loads += [(load[0].clone(), ids, load[2].clone()) for ids in crowded]
    replays(lambda: torch.ops.w4tensor.experts(*load, **operands), load, loads)


@pytest.mark.parametrize("tokens", [1, 4, 40, 300])
def test_the_operator_is_exact_on_integers(tokens):
    g = torch.Generator("cuda").manual_seed(tokens)

    def codes(*shape, scale):
        q = torch.randint(7, 10, shape, dtype=torch.uint8, device="cuda", generator=g)
        groups = (*shape[:-1], shape[-1] // 64)
        return Int4Codes(q, torch.full(groups, scale, device="cuda").bfloat16(), None)

    block = Block(6, 64, 192, 64)
    block.codes = codes(6, 192, 64, scale=0.5), codes(6, 64, 192, scale=0.25)
    x = torch.zeros(tokens, 64, device="cuda", dtype=torch.bfloat16)
    x.scatter_(1, torch.randint(0, 64, (tokens, 2), device="cuda", generator=g), 2.0)
    ids = torch.randint(0, 7, (tokens, 3), device="cuda", generator=g)
    weight = torch.randint(0, 3, (tokens, 3), device="cuda", generator=g).float()
    exact = block.expected(x, ids, weight, gate="none", act="none")
    assert torch.equal(exact.bfloat16().float(), exact), "not representable: smaller numbers"
    y = torch.ops.w4tensor.experts(x, ids, weight, **block.operands(gate="none", act="none"))
    assert torch.equal(y.float(), exact)


@pytest.mark.parametrize("act_group_size", ACT_GROUPS)
def test_indexed_weights_on_both_sides_of_each_border(blocks, act_group_size):
    block = blocks["qwen"]
    w, dense = block.tensors(act_group_size)[0], block.codes[0].dequantize()
    g = torch.Generator("cuda").manual_seed(0)

    def plan(rows):
        return plan_gathered(rows, 64, 1024, 2048, 128, arch.current(), act_group_size)

    for rows in borders(plan):
        ids = torch.randint(-64, 64, (rows,), device="cuda", generator=g)
        x = torch.randn(rows, 2048, device="cuda", generator=g).bfloat16()
        x_hat = rounded(x, act_group_size)
        expected = torch.empty(rows, 1024, device="cuda")
        for e in range(64):
            expected[ids % 64 == e] = x_hat[ids % 64 == e] @ dense[e].mT
        with no_sync():
            y = torch.bmm(w[ids], x[..., None])[..., 0]
            again = torch.bmm(x[:, None], w.mT[ids])[:, 0]
        assert y.dtype == x.dtype and torch.equal(y, again)
        assert rel_err(y, expected) < 3e-3


@pytest.mark.parametrize("act_group_size", [None, 32, -1])
def test_indexed_weights_give_zeros_for_ids_out_of_range(blocks, act_group_size):
    w = blocks["qwen"].tensors(act_group_size)[0]
    for rows in (0, 1, 5, 200):
        x = torch.randn(rows, 2048, 1, device="cuda", dtype=torch.bfloat16)
        assert not torch.bmm(w[torch.full((rows,), 64, device="cuda")], x).any()


@pytest.mark.parametrize("act_group_size", [None, 32, -1])
@pytest.mark.parametrize("rows", [1, 8, 400])
def test_indexed_weights_in_a_graph_whose_ids_change(blocks, rows, act_group_size):
    w = blocks["qwen"].tensors(act_group_size)[0]
    x = torch.randn(rows, 2048, 1, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(rows, dtype=torch.int64, device="cuda")
    others = [(torch.randint(0, 64, (rows,), device="cuda"),) for _ in range(4)]
    replays(lambda: torch.bmm(w[ids], x), (ids,), others)


@pytest.mark.parametrize("act_group_size", [None, 32])
def test_the_gradient_through_indexed_weights(blocks, act_group_size):
    block = blocks["qwen"]
    w, dense = block.tensors(act_group_size)[0], block.codes[0].dequantize()
    x = torch.randn(5, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([3, 0, 3, 63, 7], device="cuda")
    grad = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)
    with no_sync():
        torch.bmm(w[ids], x[..., None])[..., 0].backward(grad)
    assert rel_err(x.grad, (grad.float()[:, None] @ dense[ids])[:, 0]) < MOE_REL_ERR_BUDGET


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
        pairs = isinstance(plan.first, FewPlan)
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
    off = "none" if isinstance(plan.first, FewPlan) else False
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
        *([plan_gemv(70, 96, 320, 64, target, "none")] if act_group_size is None else []),
        plan_pairs(1, 320, target),
        *(plan_grouped(70 * m, 70, 320, 64, target, act_group_size) for m in (1, 8, 20, 60, 200)),
    ):
        y = moe.gathered_linear(x, ids, stack, plan)
        assert torch.equal(y, exact.to(y.dtype)), plan


@pytest.mark.parametrize("act_group_size", [None, 32, -1])
@pytest.mark.parametrize("rows", [1, 9, 64, 1000])
def test_grouped_linear_is_grouped_mm(blocks, rows, act_group_size):
    block = blocks["qwen"]
    stack = block.stacks(act_group_size)[0]
    g = torch.Generator("cuda").manual_seed(rows)
    ends = torch.randint(0, rows + 1, (64,), device="cuda", generator=g).sort().values
    x = torch.randn(rows, 2048, device="cuda", generator=g).bfloat16()
    plan = plan_grouped(rows, 64, 2048, 128, arch.current(), act_group_size)
    y = moe.grouped_linear(x, ends.int(), stack, plan)
    expert = torch.searchsorted(ends, torch.arange(rows, device="cuda"), right=True)
    x_hat = rounded(x, act_group_size).double()
    exact = torch.zeros(rows, 1024, device="cuda", dtype=torch.float64)
    for e in expert[expert < 64].unique().tolist():
        at = expert == e
        exact[at] = x_hat[at] @ _one(block.codes[0], e).dequantize(torch.float64).mT
    assert torch.equal(y[expert == 64], torch.zeros_like(y[expert == 64]))
    assert rel_err(y, exact) < 3e-3
