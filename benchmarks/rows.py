"""The format of the result files: one CSV row a measured point, with what it was measured on.

    python -m benchmarks.rows SOURCE.csv... benchmarks/results/linear.csv

appends rows that were measured elsewhere (on a machine that was given back) to a file here.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import functools
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What every row begins with."""

    date: str
    gpu: str
    torch: str
    triton: str
    ptxas: str
    git: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Environment):
    """One product, or one experts block, in one implementation.

    Fields:
        impl: ours, bf16, or a peer; see peers.py and experts.py.
        act: what the activations are: bf16, fp16, int8g32 (int8 in groups of 32), int8token,
            int8integer (per token, with integer scales), fp8.
        group, zero: the weight's group size, and symmetric, integer or fractional zero points.
        E, top_k: 0 for a Linear. For experts N is 2 x inter and K is hidden.
        routing: uniform or zipf1.2, of experts.
        us, spread: median of a call, and its quartiles' distance as a share of it.
        read_us: a bare read of the weight bytes that the point needs (of the experts hit).
        bf16_us: cuBLAS (torch._grouped_mm with routing for experts) in 16 bits, in the same run.
        quant_us: quantising the activations alone, where `us` includes it.
        cpu_us: what Python needs to issue one eager call.
        scratch_mb: most memory held beyond the output.
        rel_err: against the fp32 product of x and the dequantised weight.
        plan: what dispatch chose, ours only.
    """

    impl: str
    act: str
    group: int
    zero: str
    N: int
    K: int
    E: int = 0
    top_k: int = 0
    routing: str = ""
    M: int
    us: float
    spread: float
    read_us: float
    bf16_us: float
    quant_us: float = 0.0
    cpu_us: float = 0.0
    scratch_mb: float = 0.0
    rel_err: float
    plan: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure(Environment):
    """One figure of a whole model in one implementation.

    Fields:
        figure: decode_tok_s, prefill_tok_s, weights_gb, peak_gb, load_s or compile_s.
        batch, prompt: sequences and their length when it was measured; 0 where it has none.
    """

    transformers: str
    model: str
    impl: str
    figure: str
    batch: int = 0
    prompt: int = 0
    value: float


Row = TypeVar("Row", Point, Figure)


@functools.cache
def environment() -> dict[str, str]:
    """The fields of Environment, once a process: rows of one run share their date."""
    import torch
    import triton

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "git": _commit(),
    }


def append(path: Path, row: Point | Figure) -> None:
    """Add one row; a new file gets the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(field.name for field in dataclasses.fields(row))
        writer.writerow(_text(value) for value in dataclasses.astuple(row))


def load(path: Path, kind: type[Row]) -> list[Row]:
    """All rows of a file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    types = {"int": int, "float": float, "str": str}
    casts = {field.name: types[str(field.type)] for field in dataclasses.fields(kind)}
    with path.open(newline="") as file:
        return [
            kind(**{name: casts[name](text) for name, text in record.items()})
            for record in csv.DictReader(file)
        ]


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    """The commit that is measured: of this checkout, else $W4TENSOR_COMMIT."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("W4TENSOR_COMMIT", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    for source in options.source:
        header = source.open().readline().strip().split(",")
        kind = Figure if "figure" in header else Point
        rows = load(source, kind)
        for row in rows:
            append(options.target, row)
        print(f"{options.target}: {len(rows)} rows from {source}")


if __name__ == "__main__":
    main()
