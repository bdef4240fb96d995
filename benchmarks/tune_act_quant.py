"""Find the tiles of int8 activations: as benchmarks/tune.py does, for dispatch_act_quant's plans.

    python -m benchmarks.tune_act_quant --shapes 28672x4096 --m 1,16,64 --act 32,-1 --out t.csv

A plan is timed twice: the product alone on codes that are there, and with the launch that quantises
the activations before it, which is what the rows are ranked by. Points that the output file has are
skipped; none is started that `--seconds` may not hold.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ceilings, timing
from benchmarks.tune import CHECKED_ROWS, WORKERS
from w4tensor import arch, dispatch_int8, launch
from w4tensor.dispatch import HOPPER, KWIDTH_2_EVERYWHERE, Arch, Problem
from w4tensor.dispatch_act_quant import (
    ActQuantDecodePlan,
    ActQuantDp4aPlan,
    ActQuantGemmPlan,
    ActQuantPlan,
    ActQuantRoundedPlan,
)
from w4tensor.dispatch_int8 import Int8Plan
from w4tensor.kernels.act_quant_decode import act_quant_decode
from w4tensor.kernels.act_quant_dequantize import act_quant_dequantize
from w4tensor.kernels.act_quant_dp4a import act_quant_dp4a
from w4tensor.kernels.act_quant_gemm import act_quant_gemm
from w4tensor.kernels.act_quant_tile import cell_and_span
from w4tensor.kernels.int8_hopper import int8_hopper
from w4tensor.kernels.quantize_activation import quantize_activation, round_activation
from w4tensor.layout import ACT_QUANT
from w4tensor.testing import Int4Codes, random_codes, rel_err

FIELDS = "n k group_size zero act m us product_us quant_us read_us bf16_us rel_err plan".split()
DTYPE = torch.bfloat16
KERNELS = {
    ActQuantDp4aPlan: act_quant_dp4a,
    ActQuantDecodePlan: act_quant_decode,
    ActQuantGemmPlan: act_quant_gemm,
    Int8Plan: int8_hopper,
}
# against the definition in fp64: fp32 sums, and one rounding of x or none
REL_ERR = {ActQuantRoundedPlan: 3e-3}
MAX_REL_ERR = 1e-5
# bytes of shared memory of a program, and registers of a thread for two tiles of sums
SHARED = 220_000
SUMS = 64


@dataclass(frozen=True)
class Point:
    """What is tuned: one shape, one width of activation groups, one number of tokens."""

    n: int
    k: int
    group_size: int
    zero: str
    act: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}x{self.group_size}:{self.zero}:{self.act}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> Point:
        shape, zero, act, m = text.split(":")
        n, k, group_size = map(int, shape.split("x"))
        return cls(n, k, group_size, zero, int(act), int(m))

    @property
    def problem(self) -> Problem:
        symmetric = self.zero == "symmetric"
        sizes = self.m, self.n, self.k, self.group_size
        return Problem(*sizes, "int8", symmetric, act_group_size=self.act)

    @property
    def cell(self) -> int:
        group = 0 if self.group_size == self.k else self.group_size
        return cell_and_span(group, max(self.act, 0))[0]


# candidates


def candidates(p: Point, target: Arch) -> list[ActQuantPlan]:
    """Plans that may be the best for `p`."""
    plans: list[ActQuantPlan] = []
    if p.m <= 4:
        plans += _dp4a_plans(p)
    if p.m <= 16:
        plans += _decode_plans(p, target)
    if p.m > 8:
        plans += _gemm_plans(p, target)
    if dispatch_int8.serves_int8(p.problem, target):
        plans += _tile_plans(p, target)
    if p.m >= 128:
        plans += [ActQuantRoundedPlan(r) for r in (1024, 2048, 4096, 8192) if r < 2 * p.n]
    return plans


def _dp4a_plans(p: Point) -> list[ActQuantPlan]:
    tokens = next(t for t in (1, 2, 4) if p.m <= t)
    plans: list[ActQuantPlan] = []
    for warps, rows, slices in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (16, 32, 64, 128)):
        block_n = 32 * warps // slices
        # threads past the end of a row, and sums that spill
        if block_n < 1 or rows * tokens > 16 or slices * 32 >= 2 * p.k:
            continue
        plans.append(ActQuantDp4aPlan(tokens, rows, block_n, slices, warps))
    return plans


def _decode_plans(p: Point, target: Arch) -> list[ActQuantPlan]:
    kwidth = 4 if target.triton >= KWIDTH_2_EVERYWHERE else 8
    block_m = 8 if p.m <= 8 else 16
    plans: list[ActQuantPlan] = []
    for block_n, block_k, warps, split, stages in itertools.product(
        (16, 32, 64), (256, 512, 1024), (2, 4, 8), (1, 2, 4), (3, 4, 6)
    ):
        shared = stages * block_k * (block_n // 2 + block_m)
        if block_k // warps < 64 or block_k > p.k or shared > SHARED // 2:
            continue
        # fp32 sums of a thread: one tile a span
        sums = block_k // max(128, block_k // warps) * block_n * block_m // (32 * warps)
        programs = math.ceil(p.n / block_n) * split
        steps = p.k / (block_k * split)
        if sums > SUMS or steps < 1 or (stages > 3 and stages > steps + 1):
            continue
        few = programs * warps < 4 * target.num_sms
        if (few and steps >= 2) or (split > 1 and programs * warps > 32 * target.num_sms):
            continue
        plans.append(ActQuantDecodePlan(block_m, block_n, block_k, split, kwidth, warps, stages))
    return plans


def _tile_plans(p: Point, target: Arch) -> Iterator[ActQuantPlan]:
    for tile, split_k, whole in dispatch_int8.candidates(p.problem, target.num_sms):
        yield tile.plan(split_k, whole, pdl=False)


def _gemm_plans(p: Point, target: Arch) -> list[ActQuantPlan]:
    hopper = target.capability[0] == HOPPER
    kwidth = 4 if hopper or target.triton >= KWIDTH_2_EVERYWHERE else 8
    # where all of K is one int32 sum there is one tile of sums, else two
    chain = p.act == -1 and p.group_size == p.k
    # the tile that holds all tokens, and half of it
    fits = [b for b in (16, 32, 64, 128) if b < 2 * p.m][-2:] + [256] * (chain and p.m > 128)
    blocks = math.ceil(p.k / 128)
    plans: list[ActQuantPlan] = []
    for block_m, block_n, block_k, warps, stages, split, tma in itertools.product(
        fits, (64, 128, 256), (128, 256), (4, 8), (3, 4, 5), (1, 2, 4), (False, True)
    ):
        sums = block_m * block_n // (32 * warps)
        shared = stages * block_k * (block_m + block_n // 2)
        if block_n < 16 * warps or shared > SHARED or sums > (2 * SUMS if chain else SUMS):
            continue
        if block_k == 256 and (block_m < 64 or p.cell < 128):
            continue
        if tma and not (hopper and block_m >= 64 and p.cell >= 128):
            continue
        programs = math.ceil(p.n / block_n) * math.ceil(p.m / block_m) * split
        if split > 1 and (p.m > 256 or programs > 4 * target.num_sms or blocks < 4 * split):
            continue
        # less than a third of the card, where more could be had
        if programs < target.num_sms // 3 and p.m <= 256 and split < 4 and blocks >= 8 * split:
            continue
        plans.append(ActQuantGemmPlan(block_m, block_n, block_k, split, kwidth, warps, stages, tma))
    return plans


# running one


def run(plan: ActQuantPlan, x: Tensor, p: Point, weight: tuple, y: Tensor, pdl: bool) -> None:
    """y [1, M, N] by quantising x [1, M, K] and `plan`; weight is qdata, scale, zero_point."""
    if isinstance(plan, ActQuantRoundedPlan):
        rounded = round_activation(x, p.act)[0]
        rows = (None if t is None else t[0] for t in weight)
        launch._by_blocks(act_quant_dequantize, rounded, *rows, p.group_size, None, y[0], plan.rows)
        return
    sums = None if weight[2] is None else p.group_size
    product(plan, quantize_activation(x, p.act, sums, pdl=pdl), p, weight, y)


def product(plan: ActQuantPlan, quantized: tuple, p: Point, weight: tuple, y: Tensor) -> None:
    KERNELS[type(plan)](*quantized, *weight, None, y, p.group_size, p.act, plan)


def _weight(p: Point, n: int) -> tuple[Int4Codes, tuple]:
    codes = random_codes(1, n, p.k, group_size=p.group_size, zero_point=p.zero, device="cuda")
    return codes, (ACT_QUANT.pack(codes.q), codes.scale, codes.zero_point)


def _expected(x: Tensor, p: Point, codes: Int4Codes) -> Tensor:
    """The definition in fp64, on the codes of x that the kernels see."""
    x_codes, x_scale, _ = quantize_activation(x, p.act)
    width = p.k if p.act == -1 else p.act
    x_scale = x_scale.mT.double().repeat_interleave(width, -1)[..., : p.k]
    return (x_codes[..., : p.k] * x_scale) @ codes.dequantize().double().mT


def worker(text: str, indices: list[int]) -> None:
    """Try candidates one after another; `try i` before each, `ok i` after each that is right."""
    p = Point.parse(text)
    plans = candidates(p, _target())
    codes, weight = _weight(p, min(p.n, CHECKED_ROWS))
    x = torch.randn(1, p.m, p.k, device="cuda", dtype=DTYPE)
    expected = _expected(x, p, codes)
    for i in indices:
        print(f"try {i}", flush=True)
        # in fp32, but for the library's product
        dtype = DTYPE if isinstance(plans[i], ActQuantRoundedPlan) else torch.float32
        y = torch.full(expected.shape, torch.nan, device="cuda", dtype=dtype)
        try:
            run(plans[i], x, p, weight, y, False)
            first = y.clone()
            run(plans[i], x, p, weight, y, False)
            error = rel_err(y, expected)
        except Exception as failure:
            print(f"# {plans[i]}: {failure!r}"[:300], file=sys.stderr, flush=True)
            # a broken context fails whatever comes after; one that only lacks a plan does not
            torch.cuda.synchronize()
            continue
        if error <= REL_ERR.get(type(plans[i]), MAX_REL_ERR) and torch.equal(first, y):
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
            command = [sys.executable, "-m", "benchmarks.tune_act_quant", "--worker", str(p)]
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

    codes, weight = _weight(p, p.n)
    nbytes = codes.nbytes
    copies = [
        tuple(None if t is None else t.clone() for t in weight)
        for _ in range(timing.n_copies(nbytes))
    ]
    x = torch.randn(1, p.m, p.k, device="cuda", dtype=DTYPE)
    y = torch.empty(1, p.m, p.n, device="cuda", dtype=DTYPE)
    rows = min(p.m, 64)
    expected = _expected(x[:, :rows], p, codes) if p.n * p.k < 1 << 28 else None
    w = codes.dequantize(DTYPE)[0]
    del codes
    dense = [w.clone() for _ in range(timing.n_copies(2 * p.n * p.k))]
    del w
    read_us = ceilings.read_us(nbytes)
    bf16_us = timing.graph_time([lambda w=w: x[0] @ w.T for w in dense], 0.02).us
    del dense
    sums = None if weight[2] is None else p.group_size
    quantized = quantize_activation(x, p.act, sums)
    quant_us = timing.graph_time([lambda: quantize_activation(x, p.act, sums)] * 8, 0.005).us

    def measure(plan: ActQuantPlan, seconds: float) -> tuple | None:
        alone = not isinstance(plan, ActQuantRoundedPlan)
        pdl = getattr(plan, "pdl", False)
        try:
            y.fill_(torch.nan)
            run(plan, x, p, copies[0], y, pdl)
            error = math.nan if expected is None else rel_err(y[:, :rows], expected)
            product_us = math.nan
            if alone and not pdl:
                calls = [lambda c=c: product(plan, quantized, p, c, y) for c in copies]
                product_us = timing.graph_time(calls, seconds).us
            calls = [lambda c=c: run(plan, x, p, c, y, pdl) for c in copies]
            return timing.graph_time(calls, seconds).us, product_us, plan, error
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as failure:
            print(f"# {plan}: {failure!r}"[:300], file=sys.stderr)
            return None

    timed = [row for i in good if (row := measure(plans[i], 0.004)) is not None]
    timed.sort(key=lambda row: row[0])
    # the best ones again, for longer, and under programmatic dependent launch
    finalists = [row[2] for row in timed[:keep]]
    if _target().capability[0] >= HOPPER:
        finalists += [
            dataclasses.replace(plan, pdl=True) for plan in finalists[:4] if hasattr(plan, "pdl")
        ]
    finals = [row for plan in finalists if (row := measure(plan, 0.02)) is not None]
    finals.sort(key=lambda row: row[0])
    for us, product_us, plan, error in finals[:keep]:
        times = (us, product_us, quant_us, read_us, bf16_us)
        head = [p.n, p.k, p.group_size, p.zero, p.act, p.m, *(f"{t:.2f}" for t in times)]
        writer.writerow([*head, f"{error:.1e}", plan])
    total = time.time() - start
    print(
        f"{p}: read {read_us:.1f} bf16 {bf16_us:.1f} quantising {quant_us:.1f} us; "
        f"{len(good)} of {len(plans)} right, {compile_time:.0f} + {total - compile_time:.0f} s",
        flush=True,
    )
    for us, product_us, plan, error in finals[:6]:
        shares = f"{us / read_us:.2f} read {us / bf16_us:.2f} bf16"
        print(f"    {us:8.2f} us, product {product_us:8.2f}  {shares}  e {error:.1e}  {plan}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096", help="NxK or NxKxgroup, by commas")
    parser.add_argument("--m", default="1", help="token counts, by commas")
    parser.add_argument("--act", default="32", help="act_group_size, by commas; -1 is per token")
    parser.add_argument("--zero", default="symmetric", choices=("symmetric", "fractional"))
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--compile-seconds", type=float, default=60, help="of one point, at most")
    parser.add_argument("--keep", type=int, default=8, help="rows of each point")
    parser.add_argument("--out", type=Path, default=Path("tune_act_quant.csv"))
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
                f"{r['n']}x{r['k']}x{r['group_size']}:{r['zero']}:{r['act']}:{r['m']}"
                for r in csv.DictReader(file)
            }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    longest = 0.0
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(FIELDS)
        for m, act, shape in itertools.product(
            args.m.split(","), args.act.split(","), args.shapes.split(",")
        ):
            n, k, *group = map(int, shape.split("x"))
            point = Point(n, k, group[0] if group else 128, args.zero, int(act), int(m))
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
