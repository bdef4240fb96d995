"""dispatch.plan over every border, without a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w4tensor import dispatch, dispatch_act_quant, dispatch_hopper
from w4tensor.dispatch import (
    Arch,
    DecodePlan,
    DequantPlan,
    GemmPlan,
    Problem,
    ReferencePlan,
    plan,
)
from w4tensor.dispatch_act_quant import (
    ActQuantDecodePlan,
    ActQuantDp4aPlan,
    ActQuantHopperPlan,
    ActQuantPlan,
)
from w4tensor.dispatch_gemv import WARP_K, GemvPlan, plan_gemv, serves_gemv, warps_per_sm
from w4tensor.dispatch_hopper import TILES, HopperPlan, predicted_us
from w4tensor.dispatch_int8 import Int8Plan
from w4tensor.errors import Unsupported
from w4tensor.testing import DENSE_SHAPES

H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
A100 = Arch(capability=(8, 0), num_sms=108, triton=(3, 6))
T4 = Arch(capability=(7, 5), num_sms=40, triton=(3, 6))
ARCHES = (H200, A100, Arch((9, 0), 132, (3, 9)), Arch((12, 0), 170, (3, 9)))


@st.composite
def problems(draw):
    group_size = draw(st.sampled_from([16, 32, 64, 128, 256, None]))
    if group_size is None:
        k = group_size = draw(st.integers(1, 5000))
    else:
        k = group_size * draw(st.integers(1, 200))
    act = draw(st.sampled_from(["bf16", "fp16", "int8"]))
    return Problem(
        m=draw(st.one_of(st.integers(1, 600), st.integers(1, 10**6))),
        n=draw(st.one_of(st.integers(1, 300), st.integers(1, 300_000))),
        k=k,
        group_size=group_size,
        act=act,
        symmetric=draw(st.booleans()),
        batch=draw(st.sampled_from([1, 1, 8, 256])),
        act_group_size=draw(st.sampled_from([32, 64, 128, -1])) if act == "int8" else None,
    )


@given(problems(), st.sampled_from(ARCHES))
def test_every_legal_problem_has_a_plan_that_its_kernel_can_take(problem, arch):
    p = plan(problem, arch)
    if problem.act == "int8":
        assert isinstance(p, ActQuantPlan)
        assert not isinstance(p, ActQuantDecodePlan) or problem.m <= p.block_m
        assert not isinstance(p, ActQuantDp4aPlan) or problem.m <= p.tokens
        return
    assert isinstance(p, (GemvPlan, DecodePlan, GemmPlan, HopperPlan, DequantPlan))
    if isinstance(p, GemvPlan):
        # whole programs, pairs of k, and words that have one scale each
        assert problem.m <= dispatch.GEMV_MAX_M and problem.n >= p.rows and problem.k % 2 == 0
        assert problem.group_size >= 32 or problem.group_size == problem.k
        assert (p.pdl != "none") is (arch.capability[0] >= 9)
    elif isinstance(p, DecodePlan):
        assert problem.m <= p.block_m
        # what kernels/decode.py asserts: groups do not straddle steps
        step = p.num_warps * p.block_k
        assert problem.k == problem.group_size or step % problem.group_size == 0
        assert p.block_k % 128 == 0
    elif isinstance(p, GemmPlan):
        # a warp of the operand takes 16 rows
        assert p.block_n % (16 * p.num_warps) == 0
        assert p.split_k == 1 or problem.k >= 128 * p.split_k
    elif isinstance(p, HopperPlan):
        assert arch.capability[0] == 9
        # what the tensor memory accelerator reads, and scales that words have one of
        assert problem.batch == 1 and problem.k % 8 == 0
        assert problem.group_size != 16 or problem.k == 16
        assert p.split_k == 1 or problem.k >= 128 * p.split_k
        tiles = -(-problem.n // p.block_n) * -(-problem.m // p.block_m)
        sums = p.programs if p.programs else tiles * (p.split_k - 1)
        assert sums * p.block_m * p.block_n * 4 <= dispatch_hopper.WORKSPACE_BYTES
        # what kernels/gemm_hopper_persistent.py takes: each program has a tile, whose ends have as
        # many steps as the ring has stages
        if p.programs:
            steps = -(-problem.k // 128)
            assert p.split_k == 1 and p.programs < tiles and steps >= 3 * p.num_stages
            assert (tiles % p.programs + p.programs) * p.programs * steps < 1 << 31
    else:
        assert p.rows % 256 == 0 or p.rows == problem.n
        assert problem.batch == 1


@given(problems())
def test_outside_the_domain_there_is_no_plan(problem):
    for field in ("m", "n", "k", "batch", "group_size"):
        values = {name: getattr(problem, name) for name in problem.__slots__} | {field: 0}
        with pytest.raises(Unsupported, match="at least 1"):
            plan(Problem(**values), H200)
    values = {name: getattr(problem, name) for name in problem.__slots__}
    values["k"] = problem.k * 16 + 1
    values["group_size"] = 16
    with pytest.raises(Unsupported, match="not a multiple of group_size=16"):
        plan(Problem(**values), H200)


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=lambda s: s.name)
def test_regimes_change_where_dispatch_says(shape):
    def at(m: int, act: str = "bf16"):
        group = 32 if act == "int8" else None
        return plan(Problem(m, shape.n, shape.k, shape.group_size, act, True, 1, group), H200)

    fine = shape.group_size < 128
    two = dispatch.GEMV_FINE_PRODUCTS if fine else dispatch.GEMV_PRODUCTS
    gemv = 1 + (2 * shape.n * shape.k <= two)
    if shape.k >= dispatch.GEMV_MANY_MIN_K:
        few = dispatch.GEMV_MANY_PRODUCTS // (shape.n * shape.k)
        gemv = max(gemv, min(dispatch.GEMV_MAX_M, few))
    if shape.n == 1:
        gemv = 0
    small = shape.n * shape.k < dispatch.DECODE_SMALL
    tall = shape.n >= dispatch.DECODE_TALL and shape.group_size >= 64
    border = dispatch.DECODE_SMALL_MAX_M if small else dispatch.DECODE_MAX_M * tall
    assert all(isinstance(at(m), GemvPlan) for m in range(1, gemv + 1))
    assert all(isinstance(at(m), DecodePlan) for m in range(gemv + 1, border + 1))
    assert isinstance(at(max(gemv, border) + 1), HopperPlan)
    assert isinstance(at(16384), HopperPlan)
    border = dispatch_act_quant.TILE_FINE_MAX_M
    rows = 1 + (2 * shape.n * shape.k <= dispatch.GEMV_INT8_PRODUCTS)
    if shape.k >= dispatch.GEMV_MANY_MIN_K:
        rows = max(rows, min(dispatch.GEMV_MAX_M, few))
    one = ActQuantDp4aPlan if shape.n == 1 else GemvPlan
    assert isinstance(at(1, "int8"), one)
    if shape.n > 1:
        assert all(isinstance(at(m, "int8"), GemvPlan) for m in range(1, rows + 1))
        assert all(isinstance(at(m, "int8"), Int8Plan) for m in range(rows + 1, border + 1))
    assert isinstance(at(border + 1, "int8"), ActQuantHopperPlan)


@given(
    st.integers(1, 600),
    st.integers(8, 300_000),
    st.integers(1, 60_000),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([None, 32, 128]),
    st.booleans(),
    st.sampled_from(ARCHES),
)
def test_a_row_by_row_product_takes_the_fewest_rounds_and_steps(
    items, n, k, group_size, act_group_size, symmetric, arch
):
    groups = dict(symmetric=symmetric, act_group_size=act_group_size)
    p = plan_gemv(items, n, k, group_size, arch, **groups)
    # what takes registers: zero points, or several scales for a thread's chunk of COALESCED words
    more = not symmetric or (group_size < 128 and act_group_size is None)

    def cost(warps):
        programs = items * math.ceil(n / p.rows)
        rounds = math.ceil(programs * warps / (warps_per_sm(more, False) * arch.num_sms))
        return rounds * (math.ceil(k / (warps * WARP_K)) + 1)

    fits = [warps for warps in (1, 2, 4, 8) if warps == 1 or warps * WARP_K <= k]
    assert p.num_warps in fits and cost(p.num_warps) == min(map(cost, fits))
    warps = items * math.ceil(n / p.rows) * p.num_warps
    if p.ahead:
        assert p.num_warps * WARP_K < k and warps <= warps_per_sm(more, True) * arch.num_sms


@pytest.mark.parametrize(
    "n,k,group_size,warps,ahead",
    [
        (4096, 4096, 128, 4, False),
        (8192, 8192, 128, 2, True),
        (28672, 4096, 128, 2, False),
        (57344, 8192, 128, 1, False),
        (4096, 14336, 128, 4, True),
        (14336, 4096, 128, 1, True),
        (9216, 2048, 128, 2, False),
        (43008, 5376, 32, 1, False),
        (5376, 21504, 32, 2, True),
        (5120, 2880, 32, 2, True),
        (2880, 4096, 32, 4, False),
    ],
)
def test_a_row_by_row_product_has_the_warps_that_were_fastest(n, k, group_size, warps, ahead):
    p = plan_gemv(1, n, k, group_size, H200)
    assert (p.num_warps, p.ahead) == (warps, ahead)


@pytest.mark.parametrize("n,k", [(8192, 8192), (4096, 14336)])
def test_zero_points_take_the_registers_of_weights_ahead(n, k):
    # us: 12.0 and 11.5; with weights ahead, in two rounds, 17.2 and 16.7
    for symmetric in (True, False):
        assert plan(Problem(1, n, k, 128, "bf16", symmetric), H200).ahead == symmetric


def test_what_the_row_by_row_kernel_does_not_take_is_decoded():
    def one(n=256, k=2048, group_size=128):
        return plan(Problem(1, n, k, group_size, "bf16"), H200)

    assert isinstance(one(), GemvPlan) and isinstance(one(k=720, group_size=720), GemvPlan)
    assert isinstance(one(group_size=16), DecodePlan)
    assert isinstance(one(n=7), DecodePlan) and isinstance(one(n=8), GemvPlan)
    assert isinstance(one(k=721, group_size=721), DecodePlan)
    assert not serves_gemv(1 << 18, 1 << 15, 128, H200)
    # int8 activations come 16 bytes at a time, and have a scale for each 32 to 128 of them
    assert serves_gemv(256, 1000, 1000, H200, 32) and not serves_gemv(256, 1004, 1004, H200, 32)
    assert not serves_gemv(256, 1024, 128, H200, -1)


def test_two_tokens_are_decoded_where_rows_are_few_or_very_many():
    m, small, tall = dispatch.DECODE_MAX_M, dispatch.DECODE_SMALL // 4096, dispatch.DECODE_TALL

    def at(n, m=m, group=64, arch=H200, batch=1):
        return plan(Problem(m, n, 4096, group, "bf16", batch=batch), arch)

    # more rows than the row-by-row kernel takes, which takes fewer still of more tokens
    many = dispatch.GEMV_PRODUCTS // 4096
    assert isinstance(at(small - 1, m + 1), DecodePlan) and isinstance(at(small, m + 1), HopperPlan)
    assert isinstance(at(many), HopperPlan) and isinstance(at(tall - 1), HopperPlan)
    assert isinstance(at(tall), DecodePlan) and isinstance(at(tall, m + 1), HopperPlan)
    assert isinstance(at(tall, group=32), HopperPlan)
    # wherever the tile kernel does not run
    assert isinstance(at(many, arch=A100), DecodePlan)
    assert isinstance(at(many, batch=2), DecodePlan)


def test_the_operand_order_follows_the_triton_release():
    problem = Problem(2, dispatch.DECODE_TALL, 4096, 128, "bf16")
    assert plan(problem, H200).kwidth == 4
    assert plan(problem, Arch((9, 0), 132, (3, 7))).kwidth == 4
    assert plan(problem, Arch((9, 0), 132, (3, 8))).kwidth == 2
    # wgmma wants its own order in every release
    assert plan(Problem(64, 4096, 4096, 16, "bf16"), H200).kwidth == 2
    assert plan(Problem(64, 4096, 4096, 128, "bf16"), A100).kwidth == 4


@given(st.integers(1, 300_000), st.integers(1, 200), st.integers(3, 8191))
def test_the_chosen_tile_is_the_one_with_the_least_predicted_time(n, blocks, m):
    problem = Problem(m, n, 128 * blocks, 128, "bf16")
    p = dispatch_hopper.plan_hopper(problem, H200)
    chosen = next(
        tile
        for tile in TILES
        if (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, tile.pipelined)
        == (p.block_m, p.block_n, p.num_warps, p.num_stages, p.pipelined)
    )
    us = predicted_us(problem, 132, chosen, p.split_k, p.programs, p.even)
    others = dispatch_hopper.candidates(problem, 132)
    assert us == min(predicted_us(problem, 132, *other) for other in others)
    # among them all tiles, not sliced, that are neither half empty nor far too small
    smallest = max(min(m, 64) / 2, min(m, 1024) / 8)
    fits = [tile for tile in TILES if smallest <= tile.block_m < 2 * max(m, 8)]
    fits = [tile for tile in fits if tile.coarse_slices == 1]
    assert us <= min(predicted_us(problem, 132, tile, 1, 0, False) for tile in fits)


@given(problems())
def test_hopper_serves_what_its_copies_can_read(problem):
    served = dispatch_hopper.serves(problem, H200)
    whole_row = problem.group_size == problem.k
    readable = problem.k % 8 == 0 and (problem.group_size >= 32 or whole_row)
    assert served == (problem.batch == 1 and readable)
    for other in (A100, Arch((12, 0), 170, (3, 9))):
        assert not dispatch_hopper.serves(problem, other)
    if problem.act != "int8":
        assert served or not isinstance(plan(problem, H200), HopperPlan)


@given(st.integers(1, 300_000), st.integers(1, 300), st.integers(1, 8191))
def test_slices_are_few_enough(n, blocks, m):
    p = dispatch_hopper.plan_hopper(Problem(m, n, 128 * blocks, 128, "bf16"), H200)
    assert p.split_k in dispatch_hopper.SPLITS
    assert p.split_k == 1 or blocks >= dispatch_hopper.MIN_STEPS * p.split_k
    # no tile of which more than half would be empty
    assert p.block_m < 2 * max(m, 8)
    # programs that share tiles fill the card
    assert p.programs % 132 == 0


@pytest.mark.parametrize(
    "k, group_size, shared", [(5376, 32, True), (2880, 32, False), (2888, 2888, True)]
)
def test_tiles_without_registers_for_ragged_fine_groups_are_not_shared(k, group_size, shared):
    p = Problem(m=96, n=43008, k=k, group_size=group_size, act="bf16")
    found = dispatch_hopper.candidates(p, 132)
    shapes = {(c.tile.block_m, c.tile.block_n) for c in found if c.programs}
    assert (dispatch_hopper.NO_ZERO_POINTS in shapes) == shared
    assert (64, 128) in shapes


def test_programs_share_no_more_steps_than_they_count():
    # of a card with many multiprocessors
    arch = Arch(capability=(9, 0), num_sms=1000, triton=(3, 6))
    long, longer = (Problem(8, 1 << 20, k, 128, "bf16") for k in (1 << 13, 1 << 15))
    shared = [c.programs for c in dispatch_hopper.candidates(long, arch.num_sms)]
    assert any(shared)
    assert not any(c.programs for c in dispatch_hopper.candidates(longer, arch.num_sms))


def test_finer_scales_cost_time_and_nothing_is_faster_than_the_read():
    for tile in TILES:
        coarse, fine = (Problem(512, 8192, 8192, group, "bf16") for group in (128, 32))
        assert predicted_us(coarse, 132, tile, 1, 0, False) <= predicted_us(
            fine, 132, tile, 1, 0, False
        )
        one = Problem(1, 100_000, 8192, 128, "bf16")
        read_us = one.n * one.k * (0.5 + 2 / 128) / dispatch_hopper.READ_BYTES
        # on a card of any number of multiprocessors
        assert predicted_us(one, 100_000, tile, 1, 0, False) == read_us


def test_predicted_time_grows_with_each_size():
    def us(m: int, n: int, k: int) -> float:
        problem = Problem(m, n, k, 128, "bf16")
        return min(predicted_us(problem, 132, tile, 1, 0, False) for tile in TILES)

    sizes = (128, 512, 2048, 8192)
    for m, n, k in itertools.product(sizes, sizes, sizes):
        assert us(m, n, k) <= us(2 * m, n, k)
        assert us(m, n, k) <= us(m, 2 * n, k)
        assert us(m, n, k) < us(m, n, 2 * k)


def test_a_device_without_kernels_runs_the_reference():
    assert plan(Problem(1, 4096, 4096, 128, "bf16"), T4) == ReferencePlan()


def test_the_workspace_stays_within_its_bytes():
    for shape in DENSE_SHAPES:
        p = plan(Problem(dispatch.DEQUANT_FROM_M, shape.n, shape.k, shape.group_size, "bf16"), A100)
        assert isinstance(p, DequantPlan)
        if p.rows > 256:
            assert p.rows * shape.k * 2 <= dispatch.WORKSPACE_BYTES
