"""kernels/gemm_hopper.py, which no interpreter runs, against the oracle and its plain Triton twin.

Every tile with every number of slices; the weights differ in all that compiles apart. Outputs and
partial sums are NaN beforehand (test_linear.py), but where old memory is the point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional as F

from tests.gpu.test_linear import (  # noqa: F401
    _poison,
    codes,
    needs_hopper,
    oracle,
    rel_err,
)
from w4tensor import CudaCoalescedInt4Tensor, launch
from w4tensor.dispatch import GemmPlan
from w4tensor.dispatch_hopper import TILES, HopperPlan, HopperTile
from w4tensor.kernels.hopper_memory import aligned_rows
from w4tensor.testing import REL_ERR_BUDGET

pytestmark = [pytest.mark.gpu, needs_hopper]

EMPTY = torch.empty
SPLITS = (1, 2, 3, 8)
BY_SHAPE = {(tile.block_m, tile.block_n): tile for tile in reversed(TILES)}
# of few tokens, of warps with 32 rows, of two runs of tokens, of eight warps, and not pipelined
SEVERAL = tuple(BY_SHAPE[shape] for shape in ((16, 64), (64, 128), (96, 64), (128, 128)))
SEVERAL += (next(tile for tile in TILES if not tile.pipelined),)
# the same weights and the same sums in another order of fp32 additions
TWIN_REL_ERR = 3e-5
TWIN = GemmPlan(64, 64, 8, 1, scale_after=False, kwidth=2, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class Case:
    """A weight and what is asked of it. x: its dtype, and y's; fp32 is rounded to bf16 before."""

    n: int
    k: int
    group: int
    x: torch.dtype = torch.bfloat16
    scale: torch.dtype = torch.bfloat16
    zero: torch.dtype | None = None
    bias: bool = False

    def __str__(self) -> str:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        zero = "" if self.zero is None else f"-zero-{short[self.zero]}"
        types = f"{short[self.x]}-scale-{short[self.scale]}{zero}{'-bias' * self.bias}"
        return f"{self.n}x{self.k}-g{self.group}-{types}"


HALF, FULL = torch.float16, torch.float32
CASES = (
    # stored by the accelerator: N a multiple of 8, with a tail
    Case(264, 1024, 128),
    Case(328, 2880, 64, HALF, HALF, bias=True),
    Case(136, 2048, 256, zero=HALF, bias=True),
    Case(200, 1032, -1, HALF, HALF, zero=FULL),
    # one by one
    Case(131, 2880, 32, zero=HALF, bias=True),
    Case(77, 1032, -1),
    Case(1, 1152, 128, HALF, HALF, zero=HALF),
    Case(264, 1280, 64, FULL, zero=FULL, bias=True),
    Case(129, 1440, 32, FULL, FULL),
    Case(72, 640, 128, FULL, HALF),
    # one step: no slices, and nothing to fetch ahead
    Case(96, 128, 32),
    Case(65, 40, -1, zero=FULL),
)


def weight_of(case: Case, exact: bool = False) -> CudaCoalescedInt4Tensor:
    zero = None if case.zero is None else "integer" if exact else "fractional"
    q, scale, zero_point = codes(case.n, case.k, case.group, zero, case.scale)
    if exact:
        scale = torch.ones_like(scale)
        scale[::2] = 0.5
    if zero_point is not None:
        zero_point = zero_point.to(case.zero)
    return CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=case.group)


def run(plan, x, w, bias=None, dtype=None):
    """y [M, N] by `plan`, which starts as NaN."""
    y = torch.empty(len(x), len(w), device="cuda", dtype=dtype or x.dtype)
    x = x.bfloat16() if x.dtype == torch.float32 else x
    weight = w.qdata, w.scale, w.zero_point
    launch.run_coalesced(plan, x[None], *weight, bias, y[None], w.group_size)
    return y


def plan_of(tile: HopperTile, split_k: int = 1, pdl: bool = False) -> HopperPlan:
    shape = tile.block_m, tile.block_n, tile.num_warps, tile.num_stages
    return HopperPlan(*shape, split_k, pdl=pdl, pipelined=tile.pipelined)


