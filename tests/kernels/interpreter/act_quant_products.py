"""What the tests of all W4A8 products share: the definition, exact problems, guarded output."""

from __future__ import annotations

import torch
from torch import Tensor

from w4tensor.kernels.quantize_activation import quantize_activation
from w4tensor.layout import ACT_QUANT
from w4tensor.testing import Int4Codes

GROUPS = (16, 32, 64, 128, 256, -1)
ACT_GROUPS = (32, 64, 128, -1)
# fp32 sums of a few thousand products; what a kernel may differ from the definition
REL_ERR = 1e-6


def definition(codes: Int4Codes, x_codes: Tensor, x_scale: Tensor, act_group_size: int) -> Tensor:
    """y [E, M, N] in fp64: integer sums over cells, each with one scale on either side."""
    k, group = codes.q.shape[-1], codes.group_size
    act_group = k if act_group_size == -1 else act_group_size
    edges = sorted({*range(0, k, group), *range(0, k, act_group), k})
    y = torch.zeros(*x_codes.shape[:2], codes.q.shape[1], dtype=torch.float64)
    for first, end in zip(edges, edges[1:], strict=False):
        x = x_codes[..., first:end].long()
        q = codes.q[..., first:end].long()
        g, a = first // group, first // act_group
        d = (x @ q.mT).double()
        zero = 8.0 if codes.zero_point is None else codes.zero_point[:, None, :, g].double()
        d -= x.sum(-1, keepdim=True).double() * zero
        y += d * x_scale[:, a, :, None].double() * codes.scale[:, None, :, g].double()
    return y


def integral(
    e: int, m: int, n: int, k: int, group_size: int, zero_point: bool, seed: int = 0
) -> tuple[Tensor, Int4Codes]:
    """fp16 x and codes with an exact product: every act group of x has scale 1, so codes are x."""
    g = torch.Generator().manual_seed(seed)
    groups = (e, n, 1 if group_size == -1 else k // group_size)
    q = torch.randint(0, 16, (e, n, k), dtype=torch.uint8, generator=g)
    scale = 2.0 ** torch.randint(-1, 2, groups, generator=g).half()
    zero = torch.randint(0, 31, groups, generator=g).half() / 2 if zero_point else None
    x = torch.randint(-9, 10, (e, m, k), generator=g).half()
    x[..., ::32] = 127 * (2 * torch.randint(0, 2, x[..., ::32].shape, generator=g) - 1)
    return x, Int4Codes(q, scale, zero)


def run(
    launch,
    x: Tensor,
    codes: Int4Codes,
    act_group_size: int,
    plan,
    bias: Tensor | None = None,
    dtype=torch.float32,
) -> tuple[Tensor, Tensor]:
    """y of `launch`, every element written and nothing behind them; and the definition's."""
    e, m, k = x.shape
    n = codes.q.shape[1]
    sum_group_size = None if codes.zero_point is None else codes.group_size
    x_codes, x_scale, x_sum = quantize_activation(x, act_group_size, sum_group_size)
    memory = torch.full((e * m * n + 64,), torch.nan, dtype=dtype)
    y = memory[: e * m * n].view(e, m, n)
    launch(
        x_codes,
        x_scale,
        x_sum,
        ACT_QUANT.pack(codes.q),
        codes.scale,
        codes.zero_point,
        bias,
        y,
        codes.group_size,
        act_group_size,
        plan,
    )
    assert memory[e * m * n :].isnan().all()
    return y, definition(codes, x_codes[..., :k], x_scale, act_group_size)
