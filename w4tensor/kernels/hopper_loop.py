"""The loop of Hopper's kernels, in Gluon: rows of dequant(W) times x, summed over steps of 128 k.

What plain Triton does not say: the matrix unit works on one half of a step while the other half is
being unpacked, so that it need not wait, nor need the unpacking.

    unpack     | (j, k 64..127)  | (j + 1, k 0..63) | (j + 1, k 64..127) | ...
    multiply   | (j, k 0..63)    | (j, k 64..127)   | (j + 1, k 0..63)   | ...

PIPELINED tiles do so. It takes the registers of two halves; without, more programs share a
multiprocessor, and one unpacks while another multiplies. That is faster where loops are short or
scales are fine, and tiles are many.

Weights go from shared memory through registers to the matrix unit (wgmma's register operand); x and
words come by the tensor memory accelerator, STAGES steps ahead.

With a GATE, gate and up rows of the same outputs are eight and eight in turn (hopper_memory.py), so
that one thread has both sums of an output.

This was written and run with Triton 3.6, and lowers alike with 3.7, 3.8 and 3.9; but with 3.9 the
assembler makes the tile of 96 tokens and 128 rows wait for each multiplication (C7511).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from w4tensor.kernels.hopper_memory import barrier, fetch_words
from w4tensor.kernels.hopper_operand import (
    BF16_UNIT,
    fetch_factors,
    halves,
    load_words,
    operand,
    prepare,
)
from w4tensor.kernels.hopper_ring import expect, fetch_first, fetch_x, open_ring, x_at
from w4tensor.kernels.unpack import FP16_LIFT


@gluon.constexpr_function
def layout_of_sums(warps, columns, dtype):
    """Of what accumulate() returns for x of so many columns."""
    if dtype == gl.int8:
        # of more columns Triton knows no instruction
        return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, min(columns, 128), 32])
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.jit
def _either(which, one, other):
    """One of two tiles, as add_steps() has them."""
    x_row = ()
    for i in gl.static_range(len(one[0])):
        x_row += (gl.where(which, one[0][i], other[0][i]),)
    out = (x_row,)
    for i in gl.static_range(1, len(one)):
        out += (gl.where(which, one[i], other[i]),)
    return out


@gluon.jit
def _multiply(z, ring, stage, HALF: gl.constexpr, acc, CHOICE: gl.constexpr):
    """Start acc += weights z [BN, 64] times k 64 * HALF .. of every part of x [BM, 128]."""
    FIRST: gl.constexpr = 0 if CHOICE is None else CHOICE
    first = x_at(ring, FIRST, stage).slice(HALF * 64, 64, 1).permute((1, 0))
    sums = warpgroup_mma(z, first, acc[0], is_async=True)
    if len(acc) == 1:
        return (sums,)
    else:
        second = x_at(ring, 1, stage).slice(HALF * 64, 64, 1).permute((1, 0))
        return sums, warpgroup_mma(z, second, acc[1], is_async=True)


@gluon.jit
def _wait(acc, z, ALL_BUT: gl.constexpr):
    """Until no more than ALL_BUT multiplications are under way, of which one reads z."""
    if z.dtype == gl.int8:
        # Triton keeps no bytes for a wait; that registers are read until then is ptxas's to know
        if len(acc) == 1:
            return (warpgroup_mma_wait(ALL_BUT, deps=[acc[0]]),), z
        else:
            first, second = warpgroup_mma_wait(2 * ALL_BUT, deps=[acc[0], acc[1]])
            return (first, second), z
    elif len(acc) == 1:
        sums, z = warpgroup_mma_wait(ALL_BUT, deps=[acc[0], z])
        return (sums,), z
    else:
        first, second, z = warpgroup_mma_wait(2 * ALL_BUT, deps=[acc[0], acc[1], z])
        return (first, second), z


@gluon.jit
def _settle(acc, z, newest, PIPELINED: gl.constexpr):
    """Until the multiplication that reads z is done, and if not PIPELINED the newest as well."""
    if PIPELINED:
        acc, z = _wait(acc, z, 1)
    else:
        acc, newest = _wait(acc, newest, 0)
    return acc, z, newest


@gluon.jit
def add_steps(
    ring,
    x_desc,
    w_desc,
    at,
    row,
    scale_ptr,
    zero_ptr,
    # of step `begin`
    factors,
    n_groups,
    begin,
    end,
    steps,
    # where in the ring that step is, and how often the ring came around, modulo 2
    stage,
    phase,
    # tile and first step of what is to be fetched after step end - 1, if anything; or None
    next_at,
    next_begin,
    has_next,
    # whether the stage before `stage` is free only when what is stored through it has been read
    stores,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    # groups of a row that are loaded at a time (groups.py)
    TOGETHER: gl.constexpr,
    # whether W is in this format, or in COALESCED
    ACT_QUANT: gl.constexpr,
    GATE: gl.constexpr,
    WARPS: gl.constexpr,
    PIPELINED: gl.constexpr,
    # which of the ring's choices the tile is; None if it has none
    CHOICE: gl.constexpr = None,
):
    """Sums fp32 [BN, BM] over steps begin .. end - 1 of `steps`; stage and phase of the last one.

    The ring has the first steps, at least one, as fetch_first() or a call before this left them. At
    the end it has the first steps of what is next, in all stages but the last one, which is free;
    that takes as many steps as there are stages.

    x_desc, at: as hopper_ring.py has them; one or two sums, as there are runs of tokens. row [BN]:
    of the scales and zero points, for each row of the operand.
    """
    xs, ws, full = ring
    STAGES: gl.constexpr = ws.shape[0]
    BLOCK_N: gl.constexpr = ws.shape[1]
    DTYPE: gl.constexpr = x_desc[0].dtype
    # an fp32 x is bf16 here, beside scales that are not
    BF16: gl.constexpr = DTYPE == gl.bfloat16 and scale_ptr.dtype.element_ty == gl.bfloat16
    FAST: gl.constexpr = BF16 and zero_ptr is None
    BLOCK_M: gl.constexpr = xs[0 if CHOICE is None else CHOICE].shape[1]
    ACC: gl.constexpr = layout_of_sums(WARPS, BLOCK_M, DTYPE)
    SUM: gl.constexpr = gl.int32 if DTYPE == gl.int8 else gl.float32
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if DTYPE == gl.int8 else 2)
    acc = (gl.zeros([BLOCK_N, BLOCK_M], SUM, ACC),)
    if len(xs) == 2 and CHOICE is None:
        MORE: gl.constexpr = xs[1].shape[1]
        acc += (gl.zeros([BLOCK_N, MORE], SUM, layout_of_sums(WARPS, MORE, DTYPE)),)
    mbarrier.wait(full.index(stage), phase)
    words = load_words(ws.index(stage), WARPS, GATE, DTYPE)
    words_a, words_b = halves(words, DTYPE)
    terms_a, terms_b = prepare(factors, words, DTYPE, FAST)
    following = gl.minimum(begin + 1, steps - 1)
    factors = fetch_factors(
        scale_ptr, zero_ptr, row, following, n_groups, GROUP, TOGETHER, ACT_QUANT, WARPS, DTYPE
    )
    z_a = operand(words_a, terms_a, DTYPE, FAST, ACT_QUANT, OPERAND)
    acc = _multiply(z_a, ring, stage, 0, acc, CHOICE)
    if has_next is not None:
        if stores:
            tma.store_wait(0)
            barrier()
            before = gl.where(stage == 0, STAGES - 1, stage - 1)
            last = begin + STAGES - 1
            expect(ring, before, at, True)
            fetch_words(w_desc, ws, full, before, at[1], at[2], last, True, GATE)
            fetch_x(x_desc, ring, before, at, last, True)
    acc, z_a = _wait(acc, z_a, 1 if PIPELINED else 0)
    for step in range(begin + 1, end):
        z_b = operand(words_b, terms_b, DTYPE, FAST, ACT_QUANT, OPERAND)
        acc = _multiply(z_b, ring, stage, 1, acc, CHOICE)
        done = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        mbarrier.wait(full.index(stage), phase)
        words = load_words(ws.index(stage), WARPS, GATE, DTYPE)
        acc, z_a, z_b = _settle(acc, z_a, z_b, PIPELINED)
        words_a, words_b = halves(words, DTYPE)
        terms_a, terms_b = prepare(factors, words, DTYPE, FAST)
        # of the step after this one
        following = gl.minimum(step + 1, steps - 1)
        factors = fetch_factors(
            scale_ptr, zero_ptr, row, following, n_groups, GROUP, TOGETHER, ACT_QUANT, WARPS, DTYPE
        )
        z_a = operand(words_a, terms_a, DTYPE, FAST, ACT_QUANT, OPERAND)
        acc = _multiply(z_a, ring, stage, 0, acc, CHOICE)
        acc, z_b, z_a = _settle(acc, z_b, z_a, PIPELINED)
        barrier()
        ahead = step - 1 + STAGES
        ok = ahead < end
        fetched = at
        if has_next is not None:
            fetched = _either(ok, at, next_at)
            ahead = gl.where(ok, ahead, next_begin + ahead - end)
            ok = ok | has_next
        expect(ring, done, fetched, ok)
        fetch_words(w_desc, ws, full, done, fetched[1], fetched[2], ahead, ok, GATE)
        fetch_x(x_desc, ring, done, fetched, ahead, ok)
    z_b = operand(words_b, terms_b, DTYPE, FAST, ACT_QUANT, OPERAND)
    acc = _multiply(z_b, ring, stage, 1, acc, CHOICE)
    acc, z_a = _wait(acc, z_a, 0)
    acc, z_b = _wait(acc, z_b, 0)
    if FAST:
        UNIT: gl.constexpr = BF16_UNIT
    elif DTYPE == gl.float16:
        UNIT: gl.constexpr = 1.0 / FP16_LIFT
    else:
        UNIT: gl.constexpr = 1.0
    sums = (acc[0].to(gl.float32) * UNIT,)
    if len(acc) == 2:
        sums += (acc[1].to(gl.float32) * UNIT,)
    return sums, stage, phase


@gluon.jit
def accumulate(
    x_desc,
    w_desc,
    at,
    row,
    scale_ptr,
    zero_ptr,
    n_groups,
    begin,
    end,
    steps,
    BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    GATE: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    PIPELINED: gl.constexpr,
    # whether to ask for the first step's scales before x
    SCALES_FIRST: gl.constexpr,
):
    """Sums of the only steps of a program, as add_steps() has them; and memory of x."""
    ring = open_ring(x_desc, w_desc, BLOCK_N, STAGES)
    factors = fetch_first(
        ring,
        x_desc,
        w_desc,
        at,
        row,
        scale_ptr,
        zero_ptr,
        n_groups,
        begin,
        end,
        GROUP,
        TOGETHER,
        ACT_QUANT,
        GATE,
        WARPS,
        PDL,
        SCALES_FIRST,
    )
    acc, _, _ = add_steps(
        ring,
        x_desc,
        w_desc,
        at,
        row,
        scale_ptr,
        zero_ptr,
        factors,
        n_groups,
        begin,
        end,
        steps,
        gl.to_tensor(0),
        gl.to_tensor(0),
        None,
        None,
        None,
        None,
        GROUP,
        TOGETHER,
        ACT_QUANT,
        GATE,
        WARPS,
        PIPELINED,
    )
    return acc, ring[0]
