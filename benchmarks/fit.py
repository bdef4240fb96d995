"""Fit the constants of dispatch_hopper.py to the rows of benchmarks/results/tune.csv.

    python -m benchmarks.fit
    python -m benchmarks.fit --leave-out

The first starts at the constants that stand there and prints others, to be pasted, and what both
choices lose to the best measured plan of any kind. The second fits without each shape in turn, from
a start that knows no shape, and says what the choice loses on that shape.

A point counts if dispatch takes a tile there and one was measured; the choice is made among all
candidates of dispatch_hopper.py. To the fit one without a row is UNMEASURED times as slow as the
best plan; what is printed counts it apart. Of a plan with and without pdl the faster row counts.

With p the predicted time of a candidate, t the measured one and b the best of the point, the fit
lowers

    mean over points of r + TAIL * r^2,  r = sum of w * log(t / b),  w = softmax(-log(p) / tau)
    + CLOSE * mean over candidates of |log(p / t)|, weighted by (b / t)^4, up to FAR
    + PULL * sum over constants of log(constant / start)^2

by gradient descent (Adam) in the constants' logarithms, with tau and the steps growing smaller.
Nothing in it is random.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import rows, tune
from w4tensor import dispatch, dispatch_hopper
from w4tensor.dispatch import Arch
from w4tensor.dispatch_hopper import LARGE_M, NEAR_BYTES, TILES, Candidate, HopperPlan

H200 = Arch(capability=(9, 0), num_sms=132, triton=(3, 6))
# the module's constants, and where a fit begins that knows no shape
NAMED = {
    "FILL": 3.0,
    "ADD_SLICE": 0.3,
    "ADD_PART": 1.5,
    "ADD_EVEN": 1.0,
    "READ_BYTES": 4.2e6,
    "READ_FINE_BYTES": 3.5e6,
    "L2_BYTES": 90e3,
    "L2_FAR_BYTES": 80e3,
    "FINE_ALONE": 0.1,
    "FINE_SHARED": 0.01,
    "FINE_LARGE": 0.1,
}
STEPS = 1000
UNMEASURED = 1.1
TAIL = 16
CLOSE = 0.12
FAR = 0.4
PULL = 5e-4
# the first and the last
TAU = 0.06, 0.01
RATE = 0.03
# of a constant's logarithm, to see what it changes
NUDGE = 1e-5

BLOCK_M, BLOCK_N, RESIDENT = (
    np.array([getattr(tile, name) for tile in TILES], float)
    for name in ("block_m", "block_n", "resident")
)


class Constants(NamedTuple):
    """alone, shared: of each tile. named: in NAMED's order."""

    alone: np.ndarray
    shared: np.ndarray
    named: np.ndarray

    @classmethod
    def present(cls) -> Constants:
        """What stands in dispatch_hopper.py."""
        alone, shared = (np.array([getattr(t, name) for t in TILES]) for name in cls._fields[:2])
        return cls(alone, shared, np.array([getattr(dispatch_hopper, name) for name in NAMED]))

    @classmethod
    def rough(cls) -> Constants:
        """A start that knows no shape: a step takes as long as its products."""
        products = BLOCK_M * BLOCK_N / 32768
        return cls(0.3 + products, 0.15 + products, np.array(list(NAMED.values())))

    @classmethod
    def of_logs(cls, logs: np.ndarray) -> Constants:
        alone, shared, named = np.split(np.exp(logs), (len(TILES), 2 * len(TILES)))
        # a program that is never with another has one cost
        return cls(alone, np.where(RESIDENT > 1, shared, alone), named)


class Table:
    """The candidates of points; an array has a place for each, or for each point.

    Fields:
        point, tile: indices of `points` and of TILES.
        split_k, programs, even: as HopperPlan has them.
        us: measured, nan if it was not.
        n, k, group_size, m: of the candidate's point.
        best: of each point, us of the fastest plan of any kind.
    """

    def __init__(self, measured: Mapping[tune.Point, Mapping[str, float]]) -> None:
        self.points = list(measured)
        found = []
        for i, (p, times) in enumerate(measured.items()):
            for choice in dispatch_hopper.candidates(p.problem, H200.num_sms):
                tile, *how = choice
                found.append((i, TILES.index(tile), *how, _measured_us(times, choice)))
        self.point, self.tile, self.split_k, self.programs, self.even, self.us = map(
            np.array, zip(*found, strict=True)
        )
        self.best = np.array([min(times.values()) for times in measured.values()])
        sizes = [(p.n, p.k, p.group_size, p.m) for p in self.points]
        self.n, self.k, self.group_size, self.m = np.array(sizes).T[:, self.point]

    @classmethod
    def read(cls, path: Path) -> Table:
        """Of the points where dispatch takes a tile and a tile was measured."""
        return cls(
            {
                p: {plan: us for plan, (us, _) in times.items()}
                for p, times in tune.read(path).items()
                if isinstance(dispatch.plan(p.problem, H200), HopperPlan)
                and any(plan.startswith("hopper ") for plan in times)
            }
        )


