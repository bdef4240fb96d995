"""Every legal problem with int8 activations has a plan, and the plan fits its kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w4tensor import dispatch_int8
from w4tensor.dispatch import (
    GEMV_INT8_PRODUCTS,
    Arch,
    Problem,
    is_row_by_row,
    plan,
)
from w4tensor.dispatch_act_quant import (
    TILE_FINE_MAX_M,
    TILE_MAX_M,
    TILE_WIDE_MIN_M,
    ActQuantDecodePlan,
    ActQuantDp4aPlan,
    ActQuantGemmPlan,
    ActQuantHopperPlan,
    ActQuantIntegerPlan,
    ActQuantRoundedPlan,
    plan_act_quant,
)
from w4tensor.dispatch_gemv import GemvPlan, serves_gemv
from w4tensor.dispatch_hopper import (
    MIN_STEPS,
    SHARED_BYTES,
    WORKSPACE_BYTES,
    hopper_us,
    is_placed_evenly,
    plan_hopper,
    serves,
)
from w4tensor.dispatch_int8 import (
    TILES,
    Int8Plan,
    int8_us,
    is_fine,
    plan_int8,
    quantizing_overlaps,
    serves_int8,
)
from w4tensor.dispatch_integer import (
    FEW_M,
    candidates,
    integer_us,
    plan_integer,
    predicted_us,
    serves_integer,
)
from w4tensor.dispatch_integer import TILES as INTEGER_TILES
from w4tensor.testing import DENSE_SHAPES

ARCHS = [
    Arch(capability=capability, num_sms=num_sms, triton=triton)
    for capability, num_sms in (((8, 0), 108), ((8, 9), 128), ((9, 0), 132), ((10, 0), 148))
    for triton in ((3, 6), (3, 7), (3, 8), (3, 9))
]


@st.composite
def problems(draw) -> Problem:
    group_size = draw(st.sampled_from((16, 32, 64, 128, 256, 0)))
    k = draw(st.integers(1, 40000)) if group_size == 0 else group_size * draw(st.integers(1, 150))
    return Problem(
        m=draw(st.sampled_from((1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 129, 1024, 5000))),
        n=draw(st.integers(1, 200000)),
        k=k,
        group_size=group_size or k,
        act="int8",
        symmetric=draw(st.booleans()),
        batch=draw(st.sampled_from((1, 3, 64))),
        act_group_size=draw(st.sampled_from((32, 64, 128, -1))),
    )


@given(problems(), st.sampled_from(ARCHS))
def test_a_plan_fits_its_kernel(p, arch):
    plan = plan_act_quant(p, arch)
    rows = is_row_by_row(p) and serves_gemv(p.n, p.k, p.group_size, arch, p.act_group_size)
    assert isinstance(plan, GemvPlan) == rows
    if isinstance(plan, GemvPlan):
        # activation groups and weight groups are whole slices, x whole runs of 16 bytes
        assert p.act_group_size >= 32 and p.k % 8 == 0
        assert p.group_size % 32 == 0 or p.group_size == p.k
        return
    hopper = arch.capability[0] == 9
    natural = arch.triton >= (3, 8)
    if isinstance(plan, ActQuantRoundedPlan):
        assert p.batch == 1 and 1 <= plan.rows <= p.n
        return
    if isinstance(plan, ActQuantHopperPlan):
        # one weight, whose words have one scale each
        assert hopper and p.batch == 1 and (p.group_size >= 32 or p.group_size == p.k)
        assert p.m > (TILE_FINE_MAX_M if is_fine(p) else TILE_MAX_M)
        assert plan.gemm == plan_hopper(p, arch)
        return
    if isinstance(plan, Int8Plan):
        assert serves_int8(p, arch) and plan == plan_int8(p, arch)
        # tiles of many tokens have no registers for sums of their own for each 32 k
        assert plan.block_m == 8 or not is_fine(p)
        # no slice without a step, and no more tiles whole than there are
        steps = -(-p.k // plan.block_k)
        tiles = -(-p.n // plan.block_n) * -(-p.m // plan.block_m)
        assert 1 <= plan.split_k <= steps and 0 <= plan.whole < tiles
        return
    warps = plan.num_warps
    if isinstance(plan, ActQuantDp4aPlan):
        assert p.m <= plan.tokens
        # a thread has one slice of one row
        assert plan.block_n * plan.block_slices == 32 * warps
        assert plan.pdl <= (arch.capability >= (9, 0))
        return
    shared = plan.num_stages * plan.block_k * (plan.block_m + plan.block_n // 2)
    assert shared <= (200_000 if hopper else 96_000)
    if isinstance(plan, ActQuantDecodePlan):
        assert p.m <= plan.block_m and plan.block_m in (8, 16)
        # every warp has at least what one instruction takes, every slice at least a step
        assert plan.block_k // warps >= 32 and (plan.split_k - 1) * plan.block_k < p.k
        assert plan.kwidth == (4 if natural else 8)
        assert plan.pdl <= (arch.capability >= (9, 0))
    else:
        assert isinstance(plan, ActQuantGemmPlan)
        # two tiles of 32-bit sums in the registers of a program's threads
        assert plan.block_m * plan.block_n // (32 * warps) <= 64
        assert plan.block_n >= 16 * warps and plan.block_k % 128 == 0
        assert plan.kwidth == (4 if hopper or natural else 8)
        assert plan.x_tma <= hopper


H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
A100 = Arch(capability=(8, 0), num_sms=108, triton=(3, 6))
FINE = Problem(m=64, n=4096, k=4096, group_size=128, act="int8", act_group_size=32)


@pytest.mark.parametrize(
    "m,kind",
    [
        (1, GemvPlan),
        (2, GemvPlan),
        (3, Int8Plan),
        (TILE_FINE_MAX_M, Int8Plan),
        (TILE_FINE_MAX_M + 1, ActQuantHopperPlan),
        (128, ActQuantHopperPlan),
        (16384, ActQuantHopperPlan),
    ],
)
@pytest.mark.parametrize(
    "groups", [(128, 32), (128, 64), (32, 32), (32, 128), (64, -1), (256, 32), (4096, 64)]
)
def test_fine_scales_on_hopper(m, kind, groups):
    p = replace(FINE, m=m, group_size=groups[0], act_group_size=groups[1])
    if kind is GemvPlan and groups[1] == -1:
        # a scale a token is known after all of x
        kind = ActQuantDp4aPlan if m == 1 else Int8Plan
    assert type(plan_act_quant(p, H200)) is kind


def test_two_tokens_go_row_by_row_while_weights_are_few():
    p = replace(FINE, m=2, n=GEMV_INT8_PRODUCTS // 2 // 4096)
    assert isinstance(plan_act_quant(p, H200), GemvPlan)
    assert isinstance(plan_act_quant(replace(p, n=p.n + 1), H200), Int8Plan)
    # with 16 bits a tile is faster there
    assert not isinstance(plan(replace(p, act="bf16", act_group_size=None), H200), GemvPlan)


@pytest.mark.parametrize("groups", [(128, 128), (128, -1), (4096, -1), (256, 128)])
def test_few_tokens_with_coarse_scales_are_not_rounded(groups):
    p = replace(FINE, group_size=groups[0], act_group_size=groups[1])
    for m in range(3, TILE_MAX_M + 1):
        assert isinstance(plan_act_quant(replace(p, m=m), H200), Int8Plan)


@pytest.mark.parametrize(
    "n,k,act,m,kind",
    [
        # what was faster on an H200; us by an int8 tile and rounded, where tune_int8.csv has both
        (6144, 4096, 128, 256, ActQuantHopperPlan),  # 28, 25
        (6144, 4096, 128, TILE_WIDE_MIN_M - 1, ActQuantHopperPlan),
        (6144, 4096, 128, TILE_WIDE_MIN_M, Int8Plan),  # 38, 41
        (8192, 8192, 128, 33, ActQuantHopperPlan),
        (6144, 4096, -1, 512, Int8Plan),  # 31, 45
        (2048, 4096, 128, 128, ActQuantHopperPlan),  # 11.1, 10.5
        (8192, 8192, -1, 64, Int8Plan),  # 22, 25
        (28672, 4096, -1, 256, Int8Plan),  # 72, 91
        (4096, 14336, -1, 4096, Int8Plan),  # 617, 712
        (2048, 4096, -1, 128, Int8Plan),  # 10.1, 10.8
    ],
)
def test_coarse_scales_are_rounded_where_that_is_faster(n, k, act, m, kind):
    p = replace(FINE, n=n, k=k, m=m, act_group_size=act)
    assert type(plan_act_quant(p, H200)) is kind
    if kind is Int8Plan:
        assert int8_us(p, H200) <= hopper_us(p, H200)


# each was timed both ways
@pytest.mark.parametrize(
    "n,k,act,m,overlap",
    [
        # few tokens
        (4096, 4096, 32, 4, True),
        (4096, 14336, 32, 4, False),
        (4096, 14336, -1, 4, True),
        (8192, 8192, 32, 32, False),
        (8192, 8192, -1, 32, True),
        (4096, 14336, -1, 32, True),
        # programs of which more fit on a multiprocessor than its share: 128 where two fit
        (4096, 4096, 32, 96, False),
        (2048, 4096, 32, 128, False),
        # and 256 where three do
        (4096, 14336, 32, 64, False),
        # programs of which a multiprocessor has its share and no room for more
        (4096, 4096, 32, 128, True),
        (4096, 4096, 32, 192, True),
        (4096, 4096, 32, 256, True),
        (8192, 8192, 32, 192, True),
        # programs of int8 tiles, of which four fit: 256, 384 and 512
        (8192, 8192, -1, 64, False),
        (6144, 4096, -1, 128, False),
        (8192, 8192, -1, 192, False),
        # and three, of 384
        (4096, 14336, -1, 128, True),
        # more than fit at a time
        (28672, 4096, 32, 128, True),
        (28672, 4096, -1, 192, True),
    ],
)
def test_products_that_wait_until_activations_are_quantised(n, k, act, m, overlap):
    p = Problem(m=m, n=n, k=k, group_size=128, act="int8", act_group_size=act)
    plan = plan_act_quant(p, H200)
    assert isinstance(plan, (Int8Plan, ActQuantHopperPlan)) and plan.overlap is overlap


def test_long_prompts_with_a_scale_a_token_are_not_rounded():
    p = Problem(m=4096, n=28672, k=4096, group_size=128, act="int8", act_group_size=-1)
    for m in (256, 1024, 4096, 16384):
        assert isinstance(plan_act_quant(replace(p, m=m), H200), Int8Plan)


@pytest.mark.parametrize("arch,batch", [(H200, 3), (A100, 1)])
def test_where_int8_tiles_of_hopper_do_not_serve(arch, batch):
    for m in (3, 16):
        p = replace(FINE, m=m, batch=batch)
        assert isinstance(plan_act_quant(p, arch), ActQuantDecodePlan)
    for m in (17, 64, 127):
        p = replace(FINE, m=m, batch=batch)
        assert isinstance(plan_act_quant(p, arch), ActQuantGemmPlan)
    p = replace(FINE, m=128)
    assert isinstance(plan_act_quant(p, A100), ActQuantRoundedPlan)


@pytest.mark.parametrize("changes", [dict(group_size=16), dict(k=1001, group_size=1001)])
def test_where_hopper_tiles_do_not_serve(changes):
    p = replace(FINE, **changes)
    assert not serves(p, H200)
    few = Int8Plan if p.group_size != 16 else ActQuantDecodePlan
    assert isinstance(plan_act_quant(replace(p, m=8), H200), few)
    assert isinstance(plan_act_quant(replace(p, m=127), H200), ActQuantGemmPlan)
    assert isinstance(plan_act_quant(replace(p, m=128), H200), ActQuantRoundedPlan)


def test_every_int8_tile_is_the_best_somewhere():
    seen = set()
    for shape in DENSE_SHAPES:
        sizes = dict(n=shape.n, k=shape.k, group_size=128 if shape.k % 128 == 0 else shape.k)
        for m in (2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            for act in (128, -1):
                p = Problem(m=m, act="int8", act_group_size=act, **sizes)
                plan = plan_int8(p, H200)
                seen.add((plan.block_m, plan.block_n, plan.runs))
    assert seen == {(tile.block_m, tile.block_n, tile.runs) for tile in TILES}


def test_tokens_in_runs_have_one_scale_and_weights_no_zero_points():
    p = Problem(m=1024, n=4096, k=14336, group_size=128, act="int8", act_group_size=-1)
    plan = plan_int8(p, H200)
    assert plan.runs == 2 and plan.max_registers == 128
    for other in (dict(symmetric=False), dict(act_group_size=128)):
        plan = plan_int8(replace(p, **other), H200)
        assert plan.runs == 1 and plan.max_registers == 0


def test_a_prediction_grows_with_tokens_rows_and_scales():
    p = Problem(m=16, n=4096, k=4096, group_size=128, act="int8", act_group_size=-1)
    us = int8_us(p, H200)
    for more in (dict(m=4096), dict(n=65536), dict(k=65536)):
        assert int8_us(replace(p, **more), H200) > us
    tile = TILES[0]
    few = replace(p, m=8)
    costs = [
        dispatch_int8.predicted_us(replace(few, act_group_size=a), 132, tile, 1, 0)
        for a in (-1, 128, 32)
    ]
    assert costs == sorted(costs) and costs[0] < costs[2]


def test_the_name_says_that_x_is_rounded():
    assert plan_act_quant(FINE, H200).name == f"rounded x, {plan_hopper(FINE, H200).name}"
    assert plan_act_quant(replace(FINE, m=8), H200).name.startswith("int8 tile 8x")


def test_plans_are_hashable_and_named():
    arch = ARCHS[8]
    for m in (1, 8, 64, 4096):
        p = Problem(m=m, n=4096, k=4096, group_size=128, act="int8", act_group_size=32)
        plan = plan_act_quant(p, arch)
        assert hash(plan) == hash(plan_act_quant(p, arch)) and plan.name


# integer scales

INTEGER = Problem(m=64, n=4096, k=4096, group_size=128, act="int8", act_group_size=-1)
INTEGER = replace(INTEGER, integer_scales=True)


@st.composite
def integer_problems(draw) -> Problem:
    p = draw(problems())
    return replace(p, symmetric=True, act_group_size=-1, integer_scales=True)


@given(integer_problems(), st.sampled_from(ARCHS))
def test_a_plan_for_integer_scales_fits_its_kernel(p, arch):
    plan = plan_act_quant(p, arch)
    known = p.group_size >= 32 or p.group_size == p.k
    served = arch.capability[0] == 9 and p.batch == 1 and p.m > FEW_M and known
    assert serves_integer(p, arch) == served
    if not isinstance(plan, ActQuantIntegerPlan):
        # where it does not serve, or would be slower, multiples change nothing
        assert plan == plan_act_quant(replace(p, integer_scales=False), arch)
        return
    assert served
    gemm = plan.gemm
    assert gemm == plan_integer(p, arch)
    assert plan.overlap == quantizing_overlaps(p, is_placed_evenly(p, gemm, arch, x_bytes=1))


@given(integer_problems())
def test_candidates_for_integer_scales_obey_their_limits(p):
    p = replace(p, m=max(p.m, FEW_M + 1), batch=1)
    steps = -(-p.k // 128)
    choices = list(candidates(p, H200.num_sms))
    assert choices
    for tile, split_k, programs, even in choices:
        assert tile in INTEGER_TILES
        # no more than half of a tile is empty, and no tile is far too small
        assert tile.block_m < 2 * p.m and 8 * tile.block_m >= min(p.m, 1024)
        tiles = -(-p.n // tile.block_n) * -(-p.m // tile.block_m)
        assert split_k == 1 or steps >= MIN_STEPS * split_k
        sums = tiles * (split_k - 1) * tile.block_m * tile.block_n * 4
        assert sums <= WORKSPACE_BYTES
        if programs:
            # each has a tile, whose ends have as many steps as the ring has stages; 32-bit counts
            assert split_k == 1 and tile.shares and programs < tiles
            assert steps >= 3 * tile.num_stages
            assert (tiles % programs + programs) * programs * steps < 1 << 31
        assert programs or not even
        us = predicted_us(p, H200.num_sms, tile, split_k, programs, even)
        assert 0 < integer_us(p, H200) <= us < float("inf")


def test_tiles_for_integer_scales_fit_a_multiprocessor():
    for tile in INTEGER_TILES:
        # int8 x and packed weights in the ring, and y in 16 bits beside them where tiles are shared
        ring = tile.num_stages * 128 * (tile.block_m + tile.block_n // 2)
        y = 2 * tile.block_m * tile.block_n if tile.shares else 0
        assert tile.resident * (ring + y) <= SHARED_BYTES
        # sums in the registers of a program's threads
        assert tile.block_m * tile.block_n // (32 * tile.num_warps) <= 128 * (2 if y else 1)


@pytest.mark.parametrize("groups", [32, 128, 256, 4096])
@pytest.mark.parametrize("m", [1, 2, 16, FEW_M, FEW_M + 1, 64, 512, 4096])
def test_from_a_few_tokens_on_sums_are_in_int32(m, groups):
    p = replace(INTEGER, m=m, n=28672, group_size=groups)
    chosen = plan(p, H200)
    assert isinstance(chosen, ActQuantIntegerPlan) == (m > FEW_M)
    assert chosen == plan_act_quant(p, H200) and hash(chosen) == hash(plan_act_quant(p, H200))
    if m > FEW_M:
        assert chosen.name == f"int8 {chosen.gemm.name}"


@pytest.mark.parametrize("m", [FEW_M + 1, 64, 512, 4096])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 14336), (8192, 8192), (2048, 4096)])
def test_multiples_are_read_where_that_is_faster(m, shape):
    # without them, x is rounded for scales finer than 128 k
    for group_size, other_us in ((128, int8_us), (32, hopper_us)):
        p = replace(INTEGER, m=m, n=shape[0], k=shape[1], group_size=group_size)
        faster = integer_us(p, H200) <= other_us(p, H200)
        assert isinstance(plan_act_quant(p, H200), ActQuantIntegerPlan) == faster
        assert faster or m <= 64


@pytest.mark.parametrize("m", [1, FEW_M, FEW_M + 1, 64, 512, 4096])
def test_only_hopper_and_known_groups_of_one_weight_are_summed_in_int32(m):
    for p, arch in (
        (replace(INTEGER, m=m, integer_scales=False), H200),
        (replace(INTEGER, m=m, batch=2), H200),
        (replace(INTEGER, m=m, group_size=16), H200),
        (replace(INTEGER, m=m), A100),
        (replace(INTEGER, m=m), Arch(capability=(10, 0), num_sms=148, triton=(3, 6))),
    ):
        assert not serves_integer(p, arch)
        assert not isinstance(plan_act_quant(p, arch), ActQuantIntegerPlan)
        assert not isinstance(plan(p, arch), ActQuantIntegerPlan)


def test_every_tile_for_integer_scales_is_the_best_somewhere():
    seen = set()
    for shape in DENSE_SHAPES:
        sizes = dict(n=shape.n, k=shape.k, group_size=128 if shape.k % 128 == 0 else shape.k)
        for m in (33, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096):
            gemm = plan_integer(replace(INTEGER, m=m, **sizes), H200)
            seen.add((gemm.block_m, gemm.block_n, gemm.num_warps))
    assert seen == {(tile.block_m, tile.block_n, tile.num_warps) for tile in INTEGER_TILES}
