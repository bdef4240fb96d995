"""Times F.linear on int4 weights, ours and the peers', over the shapes of real models.

    python -m benchmarks.bench_linear --shapes llama-3-8b --m 1,16,256 --impl w4tensor,humming

appends a row a point to benchmarks/results/linear.csv (rows.Point says what the columns mean).
What fails or is refused gives a line on the screen and no row. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ceilings, peers, rows, timing
from benchmarks.peer_humming import Humming
from w4tensor import arch, dispatch
from w4tensor.testing import DENSE_SHAPES, TOKENS, Int4Codes, Shape, random_codes, rel_err

LINEARS: dict[str, type[peers.Linear]] = {
    "w4tensor": peers.Ours,
    "bf16": peers.Dense,
    "tinygemm": peers.Tinygemm,
    "gemlite": peers.Gemlite,
    "humming": Humming,
}
# rows of x that rel_err looks at: the first ones, and the last ones of a larger M
HEAD, TAIL = 1024, 256
# no further tokens for an implementation that is this many times slower than bf16
HOPELESS = 6.0
# what a user's process calls matters for few tokens only
CPU_TIME_UP_TO = 1


class Problem:
    """One shape with its weight, its x, and everything that does not depend on implementations."""

    def __init__(self, shape: Shape, act: peers.Act, zero: str, tokens: list[int]):
        self.shape = shape
        self.act = act
        self.codes: Int4Codes = random_codes(
            shape.n,
            shape.k,
            group_size=shape.group_size,
            dtype=act.dtype,
            zero_point=zero,
            device="cuda",
            integer_scales=act.integer_scales,
        )
        self.x = torch.randn(max(tokens), shape.k, device="cuda", dtype=act.dtype)
        self.read_us = ceilings.read_us(self.codes.nbytes)
        self._weight = self.codes.dequantize()
        self._expected_head = self.x[:HEAD].float() @ self._weight.mT
        dense = peers.Dense(self.codes, peers.ACTS["fp16" if act.name == "fp16" else "bf16"])
        self.dense_copies = _rotate(dense, dense.weight.nbytes)
        self.dense_error = {m: self.error(dense(self.x[:m])) for m in tokens}
        self.dense_cpu_us = timing.eager_us(lambda: dense(self.x[:1]))

    def error(self, y: Tensor) -> float:
        """rel_err of y [M, N] against fp32, on the first and the last rows."""
        m = len(y)
        if m <= HEAD:
            return rel_err(y, self._expected_head[:m])
        tail = self.x[m - TAIL : m].float() @ self._weight.mT
        return rel_err(torch.cat([y[:HEAD], y[-TAIL:]]), torch.cat([self._expected_head, tail]))


def measure(problem: Problem, impl: str, zero: str, tokens: list[int]) -> Iterator[rows.Point]:
    """The rows of one implementation; raises what its construction raises."""
    shape, act = problem.shape, problem.act
    common = dict(
        rows.environment(),
        impl=impl,
        act=act.name,
        group=problem.codes.group_size,
        zero=zero,
        N=shape.n,
        K=shape.k,
        read_us=problem.read_us,
    )
    if impl == "bf16":
        # it knows no int8: rows would only repeat those of the bf16 run
        peers.only(act, "bf16", "fp16")
        for m in tokens:
            (dense,) = _times(problem.x[:m], problem.dense_copies)
            yield rows.Point(
                **common,
                M=m,
                us=dense.us,
                spread=dense.spread,
                bf16_us=dense.us,
                cpu_us=problem.dense_cpu_us if m <= CPU_TIME_UP_TO else 0.0,
                rel_err=problem.dense_error[m],
            )
        return
    linear = LINEARS[impl](problem.codes, act)
    tokens = list(_not_refused(linear, tokens))
    if not tokens:
        return
    linear.prepare(tokens)
    calls = _rotate(linear, problem.codes.nbytes)
    hopeless = 0
    for m in tokens:
        x = problem.x[:m]
        try:
            error = problem.error(linear(x))
            # in turn: with many tokens who comes first finds the card cool
            point, dense = _times(x, calls, problem.dense_copies)
            yield rows.Point(
                **common,
                M=m,
                us=point.us,
                spread=point.spread,
                bf16_us=dense.us,
                quant_us=_quant_us(x, act) if impl == "w4tensor" else 0.0,
                cpu_us=timing.eager_us(lambda x=x: linear(x)) if m <= CPU_TIME_UP_TO else 0.0,
                scratch_mb=timing.scratch_bytes(lambda x=x: linear(x)) / 2**20,
                rel_err=error,
                plan=_plan(problem, m) if impl == "w4tensor" else "",
            )
        except Exception as error:
            say(shape, impl, act.name, f"M={m}: {peers.reason(error)}")
            continue
        hopeless = hopeless + 1 if point.us > HOPELESS * dense.us else 0
        if hopeless == 2 and impl != "w4tensor":
            say(shape, impl, act.name, f"stops at M={m}: {HOPELESS:.0f} times slower than bf16")
            return


def say(shape: Shape, impl: str, act: str, message: str) -> None:
    print(f"{shape.name:>12s} {impl:9s} {act:9s} {message}", flush=True)


def _not_refused(linear: peers.Linear, tokens: list[int]) -> Iterator[int]:
    reasons: dict[str, list[int]] = {}
    for m in tokens:
        try:
            linear.check(m)
        except peers.Refused as reason:
            reasons.setdefault(str(reason), []).append(m)
        else:
            yield m
    for reason, refused in reasons.items():
        print(f"{'':12s} no rows for M in {refused}: {reason}")


def _rotate(linear: peers.Linear, nbytes: int) -> list[peers.Linear]:
    return [linear, *(linear.copy() for _ in range(timing.n_copies(nbytes) - 1))]


def _times(x: Tensor, *kinds: list[peers.Linear]) -> list[timing.Time]:
    groups = [[lambda linear=linear: linear(x) for linear in linears] for linears in kinds]
    return timing.graph_times(groups, seconds=0.05)


def _quant_us(x: Tensor, act: peers.Act) -> float:
    if act.int8_group is None:
        return 0.0
    quantize = torch.ops.w4tensor.quantize_activation
    return timing.graph_time([lambda: quantize(x, act.int8_group)] * 8, seconds=0.01).us


def _plan(problem: Problem, m: int) -> str:
    """What dispatch chose."""
    asked = dispatch.Problem(
        m=m,
        n=problem.shape.n,
        k=problem.shape.k,
        group_size=problem.codes.group_size,
        act="int8" if problem.act.int8_group else problem.act.name,
        symmetric=problem.codes.zero_point is None,
        act_group_size=problem.act.int8_group,
        integer_scales=problem.act.integer_scales,
    )
    try:
        return dispatch.plan(asked, arch.current()).name
    except Exception as error:
        # the time counts without it
        return peers.reason(error)


def select_shapes(text: str) -> list[Shape]:
    """Shapes by size (4096x4096), by model (llama-3-8b), or all.

    >>> [shape.name for shape in select_shapes("1x2048,4096x4096")]
    ['4096x4096', '1x2048']
    """
    wanted = set(text.split(","))
    known = {word for shape in DENSE_SHAPES for word in (shape.name, shape.model)}
    if wanted - known - {"all"}:
        raise SystemExit(f"unknown shapes {sorted(wanted - known)}; known: {sorted(known)}")
    return [s for s in DENSE_SHAPES if wanted & {s.name, s.model, "all"}]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="all", help="sizes or models, comma-separated")
    parser.add_argument("--m", default=",".join(map(str, TOKENS)), help="numbers of tokens")
    parser.add_argument("--peer-m", default="", help="other numbers of tokens for the peers")
    parser.add_argument(
        "--impl", default="w4tensor,bf16,tinygemm,gemlite,humming", help=", ".join(LINEARS)
    )
    parser.add_argument("--act", default="bf16", help=", ".join(peers.ACTS))
    parser.add_argument("--group", type=int, help="instead of each shape's own group size")
    parser.add_argument(
        "--zero", default="symmetric", choices=("symmetric", "integer", "fractional")
    )
    parser.add_argument("--autotune", action="store_true", help="let gemlite search (minutes)")
    parser.add_argument("--seconds", type=float, default=540, help="start no new shape after these")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "linear.csv")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench_linear times kernels and needs a CUDA device")
    started = time.monotonic()
    peers.Gemlite.autotune = options.autotune
    tokens = [int(m) for m in options.m.split(",")]
    peer_tokens = [int(m) for m in options.peer_m.split(",")] if options.peer_m else tokens
    for shape in select_shapes(options.shapes):
        if options.group is not None:
            shape = dataclasses.replace(shape, group_size=options.group)
        for act in options.act.split(","):
            if time.monotonic() - started > options.seconds:
                print(f"out of time before {shape.name} {act}")
                return
            torch.cuda.empty_cache()
            try:
                both = sorted({*tokens, *peer_tokens})
                problem = Problem(shape, peers.ACTS[act], options.zero, both)
            except Exception as error:
                say(shape, "-", act, peers.reason(error))
                continue
            for impl in options.impl.split(","):
                ms = tokens if impl in ("w4tensor", "bf16") else peer_tokens
                try:
                    for point in measure(problem, impl, options.zero, ms):
                        rows.append(options.out, point)
                        say(shape, impl, act, summary(point))
                except Exception as error:
                    say(shape, impl, act, peers.reason(error))


def summary(point: rows.Point) -> str:
    return (
        f"M={point.M:<5d}{point.us:9.2f} us  {point.us / point.read_us:6.2f} x read  "
        f"{point.us / point.bf16_us:5.2f} x bf16  err {point.rel_err:.1e}  {point.plan}"
    )


if __name__ == "__main__":
    main()
