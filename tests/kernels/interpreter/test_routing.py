"""routing.py in Triton's CPU interpreter: a stable counting sort, and tiles that cover its rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w4tensor.kernels.routing import ONE_BLOCK_PAIRS, route, tiles_of


@st.composite
def routings(draw):
    """ids [T, top_k] with duplicates, sentinels on both sides and crowded experts; E; block_m."""
    n_experts = draw(st.integers(1, 40))
    top_k = draw(st.sampled_from([1, 2, 3, 8]))
    tokens = draw(st.integers(0, 24))
    # of the last, the lower 32 bits are an expert
    far = st.just(2**32)
    crowded = st.just(draw(st.integers(0, n_experts - 1)))
    one = st.one_of(st.integers(-1, n_experts + 1), crowded, far)
    ids = draw(st.lists(one, min_size=tokens * top_k, max_size=tokens * top_k))
    ids = torch.tensor(ids, dtype=torch.int64).view(tokens, top_k)
    return ids, n_experts, draw(st.sampled_from([8, 16]))


def _sorted_pairs(ids: torch.Tensor, n_experts: int) -> tuple[list[int], list[int]]:
    flat = ids.flatten().tolist()
    order = [p for e in range(n_experts) for p, found in enumerate(flat) if found == e]
    ends = [sum(0 <= found <= e for found in flat) for e in range(n_experts)]
    return order, ends


def _rows_of_tiles(tiles: torch.Tensor, ends: list[int], block_m: int) -> list[int]:
    """Every row that a tile lists, after checking that it lists only rows of its expert."""
    rows = []
    for expert, first, end in tiles.tolist():
        assert 0 <= end - first <= block_m
        if first < end:
            begin = 0 if expert == 0 else ends[expert - 1]
            assert begin <= first and (expert == len(ends) or end <= ends[expert])
        rows += range(first, end)
    return sorted(rows)


@settings(max_examples=25)
@given(routings())
def test_order_is_stable_and_tiles_cover_every_row_once(case):
    ids, n_experts, block_m = case
    order, offs, tiles = route(ids, n_experts, block_m)
    expected, ends = _sorted_pairs(ids, n_experts)
    assert offs.tolist() == ends
    assert order[: ends[-1]].tolist() == expected
    assert _rows_of_tiles(tiles, ends, block_m) == list(range(ends[-1]))
    pairs = ids.numel()
    assert len(tiles) <= -(-pairs // block_m) + min(n_experts, pairs)


@settings(max_examples=25)
@given(routings(), st.integers(0, 20), st.sampled_from([0, 2, 5]))
def test_tiles_of_offs_are_in_order_without_holes(case, tail, narrow_m):
    ids, n_experts, block_m = case
    _, ends = _sorted_pairs(ids, n_experts)
    n_rows = ends[-1] + tail
    tiles = tiles_of(torch.tensor(ends, dtype=torch.int32), n_rows, block_m, narrow_m)
    assert _rows_of_tiles(tiles, ends, block_m) == list(range(n_rows))
    listed = [tuple(tile) for tile in tiles.tolist() if tile[1] < tile[2]]
    assert all(first == end for _, first, end in tiles[len(listed) :].tolist())
    # wide tiles, narrow ones, and at last the rows behind the last expert; each by expert and row
    kinds = [
        2 if expert == n_experts else int(end - first <= narrow_m) for expert, first, end in listed
    ]
    keys = list(zip(kinds, listed, strict=True))
    assert keys == sorted(keys)
    assert all((end > ends[-1]) == (expert == n_experts) for expert, _, end in listed)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(
    "n_experts,pairs",
    [(3, 5000), (3, ONE_BLOCK_PAIRS), (1, ONE_BLOCK_PAIRS + 200), (3, ONE_BLOCK_PAIRS + 200)],
)
def test_all_pairs_in_one_block_and_more(n_experts, pairs, crowded):
    top_k = 2
    tokens = pairs // top_k
    ids = torch.randint(0, n_experts + 1, (tokens, top_k), generator=torch.manual_seed(0))
    if crowded:
        ids.fill_(n_experts - 1)
    order, offs, _ = route(ids, n_experts, block_m=64)
    expected, ends = _sorted_pairs(ids, n_experts)
    assert offs.tolist() == ends
    assert order[: ends[-1]].tolist() == expected
