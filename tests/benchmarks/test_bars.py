"""Rows survive their file, and a bar fails when a row passes its limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import bars, rows
from w4tensor.testing import DENSE_SHAPES, MOE_SHAPES

SHAPE = next(shape for shape in DENSE_SHAPES if shape.name == "28672x4096")
RUN = dict(date="2026-01-01T00:00", gpu="x", torch="2", triton="3", ptxas="12", git="0")


def point(m=1, us=20.0, impl="w4tensor", act="bf16", **fields) -> rows.Point:
    known = dict(impl=impl, act=act, group=128, zero="symmetric", N=SHAPE.n, K=SHAPE.k, M=m, us=us)
    known |= dict(spread=0.01, read_us=16.0, bf16_us=60.0, rel_err=2e-3)
    return rows.Point(**RUN, **(known | fields))


def worst(points, start, make=bars.linear_bars) -> bars.Bar:
    return next(bar for bar in make(points) if bar.name.startswith(start))


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "new" / "linear.csv"
    written = [point(), point(m=17, us=1.25, plan="GemmPlan(block_m=32, block_n=64)")]
    for row in written:
        rows.append(path, row)
    assert rows.load(path, rows.Point) == written
    assert rows.load(tmp_path / "none.csv", rows.Point) == []


@pytest.mark.parametrize("us, kept", [(20.0, True), (21.0, False)])
def test_first_token_is_held_against_the_read(us, kept):
    # 1.30 x 16 us is 20.8 us
    bar = worst([point(us=us)], "M = 1, packed")
    assert bar.worst.value == us / 16 and bar.reaches(bar.must) is kept


@pytest.mark.parametrize("peer_us, kept", [(24.0, True), (22.0, False)])
def test_decode_is_held_against_the_best_peer(peer_us, kept):
    peers = [point(us=peer_us, impl="humming"), point(us=40.0, impl="tinygemm")]
    bar = worst([point(us=20.0), *peers], "M <= 64")
    assert bar.worst.value == peer_us / 20 and bar.reaches(bar.must) is kept


def test_a_wrong_result_is_no_peer():
    peers = [point(us=1.0, impl="gemlite", rel_err=0.7), point(us=30.0, impl="humming")]
    assert worst([point(us=20.0), *peers], "M <= 64").worst.value == 1.5


def test_a_cliff_between_two_tokens_shows():
    line = [point(m=16, us=20.0), point(m=17, us=19.0), point(m=24, us=30.0)]
    bar = worst(line, "time at M")
    assert bar.worst.value == 20 / 19 and bar.worst.where == "28672x4096, M=16 to 17"
    assert bar.reaches(bar.must) is False


def test_our_own_rows_are_compared_within_a_commit():
    with_zeros = point(us=30.0, zero="integer")
    old, new = point(us=25.0), replace(point(us=20.0), git="1")
    assert worst([with_zeros, old, new], "asymmetric").worst.value == 30 / 25
    assert worst([with_zeros, new], "asymmetric").cases == []


def test_the_newest_row_counts():
    assert worst([point(us=99.0), point(us=17.0)], "M = 1, packed").worst.value == 17 / 16


def test_a_bar_without_rows_is_not_kept():
    bar = worst([], "M = 1, packed")
    assert bar.reaches(bar.must) is None and "not measured" in bars.table("x", [bar])


def test_int8_without_quantising():
    def make(points):
        return bars.act_quant_bars(points, "int8g32")

    row = point(us=21.0, act="int8g32", quant_us=1.0)
    assert worst([row], "the same", make).worst.value == 20 / 16
    assert worst([row, point(us=30.0)], "any M", make).worst.value == 0.7


def test_experts_and_models():
    shape = MOE_SHAPES[0]
    fields = dict(N=2 * shape.inter, K=shape.hidden, E=shape.experts, top_k=8, routing="uniform")
    found = bars.moe_bars([point(us=14.5, **fields)])
    one = next(bar for bar in found if bar.name == f"{shape.name}, 1 tokens, us")
    assert one.worst.value == 14.5 and one.reaches(one.must) is False
    figure = dict(RUN, transformers="5", model="llama-3-8b", batch=1)
    rates = {"w4tensor": 950.0, "bf16": 1000.0}
    prefill = bars.model_bars(
        rows.Figure(**figure, impl=impl, figure="prefill_tok_s", value=rate)
        for impl, rate in rates.items()
    )
    bar = next(bar for bar in prefill if "llama-3-8b: prefill" in bar.name)
    assert bar.worst.value == 0.95 and bar.reaches(bar.must) is True
