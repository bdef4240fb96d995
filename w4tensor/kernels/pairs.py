"""Few tokens: rows of y from rows of x and the experts chosen for each, without a sort.

    y[i] = f(sum over j < TOP_K of weight[i, j] * (W[e] @ x[(i * TOP_K + j) // X_DIV] + bias[e]))
           e = ids[i, j]

Three products of one form:
    first    x [T, H]         -> h [T * top_k, I]   TOP_K 1, X_DIV top_k, f = act(gate) * up
    second   h [T * top_k, I] -> y [T, H]           TOP_K top_k, X_DIV 1, weighted sum over slots
    gather   x [S, K]         -> y [S, N]           TOP_K 1, X_DIV 1: W[ids] @ x, W not copied

A program makes 16 * TILES rows of W for one i. Its C = SLOTS * SLICES warps share out slots and K:
warp slot * SLICES + slice takes one expert and BLOCKS blocks of 128 k of each step,

    K   | slice 0: BLOCKS x 128 | slice 1 | .. | slice 0, next step | ..

and one dot has a batch (block, group, warp) of [16 * TILES, GROUP] x [GROUP, 8 columns], one of
which is x. Words go from memory straight into the registers of the matrix unit: the load's shape
[4, 8, C, 2, TILES, BLOCKS, 4] is the operand's own order of lanes, warps and registers. All loads
of a step are in flight at once; where one step is all of K, all of the program's are.

W may be in either format: the ACT_QUANT one is read with 16-bit activations too, as the int8 unit
would gain nothing for so few tokens. Groups of 128 k or more leave the order of k within a block
free: then x comes in word order, and words are loaded four at a time as COALESCED ones are.

Ids outside 0..E-1 are expert-parallel sentinels: they load no weights and add nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.act_quant_words import EIGHTS, unpackable
from w4tensor.kernels.gate import activate, gated
from w4tensor.kernels.groups import groups_of
from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import CODE_UNIT, SYMMETRIC_ZERO_POINT, join8, unpack, use_asm
from w4tensor.layout import ACT_QUANT

if TYPE_CHECKING:
    from w4tensor.plans_experts import PairsPlan

# the columns of the smallest matrix instruction
COLUMNS = tl.constexpr(8)


@triton.jit
def _rows(pid, tile, half, lane, N, TILES: tl.constexpr, GATE: tl.constexpr):
    """Row of W, kept inside N. With a gate, half 0 of a register tile is gate rows, half 1 up."""
    if GATE == "none":
        return tl.minimum((pid * TILES + tile) * 16 + half * 8 + lane, N - 1)
    else:
        n = tl.minimum((pid * TILES + tile) * 8 + lane, N // 2 - 1)
        if GATE == "halves":
            return n + half * (N // 2)
        else:
            return 2 * n + half


@triton.jit
def _slot(j0, c, SLOTS: tl.constexpr, SLICES: tl.constexpr):
    """The slot of warp c: a scalar where all warps share it, so that addresses stay scalar too."""
    if SLOTS == 1:
        return j0
    else:
        return j0 + c // SLICES


@triton.jit
def _expert(ids_ptr, item, slot, E, TOP_K: tl.constexpr):
    """The expert in a slot (0 if there is none), and whether there is one."""
    e = tl.load(ids_ptr + item * TOP_K + slot, mask=slot < TOP_K, other=-1)
    ok = (e >= 0) & (e < E)
    return tl.where(ok, e, 0).to(tl.int64), ok


@triton.jit
def _multiply(
    words,
    x,
    scale,
    shift,
    ACT_QUANT: tl.constexpr,
    KWIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One step of every warp: fp32 [C, TILES * 16, COLUMNS].

    words [4, 8, C, 2, TILES, BLOCKS, 4], x [BLOCKS * PARTS * C, COLUMNS, 128 / PARTS], scale and
    shift [4, 8, C, 2, TILES, BLOCKS * PARTS]: w = CODE_UNIT * (q - 8) * scale + shift.
    """
    C: tl.constexpr = words.shape[2]
    TILES: tl.constexpr = words.shape[4]
    BLOCKS: tl.constexpr = words.shape[5]
    GROUPS: tl.constexpr = BLOCKS * PARTS
    GROUP: tl.constexpr = 128 // PARTS
    # x in word order: words are those of COALESCED, but for the signs of their nibbles
    NATURAL: tl.constexpr = ACT_QUANT and PARTS > 1
    if NATURAL:
        words = unpackable(words, ASM)
    elif ACT_QUANT:
        words = words ^ EIGHTS
    e0, e1, e2, e3, e4, e5, e6, e7 = unpack(words, x.dtype, ASM)
    z = join8(e0, e1, e2, e3, e4, e5, e6, e7)
    # [t, lane, C, half, tile, block, i, a, b, c]
    if NATURAL:
        # nibble 4r + 2p + q' of word t of slice i now holds k = 32i + 16q' + 4t + 2p + r
        z = z.trans(0, 1, 2, 3, 4, 5, 6, 8, 7, 9)
    z = z.reshape(4, 8, C, 2, TILES, BLOCKS, PARTS, 8 // PARTS, 2, 2)
    # -> [(block, group, C), (tile, half, lane), k]: the unit's order of k is (b, t, c) or (t, b, c)
    if KWIDTH == 2:
        z = z.trans(5, 6, 2, 4, 3, 1, 7, 8, 0, 9)
    else:
        z = z.trans(5, 6, 2, 4, 3, 1, 7, 0, 8, 9)
    z = z.reshape(GROUPS * C, TILES * 16, GROUP)
    # where the words are made for the other order, x changes too
    if NATURAL and KWIDTH == 2:
        x = x.reshape(GROUPS * C, COLUMNS, 8 // PARTS, 4, 2, 2).trans(0, 1, 2, 4, 3, 5)
    elif KWIDTH == 4 and not NATURAL:
        x = x.reshape(GROUPS * C, COLUMNS, 8 // PARTS, 2, 4, 2).trans(0, 1, 2, 4, 3, 5)
    xt = x.reshape(GROUPS * C, COLUMNS, GROUP).trans(0, 2, 1)
    # columns as four lanes of two, which is where the matrix unit leaves them and scales stand
    d = tl.dot(z, xt).reshape(GROUPS, C, TILES, 2, 8, 4, 2)
    d *= scale.trans(5, 2, 4, 3, 1, 0)[:, :, :, :, :, :, None]
    if shift is not None:
        # a product with ones leaves sum(x) where d stands; joined as z is, they share x's registers
        half = tl.full((GROUPS * C, TILES * 16, GROUP // 2), 1.0, x.dtype)
        ones = tl.join(half, half).reshape(GROUPS * C, TILES * 16, GROUP)
        sums = tl.dot(ones, xt).reshape(GROUPS, C, TILES, 2, 8, 4, 2)
        d += sums * shift.trans(5, 2, 4, 3, 1, 0)[:, :, :, :, :, :, None]
    return tl.sum(d, 0).reshape(C, TILES * 16, COLUMNS)


@triton.jit
def _pairs_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    E,
    n_vectors,
    stride_x,
    stride_we,
    stride_wn,
    stride_se,
    stride_sv,
    X_DIV: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    SLICES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS_A_GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    ACT_QUANT: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    KWIDTH: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    C: tl.constexpr = SLOTS * SLICES
    GROUPS: tl.constexpr = BLOCKS * PARTS
    GROUP: tl.constexpr = 128 // PARTS
    if PDL == "first":
        # routing may still be on its way; once it is here, the second product may begin to load
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # neighbours in the grid share rows of W: pairs of one expert find them in L2
    item = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1)
    n_blocks = tl.cdiv(K, 128)

    # [4 t, 8 lane rows, C warps, 2 halves, TILES, BLOCKS, 4 i]
    wc = tl.arange(0, C)[None, None, :, None, None, None, None]
    w_rows = _rows(
        pid_n,
        tl.arange(0, TILES)[None, None, None, None, :, None, None],
        tl.arange(0, 2)[None, None, None, :, None, None, None],
        tl.arange(0, 8)[None, :, None, None, None, None, None],
        N,
        TILES,
        GATE,
    )
    w_block = (wc % SLICES) * BLOCKS + tl.arange(0, BLOCKS)[None, None, None, None, None, :, None]
    w_ptrs = w_ptr + w_rows.to(tl.int64) * stride_wn
    t = tl.arange(0, 4)[:, None, None, None, None, None, None]
    i = tl.arange(0, 4)[None, None, None, None, None, None, :]
    if ACT_QUANT and PARTS > 1:
        # the clamp does nothing but keep the load from giving four words to one lane
        w_ptrs += tl.minimum(t, n_blocks * 16) + i * 4
    else:
        w_ptrs += t * 4 + i

    # [4 lanes with the same row, 8, C, 2, TILES, GROUPS / VECTOR, VECTOR]
    sc = tl.arange(0, C)[None, None, :, None, None, None, None]
    s_rows = _rows(
        pid_n,
        tl.arange(0, TILES)[None, None, None, None, :, None, None],
        tl.arange(0, 2)[None, None, None, :, None, None, None],
        tl.arange(0, 8)[None, :, None, None, None, None, None],
        N,
        TILES,
        GATE,
    )
    s_rows += tl.zeros((4, 1, 1, 1, 1, 1, 1), tl.int32)
    s_block = (sc % SLICES) * BLOCKS
    run = tl.arange(0, GROUPS // VECTOR)[None, None, None, None, None, :, None]
    in_vector = tl.arange(0, VECTOR)[None, None, None, None, None, None, :]

    # [(block, group, C), COLUMNS, GROUP]
    xb = tl.arange(0, GROUPS * C)[:, None, None]
    column = tl.arange(0, COLUMNS)[None, :, None]
    x_k = ((xb % SLICES) * BLOCKS + xb // (PARTS * C)) * 128 + xb // C % PARTS * GROUP
    x_k += tl.arange(0, GROUP)[None, None, :]

    acc = tl.zeros((C, TILES * 16, COLUMNS), tl.float32)
    for j0 in tl.static_range(0, TOP_K, SLOTS):
        w_expert, w_ok = _expert(ids_ptr, item, _slot(j0, wc, SLOTS, SLICES), E, TOP_K)
        s_expert, s_ok = _expert(ids_ptr, item, _slot(j0, sc, SLOTS, SLICES), E, TOP_K)
        x_slot = _slot(j0, xb % C, SLOTS, SLICES)
        _, x_ok = _expert(ids_ptr, item, x_slot, E, TOP_K)
        x_ok = x_ok & (column == 0)
        x_ptrs = x_ptr + (item * TOP_K + x_slot) // X_DIV * stride_x
        e_ptrs = w_ptrs + w_expert * stride_we
        s_at = s_expert * stride_se + s_rows * (stride_sv * VECTOR) + in_vector

        part = tl.zeros((C, TILES * 16, COLUMNS), tl.float32)
        for block0 in tl.range(0, n_blocks, SLICES * BLOCKS, num_stages=1):
            words = tl.load(e_ptrs + tl.minimum(block0 + w_block, n_blocks - 1) * 16, mask=w_ok)
            if BLOCKS_A_GROUP == 1:
                vector = (block0 + s_block) * PARTS // VECTOR + run
            else:
                vector = (block0 + s_block + run) // BLOCKS_A_GROUP
            # the clamp also keeps the load from taking runs for one contiguous dimension
            at = s_at + tl.minimum(vector, n_vectors - 1) * VECTOR
            scale = tl.load(scale_ptr + at, mask=s_ok, other=0.0).to(tl.float32)
            scale = scale.reshape(4, 8, C, 2, TILES, GROUPS)
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + at, mask=s_ok, other=0.0).to(tl.float32)
                zero = zero.reshape(4, 8, C, 2, TILES, GROUPS)
                shift = (zero - SYMMETRIC_ZERO_POINT) * -scale
            else:
                shift = None
            if PDL == "second":
                # what was loaded so far depends on weights and routing, not on the first product
                tl.extra.cuda.gdc_wait()
            k = block0 * 128 + x_k
            x = tl.load(x_ptrs + k, mask=x_ok & (k < K), other=0.0)
            factor = scale / CODE_UNIT
            part += _multiply(words, x, factor, shift, ACT_QUANT, KWIDTH, PARTS, ASM)

        # [C, 16 * TILES]
        c = tl.arange(0, C)[:, None]
        slot = _slot(j0, c, SLOTS, SLICES)
        if bias_ptr is not None:
            expert, ok = _expert(ids_ptr, item, slot, E, TOP_K)
            row = tl.arange(0, TILES * 16)[None, :]
            n = _rows(pid_n, row // 16, row // 8 % 2, row % 8, N, TILES, GATE)
            bias = tl.load(bias_ptr + expert * N + n, mask=ok & (c % SLICES == 0), other=0.0)
            part += bias.to(tl.float32)[:, :, None]
        if weight_ptr is not None:
            pair = item * TOP_K + slot
            weight = tl.load(weight_ptr + pair, mask=slot < TOP_K, other=0.0).to(tl.float32)
            part *= weight[:, :, None]
        acc += part

    y = tl.sum(acc, 0)
    if GATE == "none":
        y = activate(y, ACT)
        ROWS: tl.constexpr = TILES * 16
        n_out = N
    else:
        gate, up = y.reshape(TILES, 2, 8, COLUMNS).trans(0, 2, 3, 1).split()
        ROWS: tl.constexpr = TILES * 8
        y = gated(gate, up, ACT).reshape(ROWS, COLUMNS)
        n_out = N // 2
    n = pid_n * ROWS + tl.arange(0, ROWS)[:, None]
    m = tl.arange(0, COLUMNS)[None, :]
    y_ptrs = y_ptr + item * n_out + n + m * 0
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(n < n_out) & (m == 0))


_launch_pairs = Launcher(_pairs_kernel)


def takes_word_order(qdata: Tensor, group_size: int) -> bool:
    """Whether multiply_pairs takes x in word order (kernels/unpack_act_quant.py)."""
    return qdata.dtype == ACT_QUANT.qdata_dtype and group_size not in (16, 32, 64)


def multiply_pairs(
    x: Tensor,
    ids: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: PairsPlan,
    *,
    weight: Tensor | None = None,
    x_div: int = 1,
    gate: str = "none",
    act: str = "none",
) -> Tensor:
    """Fill y [items, N], or [items, N / 2] with a gate, from x [items * top_k / x_div, K].

    Args:
        x: [.., padded_k(K)] in word order where takes_word_order() says so.
        ids: [items, top_k], contiguous; weight: the same shape, or None for ones.
        qdata: COALESCED or ACT_QUANT [E, N, *]; bias: [E, N].
        gate: "none", "halves" (gate rows, then up rows) or "interleaved" (gate, up, gate, ..).
        act: as kernels/gate.py names them.
    """
    items, top_k = ids.shape
    n_experts, n = qdata.shape[:2]
    if items == 0:
        return y
    words = qdata.view(torch.int32)
    groups = groups_of(scale, zero_point, group_size, plan.blocks)
    n_out = n if gate == "none" else n // 2
    rows = plan.tiles * (16 if gate == "none" else 8)
    _launch_pairs(
        (items, -(-n_out // rows)),
        x,
        ids,
        weight,
        words,
        scale,
        zero_point,
        bias,
        y,
        n,
        x.shape[1],
        n_experts,
        groups.n_vectors,
        x.stride(0),
        words.stride(0),
        words.stride(1),
        scale.stride(0),
        groups.stride,
        X_DIV=x_div,
        TOP_K=top_k,
        SLOTS=plan.slots,
        SLICES=plan.slices,
        TILES=plan.tiles,
        BLOCKS=plan.blocks,
        PARTS=groups.parts,
        BLOCKS_A_GROUP=groups.blocks_a_group,
        VECTOR=groups.vector,
        ACT_QUANT=qdata.dtype == ACT_QUANT.qdata_dtype,
        GATE=gate,
        ACT=act,
        KWIDTH=plan.kwidth,
        PDL=plan.pdl,
        ASM=use_asm(),
        num_warps=plan.slots * plan.slices,
        num_stages=1,
        **({"launch_pdl": True} if plan.pdl != "none" else {}),
    )
    return y
