"""y[i] = f(sum over j < TOP_K of weight[i, j] * (W[e] @ x[..] + bias[e])): one row of x at a time.

COALESCED weights times 16-bit activations by integer dot products (dp4a), without the matrix unit:

                 thread 0         thread 1         a thread has chunks of 16 bytes, the 32 k of one
    row n      | chunk 0: 32 k  | chunk 1       |  lane of a block of 128 (layout.py), of ROWS rows
    row n + 1  | chunk 0        | chunk 1       |  in turn; a program's threads share K

All rows of a step are in flight at once, 512 contiguous bytes of each for a warp. Slots of a token
follow one another along K, as one long row.

x becomes 16-bit integers, for each slot and 128 k with a scale that is a power of two, and those
two planes of bytes, x = (256 * high + low) * unit: numbers down to 1 / 128 of the largest among the
128 (of fp16: 1 / 16) are exact, others lose at most 2**-15 of that largest. That is less than tiles
lose by rounding weights to 16 bits. A row with an Inf or NaN among its x gives NaN.

Products are summed in integers over a group of weights, or the 128 k at most, then in fp32, over
threads in a fixed tree: two runs give the same bits.

    linear    x [E * M, K] -> y [E * M, N]               item e * M + m with W[e]
    first     x [T, H]     -> h [T * top_k, I]           TOP_K 1, X_DIV top_k, f = act(gate) * up
    second    h [T * top_k, I] -> y [T, H]               TOP_K top_k, weighted sum over slots
    gather    x [S, K]     -> y [S, N]                   TOP_K 1: W[ids] @ x, W not copied

Ids outside 0..E-1 are expert-parallel sentinels: they load no weights and add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from w4tensor.kernels.gate import activate, gated
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import SYMMETRIC_ZERO_POINT, use_asm

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_gemv import GemvPlan

LOW_NIBBLES = tl.constexpr(0x0F0F0F0F)
HIGH_NIBBLES = tl.constexpr(-0x0F0F0F10)
ONES = tl.constexpr(0x01010101)
# what makes the low bits of an fp32 those of the integer that is added to it, in [-2**22, 2**22)
ROUND = tl.constexpr(1.5 * 2**23)
# high nibbles stand for 16 times their codes: sums are in units of 1 / UNIT
UNIT = tl.constexpr(16)


@triton.jit
def _dot(w, x, c, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """c + the sum of products of bytes: unsigned ones of w, and of x as SIGNED says."""
    if ASM and SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [w, x, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [w, x, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        shift = tl.arange(0, 4)[None, :] * 8
        xs = x[:, None] << (24 - shift) >> 24
        if not SIGNED:
            xs = xs & 255
        return c + tl.sum((w[:, None] >> shift & 255) * xs, 1)


@triton.jit
def _planes(a, b, c, d, ASM: tl.constexpr):
    """Bytes 1 of four int32, as a word, and bytes 0."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 l, h;
                prmt.b32 l, $2, $3, 0x5410;
                prmt.b32 h, $4, $5, 0x5410;
                prmt.b32 $0, l, h, 0x7531;
                prmt.b32 $1, l, h, 0x6420;
            }""",
            "=r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        high = (a >> 8 & 255) | (b >> 8 & 255) << 8 | (c >> 8 & 255) << 16 | (d >> 8 & 255) << 24
        low = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
        return high, low


@triton.jit
def _larger_bf16(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger_fp16(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _numbers(pairs, DTYPE: tl.constexpr):
    """The two numbers of each pair, as fp32."""
    if DTYPE == tl.bfloat16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _exponents(pairs, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Pairs [16, T] -> exponents [T] with 2**(e - 127) <= the largest number that four threads, a
    block of 128 k, have: 255 where one is not finite, and at least 15."""
    T: tl.constexpr = pairs.shape[1]
    sizes = pairs & 0x7FFF7FFF
    if ASM and DTYPE == tl.bfloat16:
        sizes = tl.reduce(sizes, 0, _larger_bf16)
    elif ASM:
        sizes = tl.reduce(sizes, 0, _larger_fp16)
    a, b = _numbers(sizes, DTYPE)
    # of numbers without a sign, the order of bits is theirs; NaN is the largest
    largest = tl.maximum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True))
    if not ASM:
        largest = tl.max(largest, 0)
    largest = tl.max(largest.reshape(T // 4, 4), 1)
    e = tl.maximum(largest >> 23, 15)
    return (e[:, None] + tl.zeros([1, 4], tl.int32)).reshape(T)


@triton.jit
def _four(v):
    """[T, 4] -> four tensors [T]."""
    even, odd = v.reshape(v.shape[0], 2, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0, v1, v2, v3


@triton.jit
def _integers(pairs, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Pairs of x [(i, p, q', thread)] -> of each thread's words i: bytes that belong to their low
    nibbles, and to their high ones, in two planes each; and unit [T]."""
    T: tl.constexpr = pairs.shape[0] // 16
    e = _exponents(pairs.reshape(16, T), DTYPE, ASM)
    scale = ((268 - e) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(e < 255, (e - 14) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    # k = 32i + 16p + 8q' + 2t + r, of r = 0 and of r = 1
    even, odd = _numbers(pairs, DTYPE)
    even = (even.reshape(16, T) * scale[None, :] + ROUND).to(tl.int32, bitcast=True)
    odd = (odd.reshape(16, T) * scale[None, :] + ROUND).to(tl.int32, bitcast=True)
    # -> [i, q', T] of p = 0 and p = 1; bytes of a word are r, then p
    a, b = even.reshape(4, 2, 2, T).trans(0, 2, 3, 1).split()
    c, d = odd.reshape(4, 2, 2, T).trans(0, 2, 3, 1).split()
    high, low = _planes(a, b, c, d, ASM)
    # q' is whether a nibble is the high one
    high_0, high_1 = high.trans(0, 2, 1).split()
    low_0, low_1 = low.trans(0, 2, 1).split()
    high_x = _four(high_0.trans(1, 0)), _four(high_1.trans(1, 0))
    low_x = _four(low_0.trans(1, 0)), _four(low_1.trans(1, 0))
    return high_x, low_x, unit


@triton.jit
def _sum(high, low):
    """Of sums of the two planes; fp32."""
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _step(
    acc,
    words,
    scale,
    zero,
    high_x,
    low_x,
    # UNIT times the sums of x of each word, in two planes, and of all words
    high_sums,
    low_sums,
    unit,
    FINE: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc [T] + one row's chunks."""
    w0, w1, w2, w3 = _four(words)
    w = w0, w1, w2, w3
    none = tl.zeros(acc.shape, tl.int32)
    if FINE:
        s = _four(scale.to(tl.float32))
        part = tl.zeros(acc.shape, tl.float32)
        for i in tl.static_range(4):
            low_w = w[i] & LOW_NIBBLES
            high_w = w[i] & HIGH_NIBBLES
            high = _dot(low_w, high_x[0][i], none, True, ASM) * UNIT
            low = _dot(low_w, low_x[0][i], none, False, ASM) * UNIT
            high += _dot(high_w, high_x[1][i], high_sums[i] * -8, True, ASM)
            low += _dot(high_w, low_x[1][i], low_sums[i] * -8, False, ASM)
            d = _sum(high, low)
            if zero is not None:
                z = _four(zero.to(tl.float32))
                d -= (z[i] - SYMMETRIC_ZERO_POINT) * _sum(high_sums[i], low_sums[i])
            part += d * s[i]
        return acc + part * unit
    else:
        high_0 = none
        low_0 = none
        high_1 = high_sums[4] * -8
        low_1 = low_sums[4] * -8
        for i in tl.static_range(4):
            low_w = w[i] & LOW_NIBBLES
            high_w = w[i] & HIGH_NIBBLES
            high_0 = _dot(low_w, high_x[0][i], high_0, True, ASM)
            low_0 = _dot(low_w, low_x[0][i], low_0, False, ASM)
            high_1 = _dot(high_w, high_x[1][i], high_1, True, ASM)
            low_1 = _dot(high_w, low_x[1][i], low_1, False, ASM)
        d = _sum(high_0 * UNIT + high_1, low_0 * UNIT + low_1)
        if zero is not None:
            d -= (zero.to(tl.float32) - SYMMETRIC_ZERO_POINT) * _sum(high_sums[4], low_sums[4])
        return acc + d * unit * scale.to(tl.float32)


@triton.jit
def _groups(
    ptr,
    row,
    chunk,
    ok,
    n_groups,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """Scales or zero points of a row's chunks: [T], or of each word where a block has several."""
    if GROUP == 0 or GROUP >= 128:
        group = chunk * 0 if GROUP == 0 else chunk // 4 // (GROUP // 128)
        return tl.load(ptr + (row * n_groups + group), mask=ok, other=0.0)
    else:
        PARTS: tl.constexpr = 128 // GROUP
        first = chunk // 4 * PARTS
        ok = ok[:, None]
        part = (tl.arange(0, 4) // (GROUP // 32))[None, :]
        if WHOLE_BLOCKS:
            # one load of neighbours
            at = tl.multiple_of(row * n_groups + first, [PARTS])
        else:
            at = row * n_groups + first
            ok = ok & (first[:, None] + part < n_groups)
        return tl.load((ptr + at)[:, None] + part, mask=ok, other=0.0)


@triton.jit
def _load_rows(
    w_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    expert,
    chunk,
    ok,
    N,
    n_chunks,
    n_groups,
    GROUP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Words, scales and zero points of chunks of each row; all in flight at once."""
    words = ()
    scales = ()
    zeros = ()
    # offsets within an expert have 32 bits
    w_ptr += expert * N * n_chunks * 4
    first_group = expert * N * n_groups
    if WHOLE_BLOCKS and GROUP > 0 and GROUP < 128:
        # rows are multiples of as many groups as a block has
        first_group = tl.multiple_of(first_group, [128 // GROUP])
    scale_ptr += first_group
    for r in tl.static_range(ROWS):
        at = (w_ptr + (rows[r] * n_chunks + chunk) * 4)[:, None] + tl.arange(0, 4)[None, :]
        words += (tl.load(at, mask=ok[:, None], other=0, eviction_policy="evict_first"),)
    for r in tl.static_range(ROWS):
        scales += (_groups(scale_ptr, rows[r], chunk, ok, n_groups, GROUP, WHOLE_BLOCKS),)
    if zero_ptr is not None:
        zero_ptr += first_group
        for r in tl.static_range(ROWS):
            zeros += (_groups(zero_ptr, rows[r], chunk, ok, n_groups, GROUP, WHOLE_BLOCKS),)
    return words, scales, zeros


@triton.jit
def _slots(ids_ptr, item, chunk, M, E, n_chunks, TOP_K: tl.constexpr):
    """Of chunks of TOP_K rows: the slot, the chunk in its row, its expert, whether there is one."""
    slot = chunk * 0
    if TOP_K > 1:
        slot = chunk // n_chunks
        chunk = chunk % n_chunks
    ok = slot < TOP_K
    if ids_ptr is None:
        expert = (item // M).to(tl.int64)
        ok = ok & (chunk < n_chunks)
    else:
        if TOP_K > 1:
            e = tl.load(ids_ptr + item * TOP_K + slot, mask=ok, other=-1)
        else:
            e = tl.load(ids_ptr + item)
        there = (e >= 0) & (e < E)
        expert = tl.where(there, e, 0).to(tl.int64)
        ok = ok & there & (chunk < n_chunks)
    return slot, chunk, expert, ok


@triton.jit
def _stack(values, COUNT: tl.constexpr):
    """COUNT tensors [T, ..], a power of two -> [T, .., 2, .., 2]."""
    if COUNT == 1:
        return values[0]
    else:
        joined = ()
        for i in tl.static_range(COUNT // 2):
            joined += (tl.join(values[i], values[i + COUNT // 2]),)
        return _stack(joined, COUNT // 2)


@triton.jit
def _row(first, r, N, ROWS: tl.constexpr, GATE: tl.constexpr):
    """Row r of a program: with a gate, gate rows come first, then up rows of the same outputs."""
    if GATE == "none":
        return first + r
    else:
        HALF: tl.constexpr = ROWS // 2
        if GATE == "halves":
            return first + r % HALF + r // HALF * (N // 2)
        else:
            return 2 * (first + r % HALF) + r // HALF


_SIZES = ["items", "M", "N", "K", "E", "n_chunks", "n_groups", "stride_x"]


# one binary for weights of every size
@triton.jit(do_not_specialize=_SIZES)
def _gemv_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    items,
    M,
    N,
    K,
    E,
    n_chunks,
    n_groups,
    stride_x,
    X_DIV: tl.constexpr,
    TOP_K: tl.constexpr,
    # 0 where the row is one group
    GROUP: tl.constexpr,
    # whether K is a multiple of 128
    WHOLE_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    AHEAD: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FINE: tl.constexpr = GROUP > 0 and GROUP < 128
    if PDL == "first":
        # routing may still be on its way; once it is here, the second product may begin to load
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # neighbours share rows of W: items of one expert find them in L2
    item = (tl.program_id(0) % items).to(tl.int64)
    OUT: tl.constexpr = ROWS if GATE == "none" else ROWS // 2
    n_out = N if GATE == "none" else N // 2
    # the last program begins early enough to be whole
    n0 = tl.minimum(tl.program_id(0) // items * OUT, n_out - OUT)
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (_row(n0, r, N, ROWS, GATE),)
    pairs_ptr = (x_ptr + item * TOP_K // X_DIV * stride_x).to(tl.pointer_type(tl.int32))
    total = TOP_K * n_chunks

    c = tl.arange(0, THREADS)
    slot, chunk, expert, ok = _slots(ids_ptr, item, c, M, E, n_chunks, TOP_K)
    # weights are nobody's output
    words, scales, zeros = _load_rows(
        w_ptr,
        scale_ptr,
        zero_ptr,
        rows,
        expert,
        chunk,
        ok,
        N,
        n_chunks,
        n_groups,
        GROUP,
        WHOLE_BLOCKS,
        ROWS,
    )
    if PDL == "second":
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    accs = (tl.zeros([THREADS], tl.float32),) * ROWS
    for first in tl.range(0, total, THREADS, num_stages=1):
        # pairs of x [(i, p, q', thread)], in the order in which Triton deals them to registers
        f = tl.arange(0, 16 * THREADS)
        x_slot, x_chunk, x_expert, x_ok = _slots(
            ids_ptr, item, first + f % THREADS, M, E, n_chunks, TOP_K
        )
        # t, in a form that keeps neighbours from being taken for one load of 16 bytes
        t = (3 - x_chunk % 4) ^ 3
        pair = x_chunk // 4 * 64 + t
        of_thread = f // THREADS * 4
        if not WHOLE_BLOCKS:
            x_ok = x_ok & (of_thread < K // 2 - pair)
        # added last, for one address to serve all of a thread's loads
        x_ptrs = pairs_ptr + (x_slot * (stride_x // 2) + pair) + of_thread
        pairs = tl.load(x_ptrs, mask=x_ok, other=0)
        following = first + THREADS + tl.arange(0, THREADS)
        next_slot, chunk, expert, ok = _slots(ids_ptr, item, following, M, E, n_chunks, TOP_K)
        if AHEAD:
            next_words, next_scales, next_zeros = _load_rows(
                w_ptr,
                scale_ptr,
                zero_ptr,
                rows,
                expert,
                chunk,
                ok,
                N,
                n_chunks,
                n_groups,
                GROUP,
                WHOLE_BLOCKS,
                ROWS,
            )
        high_x, low_x, unit = _integers(pairs, DTYPE, ASM)
        none = tl.zeros([THREADS], tl.int32)
        high_sums = ()
        low_sums = ()
        high_all = none
        low_all = none
        for i in tl.static_range(4):
            high = _dot(none + ONES, high_x[0][i], none, True, ASM)
            low = _dot(none + ONES, low_x[0][i], none, False, ASM)
            high = _dot(none + ONES, high_x[1][i], high, True, ASM) * UNIT
            low = _dot(none + ONES, low_x[1][i], low, False, ASM) * UNIT
            high_sums += (high,)
            low_sums += (low,)
            high_all += high
            low_all += low
        high_sums += (high_all,)
        low_sums += (low_all,)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + item * TOP_K + slot, mask=slot < TOP_K, other=0.0)
            unit *= weight.to(tl.float32)
        updated = ()
        for r in tl.static_range(ROWS):
            zero = zeros[r] if zero_ptr is not None else None
            updated += (
                _step(
                    accs[r],
                    words[r],
                    scales[r],
                    zero,
                    high_x,
                    low_x,
                    high_sums,
                    low_sums,
                    unit,
                    FINE,
                    ASM,
                ),
            )
        accs = updated
        if not AHEAD:
            next_words, next_scales, next_zeros = _load_rows(
                w_ptr,
                scale_ptr,
                zero_ptr,
                rows,
                expert,
                chunk,
                ok,
                N,
                n_chunks,
                n_groups,
                GROUP,
                WHOLE_BLOCKS,
                ROWS,
            )
        slot = next_slot
        words = next_words
        scales = next_scales
        zeros = next_zeros

    if ROWS == 1:
        sums = accs[0][:, None]
    else:
        sums = _stack(accs, ROWS)
    y = tl.sum(sums, 0).reshape(ROWS) * (1.0 / UNIT)
    n = n0 + tl.arange(0, OUT)
    if bias_ptr is not None:
        r = tl.arange(0, ROWS)
        row = _row(n0, r, N, ROWS, GATE)
        for j in tl.static_range(TOP_K):
            of_bias = _slots(ids_ptr, item, j * n_chunks + r * 0, M, E, n_chunks, TOP_K)
            # a Linear's bias is that of every item
            at = row if ids_ptr is None else of_bias[2] * N + row
            bias = tl.load(bias_ptr + at, mask=of_bias[3], other=0.0).to(tl.float32)
            if weight_ptr is not None:
                bias *= tl.load(weight_ptr + item * TOP_K + j).to(tl.float32)
            y += bias
    if GATE == "none":
        y = activate(y, ACT)
    else:
        gate, up = y.reshape(2, OUT).trans(1, 0).split()
        y = gated(gate, up, ACT)
    tl.store(y_ptr + item * n_out + n, y.to(y_ptr.dtype.element_ty))


# of a thread that loads weights ahead: the assembler takes up to 168 where it may; more kinds of
# operands than one scale a thread would spill
MAX_REGISTERS = 128

_launch_gemv = Launcher(_gemv_kernel)


def aligned_pairs(x: Tensor) -> Tensor:
    """x [rows, K], K even and contiguous, or a copy whose pairs of numbers are 4-byte aligned."""
    if x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def gemv(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: GemvPlan,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    x_div: int = 1,
    gate: str = "none",
    act: str = "none",
) -> Callable | None:
    """Fill y [items, N], or [items, N / 2] with a gate, from contiguous COALESCED W [E, N, *].

    Without ids, x [E * M, K] and item e * M + m takes W[e]; qdata may be [N, *], and bias is [N].

    Args:
        x: [items * top_k / x_div, K], bf16 or fp16: K and the distance of rows even, K contiguous.
        ids: [items, top_k], contiguous; weight: the same shape, or None for ones; bias: [E, N].
        gate: "none", "halves" (gate rows, then up rows) or "interleaved" (gate, up, gate, ..).
        act: as kernels/gate.py names them.

    Returns what does so for x .. y alike (launcher.py), if anything.
    """
    items = y.shape[0]
    top_k = 1 if ids is None else ids.shape[1]
    n, n_groups = scale.shape[-2:]
    n_experts = scale.shape[0] if scale.ndim == 3 else 1
    rows = plan.rows if gate == "none" else plan.rows // 2
    assert y.shape[1] >= rows, "the last program is a whole one"
    if items == 0:
        return None
    coarse = n_groups == 1 or group_size >= 128
    capped = plan.ahead and coarse and zero_point is None
    again = _launch_gemv.again(
        (items * -(-y.shape[1] // rows),),
        x,
        ids,
        weight,
        qdata.view(torch.int32),
        scale,
        zero_point,
        bias,
        y,
        items,
        items // n_experts,
        n,
        x.shape[1],
        n_experts,
        qdata.shape[-1] // 8,
        n_groups,
        x.stride(0),
        X_DIV=x_div,
        TOP_K=top_k,
        GROUP=0 if n_groups == 1 else group_size,
        WHOLE_BLOCKS=x.shape[1] % 128 == 0,
        ROWS=plan.rows,
        THREADS=32 * plan.num_warps,
        AHEAD=plan.ahead,
        GATE=gate,
        ACT=act,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.num_warps,
        num_stages=1,
        **({"launch_pdl": True} if plan.pdl != "none" else {}),
        **({"maxnreg": MAX_REGISTERS} if capped else {}),
    )
    # of tensors only the addresses are read: qdata need not be words
    return again and (lambda x, *rest: again(x, None, None, *rest))
