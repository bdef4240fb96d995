"""kernels/gemv.py with int8 activations on a CUDA device: the definition, its codes to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from w4tensor import Int4ActQuantTensor, arch, dispatch, reference
from w4tensor.dispatch_gemv import GemvPlan, plan_gemv
from w4tensor.kernels.gemv import gemv
from w4tensor.layout import ACT_QUANT
from w4tensor.summary import problem_of
from w4tensor.testing import Int4Codes, random_codes, rel_err

pytestmark = pytest.mark.gpu
PLANS = [GemvPlan(8, warps, ahead) for warps in (1, 2, 4) for ahead in (False, True)]
PLANS += [GemvPlan(1, 1), GemvPlan(4, 8)]


def run(x, codes: Int4Codes, act_group_size, plan, bias=None):
    """fp32 y: two runs alike to the bit, into memory that is NaN before, and past the end after."""
    items, n = len(x), codes.q.shape[-2]
    memory = torch.full((2, items * n + 64), torch.nan, device="cuda")
    weight = ACT_QUANT.pack(codes.q), codes.scale, codes.zero_point
    for y in memory:
        out = y[: items * n].view(items, n)
        gemv(x, *weight, bias, out, codes.group_size, plan, act_group_size=act_group_size)
    bits = memory.view(torch.int32)[:, : items * n]
    assert torch.equal(bits[0], bits[1]), "two runs differ"
    assert memory[:, items * n :].isnan().all(), "written past the end"
    return memory[0, : items * n].view(items, n)


def rounded(x, act_group_size):
    """What the codes of x mean, in fp64."""
    codes, scale = reference.quantize_activation(x, act_group_size)
    scale = scale.double().repeat_interleave(act_group_size, -1)
    return codes.double() * scale[..., : x.shape[-1]]


@pytest.mark.parametrize("zero", ["symmetric", "fractional"])
@pytest.mark.parametrize("act_group_size", [32, 128])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name}{'+' * plan.ahead}")
def test_every_tile(plan, act_group_size, zero):
    for n, k in ((37, 2048), (64, 5376)):
        check(n, k, 128, act_group_size, zero, torch.bfloat16, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 256, -1])
@pytest.mark.parametrize("act_group_size", [32, 64, 128])
def test_every_pair_of_groups(act_group_size, group_size, dtype):
    zero = "integer" if group_size == 64 else "symmetric"
    check(40, 2048, group_size, act_group_size, zero, dtype, GemvPlan(8, 2, ahead=True))


@pytest.mark.parametrize("k,group_size", [(8, -1), (1120, 32), (2880, 64), (1000, -1)])
def test_a_k_that_blocks_do_not_divide(k, group_size):
    check(24, k, group_size, 32, "fractional", torch.bfloat16, GemvPlan(8, 2, ahead=True))


def check(n, k, group_size, act_group_size, zero, dtype, plan):
    options = dict(group_size=group_size, zero_point=zero, device="cuda")
    codes = random_codes(n, k, **options)
    x = torch.randn(3, k, device="cuda", dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    ref = rounded(x, act_group_size) @ codes.dequantize(torch.float64).mT + bias.double()
    # sums in fp32
    assert rel_err(run(x, codes, act_group_size, plan, bias), ref) <= 2e-6


def selected(x, act_group_size):
    """What the kernel rounds each number of x [rows, K] to: weights that take one k each."""
    k = x.shape[1]
    q = torch.full((k, k), 8, dtype=torch.uint8, device="cuda").fill_diagonal_(9)
    codes = Int4Codes(q, torch.ones(k, 1, device="cuda"), None)
    return run(x, codes, act_group_size, GemvPlan(8, 1))


@pytest.mark.parametrize("act_group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_the_definition_bit_for_bit(dtype, act_group_size):
    g = torch.Generator("cuda").manual_seed(0)
    some = dict(device="cuda", generator=g)
    # sums are in sixteenths: beyond 2**123 they would be infinite
    powers = (-24, 12) if dtype == torch.float16 else (-145, 119)
    sizes = 2.0 ** torch.randint(*powers, (200, 8, 1), **some)
    x = torch.randn(200, 8, 32, **some) * sizes
    x[::3] = (torch.randint(-127, 127, (67, 8, 32), **some) + 0.5) / 128 * sizes[::3]
    x = x.view(200, 256).to(dtype)
    assert torch.equal(selected(x, act_group_size), rounded(x, act_group_size).float())


@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_codes_for_every_largest_number(dtype, bits):
    # each significand as the largest of a group whose other numbers have as many bits
    steps = 1 << (bits - 1)
    largest = 1 + torch.arange(steps, device="cuda") / steps
    others = torch.rand(steps, 63, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    x = torch.cat([largest[:, None], largest[:, None] * others], 1).to(dtype)
    x = x.view(-1, 256)
    assert torch.equal(selected(x, 64), rounded(x, 64).float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1, 31, 32, 1023, 1500])
def test_what_is_not_finite_gives_nan_for_that_row_alone(at, bad):
    x = torch.ones(3, 2048, device="cuda", dtype=torch.bfloat16)
    x[1, at] = bad
    y = run(x, random_codes(16, 2048, device="cuda"), 32, GemvPlan(8, 2))
    assert y[1].isnan().all() and y[::2].isfinite().all()


@pytest.mark.parametrize("n,k", [(4096, 4096), (28672, 4096), (1000, 14336)])
@pytest.mark.parametrize("act_group_size", [32, 128])
def test_layers_in_chains_and_graphs(n, k, act_group_size):
    weights = []
    for i, shape in enumerate(((n, k), (k, n))):
        group_size = -1 if shape[1] % 128 else 128
        codes = random_codes(*shape, group_size=group_size, device="cuda", seed=i)
        sizes = dict(group_size=codes.group_size, act_group_size=act_group_size)
        weights.append(Int4ActQuantTensor.from_codes(codes.q, codes.scale, None, **sizes))
    target = arch.current(0)
    assert all(isinstance(dispatch.plan(problem_of(w, 1), target), GemvPlan) for w in weights)
    first = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)

    def chain(pause: bool):
        # each reads what the one ahead writes
        x = first
        for _ in range(4):
            for weight in weights:
                x = F.linear(x, weight)
                if pause:
                    torch.cuda.synchronize()
        return x

    expected = chain(pause=True)
    assert expected.isfinite().all() and expected.any()
    for _ in range(10):
        assert torch.equal(chain(pause=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(pause=False)
    for _ in range(10):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


def test_the_plan_is_that_of_the_definition_on_both_sides_of_the_border():
    # 1000 has no whole 16 bytes for every row; a scale a token needs a launch of its own
    for k, act_group_size in ((1000, 32), (1004, 32), (1024, -1)):
        codes = random_codes(64, k, group_size=-1, device="cuda")
        sizes = dict(group_size=-1, act_group_size=act_group_size)
        w = Int4ActQuantTensor.from_codes(codes.q, codes.scale, None, **sizes)
        served = isinstance(dispatch.plan(problem_of(w, 1), arch.current(0)), GemvPlan)
        assert served == (k % 8 == 0 and act_group_size != -1)
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        group = k if act_group_size == -1 else act_group_size
        ref = rounded(x, group) @ codes.dequantize(torch.float64).mT
        assert rel_err(F.linear(x, w), ref) <= 3e-3
        # rows of x that begin between multiples of 16 bytes
        memory = torch.zeros(k + 1, device="cuda", dtype=torch.bfloat16)
        memory[1:] = x[0]
        assert torch.equal(F.linear(memory[1:][None], w), F.linear(x, w))


def test_plans_do_without_ahead_where_zero_points_take_the_registers():
    target = arch.current(0)
    plans = [plan_gemv(1, 8192, 8192, 128, target, symmetric=s) for s in (True, False)]
    assert [plan.ahead for plan in plans] == [True, False]
