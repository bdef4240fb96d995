"""Find the tiles of w4tensor/tables: every candidate plan, compiled in parallel, timed one by one.

    python -m benchmarks.tune --shapes 4096x4096,28672x4096x32 --m 1,16,64 --seconds 300 --out t.csv

Worker processes compile each candidate and compare it with the oracle on a narrow weight first: a
crash loses only its candidate, and Triton's disk cache keeps the binaries. The good ones are then
timed in this process by CUDA-graph replay over rotating weight copies, and the best of them once
more with the switches that make no other tile better (eviction, x ahead, PDL).

Points that the output file already has are skipped, so that a run can go on where the last one
stopped; none is started that `--seconds` may not hold. The user's process never tunes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import math
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ceilings, timing
from w4tensor import arch, launch
from w4tensor.dispatch import KWIDTH_2_EVERYWHERE, Arch, DecodePlan, DequantPlan, GemmPlan
from w4tensor.kernels.decode import decode
from w4tensor.kernels.dequantize import dequantize
from w4tensor.kernels.gemm import gemm
from w4tensor.layout import COALESCED
from w4tensor.testing import REL_ERR_BUDGET, random_codes, rel_err

FIELDS = "n k group_size zero m us read_us bf16_us rel_err plan".split()
WORKERS = 14
# rows of the narrow weight that workers compare on
CHECKED_ROWS = 512
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Point:
    """What is tuned: one shape, one number of tokens."""

    n: int
    k: int
    group_size: int
    zero: str
    m: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}x{self.group_size}:{self.zero}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> Point:
        shape, zero, m = text.split(":")
        n, k, group_size = map(int, shape.split("x"))
        return cls(n, k, group_size, zero, int(m))


# candidates


def candidates(p: Point, target: Arch) -> list:
    """Plans that may be the best for `p`: decode up to 16 tokens, the matrix kernel from 9 on."""
    plans: list = []
    if p.m <= 16:
        plans += _decode_plans(p, target)
    if p.m > 8:
        plans += _gemm_plans(p, target)
    return plans


def _decode_plans(p: Point, target: Arch) -> list[DecodePlan]:
    kwidth = 2 if target.triton >= KWIDTH_2_EVERYWHERE else 4
    block_m = 8 if p.m <= 8 else 16
    blocks = math.ceil(p.k / 128)
    plans = []
    for block_n, block_k, warps, split, stages in itertools.product(
        (8, 16, 32, 64, 128), (128, 256, 512), (1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 3)
    ):
        shared = stages > 1
        if (shared and p.m < 3) or (not shared and p.m > 8):
            continue
        # registers of a step's words, and of the sums
        words, sums = block_n * block_k // 256, block_n * block_m // 32
        tokens = 0 if shared else block_m * block_k // 32
        buffers = (stages - 1) * warps * block_m * block_k * 2
        if 2 * words + sums + tokens > 200 or buffers > 100_000:
            continue
        if p.group_size != p.k and warps * block_k % p.group_size:
            continue
        steps = blocks * 128 / (block_k * warps * split)
        programs = math.ceil(p.n / block_n) * split
        if steps < 0.5 or (split > 1 and (programs * warps > 64 * target.num_sms or steps < 1)):
            continue
        # fewer than two warps a multiprocessor, where more could be had
        if programs * warps < 2 * target.num_sms and steps > 1:
            continue
        plans.append(
            DecodePlan(
                block_m,
                block_n,
                block_k,
                warps,
                split,
                kwidth,
                x_shared=shared,
                num_stages=stages,
                x_ahead=not shared,
                evict="evict_first",
            )
        )
    return plans


def _gemm_plans(p: Point, target: Arch) -> list[GemmPlan]:
    hopper = target.capability[0] == 9
    # the tile that holds all tokens, and half of it
    fits = [b for b in (16, 32, 64, 128, 256) if b < 2 * p.m][-2:]
    depths = (3, 4, 5) if p.m <= 64 else (2, 3, 4)
    blocks = math.ceil(p.k / 128)
    plans = []
    for block_m, block_n, warps, stages, split, tma in itertools.product(
        fits, (64, 128, 256), (4, 8), depths, (1, 2, 4, 8), (False, True)
    ):
        if (
            block_n < 16 * warps
            or block_m * block_n > 256 * 128
            or (tma and not (hopper and block_m >= 64))
        ):
            continue
        sums = block_m * block_n // (32 * warps)
        shared = stages * 128 * (2 * block_m + block_n // 2)
        if sums > 128 or shared > 220_000 or (block_m >= 128 and not tma):
            continue
        programs = math.ceil(p.n / block_n) * math.ceil(p.m / block_m) * split
        if split > 1 and (p.m > 256 or programs > 6 * target.num_sms or blocks < 4 * split):
            continue
        # less than a third of the card, where more could be had
        few = programs < target.num_sms // 3
        if few and p.m <= 256 and split < 8 and blocks >= 8 * split:
            continue
        after = p.zero == "symmetric" and block_m <= 64 and p.group_size % 128 == 0
        kwidth = 2 if hopper or target.triton >= KWIDTH_2_EVERYWHERE else 4
        plan = GemmPlan(block_m, block_n, 8, split, False, kwidth, warps, stages, x_tma=tma)
        plans.append(plan)
        if after:
            plans.append(dataclasses.replace(plan, scale_after=True))
        if warps == 8 and 64 <= sums < 128 and 2 * shared < 220_000:
            plans.append(dataclasses.replace(plan, maxnreg=128))
    return plans


def variants(plan) -> list:
    """The switches of `plan` that make no other tile better."""
    if isinstance(plan, DecodePlan):
        return [
            dataclasses.replace(plan, x_ahead=ahead, evict=evict, pdl=pdl)
            for ahead, evict, pdl in itertools.product(
                (False, True), ("", "evict_first"), (False, True)
            )
            if (ahead, evict, pdl) != (plan.x_ahead, plan.evict, plan.pdl)
            and not (ahead and plan.x_shared)
        ] + [dataclasses.replace(plan, num_stages=stages) for stages in (2, 4) if plan.x_shared]
    if isinstance(plan, GemmPlan):
        splits = (plan.split_k - 1, plan.split_k + 1) if plan.split_k > 1 else ()
        return [dataclasses.replace(plan, split_k=split) for split in splits if split > 1] + [
            dataclasses.replace(plan, group_n=g) for g in (4, 16) if plan.block_m > 64
        ]
    return []


# running one


def run(plan, x: Tensor, codes: tuple, y: Tensor, group_size: int) -> None:
    """y [1, M, N] by `plan`; codes are qdata, scale, zero_point [1, N, ..]."""
    if isinstance(plan, DequantPlan):
        qdata, scale, zero = (None if t is None else t[0] for t in codes)
        weight = (qdata, scale, zero, group_size)
        launch._by_blocks(dequantize, x[0], *weight, None, y[0], plan.rows)
    else:
        product = decode if isinstance(plan, DecodePlan) else gemm
        product(x, *codes, None, y, group_size, plan)


def _weight(p: Point, n: int) -> tuple[tuple, Tensor]:
    """(qdata, scale, zero_point) [1, n, ..] and the fp32 weight [n, K], on the device."""
    codes = random_codes(1, n, p.k, group_size=p.group_size, zero_point=p.zero, device="cuda")
    w = codes.dequantize()[0]
    return (COALESCED.pack(codes.q), codes.scale, codes.zero_point), w


def worker(text: str, indices: list[int]) -> None:
    """Try candidates one after another; `try i` before each, `ok i` after each that is right."""
    p = Point.parse(text)
    plans = candidates(p, _target())
    rows = min(p.n, CHECKED_ROWS)
    codes, w = _weight(p, rows)
    x = torch.randn(1, p.m, p.k, device="cuda", dtype=DTYPE)
    expected = x[0].double() @ w.double().T
    y = torch.empty(1, p.m, rows, device="cuda", dtype=DTYPE)
    for i in indices:
        print(f"try {i}", flush=True)
        y.fill_(torch.nan)
        try:
            run(plans[i], x, codes, y, p.group_size)
            first = y.clone()
            run(plans[i], x, codes, y, p.group_size)
            error = rel_err(y[0], expected)
        except Exception as failure:
            print(f"# {plans[i]}: {failure!r}"[:300], file=sys.stderr, flush=True)
            # a broken context fails whatever comes after; one that only lacks a plan does not
            torch.cuda.synchronize()
            continue
        if error <= REL_ERR_BUDGET[DTYPE] and torch.equal(first, y):
            print(f"ok {i}", flush=True)
        else:
            print(f"# {plans[i]}: error {error:.1e}", file=sys.stderr, flush=True)


def compiled(p: Point, count: int, seconds: float) -> list[int]:
    """Indices of the candidates that compile and give the right answer twice."""
    good: list[int] = []
    deadline = time.time() + seconds

    def serve(indices: list[int]) -> None:
        # a process that dies leaves the rest to the next one
        left = None
        while indices and time.time() < deadline and len(indices) != left:
            left = len(indices)
            command = [sys.executable, "-m", "benchmarks.tune", "--worker", str(p)]
            command += ["--indices", ",".join(map(str, indices))]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                killer = threading.Timer(max(0.1, deadline - time.time()), process.kill)
                killer.start()
                assert process.stdout is not None
                for line in process.stdout:
                    word, index = line.split()
                    if word == "try":
                        indices.remove(int(index))
                    else:
                        good.append(int(index))
                killer.cancel()
            if process.returncode == 0:
                return

    order = list(range(count))
    threads = [
        threading.Thread(target=serve, args=(order[i::WORKERS],))
        for i in range(min(WORKERS, count))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(good)


@functools.cache
def _target() -> Arch:
    target = arch.current(torch.cuda.current_device())
    assert target is not None, "tuning needs a GPU"
    return target


# timing


def tune(p: Point, writer, compile_seconds: float, keep: int) -> None:
    start = time.time()
    plans = candidates(p, _target())
    good = compiled(p, len(plans), compile_seconds)
    compile_time = time.time() - start

    codes, w = _weight(p, p.n)
    nbytes = sum(t.nbytes for t in codes if t is not None)
    copies = [
        tuple(None if t is None else t.clone() for t in codes)
        for _ in range(timing.n_copies(nbytes))
    ]
    x = torch.randn(1, p.m, p.k, device="cuda", dtype=DTYPE)
    y = torch.empty(1, p.m, p.n, device="cuda", dtype=DTYPE)
    rows = min(p.m, 256)
    expected = x[0, :rows].float() @ w.T
    dense = [w.to(DTYPE) for _ in range(timing.n_copies(2 * p.n * p.k))]
    del w
    read_us = ceilings.read_us(nbytes)
    bf16_us = timing.graph_time([lambda w=w: x[0] @ w.T for w in dense], 0.02).us
    del dense

    def measure(plan, seconds: float) -> tuple[float, object, float] | None:
        try:
            y.fill_(torch.nan)
            run(plan, x, codes, y, p.group_size)
            error = rel_err(y[0, :rows], expected)
            calls = [lambda c=c: run(plan, x, c, y, p.group_size) for c in copies]
            return timing.graph_time(calls, seconds).us, plan, error
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as failure:
            print(f"# {plan}: {failure!r}"[:300], file=sys.stderr)
            return None

    tried = [plans[i] for i in good]
    if p.m >= 256:
        tried += [DequantPlan(r) for r in (1024, 2048, 4096, 8192, 16384) if r < 2 * p.n]
    timed = [row for plan in tried if (row := measure(plan, 0.004)) is not None]
    timed.sort(key=lambda row: row[0])
    # the best ones again, for longer, with their variants
    finalists = [plan for _, plan, _ in timed[:keep]]
    finalists += [v for _, plan, _ in timed[:3] for v in variants(plan)]
    finals = [row for plan in finalists if (row := measure(plan, 0.02)) is not None]
    finals.sort(key=lambda row: row[0])
    for us, plan, error in finals[:keep]:
        head = [p.n, p.k, p.group_size, p.zero, p.m]
        writer.writerow(
            [*head, f"{us:.2f}", f"{read_us:.2f}", f"{bf16_us:.2f}", f"{error:.1e}", plan]
        )
    total = time.time() - start
    print(
        f"{p}: read {read_us:.1f} bf16 {bf16_us:.1f} us; {len(good)} of {len(plans)} right, "
        f"{compile_time:.0f} + {total - compile_time:.0f} s",
        flush=True,
    )
    for us, plan, error in finals[:5]:
        times = f"{us:8.2f} us  {us / read_us:.2f} read  {us / bf16_us:.2f} bf16"
        print(f"    {times}  e {error:.1e}  {plan}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096", help="NxK or NxKxgroup, by commas")
    parser.add_argument("--m", default="1", help="token counts, by commas")
    parser.add_argument("--zero", default="symmetric", choices=("symmetric", "fractional"))
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--compile-seconds", type=float, default=60, help="of one point, at most")
    parser.add_argument("--keep", type=int, default=8, help="rows of each point")
    parser.add_argument("--out", type=Path, default=Path("tune.csv"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--indices", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, [int(i) for i in args.indices.split(",")])
        return
    start = time.time()
    done: set[str] = set()
    if args.out.exists():
        with args.out.open(newline="") as file:
            done = {
                f"{r['n']}x{r['k']}x{r['group_size']}:{r['zero']}:{r['m']}"
                for r in csv.DictReader(file)
            }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    longest = 0.0
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(FIELDS)
        for m, shape in itertools.product(args.m.split(","), args.shapes.split(",")):
            n, k, *group = map(int, shape.split("x"))
            point = Point(n, k, group[0] if group else 128, args.zero, int(m))
            if str(point) in done:
                continue
            left = args.seconds - (time.time() - start)
            if left < longest:
                print(f"# no time left for {point}: {left:.0f} s")
                continue
            began = time.time()
            tune(point, writer, min(args.compile_seconds, left / 2), args.keep)
            longest = max(longest, time.time() - began)
            file.flush()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
