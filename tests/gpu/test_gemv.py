"""kernels/gemv.py on a CUDA device: tiles against the fp64 oracle and, exactly, on integers."""

from __future__ import annotations

import itertools

import pytest
import torch

from w4tensor import arch, dispatch
from w4tensor.dispatch_gemv import WARP_K, GemvPlan, plan_gemv
from w4tensor.kernels.gemv import gemv
from w4tensor.layout import COALESCED
from w4tensor.testing import REL_ERR_BUDGET, Int4Codes, random_codes, rel_err

pytestmark = pytest.mark.gpu
# the assembler takes minutes for 16 rows with zero points, which dispatch never asks for
PLANS = [GemvPlan(rows, warps) for rows, warps in itertools.product((1, 4, 8), (1, 2, 4, 8))]
PLANS += [GemvPlan(8, warps, ahead=True) for warps in (1, 2, 4, 8)]


def _pdl() -> str:
    return "second" if torch.cuda.get_device_capability()[0] >= dispatch.HOPPER else "none"


def run(x, codes: Int4Codes, plan: GemvPlan, bias=None):
    """Two runs that agree to the bit, into memory that is NaN before and past the end after."""
    items, n = len(x), codes.q.shape[-2]
    memory = torch.full((2, items * n + 64), torch.nan, device="cuda", dtype=x.dtype)
    weight = COALESCED.pack(codes.q), codes.scale, codes.zero_point
    for y in memory:
        gemv(x, *weight, bias, y[: items * n].view(items, n), codes.group_size, plan)
    # NaN is not equal to itself, but its bits are
    bits = memory.view(torch.int16)[:, : items * n]
    assert torch.equal(bits[0], bits[1]), "two runs differ"
    assert memory[:, items * n :].isnan().all(), "written past the end"
    return memory[0, : items * n].view(items, n)


def product(x, codes: Int4Codes):
    """fp64, of x [E * M, K] and codes [E, N, K] or [N, K]."""
    w = codes.dequantize(torch.float64)
    e = w.shape[0] if w.ndim == 3 else 1
    return (x.double().view(e, -1, x.shape[1]) @ w.mT).view(len(x), -1)


@pytest.mark.parametrize("zero", ["symmetric", "fractional"])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name}{'+' * plan.ahead}")
def test_every_tile(plan, group_size, zero):
    check(plan, group_size, zero)


@pytest.mark.parametrize("zero", ["symmetric", "integer", "fractional"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_every_group_size(group_size, zero):
    check(GemvPlan(8, 2, ahead=True), group_size, zero)


def check(plan, group_size, zero):
    for dtype, n, k in ((torch.bfloat16, 37, 2048), (torch.float16, 64, 5376)):
        codes = random_codes(
            n, k, group_size=group_size, zero_point=zero, dtype=dtype, device="cuda"
        )
        x = torch.randn(3, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype)
        ref = product(x, codes) + bias.double()
        assert rel_err(run(x, codes, plan, bias), ref) <= REL_ERR_BUDGET[dtype]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("k", [2, 126, 1120, 2880, 4096, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integers_are_exact(dtype, k, group_size, zero):
    if group_size != -1 and k % group_size:
        pytest.skip("groups do not divide K")
    g = torch.Generator("cuda").manual_seed(k)
    groups = 1 if group_size == -1 else k // group_size

    def some(low, high, *shape):
        return torch.randint(low, high, shape, device="cuda", generator=g)

    # few weights that are not zero, so that sums stay integers of 8 bits
    q = torch.where(some(0, k, 40, k) < 20, some(0, 16, 40, k), 8).to(torch.uint8)
    scale = (2.0 ** some(-1, 2, 40, groups)).to(dtype)
    zero_point = torch.full((40, groups), 8.0, device="cuda").half() if zero else None
    codes = Int4Codes(q, scale, zero_point)
    x = some(-2, 3, 2, k).to(dtype)
    ref = product(x, codes)
    for plan in (plan_gemv(2, 40, k, codes.group_size, arch.current()), GemvPlan(8, 4, True)):
        assert torch.equal(run(x, codes, plan), ref.to(dtype))


@pytest.mark.parametrize("e,m", [(1, 4), (3, 1), (5, 3)])
def test_stacks(e, m):
    codes = random_codes(e, 72, 1024, device="cuda")
    x = torch.randn(e * m, 1024, device="cuda", dtype=torch.bfloat16)
    y = run(x, codes, plan_gemv(e * m, 72, 1024, 128, arch.current()))
    assert rel_err(y, product(x, codes)) <= REL_ERR_BUDGET[torch.bfloat16]


@pytest.mark.parametrize("n,k", [(4096, 4096), (28672, 4096), (1000, 14336), (256, 2048)])
@pytest.mark.parametrize("group_size", [32, 128])
def test_the_plans_of_models_in_chains_and_graphs(n, k, group_size):
    there = random_codes(n, k, group_size=group_size, device="cuda")
    back = random_codes(k, n, group_size=-1, device="cuda", seed=1)
    weights = [(COALESCED.pack(c.q), c.scale, None) for c in (there, back)]
    plans = [plan_gemv(1, *size, group_size, arch.current()) for size in ((n, k), (k, n))]
    assert all(plan.pdl == _pdl() for plan in plans)
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    h = torch.empty(1, n, device="cuda", dtype=torch.bfloat16)

    def chain(pause: bool):
        # each reads what the one ahead writes, and writes what that one reads
        x.copy_(first)
        for _ in range(4):
            for weight, plan, a, b, c in zip(
                weights, plans, (x, h), (h, x), (there, back), strict=True
            ):
                gemv(a, *weight, None, b, c.group_size, plan)
                if pause:
                    torch.cuda.synchronize()

    first = x.clone()
    chain(pause=True)
    expected = x.clone()
    assert expected.isfinite().all() and expected.any()
    for _ in range(10):
        chain(pause=False)
        assert torch.equal(x, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(pause=False)
    for _ in range(10):
        h.fill_(torch.nan)
        graph.replay()
        assert torch.equal(x, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [0, 1, 8, 17, 1023, 1500])
def test_what_is_not_finite_gives_nan_for_that_row_alone(at, dtype, bad):
    codes = random_codes(16, 2 * WARP_K, dtype=dtype, device="cuda")
    x = torch.ones(3, 2 * WARP_K, device="cuda", dtype=dtype)
    x[1, at] = bad
    y = run(x, codes, GemvPlan(8, 2))
    assert y[1].isnan().all() and y[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_all_sizes(dtype):
    # the largest of a block decides how the others are rounded, not those of other blocks
    k = 2048
    q = torch.full((k // 128, k), 8, dtype=torch.uint8, device="cuda")
    x = torch.zeros(1, k, device="cuda", dtype=torch.float64)
    for i in range(k // 128):
        q[i, 128 * i + 3 * i] = 9 + i % 7
        x[0, 128 * i + 3 * i] = (-1.5) ** (i + 1) * 2.0 ** (i - 10)
    codes = Int4Codes(q, torch.ones(k // 128, k // 128, device="cuda", dtype=dtype), None)
    x = x.to(dtype)
    assert torch.equal(run(x, codes, GemvPlan(8, 1)), product(x, codes).to(dtype))
