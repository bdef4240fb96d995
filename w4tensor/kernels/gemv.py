"""y[i] = f(sum over j < TOP_K of weight[i, j] * (W[e] @ x[..] + bias[e])): one row of x at a time.

Weights times activations by integer dot products (dp4a), without the matrix unit:

                 thread 0         thread 1         a thread has chunks of 16 bytes, which hold 32 k,
    row n      | chunk 0: 32 k  | chunk 1       |  of ROWS rows in turn; a program's threads share
    row n + 1  | chunk 0        | chunk 1       |  K

All rows of a step are in flight at once, 512 contiguous bytes of each for a warp. Slots of a token
follow one another along K, as one long row.

Each thread makes integers of its part of x, with a scale of their own:

    COALESCED   two planes of bytes for each slot and 128 k (planes.py, gemv_coalesced.py)
    ACT_QUANT   int8 codes for each activation group of 32, 64 or 128 k (codes.py,
                gemv_act_quant.py), as the definition of the type has them

A row with an Inf or NaN among its x gives NaN. Sums are integers over a part of k that has one
scale of either kind, then fp32, over threads in a fixed tree: two runs give the same bits.

    linear    x [E * M, K] -> y [E * M, N]               item e * M + m with W[e]
    first     x [T, H]     -> h [T * top_k, I]           TOP_K 1, X_DIV top_k, f = act(gate) * up
    second    h [T * top_k, I] -> y [T, H]               TOP_K top_k, weighted sum over slots
    gather    x [S, K]     -> y [S, N]                   TOP_K 1: W[ids] @ x, W not copied

Ids outside 0..E-1 are expert-parallel sentinels: they load no weights and add nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from w4tensor.kernels.codes import as_codes, load_slices
from w4tensor.kernels.gate import activate, gated
from w4tensor.kernels.gemv_act_quant import scales_of_slices, step_of_slices
from w4tensor.kernels.gemv_coalesced import UNIT, groups, load_pairs, step, sums_of_words
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.planes import as_planes
from w4tensor.kernels.unpack import use_asm

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_gemv import GemvPlan


@triton.jit
def _scales(
    ptr,
    row,
    chunk,
    ok,
    n_groups,
    K,
    GROUP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ACT_QUANT: tl.constexpr,
):
    if ACT_QUANT:
        return scales_of_slices(ptr, row, chunk, ok, n_groups, K, GROUP, WHOLE_BLOCKS)
    else:
        return groups(ptr, row, chunk, ok, n_groups, GROUP, WHOLE_BLOCKS)


@triton.jit
def _load_rows(
    # words, scales and zero points, these maybe None
    w,
    rows,
    expert,
    chunk,
    ok,
    N,
    K,
    n_chunks,
    n_groups,
    GROUP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ACT_QUANT: tl.constexpr,
):
    """Words, scales and zero points of chunks of each row; all in flight at once."""
    w_ptr, scale_ptr, zero_ptr = w
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
    for r in tl.static_range(len(rows)):
        at = (w_ptr + (rows[r] * n_chunks + chunk) * 4)[:, None] + tl.arange(0, 4)[None, :]
        words += (tl.load(at, mask=ok[:, None], other=0, eviction_policy="evict_first"),)
    for r in tl.static_range(len(rows)):
        scale = _scales(scale_ptr, rows[r], chunk, ok, n_groups, K, GROUP, WHOLE_BLOCKS, ACT_QUANT)
        scales += (scale,)
    if zero_ptr is not None:
        zero_ptr += first_group
        for r in tl.static_range(len(rows)):
            zero = _scales(
                zero_ptr, rows[r], chunk, ok, n_groups, K, GROUP, WHOLE_BLOCKS, ACT_QUANT
            )
            zeros += (zero,)
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


# one binary for weights of every size
@triton.jit(do_not_specialize=["items", "M", "N", "K", "E", "n_chunks", "n_groups", "stride_x"])
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
    # of activations, of an ACT_QUANT W; None of a COALESCED one
    ACT_GROUP: tl.constexpr,
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
    ACT_QUANT: tl.constexpr = ACT_GROUP is not None
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
    if ACT_QUANT:
        # rows begin at multiples of 16 bytes; tl.multiple_of() of an argument is lost
        NUMBERS: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        stride_x = stride_x // NUMBERS * NUMBERS
    x_ptr += item * TOP_K // X_DIV * stride_x
    total = TOP_K * n_chunks
    w = w_ptr, scale_ptr, zero_ptr

    thread = tl.arange(0, THREADS)
    slot, chunk, expert, ok = _slots(ids_ptr, item, thread, M, E, n_chunks, TOP_K)
    # weights are nobody's output
    words, scales, zeros = _load_rows(
        w, rows, expert, chunk, ok, N, K, n_chunks, n_groups, GROUP, WHOLE_BLOCKS, ACT_QUANT
    )
    if PDL == "second":
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    accs = (tl.zeros([THREADS], tl.float32),) * ROWS
    for first in tl.range(0, total, THREADS, num_stages=1):
        if ACT_QUANT:
            x = load_slices(x_ptr, stride_x, slot, chunk, ok, K, WHOLE_BLOCKS)
        else:
            at = first + tl.arange(0, 16 * THREADS) % THREADS
            x_slot, x_chunk, _, x_ok = _slots(ids_ptr, item, at, M, E, n_chunks, TOP_K)
            x = load_pairs(x_ptr, stride_x, x_slot, x_chunk, x_ok, K, THREADS, WHOLE_BLOCKS)
        following = first + THREADS + thread
        next_slot, chunk, expert, ok = _slots(ids_ptr, item, following, M, E, n_chunks, TOP_K)
        if AHEAD:
            next_words, next_scales, next_zeros = _load_rows(
                w, rows, expert, chunk, ok, N, K, n_chunks, n_groups, GROUP, WHOLE_BLOCKS, ACT_QUANT
            )
        if ACT_QUANT:
            codes, first_sum, second_sum, unit = as_codes(x, DTYPE, ACT_GROUP, ASM)
        else:
            planes, unit = as_planes(x, DTYPE, ASM)
            x_sums = sums_of_words(planes, ASM)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + item * TOP_K + slot, mask=slot < TOP_K, other=0.0)
            unit *= weight.to(tl.float32)
        updated = ()
        for r in tl.static_range(ROWS):
            zero = zeros[r] if zero_ptr is not None else None
            acc = accs[r]
            if ACT_QUANT:
                acc = step_of_slices(
                    acc, words[r], scales[r], zero, codes, first_sum, second_sum, unit, ASM
                )
            else:
                acc = step(acc, words[r], scales[r], zero, planes, x_sums, unit, FINE, ASM)
            updated += (acc,)
        accs = updated
        if not AHEAD:
            next_words, next_scales, next_zeros = _load_rows(
                w, rows, expert, chunk, ok, N, K, n_chunks, n_groups, GROUP, WHOLE_BLOCKS, ACT_QUANT
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
            _, _, expert, ok = _slots(ids_ptr, item, j * n_chunks + r * 0, M, E, n_chunks, TOP_K)
            # a Linear's bias is that of every item
            at = row if ids_ptr is None else expert * N + row
            bias = tl.load(bias_ptr + at, mask=ok, other=0.0).to(tl.float32)
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
# operands than one scale a thread would spill, as would fp32 numbers and a K with a rest
MAX_REGISTERS = 128

_launch_gemv = Launcher(_gemv_kernel)


def aligned(x: Tensor, size: int = 4) -> Tensor:
    """x [rows, K], contiguous along K, or a copy whose rows begin at multiples of `size` bytes.

    K is a multiple of so many bytes. COALESCED weights take pairs of x, ACT_QUANT 16 bytes.
    """
    if x.stride(0) * x.itemsize % size == 0 and x.data_ptr() % size == 0:
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
    act_group_size: int | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    x_div: int = 1,
    gate: str = "none",
    act: str = "none",
) -> None:
    """Fill y [items, N], or [items, N / 2] with a gate, from contiguous W [E, N, *].

    Without ids, x [E * M, K] and item e * M + m takes W[e]; qdata may be [N, *], and bias is [N].

    Args:
        x: [items * top_k / x_div, K], K contiguous. For COALESCED W bf16 or fp16, K even, rows
            4-byte aligned. For ACT_QUANT W fp32 too, K a multiple of 8 (fp32: of 4), rows 16-byte
            aligned.
        act_group_size: 32, 64 or 128, for ACT_QUANT W; None for COALESCED.
        ids: [items, top_k], contiguous; weight: the same shape, or None for ones; bias: [E, N].
        gate: "none", "halves" (gate rows, then up rows) or "interleaved" (gate, up, gate, ..).
        act: as kernels/gate.py names them.

    """
    items = y.shape[0]
    top_k = 1 if ids is None else ids.shape[1]
    n, n_groups = scale.shape[-2:]
    n_experts = scale.shape[0] if scale.ndim == 3 else 1
    rows = plan.rows if gate == "none" else plan.rows // 2
    assert y.shape[1] >= rows, "the last program is a whole one"
    if items == 0:
        return
    if act_group_size is None:
        few = n_groups == 1 or group_size >= 128
    else:
        few = x.itemsize == 2 and x.shape[1] % 128 == 0
    capped = plan.ahead and few and zero_point is None
    _launch_gemv(
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
        # 16 bytes
        qdata.shape[-1] * qdata.itemsize // 16,
        n_groups,
        x.stride(0),
        X_DIV=x_div,
        TOP_K=top_k,
        GROUP=0 if n_groups == 1 else group_size,
        ACT_GROUP=act_group_size,
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
