"""Searches tiles for the experts kernels on this card and prints the plans that won.

    python -m benchmarks.tune_moe --shapes qwen3.5-35b-a3b --tokens 1,4,16,64 --out tune_moe.jsonl

Both products of a block are timed apart, in CUDA graphs that rotate through routings and copies of
the layer; then the best of each together as whole blocks, with and without programmatic dependent
launch, next to the plan that dispatch has today. Before either, all that will run is compiled, and
run once, by as many processes as there are cores: what fails or crashes there is left out. Blocks
are checked against the definition, and for equal bits. Rows go to --out as JSON lines. Needs a CUDA
device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from w4tensor import arch, moe
from w4tensor.dispatch import HOPPER, KWIDTH_2_EVERYWHERE, Arch
from w4tensor.dispatch_experts import (
    SHARED_RESIDENT,
    SLICES,
    ExpertsProblem,
    plan_experts,
)
from w4tensor.dispatch_gemv import WARP_K, GemvPlan, serves_gemv
from w4tensor.kernels.routing import route
from w4tensor.kernels.row_tiles import tiles_of
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.moe import Stack
from w4tensor.plans_experts import (
    ActQuantGroupedPlan,
    ExpertsPlan,
    FewPlan,
    GroupedPlan,
    HopperGroupedPlan,
    HopperInt8GroupedPlan,
    PairsPlan,
    fit_together,
)
from w4tensor.testing import (
    MOE_REL_ERR_BUDGET,
    MOE_SHAPES,
    Int4Codes,
    MoeShape,
    random_codes,
    random_routing,
    rel_err,
)

Plan = FewPlan | GroupedPlan | HopperGroupedPlan | HopperInt8GroupedPlan | ActQuantGroupedPlan
# a plan of the first or the second product, or of the block
Job = tuple[str, str, Plan | ExpertsPlan]
# (microseconds, plan) of the first and of the second product, fastest first
Ranking = tuple[list[tuple[float, Plan]], list[tuple[float, Plan]]]

DEVICE, DTYPE = "cuda", torch.bfloat16
PRODUCTS = ("first", "second")
# pairs above which weights would be read too often for the pairs path to be worth a try
TRY_PAIRS_UP_TO = 256
# pairs of an expert up to which sorting them cannot pay
TRY_GROUPED_FROM = 1.05
TILES_OF_TOKENS = (8, 16, 32, 64, 128, 256)
# sums in int32 and in fp32 leave no registers for more
INT8_MAX_TOKENS = 64
SHARED_BYTES = 227 << 10
# least steps of a slice of K
STEPS_OF_SLICE = 8
SHOWN = 3
# 36 dB of signal to noise
ACT_QUANT_ERR = 10 ** (-36 / 20)


def pairs_candidates(top_k: int, k: int, kwidth: int) -> Iterator[PairsPlan]:
    """Four to sixteen warps, with as much of K a step as there is and registers hold."""
    blocks_of_k = -(-k // 128)
    for slots, slices, tiles, blocks in itertools.product(
        (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4), (1, 2, 4)
    ):
        step = slices * blocks
        if not 4 <= slots * slices <= 16 or slots >= 2 * top_k or tiles * blocks > 4:
            continue
        if step >= 2 * blocks_of_k and step > 1:
            continue
        yield PairsPlan(slots, slices, tiles, blocks, kwidth)


def gemv_candidates(k: int) -> Iterator[GemvPlan]:
    """One warp to eight, as long as each has something to do."""
    for rows, warps in itertools.product((4, 8, 16), (1, 2, 4, 8)):
        if warps > 1 and (WARP_K * warps > k or rows * warps > 64):
            continue
        yield GemvPlan(rows, warps)
        if WARP_K * warps < k and rows < 16:
            yield GemvPlan(rows, warps, ahead=True)


def grouped_candidates(block_m: int, kwidth: int, fine: bool) -> Iterator[GroupedPlan]:
    """`fine`: scales change within a step, and must come before the dot."""
    for block_n, warps, stages in itertools.product((64, 128, 256), (2, 4, 8), (2, 3, 4, 5)):
        wgmma = block_m >= 16 and warps % 4 == 0
        sums = block_m * block_n // (32 * warps)
        shared = stages * (block_n * 64 + block_m * 256)
        if block_n < 16 * warps or sums > 128 or shared > SHARED_BYTES:
            continue
        if block_m >= 16 and not wgmma:
            continue
        for after in (True, False):
            # two sets of sums, or weights that are multiplied for few tokens
            if (after and (sums > 64 or fine)) or (not after and block_m <= 16 and not fine):
                continue
            order = 2 if wgmma else kwidth
            for narrow_m in _narrow(block_m):
                yield GroupedPlan(block_m, block_n, after, order, warps, stages, narrow_m)


def hopper_candidates(
    block_m: int, num_sms: int, slices: tuple[int, ...] = (1,)
) -> Iterator[HopperGroupedPlan]:
    for block_n, warps, stages, pipelined, split_k in itertools.product(
        (64, 128), (4, 8), (2, 3, 4, 5), (True, False), slices
    ):
        sums = block_m * block_n // (32 * warps)
        shared = stages * (block_n * 64 + block_m * 256)
        # a warp has 16 or 32 rows
        if block_n < 16 * warps or sums > 128 or shared > SHARED_BYTES:
            continue
        for narrow_m in _narrow_on_hopper(block_m):
            plan = HopperGroupedPlan(
                block_m, block_n, warps, stages, narrow_m, False, split_k, pipelined
            )
            yield plan
            if split_k == 1 and block_m in SHARED_RESIDENT:
                yield replace(plan, programs=SHARED_RESIDENT[block_m] * num_sms)


def hopper_int8_candidates(block_m: int) -> Iterator[HopperInt8GroupedPlan]:
    for block_n, block_k, stages in itertools.product((64, 128), (128, 256), (3, 4)):
        sums = block_m * block_n // 128
        # two sets of sums, and the weights of a step
        if sums > 64 or sums * block_k > 64 * 128:
            continue
        for narrow_m in _narrow_on_hopper(block_m):
            yield HopperInt8GroupedPlan(block_m, block_n, block_k, 4, stages, narrow_m, pdl=False)


def act_quant_candidates(block_m: int, kwidth: int) -> Iterator[ActQuantGroupedPlan]:
    for block_n, warps, stages in itertools.product((64, 128), (4, 8), (2, 3, 4, 5)):
        sums = block_m * block_n // (32 * warps)
        shared = stages * (block_n * 64 + block_m * 128)
        if block_n < 16 * warps or sums > 64 or shared > SHARED_BYTES:
            continue
        # int8 operands hold twice as many k: the same two orders, under twice the number
        order = 4 if block_m >= 16 else 2 * kwidth
        for narrow_m in _narrow(block_m):
            yield ActQuantGroupedPlan(block_m, block_n, order, warps, stages, narrow_m)


def _narrow(block_m: int) -> tuple[int, ...]:
    return (0, block_m // 4) if block_m >= 64 else (0,)


def _narrow_on_hopper(block_m: int) -> tuple[int, ...]:
    return {32: (0, 8), 64: (0, 16, 32), 128: (0, 32), 256: (0, 64)}.get(block_m, (0,))


def candidates(problem: ExpertsProblem, target: Arch) -> tuple[list[Plan], list[Plan]]:
    """Plans of the first and of the second product."""
    kwidth = 2 if target.triton >= KWIDTH_2_EVERYWHERE else 4
    int8 = problem.act_group_size is not None

    def grouped(block_m: int, slices: tuple[int, ...] = (1,)) -> Iterator[Plan]:
        if target.capability[0] == HOPPER:
            yield from hopper_candidates(block_m, target.num_sms, slices)
            if int8:
                yield from hopper_int8_candidates(block_m)
        elif not int8 or (block_m == 8 and kwidth == 4):
            yield from grouped_candidates(block_m, kwidth, problem.group_size % 128 != 0)
        if int8 and block_m <= INT8_MAX_TOKENS:
            yield from act_quant_candidates(block_m, kwidth)

    first: list[Plan] = []
    second: list[Plan] = []
    if problem.pairs <= TRY_PAIRS_UP_TO:
        first += pairs_candidates(1, problem.hidden, kwidth)
        second += pairs_candidates(problem.top_k, problem.inter, kwidth)
        groups = problem.group_size, target, problem.act_group_size
        if serves_gemv(problem.inter, problem.hidden, *groups):
            first += gemv_candidates(problem.hidden)
        if serves_gemv(problem.hidden, problem.inter, *groups):
            second += gemv_candidates(problem.top_k * problem.inter)
    if problem.rows_an_expert >= TRY_GROUPED_FROM:
        # tiles on either side of the mean rows of an expert
        mean = problem.rows_an_expert
        few = int8 and target.capability[0] != HOPPER
        tiles = [m for m in TILES_OF_TOKENS if m <= INT8_MAX_TOKENS or not few]
        at = next((i for i, m in enumerate(tiles) if mean <= m), len(tiles) - 1)
        for block_m in tiles[max(0, at - 1) : at + 2]:
            first += grouped(block_m)
            # what a block's sum over slots can add, and slices that are worth a start
            slices = [s for s in SLICES if s == 1 or problem.inter >= STEPS_OF_SLICE * 128 * s]
            second += grouped(block_m, tuple(slices))
    return first, second


def finalists(ranking: Ranking) -> Iterator[ExpertsPlan]:
    """The best of each kind and tile together, and with dependent launches."""

    def best(product: int, block_m: int | None, count: int) -> list[Plan]:
        """Of the plans with a tile of block_m tokens, or of pairs, which have none."""
        plans = [plan for _, plan in ranking[product]]
        return [p for p in plans if getattr(p, "block_m", None) == block_m][:count]

    for a, b in itertools.product(best(0, None, 2), best(1, None, 2)):
        yield ExpertsPlan(a, b)
        yield ExpertsPlan(replace(a, pdl="first"), replace(b, pdl="second"))
    for block_m in TILES_OF_TOKENS:
        tiles = best(0, block_m, 2)
        for a, b in itertools.product(tiles, best(1, block_m, 2)):
            if fit_together(a, b):
                yield ExpertsPlan(a, b)
        for a, b in itertools.product(tiles[:1], best(1, block_m, 1)):
            if fit_together(a, b):
                yield ExpertsPlan(replace(a, pdl=True), replace(b, pdl=True))
        for a, b in itertools.product(tiles[:1], best(1, None, 1)):
            yield ExpertsPlan(a, b)


class Layer:
    """Weights of a block, in copies that together are larger than the cache."""

    def __init__(self, shape: MoeShape, act_group_size: int | None, copies: int | None = None):
        self.shape = shape
        self.act_group_size = act_group_size
        options = dict(group_size=shape.group_size, dtype=DTYPE, device=DEVICE)
        self.codes = (
            random_codes(shape.experts, 2 * shape.inter, shape.hidden, **options),
            random_codes(shape.experts, shape.hidden, shape.inter, seed=1, **options),
        )
        self.nbytes = sum(codes.nbytes for codes in self.codes)
        layout = COALESCED if act_group_size is None else ACT_QUANT
        stacks = tuple(
            Stack(layout.pack(c.q), c.scale, None, c.group_size, None, act_group_size)
            for c in self.codes
        )
        copies = timing.n_copies(self.nbytes) if copies is None else copies
        self.stacks = [stacks]
        for _ in range(copies - 1):
            copy = (s._replace(qdata=s.qdata.clone(), scale=s.scale.clone()) for s in stacks)
            self.stacks.append(tuple(copy))


class Load:
    """`tokens` tokens, with enough routings that a graph of them reads more than the cache."""

    def __init__(self, layer: Layer, tokens: int, routings: int | None = None):
        shape = layer.shape
        self.layer = layer
        self.problem = problem_of(shape, tokens, layer.act_group_size)
        pairs = self.problem.pairs
        if routings is None:
            hit = pairs / self.problem.rows_an_expert
            routings = timing.n_copies(int(layer.nbytes * hit / shape.experts))
        options = dict(device=DEVICE, dtype=DTYPE)
        self.x = torch.randn(tokens, shape.hidden, **options)
        self.h = torch.randn(pairs, shape.inter, **options)
        layers = itertools.cycle(layer.stacks)
        # (ids, weight, gate_up, down) of every call of a graph
        self.turns = [
            (*random_routing(tokens, shape.experts, shape.top_k, device=DEVICE, seed=i), *stacks)
            for i, stacks in zip(range(routings), layers, strict=False)
        ]

    def calls(self, what: str, plan: Plan | ExpertsPlan) -> list[Callable[[], object]]:
        if isinstance(plan, ExpertsPlan):
            return [lambda turn=turn: moe.experts(self.x, *turn, plan) for turn in self.turns]
        both = ExpertsPlan(plan, plan)
        if what == "first":
            return [
                lambda turn=turn: moe.first_product(self.x, *turn[:3], both, "halves", "silu")
                for turn in self.turns
            ]
        calls = []
        for ids, weight, _, down in self.turns:
            rows = None
            if not isinstance(plan, FewPlan):
                order, offs, _ = route(ids, self.problem.experts, plan.block_m)
                tiles = tiles_of(offs, len(order), plan.block_m, getattr(plan, "narrow_m", 0))
                rows = moe.Rows(order, offs, tiles)
            routing = moe.Routing(ids, weight, rows)
            calls.append(
                lambda routing=routing, down=down: moe.second_product(self.h, routing, down, both)
            )
        return calls

    def expected(self) -> Tensor:
        """The definition in fp32, expert by expert, for the first turn."""
        ids, weight = self.turns[0][:2]
        y = torch.zeros(self.x.shape, dtype=torch.float32, device=DEVICE)
        for e in ids.unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            w1, w2 = (Int4Codes(c.q[e], c.scale[e], None).dequantize() for c in self.layer.codes)
            gate, up = (self.x[token].float() @ w1.mT).chunk(2, dim=-1)
            y.index_add_(0, token, weight[token, slot, None] * ((F.silu(gate) * up) @ w2.mT))
        return y


def problem_of(shape: MoeShape, tokens: int, act_group_size: int | None) -> ExpertsProblem:
    sizes = shape.experts, shape.hidden, shape.inter
    return ExpertsProblem(tokens, shape.top_k, *sizes, shape.group_size, act_group_size)


def this_card() -> Arch:
    target = arch.current()
    assert target is not None
    return target


def rule_of(problem: ExpertsProblem) -> ExpertsPlan:
    """What dispatch has today."""
    plan = plan_experts(problem, this_card())
    assert plan is not None
    return plan


def run_jobs(path: Path, worker: int, workers: int, act_group_size: int | None) -> None:
    """Run every workers-th job once, and write down which came back."""
    jobs: dict[Job, int] = pickle.loads(path.read_bytes())
    layer = None
    for number, ((model, what, plan), tokens) in enumerate(jobs.items()):
        if number % workers != worker:
            continue
        if layer is None or layer.shape.model != model:
            layer = None
            shape = next(shape for shape in MOE_SHAPES if shape.model == model)
            layer = Layer(shape, act_group_size, copies=1)
        try:
            Load(layer, tokens, routings=1).calls(what, plan)[0]()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{what} {plan}: {str(error)[:300]}", flush=True)
            continue
        with open(path.with_suffix(".done"), "a") as done:
            done.write(f"{number}\n")


def compile_jobs(jobs: dict[Job, int], options: argparse.Namespace) -> set[Job]:
    """Those of `jobs` (job -> tokens to run it with) that compiled and ran."""
    started = time.monotonic()
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    path = Path(tempfile.mkdtemp()) / "jobs"
    path.write_bytes(pickle.dumps(jobs))
    done = path.with_suffix(".done")
    done.touch()
    processes = []
    for i in range(workers):
        command = [sys.executable, "-m", "benchmarks.tune_moe", "--worker", f"{path},{i},{workers}"]
        if options.act_group_size is not None:
            command += ["--act-group-size", str(options.act_group_size)]
        with open(path.with_suffix(f".{i}"), "w") as out:
            processes.append(subprocess.Popen(command, stdout=out, stderr=out))
    for i, process in enumerate(processes):
        try:
            process.wait(max(0.1, started + options.compile_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        log = path.with_suffix(f".{i}").read_text()
        if process.wait() != 0 or "Error" in log:
            print(f"worker {i}, exit {process.returncode}:", log[-500:], flush=True)
    names = list(jobs)
    finished = {names[int(line)] for line in done.read_text().split()}
    spent = time.monotonic() - started
    print(f"compiled {len(finished)} of {len(jobs)} in {spent:.0f} s", flush=True)
    return finished


def tune_products(options: argparse.Namespace, load: Load, compiled: set[Job]) -> Ranking:
    model, tokens = load.layer.shape.model, load.problem.tokens
    ranking: Ranking = ([], [])
    plans = candidates(load.problem, this_card())
    for what, rows, tried in zip(PRODUCTS, ranking, plans, strict=True):
        for plan in tried:
            if (model, what, plan) in compiled:
                us = timing.graph_time(load.calls(what, plan), options.graph_seconds).us
                rows.append((us, plan))
                write(options, model, tokens, what, us, plan)
        rows.sort(key=lambda row: row[0])
        for us, plan in rows[:SHOWN]:
            print(f"  {what:6s} {us:8.2f} us  {plan}", flush=True)
    return ranking


def tune_blocks(options: argparse.Namespace, load: Load, plans: list[ExpertsPlan]) -> None:
    model, tokens = load.layer.shape.model, load.problem.tokens
    expected = load.expected()
    rule = rule_of(load.problem)
    results = []
    for plan in dict.fromkeys([*plans, rule]):
        try:
            us, error = time_block(load, plan, expected, options.graph_seconds)
        except Exception as failure:
            print(f"  FAILED {plan}: {str(failure)[:200]}", flush=True)
            continue
        write(options, model, tokens, "block", us, plan, error)
        results.append((us, error, plan))
    results.sort(key=lambda row: row[0])
    shown = [row for at, row in enumerate(results) if at < SHOWN or row[2] == rule]
    for us, error, plan in shown:
        what = "rule" if plan == rule else "block"
        print(f"  {what:6s} {us:8.2f} us  err {error:.1e}  {plan}", flush=True)


def time_block(
    load: Load, plan: ExpertsPlan, expected: Tensor, seconds: float
) -> tuple[float, float]:
    """Microseconds and error of a block; raises where two runs differ or the error is too large."""
    calls = load.calls("block", plan)
    y = moe.experts(load.x, *load.turns[0], plan)
    error = rel_err(y, expected)
    if not error < (MOE_REL_ERR_BUDGET if load.layer.act_group_size is None else ACT_QUANT_ERR):
        raise RuntimeError(f"error {error:.1e}")
    us = timing.graph_time(calls, seconds).us
    if not torch.equal(y, moe.experts(load.x, *load.turns[0], plan)):
        raise RuntimeError("two runs differ")
    return us, error


def write(
    options: argparse.Namespace,
    model: str,
    tokens: int,
    what: str,
    us: float,
    plan: Plan | ExpertsPlan,
    error: float | None = None,
) -> None:
    row = dict(model=model, tokens=tokens, act_group_size=options.act_group_size, what=what)
    row |= dict(us=round(us, 2), error=error, plan=asdict(plan))
    with open(options.out, "a") as out:
        out.write(json.dumps(row) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(shape.model for shape in MOE_SHAPES)
    parser.add_argument("--shapes", default="all", help=f"all or models of {known}")
    parser.add_argument("--tokens", default="", help="instead of each layer's own numbers")
    parser.add_argument("--out", type=Path, default=Path("tune_moe.jsonl"))
    parser.add_argument("--seconds", type=float, default=500, help="start no problem after these")
    parser.add_argument("--compile-seconds", type=float, default=150, help="of each of two rounds")
    parser.add_argument("--graph-seconds", type=float, default=0.01, help="timing of a candidate")
    parser.add_argument(
        "--act-group-size", type=int, help="int8 activations: 32, 64, 128 or -1, per token"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("tune_moe times kernels and needs a CUDA device")
    if options.worker:
        path, worker, workers = options.worker.split(",")
        return run_jobs(Path(path), int(worker), int(workers), options.act_group_size)
    started = time.monotonic()
    wanted = set(options.shapes.split(","))
    shapes = [shape for shape in MOE_SHAPES if wanted & {shape.model, "all"}]
    tokens = {
        shape.model: [int(t) for t in options.tokens.split(",") if t] or shape.tokens
        for shape in shapes
    }
    jobs: dict[Job, int] = {}
    for shape in shapes:
        for count in tokens[shape.model]:
            plans = candidates(problem_of(shape, count, options.act_group_size), this_card())
            for what, tried in zip(PRODUCTS, plans, strict=True):
                for plan in tried:
                    jobs.setdefault((shape.model, what, plan), count)
    compiled = compile_jobs(jobs, options)

    blocks: dict[tuple[str, int], list[ExpertsPlan]] = {}
    for shape in shapes:
        layer = Layer(shape, options.act_group_size)
        for count in tokens[shape.model]:
            if time.monotonic() - started > options.seconds:
                print(f"out of time before {shape.model} {count}")
                break
            print(f"{shape.name}, {count} tokens: products", flush=True)
            ranking = tune_products(options, Load(layer, count), compiled)
            blocks[shape.model, count] = list(finalists(ranking))
        del layer
        torch.cuda.empty_cache()
    jobs = {}
    for (model, count), plans in blocks.items():
        shape = next(shape for shape in shapes if shape.model == model)
        for plan in [*plans, rule_of(problem_of(shape, count, options.act_group_size))]:
            jobs.setdefault((model, "block", plan), count)
    compiled = compile_jobs(jobs, options)
    for shape in shapes:
        layer = Layer(shape, options.act_group_size)
        for count in tokens[shape.model]:
            plans = blocks.get((shape.model, count), [])
            print(f"{shape.name}, {count} tokens: blocks", flush=True)
            ran = [plan for plan in plans if (shape.model, "block", plan) in compiled]
            tune_blocks(options, Load(layer, count), ran)
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
