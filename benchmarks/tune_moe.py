"""Searches tiles for the experts kernels on this card and prints the plans that won.

    python -m benchmarks.tune_moe --shapes qwen3.5-35b-a3b --tokens 1,4,16,64 --out tune_moe.jsonl

Candidates are compiled, and run once, by as many processes as there are cores; one that fails or
crashes there is left out here. Both products are then timed apart, in CUDA graphs that rotate
through routings and copies of the layer, and the best of each together as whole blocks, with and
without programmatic dependent launch. Every candidate is checked against the definition, twice, for
equal bits. Rows go to --out as JSON lines; needs a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from w4tensor import arch, moe
from w4tensor.dispatch import KWIDTH_2_EVERYWHERE
from w4tensor.dispatch_experts import (
    ExpertsPlan,
    ExpertsProblem,
    GroupedPlan,
    PairsPlan,
    plan_experts,
)
from w4tensor.layout import COALESCED
from w4tensor.moe import Stack
from w4tensor.testing import (
    MOE_REL_ERR_BUDGET,
    MOE_SHAPES,
    Int4Codes,
    MoeShape,
    random_codes,
    random_routing,
    rel_err,
)

Plan = PairsPlan | GroupedPlan

# pairs above which weights would be read too often for the pairs path to be worth a try
TRY_PAIRS_UP_TO = 256
SHARED_BYTES = 227 << 10
# of each product, how many of the best are tried in whole blocks
FINALISTS = 3


def pairs_candidates(top_k: int, k: int, kwidth: int) -> Iterator[PairsPlan]:
    """Warps from 4 to 16, with as much of K a step as there is and registers hold."""
    blocks_of_k = -(-k // 128)
    for slots, slices, tiles, blocks in itertools.product(
        (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4), (1, 2, 4)
    ):
        step = slices * blocks
        whole = step >= blocks_of_k
        if not 4 <= slots * slices <= 16 or slots >= 2 * top_k or tiles * blocks > 4:
            continue
        if step >= 2 * blocks_of_k and step > 1:
            continue
        for prefetch in (False,) if whole else (False, True):
            yield PairsPlan(slots, slices, tiles, blocks, kwidth, prefetch)


def grouped_candidates(block_m: int, kwidth: int) -> Iterator[GroupedPlan]:
    for block_n, warps, stages in itertools.product((64, 128, 256), (2, 4, 8), (2, 3, 4, 5)):
        wgmma = block_m >= 16 and warps % 4 == 0
        sums = block_m * block_n // (32 * warps)
        shared = stages * (block_n * 64 + block_m * 256)
        if block_n < 16 * warps or sums > 128 or shared > SHARED_BYTES:
            continue
        if block_m >= 16 and not wgmma:
            continue
        for after in (True, False):
            # two accumulators, or weights that are multiplied for few tokens
            if (after and sums > 64) or (not after and block_m <= 16):
                continue
            order = 2 if wgmma else kwidth
            yield GroupedPlan(block_m, block_n, after, order, warps, stages)


def block_ms(problem: ExpertsProblem) -> list[int]:
    """Tiles of tokens on either side of the mean rows of an expert."""
    sizes = (8, 16, 32, 64, 128)
    at = next((i for i, m in enumerate(sizes) if problem.rows_an_expert <= m), len(sizes) - 1)
    return list(sizes[max(0, at - 1) : at + 2])


class Layer:
    """Weights of a block, in copies that together are larger than the cache."""

    def __init__(self, shape: MoeShape, dtype: torch.dtype, copies: int | None = None):
        self.shape = shape
        options = dict(group_size=shape.group_size, dtype=dtype, device="cuda")
        self.codes = (
            random_codes(shape.experts, 2 * shape.inter, shape.hidden, **options),
            random_codes(shape.experts, shape.hidden, shape.inter, seed=1, **options),
        )
        nbytes = sum(codes.nbytes for codes in self.codes)
        first = tuple(_stack(codes) for codes in self.codes)
        n = timing.n_copies(nbytes) if copies is None else copies
        self.stacks = [first, *(tuple(map(_clone, first)) for _ in range(n - 1))]
        self.expert_bytes = nbytes / shape.experts
        self.dtype = dtype


class Load:
    """`tokens` tokens, with enough routings that a graph of them reads more than the cache."""

    def __init__(self, layer: Layer, tokens: int):
        shape = layer.shape
        sizes = shape.experts, shape.hidden, shape.inter
        self.layer = layer
        self.problem = ExpertsProblem(tokens, shape.top_k, *sizes, shape.group_size)
        self.x = torch.randn(tokens, shape.hidden, device="cuda", dtype=layer.dtype)
        pairs = self.problem.pairs
        hit = pairs / self.problem.rows_an_expert
        n = timing.n_copies(int(hit * layer.expert_bytes))
        self.routings = [
            random_routing(tokens, shape.experts, shape.top_k, device="cuda", seed=seed)
            for seed in range(n)
        ]
        self.h = torch.randn(pairs, shape.inter, device="cuda", dtype=layer.dtype)

    def stacks(self) -> Iterator[tuple[Stack, Stack]]:
        return itertools.cycle(self.layer.stacks)

    def first(self, plan: Plan, second: Plan | None = None) -> list[Callable]:
        both = ExpertsPlan(plan, second or plan)
        return [
            lambda r=r, s=s: moe.first_product(self.x, *r, s[0], both, "halves", "silu")
            for r, s in zip(self.routings, self.stacks(), strict=False)
        ]

    def second(self, plan: Plan) -> list[Callable]:
        both = ExpertsPlan(plan, plan)
        calls = []
        for r, s in zip(self.routings, self.stacks(), strict=False):
            routing = moe.first_product(self.x, *r, s[0], both, "halves", "silu")[1]
            calls.append(lambda t=routing, s=s: moe.second_product(self.h, t, s[1], both))
        return calls

    def block(self, plan: ExpertsPlan) -> list[Callable]:
        return [
            lambda r=r, s=s: moe.experts(self.x, *r, *s, plan)
            for r, s in zip(self.routings, self.stacks(), strict=False)
        ]

    def expected(self) -> Tensor:
        """The definition in fp32, expert by expert, for the first routing."""
        ids, weight = self.routings[0]
        y = torch.zeros(self.x.shape, dtype=torch.float32, device="cuda")
        for e in ids.unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            w1, w2 = (_expert(codes, e) for codes in self.layer.codes)
            gate, up = (self.x[token].float() @ w1.mT).chunk(2, dim=-1)
            out = (F.silu(gate) * up) @ w2.mT
            y.index_add_(0, token, weight[token, slot, None] * out)
        return y


def _stack(codes: Int4Codes) -> Stack:
    return Stack(COALESCED.pack(codes.q), codes.scale, codes.zero_point, codes.group_size)


def _clone(stack: Stack) -> Stack:
    return stack._replace(qdata=stack.qdata.clone(), scale=stack.scale.clone())


def _expert(codes: Int4Codes, e: int) -> Tensor:
    zero = None if codes.zero_point is None else codes.zero_point[e]
    return Int4Codes(codes.q[e], codes.scale[e], zero).dequantize()


def candidates(problem: ExpertsProblem) -> tuple[list[Plan], list[Plan]]:
    """Plans of the first and of the second product."""
    target = arch.current()
    assert target is not None
    kwidth = 2 if target.triton >= KWIDTH_2_EVERYWHERE else 4
    first: list[Plan] = []
    second: list[Plan] = []
    if problem.pairs <= TRY_PAIRS_UP_TO:
        first += pairs_candidates(1, problem.hidden, kwidth)
        second += pairs_candidates(problem.top_k, problem.inter, kwidth)
    if problem.pairs > 16:
        for block_m in block_ms(problem):
            first += grouped_candidates(block_m, kwidth)
            second += grouped_candidates(block_m, kwidth)
    return first, second


def compile_some(options: argparse.Namespace, worker: int, workers: int) -> None:
    """Run every workers-th candidate once, and write down which came back."""
    torch.cuda.init()
    for shape in shapes_of(options):
        layer = Layer(shape, torch.bfloat16, copies=1)
        done = set()
        for tokens in tokens_of(options, shape):
            load = Load(layer, tokens)
            for i, plans in enumerate(candidates(load.problem)):
                for number, plan in enumerate(plans):
                    # the same kernel, whatever the number of tokens
                    if number % workers != worker or (i, plan) in done:
                        continue
                    done.add((i, plan))
                    try:
                        call = (load.second if i else load.first)(plan)[0]
                        call()
                        torch.cuda.synchronize()
                    except Exception as error:
                        print(f"{shape.model} {plan}: {str(error)[:200]}", flush=True)
                        continue
                    with open(options.log, "a") as log:
                        log.write(f"{shape.model} {i} {plan}\n")
        del layer, load
        torch.cuda.empty_cache()


def compile_all(options: argparse.Namespace) -> set[str]:
    """Lines `model product plan` of the candidates that compiled and ran."""
    workers = max(1, (os.cpu_count() or 2) - 1)
    log = Path(tempfile.mkdtemp()) / "compiled"
    log.touch()
    command = [sys.executable, "-m", "benchmarks.tune_moe", "--shapes", options.shapes]
    command += ["--tokens", options.tokens, "--log", str(log)]
    outputs = [open(log.with_name(f"worker{i}"), "w") for i in range(workers)]
    processes = [
        subprocess.Popen([*command, "--worker", f"{i}/{workers}"], stdout=out, stderr=out)
        for i, out in enumerate(outputs)
    ]
    end = time.monotonic() + options.compile_seconds
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    failed = [i for i, process in enumerate(processes) if process.wait() != 0]
    for i in failed[:3]:
        print(f"worker {i}:", log.with_name(f"worker{i}").read_text()[-600:])
    return set(log.read_text().splitlines())


def timed(calls: list[Callable], seconds: float) -> float:
    return timing.graph_time(calls, seconds).us


def tune(options: argparse.Namespace, layer: Layer, tokens: int, compiled: set[str]) -> None:
    load = Load(layer, tokens)
    shape, expected = layer.shape, load.expected()
    best: list[list[tuple[float, Plan]]] = []
    for i, plans in enumerate(candidates(load.problem)):
        rows = []
        for plan in plans:
            if f"{shape.model} {i} {plan}" not in compiled:
                continue
            us = timed((load.second if i else load.first)(plan), options.graph_seconds)
            rows.append((us, plan))
            write(options, shape, tokens, ("first", "second")[i], us, plan)
        rows.sort(key=lambda row: row[0])
        best.append(rows)
        for us, plan in rows[:FINALISTS]:
            print(f"  {('first', 'second')[i]:6s} {us:8.2f} us  {plan}", flush=True)

    results = []
    for plan in finalists(*best):
        try:
            us, error = whole(load, plan, expected, options.graph_seconds)
        except Exception as failure:
            print(f"  failed: {plan}: {str(failure)[:200]}", flush=True)
            continue
        write(options, shape, tokens, "block", us, plan, error)
        results.append((us, error, plan))
    results.sort(key=lambda row: row[0])
    for us, error, plan in results[:FINALISTS]:
        print(f"  block  {us:8.2f} us  err {error:.1e}  {plan}", flush=True)
    rule = plan_experts(load.problem, arch.current())
    assert rule is not None
    us, error = whole(load, rule, expected, options.graph_seconds)
    write(options, shape, tokens, "rule", us, rule, error)
    print(f"  rule   {us:8.2f} us  err {error:.1e}  {rule.name}", flush=True)


def whole(load: Load, plan: ExpertsPlan, expected: Tensor, seconds: float) -> tuple[float, float]:
    """Microseconds and error of a block; raises where two runs differ or the error is too large."""
    calls = load.block(plan)
    y = calls[0]()
    if not torch.equal(y, calls[0]()):
        raise RuntimeError("two runs differ")
    error = rel_err(y, expected)
    if not error < MOE_REL_ERR_BUDGET:
        raise RuntimeError(f"error {error:.1e}")
    us = timed(calls, seconds)
    if not torch.equal(y, calls[0]()):
        raise RuntimeError("a run after the graph differs")
    return us, error


def finalists(
    first: list[tuple[float, Plan]], second: list[tuple[float, Plan]]
) -> Iterator[ExpertsPlan]:
    """The best of each kind and block_m together, each also with dependent launches."""

    def of(rows: list[tuple[float, Plan]], kind: type, block_m: int | None) -> list[Plan]:
        found = [p for _, p in rows if isinstance(p, kind)]
        return [p for p in found if block_m is None or getattr(p, "block_m", None) == block_m]

    for a, b in itertools.product(of(first, PairsPlan, None)[:2], of(second, PairsPlan, None)[:2]):
        yield ExpertsPlan(a, b)
        yield ExpertsPlan(
            dataclasses.replace(a, pdl="first"), dataclasses.replace(b, pdl="second")
        )
    for block_m in (8, 16, 32, 64, 128):
        rows = of(first, GroupedPlan, block_m)[:2]
        for a, b in itertools.product(rows, of(second, GroupedPlan, block_m)[:2]):
            yield ExpertsPlan(a, b)
            yield ExpertsPlan(dataclasses.replace(a, pdl=True), dataclasses.replace(b, pdl=True))
        for a, b in itertools.product(rows[:1], of(second, PairsPlan, None)[:1]):
            yield ExpertsPlan(a, b)


def write(
    options: argparse.Namespace,
    shape: MoeShape,
    tokens: int,
    what: str,
    us: float,
    plan: Plan | ExpertsPlan,
    error: float | None = None,
) -> None:
    row = dict(model=shape.model, tokens=tokens, what=what, us=round(us, 2), error=error)
    row["plan"] = dataclasses.asdict(plan)
    with open(options.out, "a") as out:
        out.write(json.dumps(row) + "\n")


def shapes_of(options: argparse.Namespace) -> list[MoeShape]:
    wanted = set(options.shapes.split(","))
    return [shape for shape in MOE_SHAPES if wanted & {shape.model, "all"}]


def tokens_of(options: argparse.Namespace, shape: MoeShape) -> list[int]:
    return [int(t) for t in options.tokens.split(",") if t] or list(shape.tokens)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3.5-35b-a3b", help="models of MOE_SHAPES, or all")
    parser.add_argument("--tokens", default="", help="instead of each layer's own numbers")
    parser.add_argument("--out", type=Path, default=Path("tune_moe.jsonl"))
    parser.add_argument("--seconds", type=float, default=400, help="start no problem after these")
    parser.add_argument("--compile-seconds", type=float, default=150)
    parser.add_argument("--graph-seconds", type=float, default=0.01)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("tune_moe times kernels and needs a CUDA device")
    if options.worker:
        return compile_some(options, *map(int, options.worker.split("/")))
    started = time.monotonic()
    compiled = compile_all(options)
    print(f"{len(compiled)} candidates in {time.monotonic() - started:.0f} s", flush=True)
    for shape in shapes_of(options):
        layer = Layer(shape, torch.bfloat16)
        for tokens in tokens_of(options, shape):
            if time.monotonic() - started > options.seconds:
                print(f"out of time before {shape.model} {tokens}")
                return
            print(f"{shape.name}, {tokens} tokens", flush=True)
            tune(options, layer, tokens, compiled)
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
