"""The experts block in Triton's CPU interpreter, in fp16, against its definition in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from w4tensor import moe, reference
from w4tensor.layout import ACT_QUANT, COALESCED, padded_k
from w4tensor.moe import Stack
from w4tensor.plans_experts import (
    ActQuantGroupedPlan,
    ExpertsPlan,
    GroupedPlan,
    PairsPlan,
)
from w4tensor.testing import MOE_REL_ERR_BUDGET, Int4Codes, random_codes, rel_err

PAIRS = PairsPlan(slots=1, slices=2, tiles=1, blocks=1, kwidth=4)
GROUPED = GroupedPlan(block_m=8, block_n=32, scale_after=True, kwidth=4, num_warps=2, num_stages=2)
INT8 = ActQuantGroupedPlan(block_m=8, block_n=32, kwidth=8, num_warps=2, num_stages=2)
PLANS = {
    "pairs": ExpertsPlan(PAIRS, replace(PAIRS, slots=2)),
    "pairs, more slots than top_k": ExpertsPlan(PAIRS, replace(PAIRS, slots=4, slices=1)),
    "pairs, one warp, in steps": ExpertsPlan(*[replace(PAIRS, slices=1, kwidth=2)] * 2),
    "pairs, two blocks a step": ExpertsPlan(*[replace(PAIRS, slices=1, blocks=2, tiles=2)] * 2),
    "grouped": ExpertsPlan(GROUPED, GROUPED),
    "grouped, scale before": ExpertsPlan(
        *[replace(GROUPED, scale_after=False, block_m=16, kwidth=2, num_warps=1)] * 2
    ),
    "grouped, short tiles": ExpertsPlan(*[replace(GROUPED, block_m=16, narrow_m=8)] * 2),
    "grouped, then pairs": ExpertsPlan(GROUPED, replace(PAIRS, slots=2)),
}


def block(x, ids, weight, gate_up, down, gate_up_bias, down_bias, f):
    """The definition: y[t] = sum over j of weight[t, j] * down[e](f(gate_up[e](x[t])))."""
    n_experts, hidden = down.shape[:2]
    y = torch.zeros(len(x), hidden, dtype=torch.float64)
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if not 0 <= e < n_experts:
                continue
            h = gate_up[e] @ x[t].double()
            if gate_up_bias is not None:
                h = h + gate_up_bias[e].double()
            out = down[e] @ f(h)
            if down_bias is not None:
                out = out + down_bias[e].double()
            y[t] += weight[t, j].double() * out
    return y


def swiglu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(h):
    """gpt-oss: rows of gate and up in turn."""
    gate, up = h[..., 0::2].clamp(max=7), h[..., 1::2].clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def gelu_gate(h):
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh_gate(h):
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


ACTIVATIONS = {
    ("halves", "silu"): swiglu,
    ("halves", "gelu"): gelu_gate,
    ("halves", "gelu_tanh"): gelu_tanh_gate,
    ("interleaved", "clamped_swiglu"): clamped_swiglu,
    ("none", "relu2"): lambda h: F.relu(h).square(),
    ("none", "silu"): F.silu,
}


def stack(codes: Int4Codes, bias=None, act_group_size=None) -> Stack:
    qdata = (COALESCED if act_group_size is None else ACT_QUANT).pack(codes.q)
    return Stack(qdata, codes.scale, codes.zero_point, codes.group_size, bias, act_group_size)


def weights(n_experts, hidden, inter, group_size, zero="symmetric", gated=True, seed=0):
    options = dict(dtype=torch.float16, zero_point=zero)
    rows = 2 * inter if gated else inter
    first = hidden if hidden % group_size else group_size
    second = inter if inter % group_size else group_size
    return (
        random_codes(n_experts, rows, hidden, group_size=first, seed=seed, **options),
        random_codes(n_experts, hidden, inter, group_size=second, seed=seed + 1, **options),
    )


def run(x, ids, weight, gate_up, down, plan, gate="halves", act="silu", biases=(None, None)):
    return moe.experts(
        x, ids, weight, stack(gate_up, biases[0]), stack(down, biases[1]), plan, gate, act
    )


def expected(x, ids, weight, gate_up, down, gate="halves", act="silu", biases=(None, None)):
    first, second = gate_up.dequantize(torch.float64), down.dequantize(torch.float64)
    return block(x, ids, weight, first, second, *biases, ACTIVATIONS[gate, act])


def budget(x, ids, weight, gate_up, down, exact) -> float:
    """Twice the error of plain fp16: tiny sizes cancel, and so lose more than a fixed budget."""

    def half(v):
        return v.half().double()

    first, second = (half(c.dequantize(torch.float64)) for c in (gate_up, down))
    rounded = block(x, ids, weight, first, second, None, None, lambda h: half(swiglu(h)))
    return 2 * (rel_err(half(rounded), exact) + 2**-11)


def tokens_of(n_tokens, hidden, n_experts, top_k, seed=0, sentinels=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, hidden, generator=g, dtype=torch.float32).half()
    ids = torch.randint(0, n_experts + sentinels, (n_tokens, top_k), generator=g)
    return x, ids, torch.rand(n_tokens, top_k, generator=g) + 0.1


@pytest.mark.parametrize("zero", ["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("plan", ["pairs", "grouped", "grouped, scale before"])
def test_every_group_size(plan, group_size, zero):
    gate_up, down = weights(3, 256, 24, group_size, zero)
    case = tokens_of(3, 256, 3, 2)
    y = run(*case, gate_up, down, PLANS[plan])
    assert rel_err(y, expected(*case, gate_up, down)) < MOE_REL_ERR_BUDGET / 5


@pytest.mark.parametrize("plan", PLANS)
def test_k_that_neither_blocks_nor_slices_divide(plan):
    # 320 is two and a half blocks: a tail in each step's last block, and slices without any
    gate_up, down = weights(2, 320, 64, 64, "fractional")
    case = tokens_of(1, 320, 2, 3)
    y = run(*case, gate_up, down, PLANS[plan])
    assert rel_err(y, expected(*case, gate_up, down)) < MOE_REL_ERR_BUDGET / 5


@pytest.mark.parametrize("plan", ["pairs", "grouped"])
@pytest.mark.parametrize("gate,act", ACTIVATIONS)
def test_activations_gate_orders_and_biases(plan, gate, act):
    gated = gate != "none"
    gate_up, down = weights(2, 128, 40, 128, gated=gated)
    g = torch.Generator().manual_seed(3)
    biases = (
        torch.randn(2, 80 if gated else 40, generator=g).half(),
        torch.randn(2, 128, generator=g).half(),
    )
    case = tokens_of(3, 128, 2, 2, sentinels=True)
    case = (case[0] * 3, *case[1:])
    y = run(*case, gate_up, down, PLANS[plan], gate, act, biases)
    assert rel_err(y, expected(*case, gate_up, down, gate, act, biases)) < MOE_REL_ERR_BUDGET / 5


@pytest.mark.parametrize("plan", PLANS)
def test_integers_are_exact(plan):
    # a permutation of k, of rows or of slots would show, whatever the tolerance
    g = torch.Generator().manual_seed(5)
    q = torch.randint(7, 10, (3, 48, 256), generator=g, dtype=torch.uint8)
    gate_up = Int4Codes(q, torch.full((3, 48, 2), 0.5, dtype=torch.float16), None)
    q = torch.randint(6, 11, (3, 256, 48), generator=g, dtype=torch.uint8)
    down = Int4Codes(q, torch.full((3, 256, 3), 0.25, dtype=torch.float16), None)
    x = torch.randint(-1, 2, (4, 256), generator=g).half()
    ids = torch.tensor([[0, 2], [1, 1], [3, 0], [2, 3]])
    weight = torch.tensor([[0.5, 1.0], [2.0, 0.5], [1.0, 1.0], [2.0, 0.5]])
    y = run(x, ids, weight, gate_up, down, PLANS[plan], "none", "none")
    first, second = gate_up.dequantize(torch.float64), down.dequantize(torch.float64)
    exact = block(x, ids, weight, first, second, None, None, lambda h: h)
    assert torch.equal(exact.half().double(), exact), "not representable: choose smaller numbers"
    assert torch.equal(y.double(), exact)


@settings(max_examples=12)
@given(st.data())
def test_any_routing_is_the_definition(data):
    n_experts = data.draw(st.integers(1, 5), "E")
    top_k = data.draw(st.integers(1, 5), "top_k")
    n_tokens = data.draw(st.integers(0, 4), "T")
    # any sizes that groups of 16 divide, or none at all
    hidden = data.draw(st.sampled_from([48, 100, 128, 272]), "H")
    inter = data.draw(st.sampled_from([16, 24, 80]), "I")
    crowd = data.draw(st.integers(-1, n_experts), "an expert that most pairs have")
    one = st.one_of(st.integers(-1, n_experts), st.just(crowd), st.just(crowd))
    pairs = n_tokens * top_k
    ids = data.draw(st.lists(one, min_size=pairs, max_size=pairs), "ids")
    plan = data.draw(st.sampled_from(sorted(PLANS)), "plan")
    gate_up, down = weights(n_experts, hidden, inter, 16, "fractional")
    x, _, weight = tokens_of(n_tokens, hidden, n_experts, top_k)
    ids = torch.tensor(ids, dtype=torch.int64).view(n_tokens, top_k)
    y = run(x, ids, weight, gate_up, down, PLANS[plan])
    assert y.shape == (n_tokens, hidden)
    exact = expected(x, ids, weight, gate_up, down)
    assert rel_err(y, exact) < budget(x, ids, weight, gate_up, down, exact)


@pytest.mark.parametrize("plan", ["pairs", "grouped", "grouped, then pairs"])
def test_an_activation_of_the_modules_own(plan):
    gate_up, down = weights(3, 128, 32, 32)
    case = tokens_of(3, 128, 3, 2)
    h, routing = moe.first_product(*case, stack(gate_up), PLANS[plan])
    assert h.shape == (6, 64)
    y = moe.second_product(swiglu(h.float()).half(), routing, stack(down), PLANS[plan])
    assert rel_err(y, expected(*case, gate_up, down)) < MOE_REL_ERR_BUDGET / 5


def test_grouped_linear_is_grouped_mm_and_zero_behind_the_last_expert():
    codes, _ = weights(4, 192, 20, 64)
    offs = torch.tensor([3, 3, 12, 13], dtype=torch.int32)
    x = torch.randn(16, 192, generator=torch.manual_seed(0)).half()
    y = moe.grouped_linear(x, offs, stack(codes), GROUPED)
    w = codes.dequantize(torch.float64)
    exact = torch.zeros(16, 40, dtype=torch.float64)
    for e, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 12), slice(12, 13))):
        exact[rows] = x[rows].double() @ w[e].T
    assert torch.equal(y[13:], torch.zeros(3, 40, dtype=torch.float16))
    assert rel_err(y, exact) < MOE_REL_ERR_BUDGET / 5


@pytest.mark.parametrize("plan", [PAIRS, GROUPED])
def test_gathered_linear_is_bmm_of_indexed_weights(plan):
    codes, _ = weights(4, 192, 20, 64)
    ids = torch.tensor([2, 0, 2, 4, 3])
    x = torch.randn(5, 192, generator=torch.manual_seed(0)).half()
    y = moe.gathered_linear(x, ids, stack(codes), plan)
    w = torch.cat([codes.dequantize(torch.float64), torch.zeros(1, 40, 192)])
    assert torch.equal(y[3], torch.zeros(40, dtype=torch.float16))
    assert rel_err(y, torch.bmm(w[ids], x.double()[..., None])[..., 0]) < MOE_REL_ERR_BUDGET / 5


@pytest.mark.parametrize("plan", ["pairs", "grouped"])
def test_weights_that_are_a_slice_of_larger_ones(plan):
    gate_up, down = weights(5, 128, 32, 32)
    sliced = [
        Stack(t.qdata[1:4], t.scale[1:4], None, t.group_size) for t in map(stack, (gate_up, down))
    ]
    # half the rows of down, as a model split over two devices has them
    sliced[1] = sliced[1]._replace(qdata=sliced[1].qdata[:, 64:], scale=sliced[1].scale[:, 64:])
    case = tokens_of(3, 128, 3, 2)
    y = moe.experts(*case, *sliced, PLANS[plan])
    gate_up = Int4Codes(gate_up.q[1:4], gate_up.scale[1:4], None)
    down = Int4Codes(down.q[1:4, 64:], down.scale[1:4, 64:], None)
    assert rel_err(y, expected(*case, gate_up, down)) < MOE_REL_ERR_BUDGET / 5


def rounded(x: torch.Tensor, act_group_size: int) -> torch.Tensor:
    """What int8 codes of x mean."""
    codes, scale = reference.quantize_activation(x.float(), act_group_size)
    group = x.shape[-1] if act_group_size == -1 else act_group_size
    return codes.double() * scale.repeat_interleave(group, -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("zero", ["symmetric", "fractional"])
@pytest.mark.parametrize(
    "group_size,act_group_size",
    [
        (128, 32),
        (128, 128),
        (128, -1),
        (32, 32),
        (16, 64),
        (64, 128),
        (256, 32),
        (320, -1),
        (320, 32),
    ],
)
def test_int8_activations(group_size, act_group_size, zero):
    # 320 and 48 end within a block; a group of 320 is a whole row
    hidden = 256 if 320 % group_size else 320
    codes, _ = weights(3, hidden, 24, group_size, zero)
    x, ids, _ = tokens_of(5, hidden, 3, 2, sentinels=True)
    bias = torch.randn(3, 48, generator=torch.manual_seed(1)).half()
    pairs = ids.flatten()
    for plan in (INT8, replace(INT8, kwidth=4, block_n=16, num_warps=1, block_m=16, narrow_m=8)):
        rows = x.repeat_interleave(2, 0)
        y = moe.gathered_linear(rows, pairs, stack(codes, bias, act_group_size), plan)
        w = torch.cat([codes.dequantize(torch.float64), torch.zeros(1, 48, hidden)])
        exact = torch.bmm(w[pairs], rounded(rows, act_group_size)[..., None])[..., 0]
        exact += torch.cat([bias, torch.zeros(1, 48)])[pairs]
        assert rel_err(y, exact) < MOE_REL_ERR_BUDGET / 5


def test_int8_rows_that_are_one_sum():
    # one scale a row and one a token: the matrix unit adds all of K in int32
    codes = random_codes(3, 48, 320, group_size=320, dtype=torch.float16, zero_point="fractional")
    offs = torch.tensor([3, 3, 7], dtype=torch.int32)
    x = torch.randn(9, 320, generator=torch.manual_seed(0)).half()
    y = moe.grouped_linear(x, offs, stack(codes, act_group_size=-1), INT8)
    w, x_hat = codes.dequantize(torch.float64), rounded(x, -1)
    exact = torch.cat([x_hat[:3] @ w[0].T, x_hat[3:7] @ w[2].T, torch.zeros(2, 48)])
    assert rel_err(y, exact) < MOE_REL_ERR_BUDGET / 5


INT8_PLANS = {
    "int8": ExpertsPlan(INT8, INT8),
    "pairs": PLANS["pairs"],
    "grouped": PLANS["grouped"],
    "int8, then pairs": ExpertsPlan(INT8, replace(PAIRS, slots=2)),
}


@pytest.mark.parametrize("plan", INT8_PLANS)
@pytest.mark.parametrize("act_group_size", [32, -1])
def test_int8_block(act_group_size, plan):
    gate_up, down = weights(3, 256, 64, 128)
    x, ids, weight = tokens_of(4, 256, 3, 2, sentinels=True)
    stacks = (stack(gate_up, None, act_group_size), stack(down, None, act_group_size))
    y = moe.experts(x, ids, weight, *stacks, INT8_PLANS[plan])
    first, second = gate_up.dequantize(torch.float64), down.dequantize(torch.float64)

    def activation(h):
        # what the first product stores, then what the second one reads of it
        return rounded(swiglu(h).half()[None], act_group_size)[0]

    exact = block(rounded(x, act_group_size), ids, weight, first, second, None, None, activation)
    # a code may differ where h is rounded otherwise; unrounded x or h is off by twice that
    assert rel_err(y, exact) < MOE_REL_ERR_BUDGET


def in_order(x, act_group_size, silu_mul=False, word_order=False, pdl=False, overlap=True):
    """What round_activation would give, were it not to round."""
    if not word_order:
        return x
    k = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, padded_k(k) - k))
    # [.., block, t, q', i, r, p] -> [.., block, i, p, q', t, r], as kernels/unpack_act_quant.py
    blocks = padded.unflatten(-1, (-1, 4, 2, 4, 2, 2))
    lead = tuple(range(x.ndim))
    return blocks.permute(*lead, *(x.ndim + d for d in (2, 4, 1, 0, 3))).reshape(padded.shape)


@pytest.mark.parametrize("group_size", [16, 64, 256])
@pytest.mark.parametrize("kwidth", [2, 4])
@pytest.mark.parametrize("kind", [PAIRS, GROUPED])
def test_16_bit_activations_with_the_bytes_for_int8(kind, kwidth, group_size, monkeypatch):
    # the kernels alone: x and h are put in order, not rounded
    monkeypatch.setattr(moe, "round_activation", in_order)
    gate_up, down = weights(3, 256, 24, group_size, "fractional")
    case = tokens_of(2, 256, 3, 2)
    plan = ExpertsPlan(*[replace(kind, kwidth=kwidth)] * 2)
    stacks = (stack(codes, None, 32) for codes in (gate_up, down))
    y = moe.experts(*case, *stacks, plan)
    assert rel_err(y, expected(*case, gate_up, down)) < MOE_REL_ERR_BUDGET / 5
