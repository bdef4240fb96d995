"""The benchmark scripts without a GPU: they import, explain themselves, and say what they need."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

SCRIPTS = (
    "bench_linear",
    "bench_model",
    "bench_moe",
    "ceilings",
    "fit",
    "peer_humming",
    "report",
    "rows",
    "tune",
    "tune_act_quant",
    "tune_int8",
    "tune_moe",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize(
    "name", ["bench_linear", "bench_model", "bench_moe", "peer_humming", "tune"]
)
def test_refuses_to_time_a_cpu(name, monkeypatch):
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script.main()


def test_shapes_are_chosen_by_size_or_model():
    from benchmarks.bench_linear import select_shapes

    assert {shape.model for shape in select_shapes("gpt-oss-20b")} == {"gpt-oss-20b"}
    assert [shape.n for shape in select_shapes("1x2048,4096x4096")] == [4096, 1]
    with pytest.raises(SystemExit, match="4096x4097"):
        select_shapes("4096x4097")
