"""What becomes of a tile's sums on Hopper, in Gluon: y, with its bias."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from w4tensor.kernels.gate import activate, gated
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


@gluon.constexpr_function
def _layout_of_stores(out, warps):
    """[BM, OUT], 16 bytes of a row to a lane."""
    across = min(32, out // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def store_rows(
    acc,
    y_ptr,
    order_ptr,
    pid_n,
    first,
    end,
    N,
    SCATTER: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    memory=None,
):
    """f(acc [BN, BM]) -> the rows of y; through `memory` [BM, BN], or half of the columns with a
    gate, if any, which is y's dtype, and nobody's until all have passed another barrier."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    if GATE == "none":
        OUT: gl.constexpr = BN
        y = activate(acc, ACT)
        n_out = N
    else:
        OUT: gl.constexpr = BN // 2
        gate, up = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1).split()
        y = gated(gate, up, ACT).reshape(OUT, BM)
        n_out = N // 2
    STORED: gl.constexpr = _layout_of_stores(OUT, gl.num_warps())
    y = y.to(y_ptr.dtype.element_ty)
    if memory is None:
        y = gl.convert_layout(y.permute(1, 0), STORED)
    else:
        barrier()
        memory.permute((1, 0)).store(y)
        barrier()
        y = memory.load(STORED)
        # what comes there next is fetched by the tensor memory accelerator
        fence_async_shared()
    row = first + gl.arange(0, BM, gl.SliceLayout(1, STORED))
    n = pid_n * OUT + gl.arange(0, OUT, gl.SliceLayout(0, STORED))
    inside = row < end
    y_row = row
    if SCATTER:
        y_row = gl.load(order_ptr + row, mask=inside, other=0)
    at = y_row.to(gl.int64).expand_dims(1) * n_out + n.expand_dims(0)
    gl.store(y_ptr + at, y, mask=inside.expand_dims(1) & (n < n_out).expand_dims(0))
