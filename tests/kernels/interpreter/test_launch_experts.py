"""From checked operands to kernels, in Triton's interpreter: each product of moe.py by its plan."""

from __future__ import annotations

import pytest
import torch

from tests.experts import Block
from tests.weights import CLASSES, Case
from w4tensor import Int4ActQuantTensor, arch, launch
from w4tensor.dispatch import Arch
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.reference import act_quant_linear, dequantize, linear
from w4tensor.testing import MOE_REL_ERR_BUDGET, rel_err

both_classes = pytest.mark.parametrize("cls", CLASSES, ids=["coalesced", "act_quant"])
# pairs, then tiles of more and more rows
ROWS = (0, 1, 3, 40, 130)


@pytest.fixture(autouse=True)
def _ampere(monkeypatch):
    target = Arch(capability=(8, 0), num_sms=108, triton=(3, 6))
    monkeypatch.setattr(arch, "current", lambda device=None: target)
    launch._plan_experts.cache_clear()
    yield
    launch._plan_experts.cache_clear()


def operands(case: Case) -> tuple:
    """The arguments of launch's products from qdata on, but offs and ids."""
    q, scale, zero_point = case.codes()
    act = case.cls is Int4ActQuantTensor
    return (ACT_QUANT if act else COALESCED).pack(q), scale, zero_point, 32 if act else None


def product(case: Case, x, ids) -> torch.Tensor:
    """Each row times its expert; zeros without one."""
    y = torch.zeros(len(x), case.n)
    q, scale, zero_point = case.codes()
    for e in range(len(q)):
        rows, zero = ids == e, None if zero_point is None else zero_point[e]
        if case.cls is Int4ActQuantTensor:
            y[rows] = act_quant_linear(x[rows].float(), q[e], scale[e], zero, 32)
        else:
            y[rows] = linear(x[rows].float(), dequantize(q[e], scale[e], zero))
    return y


@both_classes
@pytest.mark.parametrize("rows", ROWS)
def test_gathered_linear(cls, rows):
    case = Case(cls, n=40, k=192, stack=(3,), zero="fractional", dtype=torch.float16)
    qdata, scale, zero_point, act_group_size = operands(case)
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 192, generator=rng).half()
    # -1 and 3 are no experts here
    ids = torch.randint(-1, 4, (rows,), generator=rng)
    y = launch.gathered_linear(x, ids, qdata, scale, zero_point, case.g, act_group_size)
    assert y.dtype == x.dtype and y.shape == (rows, 40)
    assert rel_err(y, product(case, x, ids)) < MOE_REL_ERR_BUDGET / 5


@both_classes
@pytest.mark.parametrize("rows", ROWS)
def test_grouped_linear(cls, rows):
    case = Case(cls, n=40, k=192, stack=(3,), zero="fractional", dtype=torch.float16)
    qdata, scale, zero_point, act_group_size = operands(case)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows)).half()
    ends = torch.tensor([rows // 4, rows // 4, rows - rows // 5])
    ids = torch.searchsorted(ends, torch.arange(rows), right=True)
    y = launch.grouped_linear(x, qdata, scale, zero_point, ends.int(), case.g, act_group_size)
    assert y.dtype == x.dtype and y.shape == (rows, 40)
    assert rel_err(y, product(case, x, ids)) < MOE_REL_ERR_BUDGET / 5


@both_classes
@pytest.mark.parametrize("tokens", [0, 1, 6, 60])
def test_experts(cls, tokens):
    block = Block(cls, experts=3, bias=True, zero="fractional", dtype=torch.float16)
    load, given = block.load(tokens), block.operands()

    def stack(name: str) -> tuple:
        names = ("qdata", "scale", "zero_point", "group_size", "bias")
        return (*(given[f"{name}_{part}"] for part in names), given["act_group_size"])

    y = launch.experts(*load, stack("gate_up"), stack("down"), "halves", "silu")
    assert y is not None and y.dtype == torch.float16 and y.shape == (tokens, 64)
    assert rel_err(y, block.expected(*load)[0]) < MOE_REL_ERR_BUDGET
