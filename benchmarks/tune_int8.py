"""Time dispatch_int8's tiles in turn with bf16, and say what its rule loses to the best.

    python -m benchmarks.tune_int8 --shapes 4096x4096x128 --m 256,1024 --act=-1 --out tune_int8.csv
    python -m benchmarks.tune_int8 --regret benchmarks/results/tune_int8.csv

As benchmarks/tune.py does for W4A16: processes compile and check the tiles beforehand, then each
point's candidates and bf16 are replayed by turns. Times include quantising x. rounded_us and
w4a16_us, which earlier runs have, are left empty.
"""

from __future__ import annotations

import csv
import functools
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks import tune as tune_w4a16
from benchmarks.tune import CHECKED_K, CHECKED_ROWS
from w4tensor import arch, dispatch_int8
from w4tensor.dispatch import Arch, Problem
from w4tensor.dispatch_int8 import Int8Plan, Int8Tile
from w4tensor.kernels.int8_hopper import int8_hopper
from w4tensor.kernels.quantize_activation import quantize_activation
from w4tensor.layout import ACT_QUANT
from w4tensor.testing import random_codes, rel_err

FIELDS = "n k group_size act_group_size m tile split_k whole us rounded_us w4a16_us bf16_us".split()
# x in 8 bits against x as it is; and rows of an output that are compared
MAX_REL_ERR, COMPARED = 2e-2, 256

# a tile, slices of K and how many tiles are not cut: dispatch_int8.candidates()
Choice = tuple[Int8Tile, int, int]


class Point(NamedTuple):
    """One shape, one width of activation groups (-1: per token) and one number of tokens."""

    n: int
    k: int
    group_size: int
    act: int
    m: int

    @property
    def problem(self) -> Problem:
        sizes = self.m, self.n, self.k, self.group_size
        return Problem(*sizes, "int8", act_group_size=self.act)


def run(plan: Int8Plan, x: Tensor, weight: tuple[Tensor, Tensor], y: Tensor, p: Point) -> None:
    """y [1, M, N] of x [1, M, K] by `plan`; weight is qdata and scale."""
    early = dict(pdl=plan.pdl, overlap=plan.overlap)
    quantized = quantize_activation(x, p.act, None, **early)
    int8_hopper(*quantized, *weight, None, None, y, p.group_size, p.act, plan)


