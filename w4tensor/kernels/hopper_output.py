"""What becomes of a tile's sums on Hopper, in Gluon: y, with its bias."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from w4tensor.kernels.gate import activate, gated
from w4tensor.kernels.hopper_memory import as_halves, barrier, store, tokens_of


@gluon.jit
def memory_of_y(y_desc, BLOCK_N: gl.constexpr):
    """Memory of a tile of y, for finish()."""
    BLOCK_M: gl.constexpr = tokens_of(y_desc.block_shape)
    Y: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], y_desc.dtype)
    return gl.allocate_shared_memory(y_desc.dtype, [BLOCK_M, BLOCK_N], Y)


@gluon.constexpr_function
def _are_many(rows, columns, warps):
    """Whether sums are scaled in two parts: there are no registers for the scales of more columns
    than a warp has rows."""
    return columns > rows // warps


@gluon.jit
def _two_parts(acc):
    """The left and the right columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@gluon.jit
def _one(left, right):
    """What _two_parts() took apart."""
    return gl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@gluon.jit
def scaled(acc, scales, row, row_ok, n_groups, token, token_ok):
    """acc [BN, BM], sums of products with multiples, times the units of rows [BN] and the scales of
    tokens [BM]; 0 where those are not ok.

    scales: pointers to the scales of rows, to the multiples of their groups, to scales of tokens.
    """
    first = row * n_groups
    unit = gl.load(scales[0] + first, mask=row_ok, other=0.0).to(gl.float32)
    # exact where the quotient is
    unit = gl.div_rn(unit, gl.load(scales[1] + first, mask=row_ok, other=1).to(gl.float32))
    of_tokens = gl.load(scales[2] + token, mask=token_ok, other=0.0)
    return acc * unit.expand_dims(1) * of_tokens.expand_dims(0)


@gluon.jit
def finish(acc, scales, n_groups, bias_ptr, y_desc, y_ptr, xs, n0, m0, M, N, HALVES: gl.constexpr):
    """acc [BN, BM] -> y[m0 .., n0 ..], or with HALVES the first and the last BM / 2 tokens.

    scales: as scaled() takes them, where acc are sums of products with multiples; else the second
        is None.

    Through xs, memory of x that nobody reads any more, which must live until `tma.store_wait(0)`;
    or, if y_desc is None, one by one.
    """
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    if y_desc is not None:
        ys = xs.slice(0, BLOCK_N, 1)
        y = _output(acc, scales, n_groups, bias_ptr, n0, m0, M, N, BLOCK_M, HALVES)
        barrier()
        ys.permute((1, 0)).store(y.to(y_desc.dtype))
        fence_async_shared()
        barrier()
        if HALVES:
            # of all columns: from 3.8 on, Triton does not reinterpret some of them
            LAYOUT: gl.constexpr = y_desc.layout
            store(y_desc, [0, 0, n0], as_halves(xs, LAYOUT).slice(0, BLOCK_N, 2))
        else:
            store(y_desc, [m0, n0], ys)
    else:
        _store_each(acc, scales, n_groups, bias_ptr, y_ptr, n0, m0, M, N, BLOCK_M, HALVES)


@gluon.jit
def _tokens_of(acc, first, M, BLOCK_M: gl.constexpr, HALVES: gl.constexpr):
    """The token of each column of acc; HALVES: of the one tile that there is then."""
    m = first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    if HALVES:
        m += gl.where(m < BLOCK_M // 2, 0, M - BLOCK_M)
    return m


@gluon.jit
def _output(
    acc,
    scales,
    n_groups,
    bias_ptr,
    n0,
    first,
    M,
    N,
    BLOCK_M: gl.constexpr,
    HALVES: gl.constexpr,
):
    """acc, columns `first` .. of a tile of BLOCK_M, scaled if they are of integers, and biased."""
    if scales[1] is not None and _are_many(acc.shape[0], acc.shape[1], gl.num_warps()):
        HALF: gl.constexpr = acc.shape[1] // 2
        left, right = _two_parts(acc)
        rest = n_groups, bias_ptr, n0
        left = _output(left, scales, *rest, first, M, N, BLOCK_M, HALVES)
        right = _output(right, scales, *rest, first + HALF, M, N, BLOCK_M, HALVES)
        return gl.convert_layout(_one(left, right), acc.type.layout, assert_trivial=True)
    else:
        n = n0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
        if scales[1] is not None:
            m = _tokens_of(acc, first, M, BLOCK_M, HALVES)
            acc = scaled(acc, scales, n, n < N, n_groups, m, m < M)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
            acc += bias.expand_dims(1)
        return acc


@gluon.jit
def _store_each(
    acc,
    scales,
    n_groups,
    bias_ptr,
    y_ptr,
    n0,
    first,
    M,
    N,
    BLOCK_M: gl.constexpr,
    HALVES: gl.constexpr,
):
    """_output() -> y, one by one."""
    if scales[1] is not None and _are_many(acc.shape[0], acc.shape[1], gl.num_warps()):
        HALF: gl.constexpr = acc.shape[1] // 2
        left, right = _two_parts(acc)
        rest = n_groups, bias_ptr, y_ptr, n0
        _store_each(left, scales, *rest, first, M, N, BLOCK_M, HALVES)
        _store_each(right, scales, *rest, first + HALF, M, N, BLOCK_M, HALVES)
    else:
        y = _output(acc, scales, n_groups, bias_ptr, n0, first, M, N, BLOCK_M, HALVES)
        n = n0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
        m = _tokens_of(acc, first, M, BLOCK_M, HALVES)
        mask = (n < N).expand_dims(1) & (m < M).expand_dims(0)
        at = m.to(gl.int64).expand_dims(0) * N + n.expand_dims(1)
        gl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def scaled_rows(acc, scales, of_outputs, n_groups, order_ptr, first, end, X_DIV: gl.constexpr):
    """As scaled(), of rows [BN] of weights and sorted rows first .. end - 1: row r has the scale of
    token order[r] // X_DIV, or if that is 0, of token r."""
    if _are_many(acc.shape[0], acc.shape[1], gl.num_warps()):
        HALF: gl.constexpr = acc.shape[1] // 2
        left, right = _two_parts(acc)
        left = scaled_rows(left, scales, of_outputs, n_groups, order_ptr, first, end, X_DIV)
        right = scaled_rows(
            right, scales, of_outputs, n_groups, order_ptr, first + HALF, end, X_DIV
        )
        return gl.convert_layout(_one(left, right), acc.type.layout, assert_trivial=True)
    else:
        row = first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        inside = row < end
        token = row
        if X_DIV > 0:
            token = gl.load(order_ptr + row, mask=inside, other=0) // X_DIV
        outputs = gl.convert_layout(
            of_outputs, gl.SliceLayout(1, acc.type.layout), assert_trivial=True
        )
        return scaled(acc, scales, outputs, outputs >= 0, n_groups, token, inside)


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
