"""Find the tiles of w4tensor/tables: every candidate plan, compiled in parallel, timed one by one.

    python -m benchmarks.tune --shapes 4096x4096,28672x4096 --m 1,16,64 --seconds 120 --out tune.csv

Candidates are compiled and run once in worker processes first (a crash there loses only itself, and
Triton's disk cache keeps the binaries); those that give the right answer are then timed in this
process by CUDA-graph replay over rotating weight copies. The rows are for a person, or
`benchmarks/tables.py`, to choose from: the user's process never tunes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import ceilings, timing
from w4tensor import arch, reference
from w4tensor.dispatch import GemmPlan
from w4tensor.kernels.gemm import gemm
from w4tensor.layout import COALESCED
from w4tensor.testing import rel_err

FIELDS = (
    "n k group_size m block_m block_n group_n split_k scale_after kwidth num_warps num_stages x_tma us "
    "read_us bf16_us rel_err"
).split()
WORKERS = 14


def candidates(m: int, n: int, k: int, group_size: int, num_sms: int) -> list[GemmPlan]:
    plans = []
    blocks_m = [b for b in (8, 16, 32, 64, 128, 256) if b >= m][:2] or [128, 256]
    if 64 < m:
        blocks_m = [b for b in (32, 64, 128, 256) if b <= 2 * m][-3:]
    steps = -(-k // 128)
    for block_m, block_n, warps, stages, split in itertools.product(
        blocks_m, (32, 64, 128, 256), (2, 4, 8), (3, 4, 5), (1, 2, 4, 8, 16)
    ):
        wgmma = block_m >= 16 and warps % 4 == 0 and block_n >= 64
        tiles = -(-n // block_n) * -(-m // block_m)
        if block_n < 16 * warps or block_n // warps > 64 or block_n * block_m > 256 * 128:
            continue
        if block_m >= 32 and not wgmma:
            continue
        if split > 1 and (split * 4 > steps or tiles * split > 12 * num_sms or m > 512):
            continue
        if tiles * split < num_sms // 3 and split < 16 and split * 8 <= steps:
            continue
        for after in {block_m <= 64 and group_size % 128 == 0, False}:
            if block_m <= 32 and group_size % 128 == 0 and not after:
                continue
            for x_tma in {False, m >= 64}:
                plans.append(
                    GemmPlan(
                        block_m, block_n, 8, split, after, 2 if wgmma else 4, warps, stages, x_tma
                    )
                )
    return plans


def make(n: int, k: int, group_size: int):
    q = torch.randint(0, 16, (1, n, k), dtype=torch.uint8, device="cuda")
    scale = ((torch.rand(1, n, k // group_size, device="cuda") + 0.5) / (4 * k**0.5)).bfloat16()
    return q, COALESCED.pack(q), scale


def worker(index: int, count: int, spec: str) -> None:
    """Compile every count-th candidate, check it on a narrow weight, print the good ones."""
    n, k, group_size, m, num_sms = map(int, spec.split(","))
    small = min(n, 512)
    q, qdata, scale = make(small, k, group_size)
    x = torch.randn(1, m, k, device="cuda", dtype=torch.bfloat16)
    ref = x.double() @ reference.dequantize(q, scale, None).double().mT
    for i, plan in list(enumerate(candidates(m, n, k, group_size, num_sms)))[index::count]:
        try:
            y = torch.full((1, m, small), float("nan"), device="cuda", dtype=torch.bfloat16)
            gemm(x, qdata, scale, None, None, y, group_size, plan)
            if rel_err(y, ref) < 3e-3:
                print(i, flush=True)
        except Exception as error:
            print(f"# {plan}: {error!r}"[:200], file=sys.stderr, flush=True)


def compiled(spec: str, seconds: float) -> set[int]:
    here = [sys.executable, "-m", "benchmarks.tune", "--worker"]
    workers = [
        subprocess.Popen(
            [*here, f"{i}/{WORKERS}", "--spec", spec], stdout=subprocess.PIPE, text=True
        )
        for i in range(WORKERS)
    ]
    deadline = time.time() + seconds
    good: set[int] = set()
    for process in workers:
        try:
            out, _ = process.communicate(timeout=max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        good.update(int(line) for line in out.split())
    return good


def tune(n: int, k: int, group_size: int, m: int, writer, seconds: float) -> None:
    target = arch.current()
    assert target is not None
    spec = f"{n},{k},{group_size},{m},{target.num_sms}"
    start = time.time()
    good = compiled(spec, seconds)
    plans = candidates(m, n, k, group_size, target.num_sms)
    compile_seconds = time.time() - start
    q, qdata, scale = make(n, k, group_size)
    del q
    nbytes = qdata.numel() * 2 + scale.numel() * 2
    copies = [(qdata.clone(), scale.clone()) for _ in range(timing.n_copies(nbytes))]
    x = torch.randn(1, m, k, device="cuda", dtype=torch.bfloat16)
    read_us = ceilings.read_us(nbytes)
    dense = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(timing.n_copies(2 * n * k))
    ]
    bf16_us = timing.graph_time([lambda w=w: x[0] @ w.t() for w in dense], 0.02).us
    del dense
    w = reference.dequantize(COALESCED.unpack(qdata, k), scale, None)
    ref = x[:, : min(m, 64)].double() @ w.double().mT if n * k < 1 << 28 else None
    del w
    rows = []
    y = torch.empty(1, m, n, device="cuda", dtype=torch.bfloat16)
    for i in sorted(good):
        plan = plans[i]

        def call(qdata, scale, plan=plan):
            gemm(x, qdata, scale, None, None, y, group_size, plan)

        try:
            call(*copies[0])
            error = rel_err(y[:, :64], ref) if ref is not None else float("nan")
            us = timing.graph_time([lambda c=c, call=call: call(*c) for c in copies], 0.004).us
        except Exception as failure:
            print(f"# {plan}: {failure!r}"[:200], file=sys.stderr)
            continue
        rows.append((us, plan, error))
    rows.sort(key=lambda row: row[0])
    for us, plan, error in rows[:12]:
        values = [getattr(plan, name) for name in FIELDS[4:13]]
        measured = [f"{us:.2f}", f"{read_us:.2f}", f"{bf16_us:.2f}", f"{error:.1e}"]
        writer.writerow([n, k, group_size, m, *values, *measured])
    best = " | ".join(
        f"{us:.1f} {p.block_m}x{p.block_n}/{p.split_k} w{p.num_warps} s{p.num_stages}"
        f"{' after' if p.scale_after else ''}{' tma' if p.x_tma else ''}"
        for us, p, _ in rows[:4]
    )
    print(
        f"{n}x{k} g{group_size} M={m}: read {read_us:.1f} bf16 {bf16_us:.1f} | {best} "
        f"[{len(rows)}/{len(plans)}, {compile_seconds:.0f} s + "
        f"{time.time() - start - compile_seconds:.0f} s]",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096", help="NxK or NxKxgroup, by commas")
    parser.add_argument("--m", default="1", help="token counts, by commas")
    parser.add_argument("--seconds", type=float, default=300, help="stop starting after this")
    parser.add_argument("--out", type=Path, default=Path("tune.csv"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        index, count = map(int, args.worker.split("/"))
        worker(index, count, args.spec)
        return
    start = time.time()
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if not args.out.stat().st_size:
            writer.writerow(FIELDS)
        for m, shape in itertools.product(args.m.split(","), args.shapes.split(",")):
            n, k, *group = map(int, shape.split("x"))
            if time.time() - start > args.seconds:
                print(f"# out of time before {shape} M={m}")
                return
            tune(n, k, group[0] if group else 128, int(m), writer, seconds=90)
            file.flush()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
