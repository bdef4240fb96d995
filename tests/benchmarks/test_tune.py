"""benchmarks/tune.py without a GPU: what it would time, and what it reads from its rows."""

from __future__ import annotations

import csv
import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks import rows, tune
from w4tensor import dispatch
from w4tensor.dispatch import Arch, DequantPlan, GemmPlan
from w4tensor.dispatch_hopper import HopperPlan
from w4tensor.testing import DENSE_SHAPES, TOKENS

H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
A100 = Arch(capability=(8, 0), num_sms=108, triton=(3, 6))


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=lambda s: s.name)
def test_what_dispatch_chooses_is_timed(shape):
    for m in TOKENS:
        p = tune.Point(shape.n, shape.k, shape.group_size, "symmetric", m)
        assert dispatch.plan(p.problem, H200) in tune.candidates(p, H200), p


@given(
    st.integers(1, 300_000),
    st.integers(1, 200),
    st.integers(1, 10_000),
    st.sampled_from([16, 32, 128]),
    st.sampled_from(["symmetric", "integer"]),
    st.sampled_from([H200, A100]),
)
@example(256, 1, 1024, 128, "symmetric", H200)
def test_candidates_are_all_different_and_can_be_written(n, blocks, m, group_size, zero, target):
    p = tune.Point(n, 128 * blocks, group_size, zero, m)
    plans = tune.candidates(p, target)
    assert dispatch.plan(p.problem, target) in plans
    assert len(plans) == len(set(plans)) == len(set(map(tune.written, plans)))


def test_several_tiles_and_slices_are_timed_at_every_number_of_tokens():
    for m in (3, 16, 64, 256, 1024, 4096):
        plans = tune.candidates(tune.Point(4096, 4096, 128, "symmetric", m), H200)
        tiles = {(p.block_m, p.block_n) for p in plans if isinstance(p, HopperPlan)}
        assert len(tiles) >= 2, m
        assert any(isinstance(p, DequantPlan) for p in plans) is (m >= 1024), m


def test_rows_have_the_fields_that_plans_have():
    # or no choice would be found among them
    with (rows.RESULTS / "tune.csv").open() as lines:
        for row in csv.DictReader(lines):
            named = [field.partition("=")[0] for field in row["plan"].split()]
            fields = dataclasses.fields(tune.KINDS[row["kind"]])
            assert sorted(named) == sorted(field.name for field in fields), row


def write(path, points):
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(tune.FIELDS)
        writer.writerows(
            [*point, us, 5.0, bf16_us, "1e-3", *plan] for point, us, bf16_us, plan in points
        )


@pytest.fixture
def three_rows(tmp_path):
    """What dispatch takes at 64 tokens, a faster plan there, and another's at 16."""
    at64 = tune.Point(4096, 4096, 128, "symmetric", 64)
    at16 = at64._replace(m=16, zero="integer")
    chosen = tune.written(dispatch.plan(at64.problem, H200)).split(" ", 1)
    best = tune.written(HopperPlan(8, 64, 4, 4, 6)).split(" ", 1)
    gemm = tune.written(GemmPlan(64, 64, 8, 1, False, 2, 4, 3)).split(" ", 1)
    path = tmp_path / "tune.csv"
    write(path, [(at64, 12.0, 14.0, chosen), (at64, 10.0, 14.0, best), (at16, 9.0, 11.5, gemm)])
    return path, at64, at16


def test_rows_are_read_by_point_and_plan(three_rows):
    path, at64, at16 = three_rows
    points = tune.read(path)
    assert list(points) == [at64, at16]
    chosen = tune.written(dispatch.plan(at64.problem, H200))
    assert points[at64][chosen] == (12.0, 14.0) and len(points[at64]) == 2
    assert list(points[at16].values()) == [(9.0, 11.5)]
    assert next(iter(points[at16])).startswith("gemm block_m=64")


def test_regret_is_the_choice_over_the_best(three_rows, capsys):
    path, at64, _ = three_rows
    tune.regret(path, H200)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4096x4096x128 symmetric M=64: 12.0 = 1.20 x best 10.0 (bf16 14.0)"
    assert lines[1].split("chosen ")[1] == tune.written(dispatch.plan(at64.problem, H200))
    # without a row of the choice there is nothing to compare
    assert lines[3] == "4096x4096x128 integer M=16: not measured: best 9.0 (bf16 11.5)"
    assert lines[6].startswith("1 points, loss: 1.200 median")


def test_rows_are_added_until_time_is_out(tmp_path, capsys):
    path = tmp_path / "rows.csv"

    def one(p, writer):
        writer.writerow([p, 2 * p])

    tune.tune_all([1, 2], one, path, ["p", "us"], deadline=float("inf"))
    tune.tune_all([3], one, path, ["p", "us"], deadline=float("inf"))
    tune.tune_all([4], one, path, ["p", "us"], deadline=0.0)
    assert path.read_text() == "p,us\n1,2\n2,4\n3,6\n"
    assert capsys.readouterr().out == "no time for 4\n"
