"""kernels/int8_hopper.py, which no interpreter runs, against its definition.

Every tile with every number of slices; the weights differ in all that compiles apart. Outputs and
partial sums are NaN beforehand (test_linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.gpu.test_act_quant import definition
from tests.gpu.test_linear import _poison, codes, needs_hopper, rel_err  # noqa: F401
from w4tensor import Int4ActQuantTensor
from w4tensor.dispatch_int8 import TILES
from w4tensor.kernels.int8_hopper import int8_hopper
from w4tensor.kernels.quantize_activation import quantize_activation

pytestmark = [pytest.mark.gpu, needs_hopper]

SPLITS = (1, 2, 3, 8)
HALF, FULL = torch.float16, torch.float32
# sums of fp32 in another order than fp64
REL_ERR = 1e-5


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    group: int
    act_group: int
    scale: torch.dtype = torch.bfloat16
    zero: torch.dtype | None = None
    bias: bool = False

    def __str__(self) -> str:
        short = {torch.bfloat16: "bf16", HALF: "fp16", FULL: "fp32"}
        zero = "" if self.zero is None else f"-zero-{short[self.zero]}"
        types = f"scale-{short[self.scale]}{zero}{'-bias' * self.bias}"
        return f"{self.n}x{self.k}-g{self.group}-a{self.act_group}-{types}"


CASES = (
    # stored by the accelerator: N a multiple of 8, with a tail
    Case(264, 1024, 128, -1),
    Case(264, 1152, 128, 128, bias=True),
    Case(136, 2048, 256, 128, zero=HALF, bias=True),
    Case(200, 1032, -1, -1, HALF, zero=FULL),
    # one by one
    Case(131, 1280, 256, -1, FULL, zero=HALF),
    Case(1, 1152, 128, 128, HALF, zero=HALF),
    # one step: no slices, and nothing to fetch ahead
    Case(96, 128, 128, 128),
    Case(65, 40, -1, -1, zero=FULL),
)
# scales that change within 128 k
FINE = (
    Case(264, 1024, 128, 32),
    Case(328, 2880, 64, 128, HALF, zero=HALF, bias=True),
    Case(131, 2880, 32, 32, zero=HALF, bias=True),
    Case(136, 1312, 32, -1, FULL),
    Case(77, 1000, -1, 64, zero=FULL),
    Case(129, 2080, 32, 64),
    Case(96, 128, 32, 32),
    Case(65, 40, -1, 32),
)
PAIRS = [(t, c) for t in TILES for c in CASES + FINE * t.fine]


def weight_of(case: Case, exact: bool = False) -> Int4ActQuantTensor:
    zero = None if case.zero is None else "integer" if exact else "fractional"
    q, scale, zero_point = codes(case.n, case.k, case.group, zero, case.scale)
    if exact:
        scale = torch.ones_like(scale)
        scale[::2] = 0.5
    if zero_point is not None:
        zero_point = zero_point.to(case.zero)
    sizes = dict(group_size=case.group, act_group_size=case.act_group)
    return Int4ActQuantTensor.from_codes(q, scale, zero_point, **sizes)


def run(plan, x, w, bias=None, dtype=None):
    """y [M, N] by `plan`, which starts as NaN."""
    y = torch.empty(1, len(x), len(w), device="cuda", dtype=dtype or x.dtype)
    sums = None if w.zero_point is None else w.group_size
    early = dict(pdl=plan.pdl, overlap=plan.overlap)
    quantized = quantize_activation(x[None], w.act_group_size, sums, **early)
    weight = w.qdata[None], w.scale[None], None if w.zero_point is None else w.zero_point[None]
    int8_hopper(*quantized, *weight, bias, y, w.group_size, w.act_group_size, plan)
    return y[0]


def integers(m: int, k: int, act_group: int) -> torch.Tensor:
    """x whose scales are 1 and whose codes are x."""
    x = torch.randint(-2, 3, (m, k), device="cuda", dtype=torch.float32)
    x[:, :: k if act_group == -1 else act_group] = 127
    return x


@pytest.mark.parametrize("tile,case", PAIRS, ids=lambda v: str(getattr(v, "name", v)))
def test_definition(tile, case):
    torch.manual_seed(0)
    w, whole = weight_of(case), weight_of(case, exact=True)
    bias = torch.randint(-9, 9, (case.n,), device="cuda").bfloat16() if case.bias else None
    for m in (1, tile.block_m // 2 + 1, tile.block_m, 2 * tile.block_m + 3):
        x = torch.randn(m, case.k, device="cuda", dtype=torch.bfloat16)
        few = integers(m, case.k, case.act_group)
        ref, exact = definition(x, w, bias), definition(few, whole, bias)
        for split in SPLITS:
            plan = tile.plan(split, pdl=False)
            at = m, split
            y = run(plan, x, w, bias, FULL)
            assert rel_err(y, ref) <= REL_ERR, at
            assert torch.equal(y, run(plan, x, w, bias, FULL)), at
            # by the accelerator, where it can
            assert torch.equal(run(plan, x, w, bias), y.bfloat16()), at
            assert torch.equal(run(plan, few, whole, bias, FULL).double(), exact), at


@pytest.mark.parametrize("tile", TILES, ids=lambda t: t.name)
def test_slices_of_the_last_tiles_only(tile):
    w = weight_of(Case(5 * tile.block_n - 8, 1024, 128, 128))
    x = torch.randn(tile.block_m, 1024, device="cuda", dtype=torch.bfloat16)
    one, cut = (
        run(tile.plan(pdl=False), x, w, None, FULL),
        run(tile.plan(3, pdl=False), x, w, None, FULL),
    )
    assert not torch.equal(one, cut)
    for whole in range(6):
        rows = whole * tile.block_n
        y = run(tile.plan(3, whole, pdl=False), x, w, None, FULL)
        assert torch.equal(y[:, :rows], one[:, :rows]), whole
        assert torch.equal(y[:, rows:], cut[:, rows:]), whole


@pytest.mark.parametrize("tile", TILES, ids=lambda t: t.name)
def test_the_same_bits_under_programmatic_dependent_launch(tile, monkeypatch):
    # old memory, and no kernels in between that would hide what starts too early
    monkeypatch.undo()
    k = 1024
    w = weight_of(Case(k, k, 128, 128))
    x = torch.randn(2 * tile.block_m - 3, k, device="cuda", dtype=torch.bfloat16)

    def chain(plan):
        y = x
        for _ in range(20):
            # each reads what the one before writes
            y = run(plan, y, w)
        return y

    for split in SPLITS:
        expected = chain(tile.plan(split, pdl=False))
        assert expected.isfinite().all()
        for overlap in (True, False) * 3:
            plan = replace(tile.plan(split, pdl=True), overlap=overlap)
            assert torch.equal(chain(plan), expected), (split, overlap)


def test_nan_and_zero_tokens_stay_by_themselves():
    w = weight_of(Case(264, 1024, 128, 128, zero=HALF))
    for tile in TILES:
        m = 2 * tile.block_m + 3
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        x[1, 100], x[m - 1] = torch.nan, 0
        y = run(tile.plan(2, pdl=False), x, w)
        assert y[1].isnan().all() and not y[m - 1].any(), tile
        assert y[0].isfinite().all() and y[2:].isfinite().all(), tile


def test_replay_of_a_graph():
    w = weight_of(Case(1024, 2048, 128, -1))
    for tile in TILES:
        plan = tile.plan(3, pdl=True)
        x = torch.randn(tile.block_m + 1, 2048, device="cuda", dtype=torch.bfloat16)
        run(plan, x, w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(plan, x, w)
        for seed in range(3):
            torch.manual_seed(seed)
            x.normal_()
            graph.replay()
            assert torch.equal(y, run(plan, x, w)), (tile, seed)
