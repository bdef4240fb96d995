"""benchmarks/tune_int8.py without a GPU: what it would time, and what its rows say of the rule."""

from __future__ import annotations

import csv

import pytest

from benchmarks import rows, tune_int8
from w4tensor import dispatch_int8
from w4tensor.dispatch import Arch
from w4tensor.testing import DENSE_SHAPES

H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
COMMITTED = rows.RESULTS / "tune_int8.csv"


@pytest.mark.parametrize("act", [-1, 128])
def test_what_dispatch_chooses_is_timed_and_choices_differ_as_they_are_written(act):
    for shape in DENSE_SHAPES:
        for m in (8, 96, 512, 4096):
            group = 128 if shape.k % 128 == 0 else shape.k
            p = tune_int8.Point(shape.n, shape.k, group, act, m).problem
            choices = list(dispatch_int8.candidates(p, H200.num_sms))
            assert dispatch_int8.best(p, H200.num_sms) in choices, p
            written = {(tile.name, *cut) for tile, *cut in choices}
            assert len(written) == len(choices), p
            plans = {dispatch_int8.plan_of(p, H200, *choice) for choice in choices}
            assert dispatch_int8.plan_int8(p, H200) in plans, p


@pytest.mark.parametrize(
    "with_w4a16,count,measured,high,most",
    [(True, 203, 182, 1.066, 1.121), (False, 91, 88, 1.051, 1.143)],
)
def test_the_rule_loses_what_its_description_says(with_w4a16, count, measured, high, most):
    points, found = tune_int8.losses(COMMITTED, 132, with_w4a16)
    assert (points, len(found)) == (count, measured)
    assert found[len(found) // 2] < 1.0005
    assert found[int(0.95 * len(found))] == pytest.approx(high, abs=5e-4)
    assert found[-1] == pytest.approx(most, abs=5e-4)


def test_a_loss_is_the_choice_over_the_best(tmp_path):
    p = tune_int8.Point(4096, 14336, 128, -1, 1024)
    tile, split_k, whole = dispatch_int8.best(p.problem, 132)
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(tune_int8.FIELDS)
        writer.writerow([*p, tile.name, split_k, whole, 30, "", "", 40])
        writer.writerow([*p, "other", 1, 0, 20, "", "", 40])
        # of another run, and of no int8 tile
        writer.writerow([*p, "other", 1, 0, 10, 1, 1, 40])
        writer.writerow([*p._replace(m=8), "", 0, 0, 10, "", "", 40])
    assert tune_int8.losses(path, 132, False) == (1, [1.5])
    assert tune_int8.losses(path, 132, True) == (1, [])
