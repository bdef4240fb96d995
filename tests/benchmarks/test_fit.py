"""benchmarks/fit.py: its predictions are the rule's, and its constants choose better."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import fit, rows, tune
from benchmarks.fit import H200, Constants, Table
from w4tensor import dispatch_hopper
from w4tensor.dispatch_hopper import TILES, HopperTile


@pytest.fixture(scope="module")
def measured():
    return Table.read(rows.RESULTS / "tune.csv")


def disturbed(constants: Constants) -> Constants:
    noise = np.random.default_rng(0)
    alone, shared, named = (part * np.exp(noise.normal(0, 0.4, len(part))) for part in constants)
    return Constants(alone, np.where(fit.RESIDENT > 1, shared, alone), named)


def stand(monkeypatch, constants: Constants) -> tuple[HopperTile, ...]:
    """Put constants into dispatch_hopper.py; its tiles."""
    for name, value in zip(fit.NAMED, constants.named, strict=True):
        monkeypatch.setattr(dispatch_hopper, name, value)
    tiles = tuple(
        dataclasses.replace(tile, alone=alone, shared=shared)
        for tile, alone, shared in zip(TILES, constants.alone, constants.shared, strict=True)
    )
    monkeypatch.setattr(dispatch_hopper, "TILES", tiles)
    return tiles


def by_the_rule(p: tune.Point) -> dict[str, float]:
    """Times of all candidates as the rule predicts them, as rows have them."""
    times = {}
    for choice in dispatch_hopper.candidates(p.problem, H200.num_sms):
        us = dispatch_hopper.predicted_us(p.problem, H200.num_sms, *choice)
        times[tune.written(dispatch_hopper.plan_of(*choice, pdl=False))] = us
    return times


@pytest.fixture(scope="module")
def points():
    shapes = ((4096, 4096, 128), (28672, 4096, 128), (5376, 8192, 32), (1024, 2048, 128))
    return [tune.Point(*s, "symmetric", m) for s in shapes for m in (8, 16, 48, 64, 192, 512)]


# as they stand, in disorder, and where bytes decide
@pytest.mark.parametrize(
    "constants",
    [
        Constants.present(),
        disturbed(Constants.present()),
        Constants.present()._replace(named=Constants.present().named / 3),
    ],
    ids=["present", "disturbed", "slow"],
)
def test_predictions_and_choices_are_the_rules(measured, constants, monkeypatch):
    t = measured
    tiles = stand(monkeypatch, constants)
    expected = [
        dispatch_hopper.predicted_us(t.points[point].problem, H200.num_sms, tiles[tile], *cut)
        for point, tile, *cut in zip(t.point, t.tile, t.split_k, t.programs, t.even, strict=True)
    ]
    np.testing.assert_allclose(fit.predicted_us(t, constants), expected, rtol=1e-9)
    for p, chosen in zip(t.points, fit.choices(t, constants), strict=True):
        plan = dispatch_hopper.plan_hopper(p.problem, H200)
        tile = tiles[t.tile[chosen]]
        assert (plan.block_m, plan.block_n, plan.num_stages, plan.pipelined) == (
            tile.block_m,
            tile.block_n,
            tile.num_stages,
            tile.pipelined,
        )
        how = t.split_k[chosen], t.programs[chosen], t.even[chosen]
        assert (plan.split_k, plan.programs, plan.even) == how


def test_every_row_of_a_candidate_is_found(measured):
    found = np.zeros(len(measured.points), int)
    np.add.at(found, measured.point, ~np.isnan(measured.us))
    times = tune.read(rows.RESULTS / "tune.csv")
    for p, n in zip(measured.points, found, strict=True):
        written = {plan.replace("pdl=True", "pdl=False") for plan in times[p]}
        assert n == len(written & by_the_rule(p).keys()), p
    assert found.sum() > 1000


def test_the_faster_row_counts_and_the_best_is_of_any_kind():
    p = tune.Point(4096, 4096, 128, "symmetric", 64)
    one, other, *_ = by_the_rule(p)
    faster = one.replace("pdl=False", "pdl=True")
    t = Table({p: {one: 12.0, faster: 11.0, other: 13.0, "gemm block_m=64": 10.0}})
    assert sorted(t.us[~np.isnan(t.us)]) == [11.0, 13.0] and list(t.best) == [10.0]
    lost = fit.losses(t, Constants.present())
    assert np.isnan(lost) or lost in (1.1, 1.3)


def test_a_fit_finds_what_the_rows_were_made_of(points):
    t = Table({p: by_the_rule(p) for p in points})
    np.testing.assert_array_equal(fit.losses(t, Constants.present()), 1)
    start = disturbed(Constants.present())
    fitted = fit.fit(t, start, steps=200)
    before, after = fit.losses(t, start), fit.losses(t, fitted)
    assert before.mean() > 1.05 and after.mean() < 1.01
    before, after = (abs(np.log(fit.predicted_us(t, c) / t.us)).mean() for c in (start, fitted))
    assert after < before / 3


def test_rows_that_do_not_count_change_nothing(points):
    times = {p: by_the_rule(p) for p in points}
    counts = np.array([p.n != 28672 for p in points])
    others = {
        p: {plan: us if p.n != 28672 else 100 / us for plan, us in plans.items()}
        for p, plans in times.items()
    }
    one, other = (fit.fit(Table(t), Constants.rough(), 20, counts) for t in (times, others))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_shape_is_left_out_once(points, monkeypatch, capsys):
    fitted_without = []

    def without(table, start, steps, counts):
        fitted_without.append({p[:3] for p, n in zip(table.points, counts, strict=True) if not n})
        assert steps == 7 and all(map(np.array_equal, start, Constants.rough()))
        return Constants.present()

    monkeypatch.setattr(fit, "fit", without)
    t = Table({p: by_the_rule(p) for p in points})
    np.testing.assert_array_equal(fit.leave_out(t, 7), fit.losses(t, Constants.present()))
    assert fitted_without == [{shape} for shape in dict.fromkeys(p[:3] for p in points)]
    assert capsys.readouterr().out.startswith("4096x4096x128: 1.000 median, 1.000 at 95 %")


def test_what_is_printed_can_be_pasted():
    constants = fit.rounded(disturbed(Constants.present()))
    read: dict = {"HopperTile": HopperTile}
    exec(fit.written(constants), read)
    np.testing.assert_array_equal([tile.alone for tile in read["TILES"]], constants.alone)
    np.testing.assert_array_equal([tile.shared for tile in read["TILES"]], constants.shared)
    np.testing.assert_array_equal([read[name] for name in fit.NAMED], constants.named)
    as_they_stand: dict = {"HopperTile": HopperTile}
    exec(fit.written(Constants.present()), as_they_stand)
    assert as_they_stand["TILES"] == TILES


def test_choices_without_a_row_are_counted_apart():
    text = fit.summary(np.array([1.2, np.nan, 1.0, 1.0, np.nan]))
    assert text.startswith("1.000 median, 1.200 at 95 %, 1.200 at most, 3 choices measured and 2")
    assert fit.summary(np.array([np.nan])) == "none of 1 choices measured"


@pytest.mark.parametrize("value", [3.2e-4, 0.0442, 1.354, 227.0, 99.655e3, 4.366e6])
def test_constants_are_written_with_digits(value):
    assert abs(float(fit._digits(value)) / value - 1) < 0.02
