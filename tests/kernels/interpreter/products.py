"""What the tests of all W4A16 products share: problems with exact answers, and guarded output."""

from __future__ import annotations

import torch
from torch import Tensor

from w4tensor.layout import COALESCED
from w4tensor.testing import Int4Codes


def integral(
    e: int, m: int, n: int, k: int, group_size: int, zero_step: float | None, seed: int = 0
) -> tuple[Tensor, Int4Codes]:
    """fp16 x [e, m, k] and codes whose products are whole multiples of 1/16, and few.

    Args:
        zero_step: zero points are multiples of it from 0 to 15; None for symmetric codes.
    """
    g = torch.Generator().manual_seed(seed)
    groups = (e, n, 1 if group_size == -1 else k // group_size)
    q = torch.randint(0, 16, (e, n, k), dtype=torch.uint8, generator=g)
    scale = 2.0 ** torch.randint(-2, 2, groups, generator=g).half()
    zero = None
    if zero_step is not None:
        zero = torch.randint(0, int(15 / zero_step) + 1, groups, generator=g).half() * zero_step
    x = torch.randint(-3, 4, (e, m, k), generator=g).half()
    return x, Int4Codes(q, scale, zero)


def run(
    launch, x: Tensor, codes: Int4Codes, plan, bias: Tensor | None = None, dtype=torch.float32
) -> Tensor:
    """y of `launch`: every element written, and nothing behind them."""
    e, m, _ = x.shape
    n = codes.q.shape[1]
    memory = torch.full((e * m * n + 64,), torch.nan, dtype=dtype)
    y = memory[: e * m * n].view(e, m, n)
    qdata = COALESCED.pack(codes.q)
    launch(x, qdata, codes.scale, codes.zero_point, bias, y, codes.group_size, plan)
    assert memory[e * m * n :].isnan().all()
    return y


def expected(x: Tensor, codes: Int4Codes) -> Tensor:
    """The product in fp64."""
    return x.double() @ codes.dequantize().double().mT
