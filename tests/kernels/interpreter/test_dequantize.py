"""dequantize.py in Triton's CPU interpreter, in fp16: the oracle's weights, each rounded once."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter.products import integral
from w4tensor.kernels.dequantize import dequantize
from w4tensor.layout import COALESCED
from w4tensor.testing import Int4Codes, random_codes, rel_err

GROUPS = (16, 32, 64, 128, 256, -1)


def _rows(codes: Int4Codes, first: int, rows: int) -> torch.Tensor:
    k = codes.q.shape[-1]
    # what stands behind the rows must stay, and every element of them must be written
    memory = torch.full((rows + 1, k), torch.nan, dtype=torch.float16)
    qdata = COALESCED.pack(codes.q)
    zero = codes.zero_point
    dequantize(qdata, codes.scale, zero, memory[:rows], first, codes.group_size)
    assert memory[rows:].isnan().all()
    return memory[:rows]


def _codes(n: int, k: int, group_size: int, zero_step: float | None) -> Int4Codes:
    _, codes = integral(1, 1, n, k, group_size, zero_step)
    zero = None if codes.zero_point is None else codes.zero_point[0]
    return Int4Codes(codes.q[0], codes.scale[0], zero)


@pytest.mark.parametrize("zero_step", [None, 1.0], ids=["symmetric", "whole"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("k", [256, 1280])
def test_exact_for_every_group_size(group_size, zero_step, k):
    codes = _codes(11, k, group_size, zero_step)
    assert torch.equal(_rows(codes, 0, 11).float(), codes.dequantize())


@pytest.mark.parametrize(("k", "group_size"), [(16, 16), (96, 32), (720, 16), (300, -1), (77, -1)])
@pytest.mark.parametrize("zero_step", [None, 1.0], ids=["symmetric", "whole"])
def test_exact_for_a_k_that_blocks_do_not_divide(k, group_size, zero_step):
    codes = _codes(9, k, group_size, zero_step)
    assert torch.equal(_rows(codes, 0, 9).float(), codes.dequantize())


@pytest.mark.parametrize(("first", "rows"), [(0, 1), (3, 8), (7, 13), (19, 1)])
def test_any_run_of_rows(first, rows):
    codes = _codes(20, 384, 128, None)
    expected = codes.dequantize()[first : first + rows]
    assert torch.equal(_rows(codes, first, rows).float(), expected)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
def test_random_weights_are_rounded_like_fp16(zero_point, scale_dtype):
    codes = random_codes(20, 1024, group_size=64, dtype=scale_dtype, zero_point=zero_point)
    # a relative rounding error of 2**-12, of the weight and of its scale
    assert rel_err(_rows(codes, 0, 20), codes.dequantize()) <= 2.0**-11.5


def test_small_weights_lose_no_more():
    codes = random_codes(20, 256, dtype=torch.float32)
    codes = Int4Codes(codes.q, codes.scale * 2.0**-6, None)
    w = codes.dequantize()
    # fp16 itself, whose smallest numbers have fewer bits
    fp16 = rel_err(w.half(), w)
    assert rel_err(_rows(codes, 0, 20), w) <= 2 * fp16
