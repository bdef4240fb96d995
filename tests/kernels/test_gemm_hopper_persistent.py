"""Who has which steps of which tile in kernels/gemm_hopper_persistent.py, without a GPU.

The kernel's own functions are run as Python, for each program in turn.
"""

from __future__ import annotations

from collections import defaultdict
from types import FunctionType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w4tensor.dispatch_hopper import MIN_SHARED_STEPS, TILES, HopperPlan
from w4tensor.kernels import gemm_hopper_persistent
from w4tensor.kernels.gemm_hopper import gemm_hopper
from w4tensor.layout import COALESCED
from w4tensor.testing import random_codes

STAGES = max(tile.num_stages for tile in TILES if tile.shares)


def turns_of(programs: int, rounds: int, tiles: int, steps: int, even: bool, stages: int) -> list:
    """[(tile, begin, end), ..] of each program."""
    language = SimpleNamespace(
        where=lambda which, one, other: one if which else other,
        maximum=max,
        minimum=min,
        num_programs=lambda axis: programs,
    )
    plain = {"gl": language}
    for name in ("_border", "_turn"):
        code = getattr(gemm_hopper_persistent, name).fn.__code__
        plain[name] = FunctionType(code, plain)
    found = []
    for program in range(programs):
        language.program_id = lambda axis, program=program: program
        turns = []
        while True:
            tile, begin, end, has = plain["_turn"](len(turns), rounds, tiles, steps, even, stages)
            if not has:
                # what is read nevertheless is inside
                assert tile == 0 and begin == 0
                break
            turns.append((tile, begin, end))
        found.append(turns)
    return found


sizes = (st.integers(1, 300), st.integers(0, 900), st.integers(MIN_SHARED_STEPS, 500))


@given(*sizes, st.integers(2, STAGES))
def test_steps_are_shared_evenly(programs, more, steps, stages):
    tiles = programs + more
    rounds = tiles // programs - 1
    turns = turns_of(programs, rounds, tiles, steps, True, stages)
    parts = defaultdict(list)
    for program, mine in enumerate(turns):
        # a ring is filled anew while this many steps are multiplied
        assert all(end - begin >= stages for _, begin, end in mine)
        # each step of a share may move by what no tile is cut off
        share = sum(end - begin for _, begin, end in mine)
        assert abs(share - tiles * steps / programs) < 2 * stages
        for turn, (tile, begin, end) in enumerate(mine):
            parts[tile].append((begin, end, program))
            # sums are stored before anybody is waited for
            assert end == steps or turn == rounds
            assert begin == 0 or (turn == len(mine) - 1 and end == steps)
            assert turn >= rounds or (begin, end) == (0, steps)
    assert sorted(parts) == list(range(tiles))
    for found in parts.values():
        (begin, end, first), *others = sorted(found)
        if others:
            # the end is of the next program, which waits for this one
            ((cut, end_of_tile, second),) = others
            assert (begin, end, end_of_tile) == (0, cut, steps) and second == first + 1
        else:
            assert (begin, end) == (0, steps)


@given(*sizes)
def test_whole_tiles_go_around(programs, more, steps):
    tiles = programs + more
    turns = turns_of(programs, tiles // programs - 1, tiles, steps, False, 4)
    for program, mine in enumerate(turns):
        assert mine == [(tile, 0, steps) for tile in range(program, tiles, programs)]


@given(st.integers(1, 200), st.integers(1, 9), sizes[2])
def test_as_many_tiles_for_everybody_are_not_cut(programs, each, steps):
    even, whole = (
        turns_of(programs, each - 1, each * programs, steps, even, 4) for even in (True, False)
    )
    assert even == whole


@pytest.mark.parametrize(
    "programs,k,is_shared",
    [(0, 2048, False), (3, 2048, True), (5, 2048, True), (6, 2048, False), (3, 1408, False)],
)
def test_too_few_tiles_or_steps_are_not_shared(machine, programs, k, is_shared):
    # five tiles, and a ring of four steps
    codes = random_codes(5 * 128, k, group_size=128)
    plan = HopperPlan(8, 128, 4, 4, programs=programs, even=True)
    x = torch.zeros(8, k, dtype=torch.bfloat16)
    y = torch.empty(8, 5 * 128, dtype=torch.bfloat16)
    gemm_hopper(x, COALESCED.pack(codes.q), codes.scale, None, None, y, 128, plan)
    ((name, *_), grid, *_) = machine.launches[-1]
    assert name == ("gemm_hopper_persistent_kernel" if is_shared else "_gemm_hopper_kernel")
    assert grid[0] == (programs if is_shared else 5)
