"""Int4ActQuantTensor on a CUDA device, against its definition in fp64, on both sides of borders."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from w4tensor import Int4ActQuantTensor, arch, dispatch, reference
from w4tensor.dispatch_act_quant import ActQuantHopperPlan
from w4tensor.summary import problem_of

from .test_linear import (  # noqa: F401
    MANY_TOKENS,
    TOKENS,
    _poison,
    codes,
    rel_err,
    rounded_weight,
)

pytestmark = pytest.mark.gpu


def definition(x, w, bias=None, rounded=False):
    """The product that the type promises, in fp64 on the int8 codes of x.

    `rounded`: of operands in x's dtype, as dispatch_act_quant.ActQuantHopperPlan multiplies them.
    """
    x_q, x_scale = reference.quantize_activation(x, w.act_group_size)
    k = x.shape[-1]
    group = k if w.act_group_size == -1 else w.act_group_size
    x_hat = x_q.double() * x_scale.double().repeat_interleave(group, -1)[..., :k]
    w_hat = reference.dequantize(*w.to_codes()).double()
    if rounded:
        x_hat, w_hat = x_hat.to(x.dtype).double(), rounded_weight(w, x.dtype).double()
    y = x_hat @ w_hat.mT
    return y if bias is None else y + bias.double()


def check(m, n, k, group_size, act_group_size, zero, dtype=torch.bfloat16, bias=False):
    q, scale, zero_point = codes(n, k, group_size, zero, dtype)
    w = Int4ActQuantTensor.from_codes(
        q, scale, zero_point, group_size=group_size, act_group_size=act_group_size
    )
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    y = F.linear(x, w, b)
    assert y.shape == (m, n) and y.dtype == dtype
    # only the rounding of the output, and fp32 sums, may differ from the definition
    budget = {torch.bfloat16: 3e-3, torch.float16: 6e-4}[dtype]
    if y.numel() < 64:
        # rounding errors of so few numbers need not average out
        budget = max(budget, torch.finfo(dtype).eps / 2)
    expected = definition(x, w, b)
    rounds = isinstance(dispatch.plan(problem_of(w, m), arch.current(0)), ActQuantHopperPlan)
    if rounds:
        # nor those of the operands, which this kernel rounds: the root mean square of so many is
        # known to one in sqrt(2 numel)
        spread = 1 + 3 / (2 * y.numel()) ** 0.5
        rounded = rel_err(definition(x, w, b, rounded=True).to(dtype), expected)
        budget = max(budget, spread * rounded)
    error = rel_err(y, expected)
    assert error <= budget, (m, n, k, group_size, act_group_size, zero, error)
    assert torch.equal(y, F.linear(x, w, b)), "two runs differ"


@pytest.mark.parametrize("m", TOKENS + MANY_TOKENS)
def test_definition_at_every_border(m):
    check(m, 512, 1024, 128, 32, None, torch.float16)
    check(m, 512, 1024, 128, 128, None)


@pytest.mark.parametrize("zero", [None, "integer", "fractional"])
@pytest.mark.parametrize("act_group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("m", [1, 5, 16, 33, 130, 1100])
def test_every_pair_of_groups(m, group_size, act_group_size, zero):
    check(m, 320, 768, group_size, act_group_size, zero, torch.float16, bias=True)


@pytest.mark.parametrize("act_group_size", [32, -1])
@pytest.mark.parametrize(
    "n,k,group_size",
    [(1, 2048, 128), (3, 128, 128), (65, 2880, 64), (256, 100, -1), (77, 1000, -1), (33, 16, 16)],
)
@pytest.mark.parametrize("m", [1, 4, 16, 17, 100, 513])
def test_odd_shapes(m, n, k, group_size, act_group_size):
    check(m, n, k, group_size, act_group_size, "fractional")


@pytest.mark.parametrize("m", [1, 3, 16, 17, 64, 200, 1024])
def test_exact_on_integers(m):
    n, k = 200, 640
    q, _, _ = codes(n, k, 128, None, torch.bfloat16)
    scale = torch.ones(n, k // 128, device="cuda", dtype=torch.bfloat16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    # each act group holds +-127, so its scale is exactly 1 and its codes are x
    x = torch.zeros(m, k, device="cuda")
    x[:, ::32] = 127
    x[:, 1::32] = torch.randint(-127, 128, x[:, 1::32].shape, device="cuda").float()
    w_int = (q.int() - 8).double()
    assert torch.equal(F.linear(x, w).double(), x.double() @ w_int.mT)


@pytest.mark.parametrize("act_group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("k", [32, 100, 640, 2880, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activation_codes_are_the_definition_bit_for_bit(act_group_size, k, dtype):
    x = torch.randn(37, k, device="cuda", dtype=dtype)
    x[3] = 0
    x[4, : k // 2] = 0
    x[5, 7] = float("nan")
    x[6, 9] = float("inf")
    got = torch.ops.w4tensor.quantize_activation(x, act_group_size)
    want = reference.quantize_activation(x, act_group_size)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(
            a.nan_to_num(nan=-1) if a.is_floating_point() else a,
            b.nan_to_num(nan=-1) if b.is_floating_point() else b,
        )


@pytest.mark.parametrize("act_group_size", [32, -1])
@pytest.mark.parametrize("largest", [1e-42, 1e-38, 1e-30, 2.0**-60, 1.0, 1e30, 3e38])
def test_codes_next_to_borders_of_rounding_and_of_the_range(largest, act_group_size):
    halves = torch.randint(-127, 127, (64, 1024), device="cuda") + 0.5
    largest = largest * (1 - torch.rand(64, 1, device="cuda") / 2)
    x = (halves / 127 * largest.double()).float()
    # the float that is nearest to a border, and those beside it
    bits = x.view(torch.int32)
    bits += torch.randint(-1, 2, x.shape, device="cuda", dtype=torch.int32)
    x[:, ::32] = largest
    assert x.isfinite().all()
    codes, scale = torch.ops.w4tensor.quantize_activation(x, act_group_size)
    want = reference.quantize_activation(x, act_group_size)
    assert torch.equal(codes, want[0]) and torch.equal(scale, want[1])


@pytest.mark.parametrize("m", [2, 20, 300])
def test_nan_stays_in_its_token(m):
    q, scale, _ = codes(128, 512, 128, None, torch.bfloat16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    x[1, 100] = float("nan")
    y = F.linear(x, w)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_signal_to_noise_on_gaussian_inputs():
    q, scale, _ = codes(4096, 4096, 128, None, torch.bfloat16)
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    for m in (1, 16, 64, 1024):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        ref = x.double() @ reference.dequantize(*w.to_codes()).double().mT
        decibels = -20 * torch.log10(torch.tensor(rel_err(F.linear(x, w), ref))).item()
        assert decibels >= 38, (m, decibels)


# scales finer than 128 k on kernels/gemm_hopper.py: around its tiles of tokens
FINE_TOKENS = (17, 63, 64, 65, 127, 128, 129, 300)


def fine(n, k, group_size, zero, dtype, act_group_size=32, ones=False):
    """A weight that Hopper serves with rounded x; `ones`: its scales are 1 and 1/2."""
    q, scale, zero_point = codes(n, k, group_size, zero, dtype)
    if ones:
        scale = torch.ones_like(scale)
        scale[::2] = 0.5
    w = Int4ActQuantTensor.from_codes(
        q, scale, zero_point, group_size=group_size, act_group_size=act_group_size
    )
    target = arch.current()
    assert target is not None
    if target.capability[0] == dispatch.HOPPER:
        for m in (FINE_TOKENS[0], FINE_TOKENS[-1]):
            assert isinstance(dispatch.plan(problem_of(w, m), target), ActQuantHopperPlan)
    return w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("zero", [None, "integer", "fractional"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("m", FINE_TOKENS)
def test_fine_scales(m, group_size, zero, dtype):
    # rows that descriptors store and rows that they cannot; K of whole blocks and of a part
    for n, blocks in ((256, 8), (257, 8), (101, 9)):
        k = blocks * group_size if group_size < 128 else 128 * blocks
        fine(n, k, group_size, zero, dtype)
        check(m, n, k, group_size, 32, zero, dtype, bias=n % 2 == 0)


@pytest.mark.parametrize("k,group_size", [(32, 32), (96, 32), (608, 32), (2880, 64), (328, 328)])
@pytest.mark.parametrize("m", FINE_TOKENS)
def test_fine_scales_of_rows_that_blocks_do_not_divide(m, k, group_size):
    for n, act_group_size, dtype in itertools.product(
        (104, 333), (32, 64), (torch.bfloat16, torch.float16)
    ):
        fine(n, k, group_size, "fractional", dtype, act_group_size)
        check(m, n, k, group_size, act_group_size, "fractional", dtype, bias=True)
        check(m, n, k, group_size, act_group_size, None, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("zero", [None, "integer"])
@pytest.mark.parametrize("k,group_size", [(640, 32), (672, 32), (704, 64), (640, 128)])
@pytest.mark.parametrize("m", FINE_TOKENS)
def test_fine_scales_are_exact_on_integers(m, k, group_size, zero, dtype):
    for n in (200, 203):
        w = fine(n, k, group_size, zero, dtype, ones=True)
        # 64 rounds to itself: its code 127 times 64 / 127; three of them and any q - zero are
        # representable in the output's dtype
        x = torch.zeros(m, k, device="cuda", dtype=dtype)
        for row in range(m):
            at = torch.randperm(k, device="cuda")[:3]
            x[row, at] = 64.0 * (2 * torch.randint(0, 2, (3,), device="cuda") - 1).to(dtype)
        want = x.double() @ reference.dequantize(*w.to_codes()).double().mT
        assert torch.equal(F.linear(x, w).double(), want), (m, n, k, group_size)
        # into fp32, which is bf16 on the way: beside scales of fp16 too
        assert torch.equal(F.linear(x.float(), w).double(), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("m", FINE_TOKENS)
def test_with_fine_scales_too_nan_stays_in_its_token(m, dtype, bad):
    for k, column in ((512, 100), (544, 543)):
        w = fine(200, k, 32, "integer", dtype)
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        x[m // 2, column] = bad
        y = F.linear(x, w)
        rest = torch.arange(m, device="cuda") != m // 2
        assert y[m // 2].isnan().all() and y[rest].isfinite().all()


@pytest.mark.parametrize("m", FINE_TOKENS)
def test_fine_scales_in_a_graph(m):
    w = fine(512, 1056, 32, "fractional", torch.bfloat16)
    x = torch.randn(m, 1056, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        F.linear(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.linear(x, w)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, F.linear(x, w))


@pytest.mark.parametrize("m", [17, 64, 128])
def test_fine_scales_back_to_back(m):
    """The product starts before x is rounded, in memory that the call before has just read."""
    w = fine(4096, 4096, 32, None, torch.bfloat16)
    xs = [torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    expected = []
    for x in xs:
        expected.append(F.linear(x, w))
        torch.cuda.synchronize()
    results = [F.linear(x, w) for _ in range(10) for x in xs]
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 8]), i


def test_fine_scales_with_a_stack_of_one():
    q, scale, _ = codes(200, 512, 32, None, torch.bfloat16, stack=(1,))
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=32, act_group_size=32)
    x = torch.randn(1, 70, 512, device="cuda", dtype=torch.bfloat16)
    y = torch.bmm(x, w.transpose(-2, -1))
    assert rel_err(y, definition(x, w)) <= 3e-3
    assert torch.equal(y[0], F.linear(x[0], w[0]))
