"""routing.py in Triton's CPU interpreter: a stable counting sort, and tiles that cover its rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w4tensor.kernels import routing
from w4tensor.kernels.routing import CHUNK, ONE_LAUNCH_PAIRS, ONE_LAUNCH_READS, route
from w4tensor.kernels.row_tiles import tiles_of


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


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    found: list[str] = []

    def watch(name):
        launch = getattr(routing, name)
        monkeypatch.setattr(routing, name, lambda *a, **k: found.append(name) or launch(*a, **k))

    for name in ("_launch_route", "_launch_count", "_launch_place"):
        watch(name)
    return found


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("most,launches", [(10**6, 1), (0, 2)])
@pytest.mark.parametrize(
    "n_experts,pairs",
    # less than a chunk; whole chunks, and one pair more; more chunks than are added at a time
    [(1, 100), (5, 2 * CHUNK), (40, 2 * CHUNK + 1), (64, 3 * CHUNK + 7), (3, 40 * CHUNK + 5)],
)
def test_one_launch_and_two(n_experts, pairs, most, launches, crowded, launched, monkeypatch):
    monkeypatch.setattr(routing, "ONE_LAUNCH_PAIRS", most)
    ids = torch.randint(-1, n_experts + 1, (pairs, 1), generator=torch.manual_seed(0))
    if crowded:
        ids.fill_(n_experts - 1)
    order, offs, tiles = route(ids, n_experts, block_m=64)
    assert len(launched) == launches
    expected, ends = _sorted_pairs(ids, n_experts)
    assert offs.tolist() == ends
    assert order[: ends[-1]].tolist() == expected
    assert _rows_of_tiles(tiles, ends, 64) == list(range(ends[-1]))


@settings(max_examples=10)
@given(routings())
def test_two_launches_give_what_one_gives(case):
    ids, n_experts, block_m = case
    one = route(ids, n_experts, block_m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "ONE_LAUNCH_PAIRS", 0)
        patch.setattr(routing, "CHUNK", 16)
        two = route(ids, n_experts, block_m)
    rows = int(one[1][-1])
    assert torch.equal(one[0][:rows], two[0][:rows]) and torch.equal(one[1], two[1])
    assert torch.equal(one[2], two[2])


@pytest.mark.parametrize(
    "n_experts,pairs,launches",
    [
        *((256, ONE_LAUNCH_READS // 256, 1), (256, ONE_LAUNCH_READS // 256 + 1, 2)),
        *((1, ONE_LAUNCH_PAIRS, 1), (1, ONE_LAUNCH_PAIRS + 1, 2)),
    ],
)
def test_many_reads_take_two_launches(n_experts, pairs, launches, launched):
    ids = torch.zeros(pairs, 1, dtype=torch.int64)
    order, offs, _ = route(ids, n_experts, block_m=64)
    assert len(launched) == launches
    assert offs[0] == pairs and torch.equal(order, torch.arange(pairs, dtype=torch.int32))
