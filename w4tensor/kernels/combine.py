"""y[t] = sum over j of weight[t, j] * pairs[t * TOP_K + j], in the order of j, in fp32.

One program a run of BLOCK columns of one token. Slots whose id is outside 0..E-1 are sentinels:
nobody wrote their rows, and they add nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher

BLOCK = 1024


@triton.jit
def _combine_kernel(
    pairs_ptr,
    ids_ptr,
    weight_ptr,
    y_ptr,
    N,
    E,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        e = tl.load(ids_ptr + pair)
        ok = (e >= 0) & (e < E)
        weight = tl.load(weight_ptr + pair).to(tl.float32)
        row = tl.load(pairs_ptr + pair * N + n, mask=(n < N) & ok, other=0.0)
        total += row.to(tl.float32) * weight
    tl.store(y_ptr + token * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


_launch_combine = Launcher(_combine_kernel)


def combine(
    pairs: Tensor, ids: Tensor, weight: Tensor, y: Tensor, n_experts: int, pdl: bool = False
) -> Tensor:
    """Fill y [T, N] from pairs [T * top_k, N], ids [T, top_k] and router weights [T, top_k]."""
    tokens, top_k = ids.shape
    n = pairs.shape[1]
    if tokens == 0:
        return y
    block = min(BLOCK, 1 << (n - 1).bit_length())
    _launch_combine(
        (tokens, -(-n // block)),
        pairs,
        ids,
        weight,
        y,
        n,
        n_experts,
        TOP_K=top_k,
        BLOCK=block,
        PDL=pdl,
        num_warps=max(1, block // 256),
        **({"launch_pdl": True} if pdl else {}),
    )
    return y