def _measured_us(times: Mapping[str, float], choice: Candidate) -> float:
    """With or without pdl, whichever is faster; nan without a row."""
    plans = (dispatch_hopper.plan_of(*choice, pdl=pdl) for pdl in (False, True))
    return min((times[w] for w in map(tune.written, plans) if w in times), default=np.nan)


def predicted_us(table: Table, constants: Constants) -> np.ndarray:
    """dispatch_hopper.predicted_us of every candidate (a test compares them)."""
    t, named = table, dict(zip(NAMED, constants.named, strict=True))
    block_m, block_n, resident = BLOCK_M[t.tile], BLOCK_N[t.tile], RESIDENT[t.tile]
    fine, large = t.group_size < 128, block_m >= LARGE_M
    fine_alone = np.where(large, named["FINE_LARGE"], named["FINE_ALONE"])
    fine_shared = np.where(large, named["FINE_LARGE"], named["FINE_SHARED"])
    alone = constants.alone[t.tile] + fine * fine_alone
    shared = constants.shared[t.tile] + fine * fine_shared
    full = np.maximum(alone, resident * shared)
    tiles = np.ceil(t.n / block_n) * np.ceil(t.m / block_m)
    rounds, rest = np.divmod(tiles * t.split_k, resident * H200.num_sms)
    last = np.maximum(alone, np.ceil(rest / H200.num_sms) * shared)
    per_step = rounds * full + (rest > 0) * last
    steps = np.ceil(t.k / 128)
    us = np.where(
        t.even,
        tiles * steps / np.maximum(t.programs, 1) * full,
        np.ceil(steps / t.split_k) * per_step,
    )
    us += named["FILL"] * np.where(t.programs > 0, full, per_step)
    weight_bytes = 0.5 + 2 / t.group_size
    l2_bytes = tiles * t.k * (2 * block_m + weight_bytes * block_n)
    far = 2 * t.m * t.k > NEAR_BYTES
    rate = np.where(far, named["L2_FAR_BYTES"], named["L2_BYTES"])
    us = np.maximum(us, named["FILL"] * alone + l2_bytes / (rate * H200.num_sms))
    sums = np.where(t.even, t.programs, (t.split_k > 1) * tiles * t.split_k)
    us += named["ADD_PART"] * sums / H200.num_sms * block_m * block_n / 4096
    us += np.where(t.even, named["ADD_EVEN"], (t.split_k > 1) * named["ADD_SLICE"] * t.split_k)
    read_bytes = np.where(fine, named["READ_FINE_BYTES"], named["READ_BYTES"])
    return np.maximum(us, t.n * t.k * weight_bytes / read_bytes)


def choices(table: Table, constants: Constants) -> np.ndarray:
    """The candidate that each point gets."""
    order = np.lexsort((predicted_us(table, constants), table.point))
    return order[np.unique(table.point[order], return_index=True)[1]]


def losses(table: Table, constants: Constants) -> np.ndarray:
    """Of each point, the choice's time over the best plan's; nan where the choice has no row."""
    return table.us[choices(table, constants)] / table.best


def fit(table: Table, start: Constants, steps: int, counts: np.ndarray | None = None) -> Constants:
    """What so many steps end with; `counts` says which points count, all if it is not given."""
    weight = np.ones(len(table.points)) if counts is None else counts.astype(float)
    first = logs = np.log(np.concatenate(start))
    mean, square = np.zeros_like(logs), np.zeros_like(logs)
    for step in range(steps):
        done = step / steps
        tau = TAU[0] * (TAU[1] / TAU[0]) ** done
        slope = _slope(table, logs, weight / weight.sum(), tau) + 2 * PULL * (logs - first)
        mean += 0.1 * (slope - mean)
        square += 0.01 * (slope**2 - square)
        moved = mean / (1 - 0.9 ** (step + 1)) / np.sqrt(square / (1 - 0.99 ** (step + 1)) + 1e-16)
        logs = logs - RATE * (1 - done) * moved
    return Constants.of_logs(logs)


