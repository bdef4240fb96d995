"""Rows of x by expert: what the tensor memory accelerator reads has to stand sorted in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher

# bytes of a row that a program copies
BLOCK = 4096


@triton.jit(do_not_specialize=["n_experts"])
def _gather_kernel(
    x_ptr,
    order_ptr,
    offs_ptr,
    out_ptr,
    n_experts,
    K,
    stride_x,
    X_DIV: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # rows of sentinels are nobody's
    if row < tl.load(offs_ptr + n_experts - 1):
        x_row = tl.load(order_ptr + row).to(tl.int64) // X_DIV
        tl.store(
            out_ptr + row * K + k, tl.load(x_ptr + x_row * stride_x + k, mask=k < K), mask=k < K
        )


_launch = Launcher(_gather_kernel)


def gather_rows(x: Tensor, order: Tensor, offs: Tensor, x_div: int, pdl: bool) -> Tensor:
    """x [T, K] -> [pairs, K]: row r is x[order[r] // x_div]; those from offs[-1] on are unset."""
    k = x.shape[1]
    out = torch.empty(order.numel(), k, device=x.device, dtype=x.dtype)
    block = min(BLOCK // x.element_size(), 1 << (k - 1).bit_length())
    _launch(
        (order.numel(), -(-k // block)),
        x,
        order,
        offs,
        out,
        offs.numel(),
        k,
        x.stride(0),
        X_DIV=x_div,
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