def name(tile: HopperTile) -> str:
    how = "" if tile.pipelined else "-unpipelined"
    return f"{tile.block_m}x{tile.block_n}x{tile.num_stages}{how}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_oracle_and_twin(tile, case):
    torch.manual_seed(0)
    w, whole = weight_of(case), weight_of(case, exact=True)
    bias = torch.randint(-9, 9, (case.n,), device="cuda").to(case.x) if case.bias else None
    # one row of a tile, a bit over half of it, one short of it, and an odd number of them in three
    for m in (1, tile.block_m // 2 + 1, tile.block_m - 1, 2 * tile.block_m + 3):
        if m * case.n == 1:
            # the relative error of one number is of no use
            continue
        x = torch.randn(m, case.k, device="cuda", dtype=case.x)
        x = x.bfloat16().to(case.x) if case.x == FULL else x
        few = torch.randint(-2, 3, (m, case.k), device="cuda").to(case.x)
        ref, exact = oracle(x, w, bias), oracle(few, whole, bias).to(case.x)
        twin = run(TWIN, x, w, bias, FULL)
        # of a few outputs, rounding the answer itself may take more than the budget
        budget = REL_ERR_BUDGET[HALF if case.x == HALF else torch.bfloat16]
        budget = max(budget, 2 * rel_err(ref.to(case.x), ref))
        for split in SPLITS:
            plan = plan_of(tile, split)
            y = run(plan, x, w, bias)
            at = m, split
            assert rel_err(y, ref) <= budget, at
            assert torch.equal(y, run(plan, x, w, bias)), at
            assert torch.equal(run(plan, few, whole, bias), exact), at
            assert rel_err(run(plan, x, w, bias, FULL), twin.double()) <= TWIN_REL_ERR, at


def check_the_same_bits_under_pdl(plan, x, w):
    def chain(plan):
        y = x
        for _ in range(6):
            # each reads what the one before writes
            y = run(plan, y, w)
        return y

    expected = chain(plan)
    assert expected.isfinite().all()
    for _ in range(5):
        assert torch.equal(chain(replace(plan, pdl=True)), expected), plan


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_the_same_bits_under_programmatic_dependent_launch(tile, monkeypatch):
    # old memory, and no kernels in between that would hide what starts too early
    monkeypatch.setattr(torch, "empty", EMPTY)
    k = 1024
    w = weight_of(Case(k, k, 128))
    x = torch.randn(2 * tile.block_m - 3, k, device="cuda", dtype=torch.bfloat16)

    for split in SPLITS:
        check_the_same_bits_under_pdl(plan_of(tile, split), x, w)


def captured(plan, x, w, pool=None):
    """A graph of y = x @ w.T, and y."""
    run(plan, x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        y = run(plan, x, w)
    return graph, y


def nan_in_freed_memory():
    """Fill what the allocator will hand out next."""
    blocks = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(16)]
    blocks += [torch.full((1 << b,), torch.nan, device="cuda") for b in range(8, 20)]
    del blocks


def check_graphs_that_share_memory(plan, shapes, m):
    """Of products of `shapes` [(n, k), ..], replayed by turns."""
    ws = [weight_of(Case(n, k, 128)) for n, k in shapes]
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _, k in shapes]
    graphs, ys = [], []
    for x, w in zip(xs, ws, strict=True):
        graph, y = captured(plan, x, w, pool=graphs[0].pool() if graphs else None)
        graphs.append(graph)
        ys.append(y)
    for replay in range(50):
        for i in range(len(graphs)):
            xs[i].copy_(torch.randn_like(xs[i]))
            nan_in_freed_memory()
            expected = run(plan, xs[i], ws[i])
            ys[i].fill_(torch.nan)
            graphs[i].replay()
            assert torch.equal(ys[i], expected), (replay, i)


