"""Times whole experts blocks, after the router, over the MoE layers of real models.

    python -m benchmarks.bench_moe --shapes qwen3.5-35b-a3b --impl w4tensor,bf16,humming

appends a row a point to benchmarks/results/moe.csv (rows.Point says what the columns mean). Each
call of a graph has a routing of its own and the next of several copies of the layer, so that
nothing is found in the L2 cache. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ceilings, experts, peers, rows, timing
from w4tensor import arch
from w4tensor.dispatch_experts import ExpertsProblem, plan_experts
from w4tensor.testing import MOE_SHAPES, Int4Codes, MoeShape, random_codes, random_routing, rel_err

# pairs above which picking weights pair by pair would copy more than the card holds
BATCHED_UP_TO = 64


class Problem:
    """One layer with its weights in codes."""

    def __init__(self, shape: MoeShape, act: peers.Act, zero: str):
        self.shape = shape
        self.act = act
        options = dict(group_size=shape.group_size, dtype=act.dtype, zero_point=zero, device="cuda")
        options["integer_scales"] = act.integer_scales
        e, i, h = shape.experts, shape.inter, shape.hidden
        self.gate_up: Int4Codes = random_codes(e, 2 * i, h, **options)
        self.down: Int4Codes = random_codes(e, h, i, seed=1, **options)
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def copies(self, impl: str, act: peers.Act) -> list:
        block = experts.EXPERTS[impl](self.gate_up, self.down, act)
        return [block, *(block.copy() for _ in range(timing.n_copies(self.nbytes) - 1))]


class Traffic:
    """`tokens` tokens, and as many routings as make a graph read more than the L2 cache holds."""

    def __init__(self, problem: Problem, tokens: int, zipf: float):
        shape = problem.shape
        self.x = torch.randn(tokens, shape.hidden, device="cuda", dtype=problem.act.dtype)

        def routing(seed: int):
            return random_routing(
                tokens, shape.experts, shape.top_k, zipf=zipf, device="cuda", seed=seed
            )

        self.routings = [routing(0)]
        hit = self._hit_bytes(problem)
        self.routings += [routing(seed) for seed in range(1, timing.n_copies(hit))]
        self.read_us = ceilings.read_us(self._hit_bytes(problem))
        self.expected = experts.reference_block(
            self.x, *self.routings[0], problem.gate_up, problem.down
        )

    def _hit_bytes(self, problem: Problem) -> int:
        """Bytes of the experts that a routing hits on average."""
        hit = sum(len(ids.unique()) for ids, _ in self.routings) / len(self.routings)
        return int(problem.nbytes * hit / problem.shape.experts)

    def time(self, copies: list) -> timing.Time:
        blocks = [
            copies[i % len(copies)].route(*routing) for i, routing in enumerate(self.routings)
        ]
        return timing.graph_time([lambda block=block: block(self.x) for block in blocks])


def measure(
    problem: Problem, impl: str, zero: str, routing: str, traffic: dict[int, Traffic], dense: dict
) -> Iterator[rows.Point]:
    """The rows of one implementation; raises what its construction raises."""
    shape, act = problem.shape, problem.act
    copies = problem.copies(impl, act)
    for tokens, load in traffic.items():
        if "batched" in impl and tokens * shape.top_k > BATCHED_UP_TO:
            return
        try:
            block = copies[0].route(*load.routings[0])
            error = rel_err(block(load.x), load.expected)
            point = load.time(copies)
            dense.setdefault(tokens, point.us if impl == "bf16" else 0.0)
            yield rows.Point(
                **rows.environment(),
                impl=impl,
                act=act.name,
                group=shape.group_size,
                zero=zero,
                N=2 * shape.inter,
                K=shape.hidden,
                E=shape.experts,
                top_k=shape.top_k,
                routing=routing,
                M=tokens,
                us=point.us,
                spread=point.spread,
                read_us=load.read_us,
                bf16_us=dense[tokens],
                scratch_mb=timing.scratch_bytes(lambda b=block, x=load.x: b(x)) / 2**20,
                rel_err=error,
                plan=_plan(shape, tokens, act) if impl == "w4tensor" else "",
            )
        except Exception as error:
            say(shape, impl, act.name, f"{tokens} tokens: {peers.reason(error)}")


def _plan(shape: MoeShape, tokens: int, act: peers.Act) -> str:
    sizes = shape.experts, shape.hidden, shape.inter, shape.group_size, act.int8_group
    p = ExpertsProblem(tokens, shape.top_k, *sizes, integer_scales=act.integer_scales)
    return plan_experts(p, arch.current()).name


def say(shape: MoeShape, impl: str, act: str, message: str) -> None:
    print(f"{shape.name:>24s} {impl:15s} {act:9s} {message}", flush=True)


def summary(point: rows.Point) -> str:
    bf16 = f"{point.us / point.bf16_us:5.2f} x bf16" if point.bf16_us else ""
    return (
        f"M={point.M:<5d}{point.us:9.1f} us  {point.us / point.read_us:6.2f} x read  {bf16}  "
        f"err {point.rel_err:.1e}  scratch {point.scratch_mb:.1f} MB  {point.plan}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(shape.model for shape in MOE_SHAPES)
    parser.add_argument("--shapes", default="all", help=f"all or models of {known}")
    parser.add_argument("--tokens", default="", help="instead of each layer's own numbers")
    parser.add_argument(
        "--impl",
        default="bf16,w4tensor,w4tensor-grouped,w4tensor-batched,humming,humming-grouped",
        help=f"bf16 first; {', '.join(experts.EXPERTS)}",
    )
    parser.add_argument("--act", default="bf16", help=", ".join(peers.ACTS))
    parser.add_argument(
        "--zero", default="symmetric", choices=("symmetric", "integer", "fractional")
    )
    parser.add_argument("--zipf", type=float, default=0.0, help="exponent of a skewed routing")
    parser.add_argument("--seconds", type=float, default=540, help="start no new layer after these")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "moe.csv")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench_moe times kernels and needs a CUDA device")
    started = time.monotonic()
    routing = f"zipf{options.zipf:g}" if options.zipf else "uniform"
    wanted = set(options.shapes.split(","))
    for shape in (s for s in MOE_SHAPES if wanted & {s.model, "all"}):
        tokens = [int(m) for m in options.tokens.split(",")] if options.tokens else shape.tokens
        # bf16 is measured once for all activations
        dense: dict[int, float] = {}
        for act in options.act.split(","):
            if time.monotonic() - started > options.seconds:
                print(f"out of time before {shape.name} {act}")
                return
            torch.cuda.empty_cache()
            problem = Problem(shape, peers.ACTS[act], options.zero)
            traffic = {m: Traffic(problem, m, options.zipf) for m in tokens}
            for impl in options.impl.split(","):
                try:
                    for point in measure(problem, impl, options.zero, routing, traffic, dense):
                        rows.append(options.out, point)
                        say(shape, impl, act, summary(point))
                except Exception as error:
                    say(shape, impl, act, peers.reason(error))


if __name__ == "__main__":
    main()
