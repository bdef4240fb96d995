"""What becomes of a tile's sums on Hopper, in Gluon: y, with its bias."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from w4tensor.kernels.hopper_memory import as_halves, barrier, store


@gluon.jit
def finish(acc, bias_ptr, y_desc, y_ptr, xs, n0, m0, M, N, HALVES: gl.constexpr):
    """acc [BN, BM] -> y[m0 .., n0 ..], or with HALVES the first and the last BM / 2 tokens.

    Through xs, memory of x that nobody reads any more, which must live until `tma.store_wait(0)`;
    or, if y_desc is None, one by one.
    """
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, acc.type.layout))
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        acc += bias.expand_dims(1)
    if y_desc is not None:
        ys = xs.slice(0, BLOCK_N, 1)
        barrier()
        ys.permute((1, 0)).store(acc.to(y_desc.dtype))
        fence_async_shared()
        barrier()
        if HALVES:
            # of all columns: from 3.8 on, Triton does not reinterpret some of them
            LAYOUT: gl.constexpr = y_desc.layout
            store(y_desc, [0, 0, n0], as_halves(xs, LAYOUT).slice(0, BLOCK_N, 2))
        else:
            store(y_desc, [m0, n0], ys)
    else:
        m = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, acc.type.layout))
        if HALVES:
            m += gl.where(m < BLOCK_M // 2, 0, M - BLOCK_M)
        mask = (n < N).expand_dims(1) & (m < M).expand_dims(0)
        at = m.to(gl.int64).expand_dims(0) * N + n.expand_dims(1)
        gl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)
