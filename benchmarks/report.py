"""Draws the result files, holds them against the bars and lists them.

    python -m benchmarks.report

reads benchmarks/results/{linear,moe,model}.csv and writes beside them report.md (the bars with the
figure reached beside each, and the times), linear.png (time over a bare read against tokens, a
panel a shape) and moe.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, rows, tables
from w4tensor.testing import DENSE_SHAPES, MOE_SHAPES

# implementation, activations: label, colour, dashes, width
LINES = {
    ("w4tensor", "bf16"): ("w4tensor W4A16", "#d1495b", "-", 2.4),
    ("w4tensor", "int8g32"): ("w4tensor W4A8, groups of 32", "#edae49", "-", 1.8),
    ("w4tensor", "int8g128"): ("w4tensor W4A8, groups of 128", "#edae49", "--", 1.4),
    ("w4tensor", "int8token"): ("w4tensor W4A8, per token", "#edae49", ":", 1.8),
    ("w4tensor", "int8integer"): ("w4tensor W4A8, integer scales", "#8f2d56", "-", 1.8),
    ("w4tensor-grouped", "bf16"): ("w4tensor by torch._grouped_mm", "#d1495b", ":", 1.4),
    ("bf16", "bf16"): ("bf16", "#222222", "-", 1.4),
    ("tinygemm", "bf16"): ("torchao tinygemm", "#00798c", "-", 1.2),
    ("gemlite", "bf16"): ("gemlite", "#7b9e4b", "-", 1.2),
    ("humming", "bf16"): ("humming W4A16", "#30638e", "-", 1.2),
    ("humming", "int8token"): ("humming W4A8", "#30638e", ":", 1.2),
    ("humming-grouped", "bf16"): ("humming W4A16, grouped", "#30638e", "--", 1.2),
}


def draw_linear(points: Iterable[rows.Point], path: Path) -> None:
    """Time over the bare read of the same bytes, against M."""
    sweep = bars.Sweep(points)
    panels = []
    for shape in DENSE_SHAPES:
        title = f"{shape.n} x {shape.k}, g{shape.group_size}\n{shape.model} {shape.layer}"
        series = {key: sweep.line(*key, shape) for key in LINES}
        panels.append((title, series))
    _draw(panels, path, lambda p: p.us / p.read_us, "time / bare read of the weights", "tokens M")


def draw_moe(points: Iterable[rows.Point], path: Path) -> None:
    """Time of an experts block against tokens, with the bare read of the experts hit."""
    sweep = bars.Sweep(points)
    panels = []
    for shape in MOE_SHAPES:
        title = f"{shape.model}\n{shape.name}, g{shape.group_size}"
        panels.append((title, {key: sweep.block(*key, shape) for key in LINES}))
    _draw(panels, path, lambda p: p.us, "microseconds", "tokens", floor=lambda p: p.read_us)


def _draw(
    panels: Sequence[tuple[str, dict[Any, dict[int, rows.Point]]]],
    path: Path,
    value: Callable[[rows.Point], float],
    y_label: str,
    x_label: str,
    floor: Callable[[rows.Point], float] | None = None,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = [(title, series) for title, series in panels if any(series.values())]
    if not panels:
        print(f"nothing to draw in {path.name}")
        return
    columns = min(len(panels), 7 if len(panels) > 8 else 3)
    n_rows = -(-len(panels) // columns)
    size = (2.8 * columns, 2.6 * n_rows + 0.9)
    figure, axes = pyplot.subplots(n_rows, columns, figsize=size, squeeze=False)
    handles = {}
    for axis, (title, series) in zip(axes.flat, panels, strict=False):
        for key, line in series.items():
            if not line:
                continue
            label, colour, dashes, width = LINES[key]
            handles[label] = axis.plot(
                list(line),
                [value(p) for p in line.values()],
                color=colour,
                linestyle=dashes,
                linewidth=width,
                marker=".",
                markersize=3,
                label=label,
            )[0]
        if floor is not None:
            line = max(series.values(), key=len)
            handles["bare read of the experts hit"] = axis.plot(
                list(line), [floor(p) for p in line.values()], color="#999999", linewidth=1
            )[0]
        axis.set_title(title, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(True, which="major", linewidth=0.4, alpha=0.6)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(y_label, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel(x_label, fontsize=8)
    newest = max((p for _, s in panels for line in s.values() for p in line.values()), key=_date)
    source = f"{newest.gpu}, torch {newest.torch}, Triton {newest.triton}, {newest.date[:10]}"
    figure.legend(
        list(handles.values()), list(handles), loc="lower center", ncol=6, fontsize=8, title=source
    )
    figure.tight_layout(rect=(0, 0.7 / size[1], 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")


def _date(point: rows.Point) -> str:
    return point.date


def render(results: Path = rows.RESULTS) -> str:
    """report.md, from the rows in `results`."""
    linear = rows.load(results / "linear.csv", rows.Point)
    moe = rows.load(results / "moe.csv", rows.Point)
    model = rows.load(results / "model.csv", rows.Figure)
    parts = ["# Bars and times", "Made by `make bench-report` from the rows beside this file."]
    parts += ["## Bars", bars.table("Linear, 16-bit activations", bars.linear_bars(linear))]
    for act in ("int8g32", "int8g128", "int8token", "int8integer"):
        parts.append(bars.table(f"Linear, {act} activations", bars.act_quant_bars(linear, act)))
    parts.append(bars.table("Experts", bars.moe_bars(moe)))
    parts.append(bars.table("Models", bars.model_bars(model)))
    parts += ["## Linear, microseconds", tables.linear_times(linear)]
    parts += ["## Experts blocks, microseconds", tables.moe_times(moe)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--no-pictures", action="store_true", help="print report.md only")
    options = parser.parse_args()
    text = render(options.results)
    if options.no_pictures:
        print(text)
        return
    (options.results / "report.md").write_text(text)
    draw_linear(
        rows.load(options.results / "linear.csv", rows.Point), options.results / "linear.png"
    )
    draw_moe(rows.load(options.results / "moe.csv", rows.Point), options.results / "moe.png")


if __name__ == "__main__":
    main()
