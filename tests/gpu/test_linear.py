"""torch.ops.w4tensor.linear on a CUDA device, against the fp64 oracle, on both sides of borders."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, arch, dispatch, reference
from w4tensor.dispatch import DequantPlan, Problem
from w4tensor.dispatch_gemv import GemvPlan
from w4tensor.dispatch_hopper import HopperPlan

pytestmark = pytest.mark.gpu
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != dispatch.HOPPER,
    reason="needs a Hopper",
)

BUDGET = {torch.bfloat16: 3e-3, torch.float16: 6e-4}
# both sides of every border of dispatch, and odd sizes between
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129)
MANY_TOKENS = (192, 255, 256, 257, 511, 513, 1023, 1025, 2047, 2049, 4097)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every torch.empty starts as NaN (or a large integer), so that an unwritten output shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.requires_grad:
            return out
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(85)

    monkeypatch.setattr(torch, "empty", poisoned)


def codes(n, k, group_size, zero, dtype, seed=0, stack=()):
    g = torch.Generator(device="cuda").manual_seed(seed)
    size = k if group_size == -1 else group_size
    q = torch.randint(0, 16, (*stack, n, k), dtype=torch.uint8, device="cuda", generator=g)
    shape = (*stack, n, k // size)
    scale = (torch.rand(shape, device="cuda", generator=g) + 0.5) / (4 * k**0.5)
    zero_point = None
    if zero == "integer":
        zero_point = torch.randint(0, 16, shape, device="cuda", generator=g).half()
    elif zero == "fractional":
        zero_point = (torch.rand(shape, device="cuda", generator=g) * 15).half()
    return q, scale.to(dtype), zero_point


def rounded_weight(w, dtype):
    """As tiles multiply it: (q - 8) * scale + (8 - zero_point) * scale, which is rounded first."""
    q, scale, zero_point = w.to_codes()
    shift = torch.zeros_like(scale) if zero_point is None else (8 - zero_point.float()) * scale
    size = q.shape[-1] // scale.shape[-1]
    scale, shift = (t.to(dtype).double().repeat_interleave(size, -1) for t in (scale, shift))
    return ((q.double() - 8) * scale + shift).to(dtype)


def oracle(x, w, bias=None):
    y = x.double() @ reference.dequantize(*w.to_codes()).double().mT
    return y if bias is None else y + bias.double()


def rel_err(y, ref):
    return ((y.double() - ref).norm() / ref.norm().clamp(min=1e-30)).item()


def check(m, n, k, group_size, zero, dtype, bias=False, seed=0):
    q, scale, zero_point = codes(n, k, group_size, zero, dtype, seed)
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=group_size)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    y = F.linear(x, w, b)
    assert y.shape == (m, n) and y.dtype == dtype
    ref = oracle(x, w, b)
    # of a few outputs, rounding the answer itself may take more than the budget
    budget = max(BUDGET[dtype], 2 * rel_err(ref.to(dtype), ref))
    error = rel_err(y, ref)
    assert error <= budget, (m, n, k, group_size, zero, dtype, error)
    assert torch.equal(y, F.linear(x, w, b)), "two runs differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("m", TOKENS + MANY_TOKENS)
def test_error_at_every_border(m, dtype):
    check(m, 512, 1024, 128, None, dtype, bias=m % 2 == 0)


# of a long prompt; tiles are chosen up to any number
MOST_TOKENS = 8192


@needs_hopper
@pytest.mark.parametrize(
    "n,k,group_size",
    [(584, 1024, 128), (131, 2880, 32), (264, 1032, -1), (4104, 4096, 128), (77, 1028, -1)],
)
@pytest.mark.parametrize("zero", [None, "fractional"])
def test_both_sides_of_every_border_that_dispatch_draws(n, k, group_size, zero):
    group = k if group_size == -1 else group_size

    def plan(m):
        return dispatch.plan(Problem(m, n, k, group, "bf16", zero is None), arch.current(0))

    tokens = range(2, MOST_TOKENS + 1)
    borders = [m for m in tokens if plan(m) != plan(m - 1)]
    kinds = {type(plan(m)) for m in (1, *borders)}
    served = k % 8 == 0
    assert (
        GemvPlan in kinds
        and (HopperPlan in kinds) is served
        and (DequantPlan in kinds) is not served
    )
    for m in borders:
        check(m - 1, n, k, group_size, zero, torch.bfloat16)
        check(m, n, k, group_size, zero, torch.bfloat16, bias=True)


@pytest.mark.parametrize("zero", [None, "integer", "fractional"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("m", [1, 5, 16, 17, 64, 130, 300, 2100])
def test_groups_and_zero_points(m, group_size, zero):
    for dtype in (torch.bfloat16, torch.float16):
        check(m, 320, 768, group_size, zero, dtype, bias=True)


@pytest.mark.parametrize(
    "n,k,group_size",
    [
        (1, 2048, 128),
        (3, 128, 128),
        (7, 384, 64),
        (65, 2880, 64),
        (129, 2880, 32),
        (256, 100, -1),
        (77, 1000, -1),
        (1000, 176, 16),
        (12352, 2048, 128),
        (5120, 2880, 32),
        (2048, 512, 128),
        (33, 16, 16),
        (4096, 14336, 128),
        (28672, 4096, 128),
    ],
)
@pytest.mark.parametrize("m", [1, 4, 16, 17, 100, 513])
def test_odd_shapes(m, n, k, group_size):
    check(m, n, k, group_size, None, torch.bfloat16)
    check(m, n, k, group_size, "fractional", torch.float16, bias=True)


@pytest.mark.parametrize("m", TOKENS + (256, 1024, 2050))
@pytest.mark.parametrize("zero", [None, "integer"])
def test_exact_on_integers(m, zero):
    n, k = 200, 640
    for group_size, dtype in itertools.product((32, 128), (torch.bfloat16, torch.float16)):
        q, _, zero_point = codes(n, k, group_size, zero, dtype)
        scale = torch.ones(n, k // group_size, device="cuda", dtype=dtype)
        scale[::2] = 0.5
        w = CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=group_size)
        x = torch.zeros(m, k, device="cuda", dtype=dtype)
        # few enough small integers that every sum is representable in the output's dtype
        for row in range(m):
            at = torch.randperm(k, device="cuda")[:3]
            x[row, at] = torch.randint(-2, 3, (3,), device="cuda").to(dtype)
        assert torch.equal(F.linear(x, w).double(), oracle(x, w)), (m, group_size, dtype)


def test_splitting_m_does_not_change_a_row_much_and_rows_are_not_mixed_up():
    q, scale, _ = codes(512, 1024, 128, None, torch.bfloat16)
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, group_size=128)
    x = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16)
    whole = F.linear(x, w)
    for step in (1, 7, 16, 50, 128):
        parts = torch.cat([F.linear(part, w) for part in x.split(step)])
        assert rel_err(parts, whole.double()) <= 3e-3


@pytest.mark.parametrize("m", [1, 9, 40, 300])
def test_bmm_with_stacked_weights(m):
    q, scale, zero_point = codes(96, 384, 128, "fractional", torch.bfloat16, stack=(5,))
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=128)
    x = torch.randn(5, m, 384, device="cuda", dtype=torch.bfloat16)
    ref = x.double() @ reference.dequantize(*w.to_codes()).double().mT
    assert rel_err(torch.bmm(x, w.transpose(-2, -1)), ref) <= 3e-3
    assert rel_err(torch.bmm(w, x.mT).mT, ref) <= 3e-3


@pytest.mark.parametrize("zero", [None, "fractional"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [2, 6, 40, 300, 8200])
def test_fp32_x_beside_scales_of_every_dtype(m, dtype, zero):
    q, scale, zero_point = codes(264, 640, 128, zero, dtype)
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=128)
    x = torch.randn(m, 640, device="cuda")
    y = F.linear(x, w)
    assert y.dtype == torch.float32
    # kernels round x, the scales and their products with codes to bf16
    q, s, z = w.to_codes()
    rounded = reference.dequantize(q, s.bfloat16(), z).bfloat16().double()
    ref = oracle(x, w)
    budget = max(3e-3, 1.1 * rel_err(x.bfloat16().double() @ rounded.mT, ref))
    assert rel_err(y, ref) <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_and_strided_and_empty_x(dtype):
    q, scale, _ = codes(256, 512, 128, None, dtype)
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, group_size=128)
    x = torch.randn(6, 512, device="cuda")
    assert F.linear(x, w).dtype == torch.float32
    assert rel_err(F.linear(x, w), oracle(x, w)) <= 3e-3
    strided = torch.randn(512, 6, device="cuda", dtype=dtype).t()
    assert rel_err(F.linear(strided, w), oracle(strided, w)) <= BUDGET[dtype]
    rows = torch.randn(6, 1024, device="cuda", dtype=dtype)[:, 256:768]
    assert rel_err(F.linear(rows, w), oracle(rows, w)) <= BUDGET[dtype]
    assert F.linear(x[:0].to(dtype), w).shape == (0, 256)


def test_slices_along_n_and_k_run():
    q, scale, zero_point = codes(512, 1024, 128, "integer", torch.bfloat16)
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=128)
    x = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)
    assert rel_err(F.linear(x, w[3:301]), oracle(x, w)[:, 3:301]) <= 3e-3
    part = w[:, 256:768]
    assert rel_err(F.linear(x[:, 256:768], part), oracle(x[:, 256:768], part)) <= 3e-3


@pytest.mark.parametrize("cls", [CudaCoalescedInt4Tensor, Int4ActQuantTensor])
@pytest.mark.parametrize("m", [1, 16, 17, 200, 2500])
def test_cuda_graph_capture_and_replay(m, cls):
    q, scale, _ = codes(512, 1024, 128, None, torch.bfloat16)
    w = cls.from_codes(q, scale, group_size=128)
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    F.linear(x, w)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
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


@pytest.mark.parametrize("cls", [CudaCoalescedInt4Tensor, Int4ActQuantTensor])
def test_two_streams_at_once(cls):
    q, scale, _ = codes(4096, 4096, 128, None, torch.bfloat16)
    w = cls.from_codes(q, scale, group_size=128)
    xs = [torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = [F.linear(x, w) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(F.linear(xs[i], w))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, expected[i]) for y in results[i])


@pytest.mark.parametrize("cls", [CudaCoalescedInt4Tensor, Int4ActQuantTensor])
def test_compiled_with_symbolic_m(cls):
    q, scale, _ = codes(256, 512, 128, None, torch.bfloat16)
    w = cls.from_codes(q, scale, group_size=128)
    compiled = torch.compile(lambda x: F.linear(x, w) * 2, fullgraph=True, dynamic=True)
    for m in (3, 5, 16, 17, 400):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(compiled(x), F.linear(x, w) * 2)


def test_int64_offsets():
    # N * K / 2 bytes pass 2**31
    n, k = 70000, 65536
    scale = torch.full((n, k // 128), 2.0**-6, device="cuda", dtype=torch.bfloat16)
    q = torch.full((n, k), 8, dtype=torch.uint8, device="cuda")
    q[-3:] = 9
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, group_size=128)
    del q
    for m in (1, 32):
        x = torch.ones(m, k, device="cuda", dtype=torch.bfloat16)
        y = F.linear(x, w)
        assert (y[:, -3:] == k * 2.0**-6).all() and (y[:, :-3] == 0).all()
