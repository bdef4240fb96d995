"""The table of what became of a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import w4tensor
from tests.weights import CLASSES, Case, both_classes
from w4tensor import W4ActQuantConfig, W4CoalescedConfig, arch, dispatch
from w4tensor.summary import TOKENS, problem_of

H200 = dispatch.Arch(capability=(9, 0), num_sms=132, triton=(3, 6))


def rows(model: nn.Module, device: str = "cpu") -> dict[str, w4tensor.summary.Row]:
    return {row.name: row for row in w4tensor.summary(model, device).rows}


def small_model() -> nn.Module:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(32, 256),
            "up": nn.Linear(256, 512, dtype=torch.bfloat16),
            "gate": nn.Linear(512, 8),
            "norm": nn.LayerNorm(8),
        }
    )
    quantize_(model, W4CoalescedConfig(group_size=128))
    return model


def test_every_matrix_has_a_row_and_no_vector_has():
    assert set(rows(small_model())) == {"embed.weight", "up.weight", "gate.weight"}


def test_bytes_before_and_after():
    row = rows(small_model())["up.weight"]
    assert row.kind == "CudaCoalescedInt4Tensor" and row.shape == (512, 256)
    assert row.bytes_before == 512 * 256 * 2
    # half a byte a code, a bf16 scale for each 128
    assert row.bytes_after == 512 * 256 // 2 + 512 * 2 * 2
    left = rows(small_model())["gate.weight"]
    assert left.bytes_before == left.bytes_after == 512 * 8 * 4 and left.kernels == ()


@both_classes
def test_padding_and_zero_points_count(cls):
    model = nn.Linear(100, 24)
    case = Case(cls, k=100, group_size=-1, zero="integer", dtype=torch.float16)
    model.weight = nn.Parameter(case.weight(), requires_grad=False)
    row = rows(model)["weight"]
    assert row.bytes_after == 24 * 128 // 2 + 24 * 2 + 24 * 2


def test_tensors_of_others_count_as_they_are_held():
    model = nn.Sequential(nn.Linear(256, 64))
    quantize_(model, Int8WeightOnlyConfig())
    row = rows(model)["0.weight"]
    assert row.bytes_before == 64 * 256 * 4
    assert 64 * 256 <= row.bytes_after <= 64 * 256 + 64 * 8


def test_a_tied_weight_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(256, 64), "b": nn.Linear(256, 64)})
    model["b"].weight = model["a"].weight
    table = rows(model)
    assert table["a.weight"].bytes_after == 64 * 256 * 4
    assert (table["b.weight"].bytes_before, table["b.weight"].bytes_after) == (0, 0)
    assert table["b.weight"].note == "tied to a.weight"
    model["a"].weight = model["b"].weight = nn.Parameter(
        Case(CLASSES[0], n=64).weight(), requires_grad=False
    )
    assert rows(model)["b.weight"].bytes_after == 0


def test_without_a_device_the_reference_path_serves():
    summary = w4tensor.summary(small_model(), "cpu")
    (row,) = (row for row in summary.rows if row.kernels)
    assert row.kernels == ("reference",) * len(TOKENS)
    assert "reference path" in summary.device


INTEGER = partial(W4ActQuantConfig, act_group_size=-1, integer_scales=True)


@pytest.mark.parametrize("config", [W4CoalescedConfig, W4ActQuantConfig, INTEGER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_with_a_device_each_token_count_names_its_kernel(config, dtype, monkeypatch):
    monkeypatch.setattr(arch, "current", lambda index=None: H200)
    model = nn.Sequential(nn.Linear(4096, 4096, dtype=dtype))
    quantize_(model, config())
    summary = w4tensor.summary(model)
    (row,) = summary.rows
    assert len(row.kernels) == len(TOKENS) and all(row.kernels)
    assert "reference" not in row.kernels and len(set(row.kernels)) > 1
    for m, name in zip(TOKENS, row.kernels, strict=True):
        assert dispatch.plan(problem_of(model[0].weight, m), H200).name == name
    assert "sm" in summary.device or "9, 0" in summary.device
    # asked about a CPU, the GPU that is there does not matter
    assert rows(model, "cpu")["0.weight"].kernels == ("reference",) * len(TOKENS)


def test_says_where_int8_activations_do_not_pay(monkeypatch):
    monkeypatch.setattr(arch, "current", lambda index=None: H200)

    def note(config):
        model = nn.Sequential(nn.Linear(4096, 28672, dtype=torch.bfloat16))
        quantize_(model, config)
        return w4tensor.summary(model).rows[0].note

    assert note(W4ActQuantConfig()) == "W4A16 would be faster at M=16, M=256, M=4096"
    assert note(W4ActQuantConfig(act_group_size=-1)) == note(W4CoalescedConfig()) == ""
    assert note(INTEGER()) == ""


def test_integer_scales_have_kernels_of_their_own(monkeypatch):
    monkeypatch.setattr(arch, "current", lambda index=None: H200)
    model = nn.Sequential(nn.Linear(4096, 28672, dtype=torch.bfloat16))
    quantize_(model, INTEGER())
    (row,) = w4tensor.summary(model).rows
    few, many = row.kernels[:2], row.kernels[2:]
    assert all(name.startswith("int8 gemm ") for name in many), many
    assert not any(name.startswith("int8 gemm ") for name in few), few
    # a byte for each scale
    assert row.bytes_after == model[0].weight.qdata.nbytes + 28672 * 32 * (2 + 1)


def test_the_problem_is_that_of_the_weight():
    case = Case(CLASSES[0], n=24, k=256, group_size=64, stack=(3,), zero="integer")
    problem = problem_of(case.weight(), 5, torch.float16)
    assert (problem.m, problem.n, problem.k, problem.group_size) == (5, 24, 256, 64)
    assert problem.act == "fp16" and not problem.symmetric and problem.batch == 3
    act = Case(CLASSES[1]).weight(act_group_size=64)
    assert problem_of(act, 1).act == "int8" and problem_of(act, 1).act_group_size == 64
    # a transposed view is the same weight
    assert problem_of(case.weight().mT, 5, torch.float16) == problem


def test_the_table_reads_well():
    text = str(w4tensor.summary(small_model(), "cpu"))
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer", "class", "shape", "before", "after", "M=1", "M=16", "M=256", "M=4096", "note",
    ]  # fmt: skip
    assert len(lines) == 5
    up = next(line for line in lines if line.startswith("up.weight"))
    assert "512x256" in up and "0.25 MiB" in up and "0.06 MiB" in up and "reference" in up
    assert "N=8 is below 64" in next(line for line in lines if line.startswith("gate.weight"))
    assert lines[-1].startswith("1 of 3 weights are int4")
    assert not any(line != line.rstrip() for line in lines)


def test_a_model_without_matrices():
    assert "0 of 0 weights" in str(w4tensor.summary(nn.LayerNorm(4), "cpu"))
