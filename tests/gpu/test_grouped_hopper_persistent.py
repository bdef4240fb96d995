"""kernels/grouped_hopper_persistent.py against its sibling of one tile a program, bit for bit.

That one is held against the definition in test_grouped_hopper.py. Few programs share many tiles,
and more than there are. Outputs are NaN beforehand (test_linear.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.test_experts import Block
from tests.gpu.test_grouped_hopper import CASES, TILES, expected
from tests.gpu.test_linear import _poison, needs_hopper, rel_err  # noqa: F401
from w4tensor import moe
from w4tensor.dispatch_experts import SHARED_RESIDENT
from w4tensor.kernels import grouped_hopper
from w4tensor.layout import COALESCED
from w4tensor.moe import Stack
from w4tensor.plans_experts import ExpertsPlan
from w4tensor.testing import MOE_REL_ERR_BUDGET, random_codes

pytestmark = [pytest.mark.gpu, needs_hopper]

SHARED = [tile for tile in TILES if tile.block_m in SHARED_RESIDENT]
# none that is narrow, and steps of which some end in each stage of the ring
SHARED += [replace(SHARED[0], narrow_m=0)]

tiles = pytest.mark.parametrize("tile", SHARED, ids=lambda tile: f"{tile.name}-{tile.narrow_m}")


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Which of the two kernels was launched."""
    found: list[str] = []

    def watch(name):
        launch = getattr(grouped_hopper, name)
        monkeypatch.setattr(
            grouped_hopper, name, lambda *a, **k: found.append(name) or launch(*a, **k)
        )

    watch("_launch_persistent")
    watch("_launch_grouped_hopper")
    return found


@tiles
@pytest.mark.parametrize("case", [*CASES, replace(CASES[0], k=768)], ids=str)
def test_rows_as_given(tile, case, launched):
    narrow = tile.narrow_m or 2
    counts = [1, 0, narrow, tile.block_m, 2 * tile.block_m + 5, tile.block_m // 2, 0, narrow + 1]
    options = dict(group_size=case.group, zero_point=case.zero, dtype=case.dtype, device="cuda")
    codes = random_codes(len(counts), case.n, case.k, **options)
    bias = None
    if case.bias:
        bias = torch.randint(-9, 9, (len(counts), case.n), device="cuda").to(case.dtype)
    stack = Stack(COALESCED.pack(codes.q), codes.scale, codes.zero_point, codes.group_size, bias)
    offs = torch.tensor(counts, device="cuda").cumsum(0).int()
    # the last rows are nobody's: more than a tile
    x = torch.randn(sum(counts) + tile.block_m + 3, case.k, device="cuda").to(case.dtype)
    one = moe.grouped_linear(x, offs, stack, tile)
    assert rel_err(one, expected(x, codes, offs, bias)) < MOE_REL_ERR_BUDGET
    launched.clear()
    for programs in (1, 3, 7, 1000):
        y = moe.grouped_linear(x, offs, stack, replace(tile, programs=programs))
        assert torch.equal(y, one), programs
    assert not one[sum(counts) :].any()
    # a ring that would not be full is not worth it
    enough = -(-case.k // 128) >= tile.num_stages
    assert set(launched) == {"_launch_persistent" if enough else "_launch_grouped_hopper"}


def test_fp32_goes_to_the_other_kernel(launched):
    tile = SHARED[0]
    codes = random_codes(3, 256, 1024, group_size=128, dtype=torch.bfloat16, device="cuda")
    stack = Stack(COALESCED.pack(codes.q), codes.scale, None, 128)
    x = torch.randn(300, 1024, device="cuda")
    offs = torch.tensor([100, 150, 300], device="cuda").int()
    one = moe.grouped_linear(x, offs, stack, tile)
    assert torch.equal(moe.grouped_linear(x, offs, stack, replace(tile, programs=5)), one)
    assert one.dtype == torch.float32 and set(launched) == {"_launch_grouped_hopper"}


@pytest.mark.parametrize("act_group_size", [None, 32])
@pytest.mark.parametrize("gate,act", [("halves", "silu"), ("interleaved", "clamped_swiglu")])
@tiles
def test_blocks_with_routing(tile, gate, act, act_group_size, launched):
    block = Block(6, 640, 1288 if act_group_size is None else 1280, -1, "fractional")
    _, hidden, inter = block.sizes
    biases = (
        torch.randn(6, 2 * inter, device="cuda").bfloat16(),
        torch.randn(6, hidden, device="cuda").bfloat16(),
    )
    stacks = [s._replace(bias=b) for s, b in zip(block.stacks(act_group_size), biases, strict=True)]
    # an expert has some tiles, and one that is not full, or narrow
    for tokens in (tile.block_m + 3, 5 * tile.block_m + tile.narrow_m // 2):
        x, ids, weight = block.load(tokens, 3)
        # sentinels, and an expert twice in a token
        ids[::5, 1] = 6
        ids[-1, 2] = ids[-1, 0]
        one = moe.experts(x, ids, weight, *stacks, ExpertsPlan(tile, tile), gate, act)
        launched.clear()
        for programs in (5, 1000):
            first = replace(tile, programs=programs)
            for second in (first, tile):
                plan = ExpertsPlan(first, second)
                y = moe.experts(x, ids, weight, *stacks, plan, gate, act)
                assert torch.equal(y, one), (tokens, programs, second.programs)
        assert launched.count("_launch_persistent") == 6


@tiles
def test_lists_that_do_not_fit_are_refused(tile):
    block = Block(4, 640, 640, 128)
    x, ids, weight = block.load(tile.block_m, 2)
    plan = ExpertsPlan(tile, replace(tile, programs=8))
    with pytest.raises(AssertionError, match="tiles"):
        moe.experts(x, ids, weight, *block.stacks(), plan)
