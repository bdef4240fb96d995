"""act_quant_dequantize.py in Triton's CPU interpreter against (q - zero_point) * scale."""

from __future__ import annotations

import pytest
import torch

from w4tensor.kernels.act_quant_dequantize import act_quant_dequantize
from w4tensor.layout import ACT_QUANT
from w4tensor.testing import random_codes


@pytest.mark.parametrize("zero_point", ["symmetric", "fractional"])
@pytest.mark.parametrize(
    ("k", "group_size"),
    [(512, 16), (512, 32), (512, 64), (512, 128), (512, 256), (300, -1), (96, 32), (16, 16)],
)
@pytest.mark.parametrize(("first", "rows"), [(0, 70), (3, 40)])
def test_rows_are_those_of_the_definition(k, group_size, zero_point, first, rows):
    codes = random_codes(70, k, group_size=group_size, zero_point=zero_point, dtype=torch.float16)
    memory = torch.full((rows * k + 64,), torch.nan, dtype=torch.float16)
    out = memory[: rows * k].view(rows, k)
    qdata = ACT_QUANT.pack(codes.q)
    act_quant_dequantize(qdata, codes.scale, codes.zero_point, out, first, codes.group_size)
    assert torch.equal(out, codes.dequantize(torch.float16)[first : first + rows])
    assert memory[rows * k :].isnan().all()