def _weight(n: int, k: int, group_size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(qdata, scale) of [1, n, ..] and the fp32 weight [n, k]."""
    codes = random_codes(1, n, k, group_size=group_size, device="cuda")
    return (ACT_QUANT.pack(codes.q), codes.scale), codes.dequantize()[0]


def _job(choice: Choice, p: Point) -> tuple[Int8Tile, bool, int, int]:
    """What compiles apart."""
    return choice[0], choice[1] > 1, p.group_size, p.act


def check(job: tuple[Int8Tile, bool, int, int]) -> tuple[tuple, str]:
    """Compile a tile and try it on a narrow weight: the job, and what was wrong with it."""
    tile, cut, group_size, act = job
    p = Point(CHECKED_ROWS, CHECKED_K, min(group_size, CHECKED_K), act, tile.block_m)
    try:
        weight, w = _weight(p.n, p.k, p.group_size)
        x = torch.randn(1, p.m, p.k, device="cuda", dtype=torch.bfloat16)
        y = torch.full((1, p.m, p.n), torch.nan, device="cuda", dtype=x.dtype)
        run(tile.plan(2 if cut else 1), x, weight, y, p)
        error = rel_err(y[0], x[0].double() @ w.double().T)
        return job, "" if error < MAX_REL_ERR else f"error {error:.1e}"
    except Exception as failure:
        return job, repr(failure)[:200]


def tune(p: Point, choices: list[Choice], target: Arch, writer) -> None:
    """Time `choices` on one point."""
    weight, w = _weight(p.n, p.k, p.group_size)
    n_copies = timing.n_copies(sum(t.nbytes for t in weight))
    copies = [tuple(t.clone() for t in weight) for _ in range(n_copies)]
    dense = [w.bfloat16() for _ in range(timing.n_copies(2 * p.n * p.k))]
    x = torch.randn(1, p.m, p.k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(1, p.m, p.n, device="cuda", dtype=torch.bfloat16)
    expected = x[0, :COMPARED].float() @ w.T
    plans = []
    for choice in choices:
        plan = dispatch_int8.plan_of(p.problem, target, *choice)
        y.fill_(torch.nan)
        run(plan, x, weight, y, p)
        error = rel_err(y[0, :COMPARED], expected)
        if error < MAX_REL_ERR:
            plans.append((choice, plan))
        else:
            print(p, choice, f"error {error:.1e}", flush=True)
    groups = [[functools.partial(torch.matmul, x[0], d.T) for d in dense]]
    groups += [[functools.partial(run, plan, x, c, y, p) for c in copies] for _, plan in plans]
    bf16, *times = timing.graph_times(groups, 0.015)
    for ((tile, split_k, whole), _), found in zip(plans, times, strict=True):
        row = (*p, tile.name, split_k, whole, f"{found.us:.2f}", "", "", f"{bf16.us:.2f}")
        writer.writerow(row)


def read(path: Path) -> dict[tuple[Point, bool], dict[tuple[str, int, int], float]]:
    """us of each choice, by its tile's name; of each point, and whether W4A16 was timed too.

    Rows without a tile are of other kernels.
    """
    points: dict[tuple[Point, bool], dict[tuple[str, int, int], float]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            if row["tile"]:
                p = Point(*(int(row[name]) for name in FIELDS[:5]))
                choice = row["tile"], int(row["split_k"]), int(row["whole"])
                points.setdefault((p, bool(row["w4a16_us"])), {})[choice] = float(row["us"])
    return points


def losses(path: Path, num_sms: int, with_w4a16: bool) -> tuple[int, list[float]]:
    """How many points a run has, and in order what the rule's choice takes, of the best choice's
    time, at those where it was measured."""
    found = []
    points = {p: times for (p, beside), times in read(path).items() if beside == with_w4a16}
    for p, times in points.items():
        tile, split_k, whole = dispatch_int8.best(p.problem, num_sms)
        us = times.get((tile.name, split_k, whole))
        if us is not None:
            found.append(us / min(times.values()))
    return len(points), sorted(found)


def main() -> None:
    tokens = "96,128,192,256,384,512,1024,2048,4096"
    parser = tune_w4a16.parser(__doc__, tokens, "tune_int8.csv")
    parser.add_argument("--act", default="-1", help="act_group_size, by commas; -1 is per token")
    options = parser.parse_args()
    if options.regret:
        for with_w4a16 in (True, False):
            count, found = losses(options.regret, 132, with_w4a16)
            if found:
                middle, high = found[len(found) // 2], found[int(len(found) * 0.95)]
                text = f"{middle:.3f} median, {high:.3f} at 95 %, {found[-1]:.3f} at most"
                print(f"{count} points, choice measured at {len(found)}, loss: {text}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune_int8 times kernels and needs a CUDA device (or --regret)")
    deadline = time.time() + options.seconds
    target = arch.current(torch.cuda.current_device())
    assert target is not None, "tuning needs a GPU"
    points = [
        Point(*map(int, shape.split("x")), int(act), int(m))
        for shape in options.shapes.split(",")
        for act in options.act.split(",")
        for m in options.m.split(",")
    ]
    choices = {p: list(dispatch_int8.candidates(p.problem, target.num_sms)) for p in points}
    tried = tune_w4a16.try_all(check, {_job(c, p): None for p in points for c in choices[p]})

    def tune_one(p: Point, writer) -> None:
        tune(p, [c for c in choices[p] if not tried[_job(c, p)]], target, writer)

    tune_w4a16.tune_all(points, tune_one, options.out, FIELDS, deadline)


if __name__ == "__main__":
    main()
