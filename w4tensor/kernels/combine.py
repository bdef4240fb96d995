"""y[t] = sum over j of weight[t, j] * pairs[t * TOP_K + j], in the order of j, in fp32.

A pair's row may be in SLICES parts, sums of slices of K, which are added first, in their order. One
program a run of BLOCK columns of one token. Slots whose id is outside 0..E-1 are sentinels:
nobody wrote their rows, and they add nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher

BLOCK = 1024


@triton.jit(do_not_specialize=["n_pairs"])
def _combine_kernel(
    pairs_ptr,
    ids_ptr,
    weight_ptr,
    y_ptr,
    n_pairs,
    N,
    E,
    SLICES: tl.constexpr,
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
        mask = (n < N) & ok
        row = tl.load(pairs_ptr + pair * N + n, mask=mask, other=0.0).to(tl.float32)
        for s in tl.static_range(1, SLICES):
            row += tl.load(pairs_ptr + (s * n_pairs + pair) * N + n, mask=mask, other=0.0)
        total += row * weight
    tl.store(y_ptr + token * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


_launch_combine = Launcher(_combine_kernel)


def combine(
    pairs: Tensor, ids: Tensor, weight: Tensor, y: Tensor, n_experts: int, pdl: bool = False
) -> Tensor:
    """Fill y [T, N] from pairs [T * top_k, N], ids [T, top_k] and router weights [T, top_k].

    pairs may be fp32 [slices, T * top_k, N].
    """
    tokens, top_k = ids.shape
    n = pairs.shape[-1]
    if tokens == 0:
        return y
    block = min(BLOCK, 1 << (n - 1).bit_length())
    _launch_combine(
        (tokens, -(-n // block)),
        pairs,
        ids,
        weight,
        y,
        pairs.shape[-2],
        n,
        n_experts,
        SLICES=pairs.shape[0] if pairs.ndim == 3 else 1,
        TOP_K=top_k,
        BLOCK=block,
        PDL=pdl,
        num_warps=max(1, block // 256),
        **({"launch_pdl": True} if pdl else {}),
    )
    return y
