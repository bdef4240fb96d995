"""What W4A8 kernels do alike: the widths of sums; and, of plain Triton, the end of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT
from w4tensor.kernels.unpack_act_quant import UNIT

# no sum in int32 is longer, but those that are all of K: |16 (q - 8) x| <= 16 * 8 * 127
MAX_CELL = 128
MAX_CHAINED_K = 2**31 // (16 * 8 * 127)


def cell_and_span(group: int, act_group: int) -> tuple[int, int]:
    """How much of K has one scale on either side, and how much has one on at least one side.

    0 is a scale of all of K: it waits for the end. Groups of 16 are the two halves of a cell of 32.

    >>> cell_and_span(128, 32), cell_and_span(16, 64), cell_and_span(256, 0), cell_and_span(0, 0)
    ((32, 128), (32, 64), (128, 128), (128, 128))
    """
    widths = [min(max(g, 32), MAX_CELL) for g in (group, act_group) if g] or [MAX_CELL]
    return min(widths), max(widths)


@triton.jit
def finish(
    y,
    x_scale_ptr,
    x_sum_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    e,
    m,
    n,
    M,
    N,
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
):
    """Scale sums [BN, BM], in units of 1 / UNIT, with the scales of all of K; bias; store."""
    y *= 1.0 / UNIT
    row = e * N + tl.minimum(n, N - 1)
    if GROUP == 0:
        if zero_ptr is not None:
            shift = tl.load(zero_ptr + row).to(tl.float32) - SYMMETRIC_ZERO_POINT
            x_sum = tl.load(x_sum_ptr + m, mask=m < M, other=0.0)
            y -= shift[:, None] * x_sum[None, :]
        y *= tl.load(scale_ptr + row).to(tl.float32)[:, None]
    if ACT_GROUP == 0:
        y *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (e * M + m.to(tl.int64))[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
