"""benchmarks/tune_integer.py without a GPU: what it would time, what its rows say of the rule."""

from __future__ import annotations

import csv

import pytest

from benchmarks import rows, tune_integer
from w4tensor.dispatch import Arch
from w4tensor.dispatch_integer import plan_integer
from w4tensor.testing import DENSE_SHAPES

H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))


def test_what_dispatch_chooses_is_timed_first_and_plans_differ_as_they_are_written():
    for shape in DENSE_SHAPES:
        for m in (33, 96, 512, 4096):
            p = tune_integer.Point(shape.n, shape.k, shape.group_size, m)
            plans = tune_integer.plans(p, H200.num_sms)
            assert plans[0] == plan_integer(p.problem, H200), p
            assert len({tune_integer.written(plan) for plan in plans}) == len(plans), p


def test_the_rule_loses_what_its_description_says():
    points, found = tune_integer.losses(rows.RESULTS / "tune_integer.csv", H200)
    assert (points, len(found)) == (78, 75)
    assert found[len(found) // 2] < 1.0005
    assert found[int(0.95 * len(found))] == pytest.approx(1.078, abs=5e-4)
    assert found[-1] == pytest.approx(1.105, abs=5e-4)


def test_a_loss_is_the_choice_over_the_best(tmp_path):
    p = tune_integer.Point(4096, 14336, 128, 1024)
    chosen = tune_integer.written(plan_integer(p.problem, H200))
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(tune_integer.FIELDS)
        # the better of with overlap and without
        writer.writerow([*p, 30, "", "", 40, 0, chosen])
        writer.writerow([*p, 36, "", "", 40, 1, chosen])
        writer.writerow([*p, 20, "", "", 40, 1, "other"])
        writer.writerow([*p._replace(m=64), 10, "", "", 40, 1, "other"])
    assert tune_integer.losses(path, H200) == (2, [1.5])
