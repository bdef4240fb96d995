"""gather.py in Triton's CPU interpreter: rows of x by expert, and none for sentinels."""

from __future__ import annotations

import pytest
import torch

from w4tensor.kernels import gather
from w4tensor.kernels.gather import gather_rows
from w4tensor.kernels.routing import route
from w4tensor.kernels.row_tiles import tiles_of


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("k", [40, 2048, 5000])
@pytest.mark.parametrize("few_rows", [0, 100])
def test_rows_stand_by_expert(k, dtype, few_rows, monkeypatch):
    # one row a program, and several
    monkeypatch.setattr(gather, "FEW_ROWS", few_rows)
    g = torch.Generator().manual_seed(k)
    top_k, n_experts = 3, 5
    x = torch.randint(-99, 100, (7, k + 8), generator=g).to(dtype)[:, :k]
    # ids of n_experts are sentinels
    ids = torch.randint(0, n_experts + 1, (7, top_k), generator=g)
    order, offs, _ = route(ids, n_experts, block_m=8)
    rows = gather_rows(x, order, offs, top_k, False)
    pairs = ids.flatten()
    expected = [p // top_k for e in range(n_experts) for p in (pairs == e).nonzero()[:, 0].tolist()]
    assert len(expected) == offs[-1] < len(pairs)
    assert torch.equal(rows[: len(expected)], x[expected])


@pytest.mark.parametrize("n_experts", [1, 5, 40])
@pytest.mark.parametrize("few_rows", [0, 100])
def test_tiles_that_were_left_to_it_are_listed(n_experts, few_rows, monkeypatch):
    monkeypatch.setattr(gather, "FEW_ROWS", few_rows)
    top_k = 3
    ids = torch.randint(0, n_experts + 1, (30, top_k), generator=torch.manual_seed(n_experts))
    order, offs, tiles = route(ids, n_experts, block_m=8, listed=False)
    x = torch.zeros(30, 16, dtype=torch.float16)
    rows = gather_rows(x, order, offs, top_k, False, tiles.fill_(-1), block_m=8, narrow_m=2)
    assert len(rows) == ids.numel()
    # but sentinels are nobody's
    expected = tiles_of(offs, int(offs[-1]), block_m=8, narrow_m=2)
    filled = expected[:, 1] < expected[:, 2]
    assert torch.equal(tiles[: filled.sum()], expected[filled])
    assert (tiles[filled.sum() :, 1] == tiles[filled.sum() :, 2]).all()
