"""Time dispatch_integer's tiles in turn with what else serves, and say what its rule loses.

    python -m benchmarks.tune_integer --shapes 4096x4096x128 --m 256,1024 --out tune_integer.csv
    python -m benchmarks.tune_integer --regret benchmarks/results/tune_integer.csv

As benchmarks/tune.py does for W4A16: processes compile and check the tiles beforehand, then each
point's candidates are replayed by turns with bf16, W4A16, and the same weight without its multiples
(token_us). Times include quantising x. overlap: whether a tile starts while that still runs.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from benchmarks import tune as tune_w4a16
from benchmarks.tune import CHECKED_K, CHECKED_ROWS, COMPARED
from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, arch, dispatch_integer
from w4tensor.dispatch import Arch, Problem
from w4tensor.dispatch_hopper import HopperPlan, plan_of
from w4tensor.kernels.gemm_hopper import gemm_hopper
from w4tensor.kernels.quantize_activation import quantize_activation
from w4tensor.testing import Int4Codes, random_codes, rel_err

FIELDS = "n k group_size m us token_us w4a16_us bf16_us overlap plan".split()
# of x in 8 bits against x as it is
MAX_REL_ERR = 2e-2


class Point(NamedTuple):
    """One shape and one number of tokens."""

    n: int
    k: int
    group_size: int
    m: int

    @property
    def problem(self) -> Problem:
        sizes = self.m, self.n, self.k, self.group_size
        return Problem(*sizes, "int8", act_group_size=-1, integer_scales=True)


def plans(p: Point, num_sms: int) -> list[HopperPlan]:
    """What may serve a point, the best by the rule first."""
    choices = dispatch_integer.candidates(p.problem, num_sms)
    predicted = functools.partial(dispatch_integer.predicted_us, p.problem, num_sms)
    return [plan_of(*c, pdl=True) for c in sorted(choices, key=lambda c: predicted(*c))]


def written(plan: HopperPlan) -> str:
    """A plan as a row has it: its fields."""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(plan).items())


def _weight(n: int, k: int, group_size: int) -> tuple[Int4ActQuantTensor, Int4Codes]:
    codes = random_codes(n, k, group_size=group_size, device="cuda", integer_scales=True)
    fields = dict(group_size=group_size, act_group_size=-1, multiple=codes.multiple)
    return Int4ActQuantTensor.from_codes(codes.q, codes.scale, **fields), codes


def run(plan: HopperPlan, overlap: bool, x: Tensor, w: Int4ActQuantTensor, y: Tensor) -> None:
    """y [M, N] of x [M, K] by `plan`."""
    codes, x_scale, _ = quantize_activation(x[None], -1, None, pdl=plan.pdl, overlap=overlap)
    operands = w.qdata, w.scale, None, None, y, w.group_size, plan
    gemm_hopper(codes[0], *operands, w.multiple, x_scale[0, 0])


def _job(plan: HopperPlan, p: Point) -> tuple[HopperPlan, int, int]:
    """What compiles apart: of the narrow weight, fewer programs than tiles."""
    plan = dataclasses.replace(plan, split_k=min(plan.split_k, 2))
    if plan.programs:
        plan = dataclasses.replace(plan, programs=CHECKED_ROWS // plan.block_n - 1)
    return plan, p.group_size, min(p.m, plan.block_m)


def check(job: tuple[HopperPlan, int, int]) -> tuple[tuple, str]:
    """Compile a plan and try it on a narrow weight: the job, and what was wrong with it."""
    plan, group_size, m = job
    try:
        w, codes = _weight(CHECKED_ROWS, CHECKED_K, min(group_size, CHECKED_K))
        x = torch.randn(m, CHECKED_K, device="cuda", dtype=torch.bfloat16)
        y = torch.full((m, CHECKED_ROWS), torch.nan, device="cuda", dtype=x.dtype)
        run(plan, True, x, w, y)
        error = rel_err(y, x.double() @ codes.dequantize().double().T)
        return job, "" if error < MAX_REL_ERR else f"error {error:.1e}"
    except Exception as failure:
        return job, repr(failure)[:200]


def tune(p: Point, choices: list[HopperPlan], writer) -> None:
    """Time `choices`, each with and without overlap, on one point."""
    w, codes = _weight(p.n, p.k, p.group_size)
    n_copies = timing.n_copies(w.qdata.nbytes)
    copies = [w, *(w.clone() for _ in range(n_copies - 1))]
    without = [c._with(multiple=None) for c in copies]
    w4a16 = CudaCoalescedInt4Tensor.from_codes(codes.q, codes.scale, group_size=p.group_size)
    w4a16_copies = [w4a16, *(w4a16.clone() for _ in range(n_copies - 1))]
    weight = codes.dequantize()
    dense = [weight.bfloat16() for _ in range(timing.n_copies(2 * p.n * p.k))]
    x = torch.randn(p.m, p.k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(p.m, p.n, device="cuda", dtype=torch.bfloat16)
    expected = x[:COMPARED].float() @ weight.T
    del weight
    tried = []
    for plan in choices:
        y.fill_(torch.nan)
        run(plan, True, x, w, y)
        error = rel_err(y[:COMPARED], expected)
        if error < MAX_REL_ERR:
            tried += [(plan, True), (plan, False)]
        else:
            print(p, plan, f"error {error:.1e}", flush=True)
    groups = [[functools.partial(torch.matmul, x, d.T) for d in dense]]
    groups += [
        [functools.partial(F.linear, x, c) for c in many] for many in (w4a16_copies, without)
    ]
    groups += [[functools.partial(run, *how, x, c, y) for c in copies] for how in tried]
    bf16, w4a16_time, token, *times = timing.graph_times(groups, 0.012)
    others = [f"{found.us:.2f}" for found in (token, w4a16_time, bf16)]
    for (plan, overlap), found in zip(tried, times, strict=True):
        writer.writerow((*p, f"{found.us:.2f}", *others, int(overlap), written(plan)))


def read(path: Path) -> dict[Point, dict[str, float]]:
    """us of each plan, the better of with overlap and without, of each point."""
    points: dict[Point, dict[str, float]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            times = points.setdefault(Point(*(int(row[name]) for name in FIELDS[:4])), {})
            us = float(row["us"])
            times[row["plan"]] = min(us, times.get(row["plan"], us))
    return points


def losses(path: Path, target: Arch) -> tuple[int, list[float]]:
    """How many points there are, and in order what the rule's choice takes, of the time of the best
    plan that was measured, at those where it was."""
    points, found = read(path), []
    for p, times in points.items():
        us = times.get(written(dispatch_integer.plan_integer(p.problem, target)))
        if us is not None:
            found.append(us / min(times.values()))
    return len(points), sorted(found)


def main() -> None:
    parser = tune_w4a16.parser(__doc__, "64,128,256,512,1024,2048,4096", "tune_integer.csv")
    parser.add_argument("--best", type=int, default=6, help="time so many, by the rule")
    options = parser.parse_args()
    if options.regret:
        count, found = losses(options.regret, Arch(capability=(9, 0), num_sms=132, triton=(3, 6)))
        middle, high = found[len(found) // 2], found[int(len(found) * 0.95)]
        text = f"{middle:.3f} median, {high:.3f} at 95 %, {found[-1]:.3f} at most"
        print(f"{count} points, choice measured at {len(found)}, loss: {text}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune_integer times kernels and needs a CUDA device (or --regret)")
    deadline = time.time() + options.seconds
    target = arch.current(torch.cuda.current_device())
    assert target is not None, "tuning needs a GPU"
    points = [
        Point(*map(int, shape.split("x")), int(m))
        for shape in options.shapes.split(",")
        for m in options.m.split(",")
    ]
    choices = {p: plans(p, target.num_sms)[: options.best] for p in points}
    jobs = {_job(plan, p): None for p in points for plan in choices[p]}
    tried = tune_w4a16.try_all(check, jobs)

    def tune_one(p: Point, writer) -> None:
        tune(p, [plan for plan in choices[p] if not tried[_job(plan, p)]], writer)

    tune_w4a16.tune_all(points, tune_one, options.out, FIELDS, deadline)


if __name__ == "__main__":
    main()
