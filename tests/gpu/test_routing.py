"""kernels/routing.py and kernels/gather.py on a device, at sizes too large for the interpreter.

Outputs are garbage beforehand, and what is compared is exact.
"""

from __future__ import annotations

import pytest
import torch

from w4tensor.kernels import routing
from w4tensor.kernels.gather import gather_rows
from w4tensor.kernels.routing import ONE_LAUNCH_PAIRS, ONE_LAUNCH_READS, route
from w4tensor.kernels.row_tiles import tiles_of

pytestmark = pytest.mark.gpu


def _expected(ids: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in the order of their experts, without sentinels; and where each expert ends."""
    flat = ids.flatten()
    chosen = torch.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    ends = torch.bincount(chosen, minlength=n_experts + 1)[:n_experts].cumsum(0)
    return chosen.argsort(stable=True)[: ends[-1]].int(), ends.int()


def _garbage(monkeypatch) -> None:
    """What is allocated is full of an expert, a row or a pair that there is not."""
    empty = torch.empty

    def full(*size, **options):
        made = empty(*size, **options)
        return made.fill_(0x55)

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(
    "n_experts,pairs",
    [
        *((256, 1), (256, ONE_LAUNCH_READS // 256), (256, ONE_LAUNCH_READS // 256 + 1)),
        *((8, ONE_LAUNCH_PAIRS), (8, ONE_LAUNCH_PAIRS + 1), (128, 16641), (512, 32768)),
        # not powers of two; more chunks than experts, and fewer
        *((7, 20001), (60, 100_003), (300, 8000), (1, 17000)),
    ],
)
def test_order_offsets_and_tiles(n_experts, pairs, crowded, monkeypatch):
    g = torch.Generator("cuda").manual_seed(pairs)
    ids = torch.randint(-1, n_experts + 2, (pairs, 1), device="cuda", generator=g)
    if crowded:
        ids[::3] = n_experts - 1
    ids[::7] = 2**32
    _garbage(monkeypatch)
    order, offs, tiles = route(ids, n_experts, block_m=64)
    expected, ends = _expected(ids, n_experts)
    assert torch.equal(offs, ends)
    assert torch.equal(order[: len(expected)], expected)
    listed = tiles[tiles[:, 1] < tiles[:, 2]]
    rows = [row for _, first, end in listed.tolist() for row in range(first, end)]
    assert sorted(rows) == list(range(len(expected)))
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    e = listed[:, 0].long()
    assert (listed[:, 1] >= first[e]).all() and (listed[:, 2] <= ends[e]).all()
    assert (listed[:, 2] - listed[:, 1] <= 64).all()
    again = route(ids, n_experts, block_m=64)
    assert torch.equal(again[0][: len(expected)], expected) and torch.equal(again[2], tiles)


@pytest.mark.parametrize("tokens", [1000, 6000])
def test_a_graph_whose_ids_change(tokens):
    """Both ways, with launches that begin before those ahead are done."""
    ids = torch.zeros(tokens, 8, device="cuda", dtype=torch.int64)
    x = torch.randn(tokens, 264, device="cuda", dtype=torch.bfloat16)

    def run():
        order, offs, tiles = route(ids, 256, 64, pdl=True, listed=False)
        rows = gather_rows(x, order, offs, 8, True, tiles, block_m=64, narrow_m=16)
        return order, offs, tiles, rows

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in range(20):
        g = torch.Generator("cuda").manual_seed(seed)
        ids.copy_(torch.randint(0, 256, ids.shape, device="cuda", generator=g))
        for t in found:
            t.fill_(0x55)
        graph.replay()
        order, offs, tiles, rows = found
        expected, ends = _expected(ids, 256)
        assert torch.equal(order, expected) and torch.equal(offs, ends)
        assert torch.equal(rows, x[expected.long() // 8])
        want = tiles_of(offs, tokens * 8, 64, 16)
        filled = want[:, 1] < want[:, 2]
        assert torch.equal(tiles[: filled.sum()], want[filled])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("k", [128, 2048, 2880, 5000])
@pytest.mark.parametrize("pairs", [600, 2048, 2049, 9001])
def test_rows_by_expert(pairs, k, dtype):
    ids = torch.randint(-1, 40, (pairs, 1), device="cuda")
    x = torch.randint(-99, 100, (pairs, k), device="cuda").to(dtype)
    order, offs, _ = route(ids, 40, block_m=16)
    expected, _ = _expected(ids, 40)
    rows = gather_rows(x, order, offs, 1, False)
    assert torch.equal(rows[: len(expected)], x[expected.long()])


def test_both_ways_were_taken(monkeypatch):
    launched = []
    for name in ("_launch_route", "_launch_count", "_launch_place"):
        launch = getattr(routing, name)
        monkeypatch.setattr(
            routing, name, lambda *a, n=name, f=launch, **k: launched.append(n) or f(*a, **k)
        )
    for tokens in (1000, 6000):
        route(torch.zeros(tokens, 8, device="cuda", dtype=torch.int64), 256, 64)
    assert launched == ["_launch_route", "_launch_count", "_launch_place"]
