"""Measured times as Markdown tables, a row a problem and a column an implementation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.bars import Sweep
from benchmarks.rows import Point
from w4tensor.testing import DENSE_SHAPES, MOE_SHAPES

# tokens of a product that get a row
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)

# implementation and activations of each column
OURS = {
    "W4A16": ("w4tensor", "bf16"),
    "W4A8 g32": ("w4tensor", "int8g32"),
    "W4A8 g128": ("w4tensor", "int8g128"),
    "W4A8 token": ("w4tensor", "int8token"),
    "W4A8 integer": ("w4tensor", "int8integer"),
}
LINEAR = OURS | {
    "tinygemm": ("tinygemm", "bf16"),
    "gemlite": ("gemlite", "bf16"),
    "humming": ("humming", "bf16"),
    "humming W4A8": ("humming", "int8token"),
}
MOE = OURS | {"humming": ("humming", "bf16"), "humming grouped": ("humming-grouped", "bf16")}


def linear_times(points: Iterable[Point]) -> str:
    """Microseconds of products. bf16 and the bare read are those beside W4A16."""
    sweep = Sweep(points)
    lines = _head("N x K, group", "M", LINEAR)
    for shape in DENSE_SHAPES:
        series = [sweep.line(*column, shape) for column in LINEAR.values()]
        name = f"{shape.n} x {shape.k}, {shape.group_size}"
        lines += [_row(name, m, series) for m in TOKENS if m in series[0]]
    return "\n".join(lines) + "\n"


def moe_times(points: Iterable[Point]) -> str:
    """Microseconds of experts blocks, uniform routing. bf16 and the bare read as above."""
    sweep = Sweep(points)
    lines = _head("block", "tokens", MOE)
    for shape in MOE_SHAPES:
        series = [sweep.block(*column, shape) for column in MOE.values()]
        name = f"{shape.model}, E = {shape.experts}, top {shape.top_k}"
        lines += [_row(name, tokens, series) for tokens in shape.tokens if tokens in series[0]]
    return "\n".join(lines) + "\n"


def _head(problem: str, tokens: str, columns: Iterable[str]) -> list[str]:
    names = [problem, tokens, "bare read", "bf16", *columns]
    return [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]


def _row(name: str, tokens: int, series: Sequence[dict[int, Point]]) -> str:
    ours = series[0][tokens]
    times = [ours.read_us, ours.bf16_us]
    times += [line[tokens].us if tokens in line else 0.0 for line in series]
    return f"| {name} | {tokens} | {' | '.join(map(_three_digits, times))} |"


def _three_digits(us: float) -> str:
    """Nothing for a time that was not measured.

    >>> _three_digits(5.94), _three_digits(99.97), _three_digits(1354.2), _three_digits(0.0)
    ('5.9', '100', '1354', '')
    """
    return f"{us:.1f}" if 0 < us < 99.95 else f"{us:.0f}" if us else ""