@pytest.mark.parametrize("pdl", [False, True], ids=["", "pdl"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tile", SEVERAL, ids=name)
def test_graphs_that_share_memory_replay_by_turns(tile, split, pdl, monkeypatch):
    # flags and sums of replays before are there, under the same tokens and those of the other
    monkeypatch.setattr(torch, "empty", EMPTY)
    plan = plan_of(tile, split, pdl)
    check_graphs_that_share_memory(plan, ((200, 1024), (584, 1280)), tile.block_m + 3)


@pytest.mark.parametrize("tile", SEVERAL, ids=name)
def test_one_graph_replayed_without_a_pause(tile, monkeypatch):
    monkeypatch.setattr(torch, "empty", EMPTY)
    w = weight_of(Case(1000, 1024, 128))
    x = torch.randn(tile.block_m, 1024, device="cuda", dtype=torch.bfloat16)
    graph, y = captured(plan_of(tile, 3, pdl=True), x, w)
    expected = run(plan_of(tile, 3), x, w)
    for _ in range(50):
        y.fill_(torch.nan)
        for _ in range(10):
            graph.replay()
        assert torch.equal(y, expected)


def check_two_streams_at_once(plan, n, k):
    w = weight_of(Case(n, k, 128))
    xs = [torch.randn(plan.block_m, k, device="cuda", dtype=torch.bfloat16) for _ in "ab"]
    expected = [run(plan, x, w) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, run(plan, xs[i], w)))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i]) for i, y in results)


@pytest.mark.parametrize("tile", SEVERAL, ids=name)
def test_one_plan_on_two_streams_at_once(tile, monkeypatch):
    monkeypatch.setattr(torch, "empty", EMPTY)
    check_two_streams_at_once(plan_of(tile, 3), 2056, 2048)


def test_rows_that_the_accelerator_cannot_read():
    m, k = 37, 1032
    case = Case(136, k, -1, bias=True)
    w = weight_of(case)
    bias = torch.randn(case.n, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)

    def within(rows, first, step=1):
        """x as a view of memory with rows of `rows`, from `first`, every `step`-th element."""
        memory = torch.full((m + 1, rows), torch.nan, device="cuda", dtype=x.dtype)
        view = memory[:m, first : first + step * k : step]
        view.copy_(x)
        return view

    same = F.linear(x, w, bias)
    assert rel_err(same, oracle(x, w, bias)) <= REL_ERR_BUDGET[x.dtype]
    readable = within(k + 8, 8)
    assert aligned_rows(readable) is readable
    assert torch.equal(F.linear(readable, w, bias), same)
    for view in (within(k + 8, 1), within(k + 4, 0), within(k + 1, 1), within(2 * k, 0, step=2)):
        assert aligned_rows(view).data_ptr() != view.data_ptr()
        assert torch.equal(F.linear(view, w, bias), same), view.stride()
    transposed = x.t().contiguous().t()
    assert torch.equal(F.linear(transposed, w, bias), same)
    expanded = x[:1].expand(m, k)
    assert torch.equal(F.linear(expanded, w, bias), F.linear(expanded.contiguous(), w, bias))


def test_outputs_that_the_accelerator_cannot_write():
    # N is a multiple of 8, but y begins between two units of 16 bytes
    w = weight_of(Case(136, 1024, 128))
    x = torch.randn(29, 1024, device="cuda", dtype=torch.bfloat16)
    for tile in BY_SHAPE[16, 128], BY_SHAPE[96, 64]:
        memory = torch.full((29 * 136 + 2,), torch.nan, device="cuda", dtype=x.dtype)
        y = memory[1:-1].view(29, 136)
        weight = w.qdata, w.scale, w.zero_point
        launch.run_coalesced(plan_of(tile), x[None], *weight, None, y[None], 128)
        assert torch.equal(y, run(plan_of(tile), x, w))
        assert memory[0].isnan() and memory[-1].isnan()


def test_more_slices_than_steps():
    w = weight_of(Case(96, 256, 128))
    x = torch.randn(17, 256, device="cuda", dtype=torch.bfloat16)
    for tile in BY_SHAPE[16, 64], BY_SHAPE[16, 128]:
        assert torch.equal(run(plan_of(tile, 8), x, w), run(plan_of(tile, 2), x, w))


def test_no_tokens():
    w = weight_of(Case(264, 1024, 128))
    for shape in ((0, 1024), (2, 0, 1024)):
        assert F.linear(torch.randn(shape, device="cuda").bfloat16(), w).shape == (*shape[:-1], 264)


def test_a_plan_with_other_stages_gives_the_same_bits():
    w = weight_of(Case(264, 2880, 64))
    x = torch.randn(100, 2880, device="cuda", dtype=torch.bfloat16)
    three, four = (replace(plan_of(BY_SHAPE[64, 64], 2), num_stages=s) for s in (3, 4))
    assert torch.equal(run(three, x, w), run(four, x, w))