def _slope(t: Table, logs: np.ndarray, weight: np.ndarray, tau: float) -> np.ndarray:
    """The derivative of what the fit lowers (above), PULL's term apart, by each logarithm."""
    us = np.log(predicted_us(t, Constants.of_logs(logs)))
    by_us = _slope_of_predictions(t, us, weight, tau)

    def changes(which: slice) -> np.ndarray:
        nudged = logs.copy()
        nudged[which] += NUDGE
        return by_us * (np.log(predicted_us(t, Constants.of_logs(nudged))) - us) / NUDGE

    # a candidate has one tile: what all tiles' constants change is seen at once
    n = len(TILES)
    of_tiles = [np.bincount(t.tile, changes(s), n) for s in (slice(n), slice(n, 2 * n))]
    of_named = [changes(slice(i, i + 1)).sum() for i in range(2 * n, len(logs))]
    return np.concatenate([*of_tiles, of_named])


def _slope_of_predictions(t: Table, us: np.ndarray, weight: np.ndarray, tau: float) -> np.ndarray:
    """The same by each candidate's predicted logarithm, `us`."""
    n = len(t.points)
    has_row = ~np.isnan(t.us)
    loss = np.where(has_row, np.log(t.us / t.best[t.point]), np.log(UNMEASURED))
    least = np.full(n, np.inf)
    np.minimum.at(least, t.point, us)
    share = np.exp((least[t.point] - us) / tau)
    share /= np.bincount(t.point, share, n)[t.point]
    r = np.bincount(t.point, share * loss, n)
    by_r = weight * (1 + 2 * TAIL * r)
    near = weight[t.point] * has_row * np.exp(-4 * loss)
    off = np.where(has_row, us - np.log(t.us), 0)
    # rounded off at 1 %
    closer = near / near.sum() * np.clip(off / 0.01, -1, 1) * (abs(off) < FAR)
    return by_r[t.point] * share * (r[t.point] - loss) / tau + CLOSE * closer


def _digits(value: float) -> str:
    for unit, zeros in ((1e6, "e6"), (1e3, "e3")):
        if value >= unit:
            return f"{value / unit:.3f}{zeros}"
    # three decimals, and more where they would be less than two digits
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def rounded(constants: Constants) -> Constants:
    """To the digits that are written."""
    return Constants(*(np.array([float(_digits(v)) for v in part]) for part in constants))


def written(constants: Constants) -> str:
    """As dispatch_hopper.py has them."""
    lines = ["TILES = ("]
    for tile, alone, shared in zip(TILES, constants.alone, constants.shared, strict=True):
        fields = f"{tile.block_m}, {tile.block_n}, {tile.num_warps}, {tile.num_stages}, "
        fields += f"resident={tile.resident}" if tile.pipelined else f"{tile.resident}"
        fields += f", alone={_digits(alone)}, shared={_digits(shared)}"
        fields += "" if tile.pipelined else ", pipelined=False"
        fields += f", coarse_slices={tile.coarse_slices}" if tile.coarse_slices > 1 else ""
        fields += ", shares=True" if tile.shares else ""
        lines.append(f"    HopperTile({fields}),")
    named = zip(NAMED, constants.named, strict=True)
    return "\n".join([*lines, ")", *(f"{name} = {_digits(value)}" for name, value in named)])


def summary(lost: np.ndarray) -> str:
    """Of losses()."""
    known = np.sort(lost[~np.isnan(lost)])
    if not len(known):
        return f"none of {len(lost)} choices measured"
    middle, high = known[len(known) // 2], known[int(len(known) * 0.95)]
    text = f"{middle:.3f} median, {high:.3f} at 95 %, {known[-1]:.3f} at most"
    return f"{text}, {len(known)} choices measured and {len(lost) - len(known)} not"


def leave_out(table: Table, steps: int) -> np.ndarray:
    """losses() of the fits without each point's shape; prints a line a shape."""
    shapes = [p[:3] for p in table.points]
    lost = np.empty(len(shapes))
    for shape in dict.fromkeys(shapes):
        outside = np.array([other == shape for other in shapes])
        constants = rounded(fit(table, Constants.rough(), steps, ~outside))
        lost[outside] = losses(table, constants)[outside]
        print(f"{'x'.join(map(str, shape))}: {summary(lost[outside])}", flush=True)
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each fit")
    parser.add_argument("--leave-out", action="store_true", help="fit without each shape")
    options = parser.parse_args()
    table = Table.read(rows.RESULTS / "tune.csv")
    if options.leave_out:
        print(f"left out: {summary(leave_out(table, options.steps))}")
        return
    constants = rounded(fit(table, Constants.present(), options.steps))
    print(written(constants))
    print(f"# before: {summary(losses(table, Constants.present()))}")
    print(f"# after: {summary(losses(table, constants))}")


if __name__ == "__main__":
    main()
