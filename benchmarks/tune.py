"""Time every tile that may serve a shape, and say what the rules of dispatch lose to the best.

    python -m benchmarks.tune --shapes 4096x4096x128,28672x4096x128 --m 4,64 --out tune.csv
    python -m benchmarks.tune --regret tune.csv

Worker processes compile each candidate first and compare it with the oracle on a narrow weight: a
crash loses only its candidate, and Triton's disk cache keeps the binaries. Then each point's
candidates and bf16 are timed in turn, by CUDA-graph replay over rotating weight copies; a row a
candidate. The user's process never tunes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import ceilings, timing
from w4tensor import arch, dispatch, dispatch_hopper, launch
from w4tensor.dispatch import Arch, DecodePlan, DequantPlan, GemmPlan, Problem
from w4tensor.dispatch_gemv import WARP_K, GemvPlan, serves_gemv
from w4tensor.dispatch_hopper import HopperPlan
from w4tensor.layout import COALESCED
from w4tensor.testing import random_codes, rel_err

FIELDS = "n k group_size zero m us read_us bf16_us rel_err kind plan".split()
KINDS = {"gemv": GemvPlan, "decode": DecodePlan, "gemm": GemmPlan}
KINDS |= {"hopper": HopperPlan, "dequant": DequantPlan}
WORKERS = 14
# of the narrow weight that workers compare on
CHECKED_ROWS, CHECKED_K = 512, 2048
MAX_REL_ERR = 5e-3
# rows of the largest output that is compared
COMPARED = 256


class Point(NamedTuple):
    """One shape and one number of tokens."""

    n: int
    k: int
    group_size: int
    zero: str
    m: int

    @property
    def problem(self) -> Problem:
        symmetric = self.zero == "symmetric"
        return Problem(self.m, self.n, self.k, self.group_size, "bf16", symmetric)


def candidates(p: Point, target: Arch) -> list:
    """Plans that may be the best for `p`, dispatch's own among them."""
    plans: list = []
    if p.m <= 4:
        plans += [*_gemv_plans(p, target), *_decode_plans(p, target)]
    for choice in dispatch_hopper.candidates(p.problem, target.num_sms):
        for pdl in (False, True) if p.m < 64 else (True,):
            plans.append(dispatch_hopper.plan_of(*choice, pdl=pdl))
    if p.m >= 1024:
        rows = dispatch.workspace_rows(p.problem)
        # a small weight has no smaller workspace
        plans += [DequantPlan(size) for size in {rows, max(256, rows // 512 * 256)}]
    chosen = dispatch.plan(p.problem, target)
    return plans if chosen in plans else [*plans, chosen]


def _gemv_plans(p: Point, target: Arch) -> list[GemvPlan]:
    if not serves_gemv(p.n, p.k, p.group_size, target):
        return []
    pdl = "second" if target.capability[0] >= dispatch.HOPPER else "none"
    return [
        GemvPlan(rows, warps, ahead, pdl)
        for rows, warps in itertools.product((4, 8, 16), (1, 2, 4, 8))
        # a row that is short has one step; registers for 64 rows' words at most
        for ahead in ((False, True) if p.k > WARP_K * warps and rows < 16 else (False,))
        if warps == 1 or (WARP_K * warps <= p.k and rows * warps <= 64)
        if p.n >= rows
    ]


def _decode_plans(p: Point, target: Arch) -> list[DecodePlan]:
    kwidth = 2 if target.triton >= dispatch.KWIDTH_2_EVERYWHERE else 4
    plans = []
    for block_n, block_k, warps in itertools.product((8, 16), (256, 512), (1, 2, 4, 8)):
        fits = p.k >= block_k * warps
        if not fits or (p.group_size != p.k and warps * block_k % p.group_size):
            continue
        for pdl in (False, True):
            plan = DecodePlan(8, block_n, block_k, warps, 1, kwidth, x_ahead=True, pdl=pdl)
            plans.append(dataclasses.replace(plan, evict="evict_first"))
    return plans


def run(plan, x: Tensor, weight: tuple, y: Tensor, group_size: int) -> None:
    """y [M, N] by `plan`; weight is qdata, scale, zero_point of [N, ..]."""
    launch.run_coalesced(plan, x[None], *weight, None, y[None], group_size)


def _weight(n: int, k: int, group_size: int, zero: str) -> tuple[tuple, Tensor]:
    """(qdata, scale, zero_point) of [n, ..] and the fp32 weight [n, k], on the device."""
    codes = random_codes(1, n, k, group_size=group_size, zero_point=zero, device="cuda")
    w = codes.dequantize()[0]
    zero_point = None if codes.zero_point is None else codes.zero_point[0]
    return (COALESCED.pack(codes.q)[0], codes.scale[0], zero_point), w


def _job(plan, p: Point) -> tuple:
    """What compiles apart: of the slices of K, whether there are any; and of M, up to a tile."""
    if isinstance(plan, HopperPlan):
        plan = dataclasses.replace(plan, split_k=min(plan.split_k, 2))
        if plan.programs:
            # of the narrow weight, fewer programs than tiles
            plan = dataclasses.replace(plan, programs=CHECKED_ROWS // plan.block_n - 1)
    return plan, p.group_size, p.zero, min(p.m, getattr(plan, "block_m", p.m))


def check(job: tuple) -> tuple[tuple, str]:
    """Compile a plan and try it on a narrow weight: the job, and what was wrong with it."""
    plan, group_size, zero, m = job
    try:
        group_size = min(group_size, CHECKED_K)
        weight, w = _weight(CHECKED_ROWS, CHECKED_K, group_size, zero)
        x = torch.randn(m, CHECKED_K, device="cuda", dtype=torch.bfloat16)
        y = torch.full((len(x), CHECKED_ROWS), torch.nan, device="cuda", dtype=x.dtype)
        run(plan, x, weight, y, group_size)
        error = rel_err(y, x.double() @ w.double().T)
        return job, "" if error < MAX_REL_ERR else f"error {error:.1e}"
    except Exception as failure:
        return job, repr(failure)[:200]


def tune(p: Point, plans: list, writer) -> None:
    """Time `plans` on one point."""
    weight, w = _weight(p.n, p.k, p.group_size, p.zero)
    nbytes = sum(t.nbytes for t in weight if t is not None)
    n_copies = timing.n_copies(nbytes)
    copies = [tuple(None if t is None else t.clone() for t in weight) for _ in range(n_copies)]
    dense = [w.bfloat16() for _ in range(timing.n_copies(2 * p.n * p.k))]
    x = torch.randn(p.m, p.k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(p.m, p.n, device="cuda", dtype=torch.bfloat16)
    expected = x[:COMPARED].float() @ w.T
    del w
    read_us = ceilings.read_us(nbytes)
    tried, errors = [], []
    for plan in plans:
        try:
            y.fill_(torch.nan)
            run(plan, x, weight, y, p.group_size)
            error = rel_err(y[:COMPARED], expected)
        except RuntimeError as failure:
            print(p, plan, repr(failure)[:200], flush=True)
            continue
        if error < MAX_REL_ERR:
            tried.append(plan)
            errors.append(error)
        else:
            print(p, plan, f"error {error:.1e}", flush=True)
    groups = [[functools.partial(torch.matmul, x, d.T) for d in dense]]
    groups += [[functools.partial(run, q, x, c, y, p.group_size) for c in copies] for q in tried]
    bf16, *times = timing.graph_times(groups, 0.015)
    for plan, measured, error in zip(tried, times, errors, strict=True):
        row = (*p, f"{measured.us:.2f}", f"{read_us:.2f}", f"{bf16.us:.2f}", f"{error:.1e}")
        writer.writerow([*row, *written(plan).split(" ", 1)])


def read(path: Path) -> dict[Point, dict[str, tuple[float, float]]]:
    """Of each point, (us, bf16_us) of each plan as it is written."""
    points: dict[Point, dict[str, tuple[float, float]]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            p = Point(
                int(row["n"]), int(row["k"]), int(row["group_size"]), row["zero"], int(row["m"])
            )
            plan = f"{row['kind']} {row['plan']}"
            points.setdefault(p, {})[plan] = float(row["us"]), float(row["bf16_us"])
    return points


def written(plan) -> str:
    """A plan as a row has it: its kind and its fields."""
    kind = next(name for name, cls in KINDS.items() if isinstance(plan, cls))
    return kind + " " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(plan).items())


def regret(path: Path, target: Arch) -> None:
    """What dispatch's choice loses to the best measured plan, a line a point."""
    losses = []
    for p, times in read(path).items():
        chosen = written(dispatch.plan(p.problem, target))
        best = min(times, key=lambda plan: times[plan][0])
        us, bf16_us = times[best]
        if chosen in times:
            loss = times[chosen][0] / us
            losses.append(loss)
            text = f"{times[chosen][0]:.1f} = {loss:.2f} x"
        else:
            text = "not measured:"
        shape = f"{p.n}x{p.k}x{p.group_size} {p.zero} M={p.m}"
        print(f"{shape}: {text} best {us:.1f} (bf16 {bf16_us:.1f})")
        print(f"    chosen {chosen}\n    best   {best}")
    losses.sort()
    if losses:
        middle, high = losses[len(losses) // 2], losses[int(len(losses) * 0.95)]
        print(f"{len(losses)} points, loss: {middle:.3f} median, {high:.3f} at 95 %", losses[-1])


def parser(description: str, tokens: str, out: str) -> argparse.ArgumentParser:
    """What the scripts that tune tiles of Linears are told alike."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--shapes", default="4096x4096x128", help="N x K x group size, commas between"
    )
    made.add_argument("--m", default=tokens)
    made.add_argument("--seconds", type=float, default=300, help="start no point after these")
    made.add_argument("--out", type=Path, default=Path(out))
    made.add_argument("--regret", type=Path, help="read these rows, measure nothing")
    return made


def try_all(check: Callable[[tuple], tuple[tuple, str]], jobs: Iterable[tuple]) -> dict[tuple, str]:
    """What check(), in worker processes, finds wrong with each of the jobs."""
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        tried = dict(pool.imap_unordered(check, jobs))
    for job, problem in tried.items():
        if problem:
            print(job, problem, flush=True)
    print(f"{len(tried)} kernels compiled and checked", flush=True)
    return tried


def tune_all(
    points: Iterable[tuple],
    tune: Callable[..., None],
    path: Path,
    fields: list[str],
    deadline: float,
) -> None:
    """tune(point, writer) of each point that starts before the deadline; adds rows to a file."""
    is_new = not path.exists()
    with path.open("a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if is_new:
            writer.writerow(fields)
        for p in points:
            if time.time() > deadline:
                print("no time for", p, flush=True)
                continue
            tune(p, writer)
            out.flush()
            torch.cuda.empty_cache()


def main() -> None:
    options_of = parser(__doc__, "4,16,64,256,1024,4096", "tune.csv")
    options_of.add_argument("--zero", default="symmetric")
    options = options_of.parse_args()
    if options.regret:
        regret(options.regret, Arch(capability=(9, 0), num_sms=132, triton=(3, 6)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune times kernels and needs a CUDA device (or --regret)")
    deadline = time.time() + options.seconds
    target = arch.current(torch.cuda.current_device())
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    points = [Point(*shape, options.zero, int(m)) for shape in shapes for m in options.m.split(",")]
    plans = {p: candidates(p, target) for p in points}
    jobs = {
        _job(plan, p): None
        for p in points
        for plan in plans[p]
        if not isinstance(plan, DequantPlan)
    }
    tried = try_all(check, jobs)

    def tune_one(p: Point, writer) -> None:
        tune(p, [plan for plan in plans[p] if not tried.get(_job(plan, p))], writer)

    tune_all(points, tune_one, options.out, FIELDS, deadline)


if __name__ == "__main__":
    main()
