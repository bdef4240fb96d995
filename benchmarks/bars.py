"""What the product must reach, as functions of measured rows: each bar, its worst case, and where.

Bars hold for one GPU and one run; a bar without rows says so instead of passing. Our own rows are
held against each other where they are of one commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.rows import Figure, Point
from w4tensor.testing import DENSE_SHAPES, MOE_SHAPES, Shape

PEERS = ("tinygemm", "gemlite", "humming")
# packed weights from here on fill the card; below, launching counts
LARGE_BYTES = 24e6
# products from here on are worth a bar against bf16 and the peers
LARGE_WEIGHTS = 4e6
# a row with a larger error is a wrong use of a peer, not a time; few outputs may cancel to little
CREDIBLE_ERROR = 0.1
FEW_OUTPUTS = 64

# tokens: (must, aim) in microseconds of an experts block
MOE_BARS = {
    "qwen3.5-35b-a3b": {
        1: (14, 8),
        4: (28, 18),
        16: (58, 45),
        64: (110, 95),
        256: (140, 115),
        1600: (330, 220),
        4096: (800, 500),
    },
    "mixtral-8x7b": {1: (58, 48), 4: (170, 155), 16: (190, 175), 64: (240, 190), 512: (700, 560)},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One figure that a bar is about, and where it was measured."""

    value: float
    where: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit for the worst of its cases; `at_least` where larger is better."""

    name: str
    must: float
    aim: float | None
    cases: list[Case] = field(default_factory=list)
    at_least: bool = False

    @property
    def worst(self) -> Case | None:
        choose = min if self.at_least else max
        return choose(self.cases, key=lambda case: case.value) if self.cases else None

    def reaches(self, limit: float | None) -> bool | None:
        """Whether the worst case keeps `limit`; None without cases or limit."""
        if limit is None or self.worst is None:
            return None
        return self.worst.value >= limit if self.at_least else self.worst.value <= limit


class Sweep:
    """The newest credible row of each point."""

    def __init__(self, points: Iterable[Point]):
        self._lines: dict[tuple, dict[int, Point]] = {}
        # the same of each commit
        self._commits: dict[tuple, dict[int, Point]] = {}
        for p in points:
            if p.rel_err < CREDIBLE_ERROR or p.N * p.M < FEW_OUTPUTS:
                key = (p.impl, p.act, p.group, p.zero, p.N, p.K, p.E, p.routing)
                self._lines.setdefault(key, {})[p.M] = p
                self._commits.setdefault((*key, p.git), {})[p.M] = p

    def beside(self, row: Point, **other: Any) -> Point | None:
        """The row that differs from `row` in nothing but `other`, its commit included."""
        p = replace(row, **other)
        key = (p.impl, p.act, p.group, p.zero, p.N, p.K, p.E, p.routing, p.git)
        return self._commits.get(key, {}).get(p.M)

    def line(self, impl: str, act: str, shape: Shape, group: int = 0, zero: str = "symmetric"):
        """{M: row} of a Linear, in order of M."""
        key = (impl, act, group or shape.group_size, zero, shape.n, shape.k, 0, "")
        return dict(sorted(self._lines.get(key, {}).items()))

    def block(self, impl: str, act: str, shape, routing: str = "uniform") -> dict[int, Point]:
        """{tokens: row} of an experts block, in order of tokens."""
        key = (impl, act, shape.group_size, "symmetric", 2 * shape.inter, shape.hidden)
        return dict(sorted(self._lines.get((*key, shape.experts, routing), {}).items()))


def linear_bars(points: Iterable[Point]) -> list[Bar]:
    """Dense products with 16-bit activations."""
    sweep = Sweep(points)
    bars = [
        Bar("M = 1, packed weights >= 24 MB: time / bare read", 1.30, 1.10),
        Bar("M = 1, smaller, and not within 1.5 us of the read: time / bare read", 1.60, 1.30),
        Bar("2 <= M <= 16: time / our own M = 1", 1.15, 1.05),
        Bar("M <= 64, N K >= 4 M: best peer or bf16 / time", 1.15, 1.50, at_least=True),
        Bar("64 < M <= 512: time / best int4 peer", 1.00, None),
        Bar("64 < M <= 512: time / bf16", 1.06, 0.90),
        Bar("M >= 1024: time / best int4 peer", 1.00, None),
        Bar("M >= 1024: time / bf16", 1.05, 1.00),
        Bar("any M, N K >= 4 M: time / bf16", 1.06, 1.00),
        Bar("memory beyond the output, MB", 32.0, 0.0),
        Bar("time at M / time at the next larger M", 1.03, 1.00),
        Bar("N = 1, 256, 1024: time - bf16, us", 1.0, 0.0),
        Bar("eager call at M = 1: CPU time, us", 30.0, None),
        Bar("asymmetric: time per byte / symmetric", 1.10, 1.00),
        Bar("group 32: time per byte / group 128", 1.10, 1.00),
    ]
    (large, small, flat, decode, mid_peer, mid, big_peer, big, every, memory, steps) = bars[:11]
    narrow, eager, asymmetric, group32 = bars[11:]
    for shape in DENSE_SHAPES:
        ours = sweep.line("w4tensor", "bf16", shape)
        peers = [sweep.line(peer, "bf16", shape) for peer in PEERS]
        counts = shape.n * shape.k >= LARGE_WEIGHTS
        for m, row in ours.items():
            where = f"{shape.name}, M={m}"
            best = min((peer[m].us for peer in peers if m in peer), default=None)
            if m == 1:
                _first_token(shape, row, where, large, small)
                if row.cpu_us:
                    eager.cases.append(Case(row.cpu_us, where))
            elif m <= 16 and 1 in ours:
                flat.cases.append(Case(row.us / ours[1].us, where))
            if m <= 64 and counts:
                rival = min(row.bf16_us, best or row.bf16_us)
                decode.cases.append(Case(rival / row.us, where))
            if m > 64 and counts:
                against_peer, against_bf16 = (mid_peer, mid) if m <= 512 else (big_peer, big)
                against_bf16.cases.append(Case(row.us / row.bf16_us, where))
                if best is not None:
                    against_peer.cases.append(Case(row.us / best, where))
            if counts:
                every.cases.append(Case(row.us / row.bf16_us, where))
            if shape.n in (1, 256, 1024):
                narrow.cases.append(Case(row.us - row.bf16_us, where))
            memory.cases.append(Case(row.scratch_mb, where))
        steps.cases.extend(_steps(shape, ours))
        with_zeros = sweep.line("w4tensor", "bf16", shape, zero="integer").values()
        asymmetric.cases.extend(
            _per_byte(shape, with_zeros, lambda row: sweep.beside(row, zero="symmetric"))
        )
        fine = sweep.line("w4tensor", "bf16", shape, group=32).values()
        group32.cases.extend(_per_byte(shape, fine, lambda row: sweep.beside(row, group=128)))
    return bars


def act_quant_bars(points: Iterable[Point], act: str) -> list[Bar]:
    """Dense products with int8 activations of one kind: int8g32, int8token, int8integer, .."""
    sweep = Sweep(points)
    prefill = (1.0, None) if act == "int8g32" else (1 / 1.10, 1 / 1.40)
    bars = [
        Bar("M = 1, packed weights >= 24 MB: time / bare read", 1.40, 1.15),
        Bar("the same without quantising activations", 1.25, None),
        Bar("2 <= M <= 16: time / our own M = 1", 1.20, 1.05),
        Bar("M <= 64: time / our W4A16", 1.00, None),
        Bar("64 < M <= 512: humming W4A8 / time", 1.10, None, at_least=True),
        Bar("64 < M <= 512: time / bf16", 1.00, None),
        Bar("M >= 1024: time / bf16", *prefill),
        Bar("any M: time / our W4A16", 1.05, 1.00),
    ]
    large, bare, flat, decode, peer, mid, big, every = bars
    for shape in DENSE_SHAPES:
        ours = sweep.line("w4tensor", act, shape)
        humming = sweep.line("humming", "int8token", shape)
        for m, row in ours.items():
            where = f"{shape.name}, M={m}"
            if m == 1 and shape.n * shape.k / 2 >= LARGE_BYTES:
                large.cases.append(Case(row.us / row.read_us, where))
                bare.cases.append(Case((row.us - row.quant_us) / row.read_us, where))
            if 1 < m <= 16 and 1 in ours:
                flat.cases.append(Case(row.us / ours[1].us, where))
            exact = sweep.beside(row, act="bf16")
            if exact is not None:
                against_exact = Case(row.us / exact.us, where)
                every.cases.append(against_exact)
                if m <= 64:
                    decode.cases.append(against_exact)
            if shape.n * shape.k < LARGE_WEIGHTS:
                continue
            if 64 < m <= 512:
                mid.cases.append(Case(row.us / row.bf16_us, where))
                if m in humming:
                    peer.cases.append(Case(humming[m].us / row.us, where))
            if m >= 1024:
                big.cases.append(Case(row.us / row.bf16_us, where))
    return bars


def moe_bars(points: Iterable[Point]) -> list[Bar]:
    """Experts blocks."""
    sweep = Sweep(points)
    bars = []
    slower = Bar("any block: time / bf16 grouped_mm with routing", 1.00, None)
    skewed = Bar("routing zipf 1.2: time per byte / uniform", 1.25, None)
    int8 = Bar("int8 activations: time / our W4A16", 1.00, None)
    int8_many = Bar("int8 activations, >= 1600 tokens: W4A16 / time", 1.15, None, at_least=True)
    for shape in MOE_SHAPES:
        ours = sweep.block("w4tensor", "bf16", shape)
        for tokens, (must, aim) in MOE_BARS.get(shape.model, {}).items():
            bar = Bar(f"{shape.name}, {tokens} tokens, us", must, aim)
            if tokens in ours:
                bar.cases.append(Case(ours[tokens].us, shape.model))
            bars.append(bar)
        for tokens, skew in sweep.block("w4tensor", "bf16", shape, "zipf1.2").items():
            even = sweep.beside(skew, routing="uniform")
            if even is not None:
                value = (skew.us / skew.read_us) / (even.us / even.read_us)
                skewed.cases.append(Case(value, f"{shape.name}, {tokens} tokens"))
        for tokens, row in ours.items():
            where = f"{shape.name}, {tokens} tokens"
            if row.bf16_us:
                slower.cases.append(Case(row.us / row.bf16_us, where))
        for act in ("int8g32", "int8g128", "int8token", "int8integer"):
            for tokens, row in sweep.block("w4tensor", act, shape).items():
                where = f"{shape.name}, {tokens} tokens, {act}"
                exact = sweep.beside(row, act="bf16")
                if exact is not None:
                    int8.cases.append(Case(row.us / exact.us, where))
                    if tokens >= 1600:
                        int8_many.cases.append(Case(exact.us / row.us, where))
    return [*bars, slower, skewed, int8, int8_many]


OUR_MODELS = ("w4tensor", "w4tensor-int8", "w4tensor-int8-integer")


def model_bars(figures: Iterable[Figure]) -> list[Bar]:
    """Whole models, batch 1."""
    newest = {(f.model, f.impl, f.figure): f for f in figures if f.batch in (0, 1)}

    def cases(model: str, figure: str) -> list[Case]:
        found = (newest.get((model, impl, figure)) for impl in OUR_MODELS)
        return [Case(f.value, f.impl) for f in found if f is not None]

    def against_bf16(model: str) -> list[Case]:
        bf16 = newest.get((model, "bf16", "prefill_tok_s"))
        found = cases(model, "prefill_tok_s") if bf16 is not None else []
        return [Case(case.value / bf16.value, case.where) for case in found]

    llama, qwen = "llama-3-8b", "qwen3-30b-a3b"
    return [
        Bar(f"{llama}: decode, tok/s", 230, None, cases(llama, "decode_tok_s"), at_least=True),
        Bar(f"{llama}: prefill / bf16", 0.95, None, against_bf16(llama), at_least=True),
        Bar(f"{llama}: weights, GB", 5.6, None, cases(llama, "weights_gb")),
        Bar(f"{llama}: most in use, GB", 5.6, None, cases(llama, "peak_gb")),
        Bar(f"{qwen}: decode, tok/s", 260, None, cases(qwen, "decode_tok_s"), at_least=True),
        Bar(f"{qwen}: prefill / bf16", 1.30, None, against_bf16(qwen), at_least=True),
        Bar(f"{qwen}: weights, GB", 19.0, None, cases(qwen, "weights_gb")),
        Bar(f"{qwen}: most in use, GB", 19.0, None, cases(qwen, "peak_gb")),
    ]


def table(title: str, bars: Iterable[Bar]) -> str:
    """The bars as Markdown, each with the figure reached in its worst case."""
    lines = [f"### {title}", "", "| bar | must | aim | reached | where | cases |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    lines.extend(_cells(bar) for bar in bars)
    return "\n".join(lines) + "\n"


def _cells(bar: Bar) -> str:
    sign = ">=" if bar.at_least else "<="
    aim = "" if bar.aim is None else f"{bar.aim:.4g}"
    must = f"{sign} {bar.must:.4g}"
    if bar.worst is None:
        return f"| {bar.name} | {must} | {aim} | not measured | | 0 |"
    verdict = "aim" if bar.reaches(bar.aim) else "yes" if bar.reaches(bar.must) else "**no**"
    within = sum(Bar("", bar.must, None, [c], bar.at_least).reaches(bar.must) for c in bar.cases)
    reached = f"{bar.worst.value:.4g} ({verdict})"
    cases = f"{within} of {len(bar.cases)}"
    return f"| {bar.name} | {must} | {aim} | {reached} | {bar.worst.where} | {cases} |"


def _first_token(shape: Shape, row: Point, where: str, large: Bar, small: Bar) -> None:
    case = Case(row.us / row.read_us, where)
    if shape.n * shape.k / 2 >= LARGE_BYTES:
        large.cases.append(case)
    elif row.us > row.read_us + 1.5:
        small.cases.append(case)
    else:
        # within 1.5 us of the read counts as kept
        small.cases.append(Case(min(case.value, small.must), where))


def _steps(shape: Shape, line: dict[int, Point]) -> Iterator[Case]:
    rows = list(line.values())
    for row, larger in zip(rows, rows[1:], strict=False):
        if row.git == larger.git:
            yield Case(row.us / larger.us, f"{shape.name}, M={row.M} to {larger.M}")


def _per_byte(
    shape: Shape, rows: Iterable[Point], base: Callable[[Point], Point | None]
) -> Iterator[Case]:
    for row in rows:
        other = base(row)
        if other is not None:
            value = (row.us / row.read_us) / (other.us / other.read_us)
            yield Case(value, f"{shape.name}, M={row.M}")
