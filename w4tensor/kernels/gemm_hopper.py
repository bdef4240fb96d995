"""Y[M, N] = X[M, K] @ dequant(W)[N, K].T on Hopper, in Gluon.

What kernels/gemm.py does, with what plain Triton does not say: the matrix unit works on one half of
a step while the other half is being unpacked, so that it need not wait, nor need the unpacking.

    unpack     | (j, k 64..127)  | (j + 1, k 0..63) | (j + 1, k 64..127) | ...
    multiply   | (j, k 0..63)    | (j, k 64..127)   | (j + 1, k 0..63)   | ...

Weights go from shared memory through registers to the matrix unit (wgmma's register operand); x and
words come by the tensor memory accelerator, STAGES steps of 128 k ahead.

W is in the COALESCED format, or in ACT_QUANT with x in word order (kernels/unpack_act_quant.py):
then word (t, i) of a step is of slice t, not i, and so are its scales; and nibbles are q ^ 8.

K is cut into split_k slices where tiles alone would leave the card idle. Slices store their sums,
and that of the last slice adds them, in order: two runs give the same bits. A stored sum is
announced by a flag that gets this launch's token, so that the flags need no zeros to begin with;
who has seen a flag clears it. Programs wait only for programs that were started before them.

Gluon is young: the kernel was written and run with Triton 3.6, and lowers alike with 3.7, 3.8 and
3.9, which renamed things.

Scales of bf16 weights without zero points must be below 2**30: codes enter the multiplication as
subnormal numbers, whose unit goes into the scale.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from w4tensor.kernels.unpack import FP16_LIFT, join8, unpack_scaled
from w4tensor.layout import ACT_QUANT

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_hopper import HopperPlan

# 3.7 renamed the first, 3.8 the others
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# a word $8, and pairs of scale * 2**97 and scale * -2**-29: (q - 8) * scale * 2**-32, rounded once.
# Each nibble, brought to bits 4..7 of its 16, is the subnormal q * 2**-129.
_UNPACK_TEXT = """{
    .reg .b32 a, b, c, d;
    shl.b32 a, $8, 4;
    shr.u32 c, $8, 4;
    shr.u32 d, $8, 8;
    lop3.b32 a, a, 0x00F000F0, MINUS_8, 0x6A;  // (a & mask) ^ MINUS_8
    lop3.b32 b, $8, 0x00F000F0, MINUS_8, 0x6A;
    lop3.b32 c, c, 0x00F000F0, MINUS_8, 0x6A;
    lop3.b32 d, d, 0x00F000F0, MINUS_8, 0x6A;
    fma.rn.bf16x2 a, a, $9, $10;
    fma.rn.bf16x2 b, b, $9, $10;
    fma.rn.bf16x2 c, c, $9, $10;
    fma.rn.bf16x2 d, d, $9, $10;
    mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
}"""
_UNPACK = gl.constexpr(_UNPACK_TEXT.replace("MINUS_8", "0"))
_UNPACK_MINUS_8 = gl.constexpr(_UNPACK_TEXT.replace("MINUS_8", "0x00800080"))
# 0x88888888: what makes q of the eight q - 8 of a word
_EIGHTS = gl.constexpr(-0x77777778)
_UNPACK_REGISTERS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
_SCALES = gl.constexpr("""{
    .reg .b32 s, up, down;
    mov.b32 s, {$2, $2};
    mov.b32 up, 0x70007000;
    mov.b32 down, 0xB100B100;
    mul.rn.bf16x2 $0, s, up;
    mul.rn.bf16x2 $1, s, down;
}""")
BF16_UNIT = gl.constexpr(2.0**32)


@gluon.constexpr_function
def _layout_of_rows(rows, warps):
    """Words [BN, (t, i)]: lane l of warp w has t = l % 4 of rows 16 w + l / 4 and 8 below."""
    more = [[16 * warps, 0]] if rows > 16 * warps else []
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]] + more,
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 * w, 0] for w in (1, 2, 4) if w < warps],
        block_bases=[],
        shape=[rows, 16],
    )


@gluon.constexpr_function
def _layout_of_words(rows, warps):
    """The same, as [BN, t, i]."""

    def apart(bases):
        return [[n, word // 4, word % 4] for n, word in bases]

    whole = _layout_of_rows(rows, warps)
    return gl.DistributedLinearLayout(
        apart(whole.reg_bases), apart(whole.lane_bases), apart(whole.warp_bases), [], [rows, 4, 4]
    )


@gluon.jit
def _tile(tile, tiles_n, tiles_m, GROUP_N: gl.constexpr):
    """Row and column of a tile: GROUP_N tiles of rows share x while it is in L2."""
    first = tile // (GROUP_N * tiles_m) * GROUP_N
    width = gl.minimum(tiles_n - first, GROUP_N)
    within = tile % (GROUP_N * tiles_m)
    return first + within % width, within // width


@gluon.jit
def _expect(x_desc, w_desc, full, stage, ok):
    """Tell `full` of a stage how many bytes _fetch_words() and _fetch_x() bring."""
    BYTES: gl.constexpr = x_desc.block_shape[0] * 256 + w_desc.block_shape[0] * 64
    mbarrier.expect(full.index(stage), BYTES, pred=ok)


@gluon.jit
def _fetch_words(w_desc, ws, full, stage, n0, step, ok):
    at = [n0, step * 16]
    _load(w_desc, at, full.index(stage), ws.index(stage), pred=ok)


@gluon.jit
def _fetch_x(x_desc, xs, full, stage, m0, step, ok):
    at = [m0, step * 128]
    _load(x_desc, at, full.index(stage), xs.index(stage), pred=ok)


@gluon.jit
def _halves(words):
    """[BN, t, i] -> [R, t, i % 2] of k 0..63 and of k 64..127."""
    BN: gl.constexpr = words.shape[0]
    return words.reshape(BN, 4, 2, 2).permute(0, 1, 3, 2).split()


@gluon.jit
def _groups(
    ptr,
    row,
    step,
    n_groups,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    WHOLE_STEPS: gl.constexpr,
    WORDS: gl.constexpr,
    # of [BN, t, i]: that which groups do not run along
    ACROSS: gl.constexpr,
):
    """Scales or zero points of a step: [BN, 1, 1], or with one of t and i where slices differ."""
    if GROUP == 0 or GROUP >= 128:
        at = row * n_groups if GROUP == 0 else row * n_groups + step // (GROUP // 128)
        return gl.load(ptr + at).expand_dims(1).expand_dims(ACROSS)
    else:
        of_step = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(ACROSS, WORDS)))
        group = (step * (128 // GROUP) + of_step // (GROUP // 32)).expand_dims(0)
        first = (row * n_groups).expand_dims(1)
        if WHOLE_STEPS:
            # one load of four neighbours
            first = gl.multiple_of(first, [128 // GROUP, 128 // GROUP])
        else:
            group = gl.minimum(group, n_groups - 1)
        return gl.load(ptr + (first + group)).expand_dims(ACROSS)


@gluon.jit
def _operand(
    words,
    scale,
    zero,
    DTYPE: gl.constexpr,
    FAST: gl.constexpr,
    ACT_QUANT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Words [BN, t, i] of 64 k, and that half of what _prepare() made -> weights [BN, 64]."""
    BN: gl.constexpr = words.shape[0]
    if FAST:
        e0, e1, e2, e3, e4, e5, e6, e7 = gl.inline_asm_elementwise(
            _UNPACK_MINUS_8 if ACT_QUANT else _UNPACK,
            _UNPACK_REGISTERS,
            [words, scale, zero],
            dtype=(gl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        if ACT_QUANT:
            words = words ^ _EIGHTS
        e0, e1, e2, e3, e4, e5, e6, e7 = unpack_scaled(words, scale, scale, zero, zero, DTYPE, True)
    # [BN, t, i, p, q', r]
    z = join8(e0, e1, e2, e3, e4, e5, e6, e7)
    z = z.permute(0, 2, 3, 4, 1, 5).reshape(BN, 64)
    return gl.convert_layout(z, OPERAND, assert_trivial=True)


@gluon.jit
def _prepare(scale, zero, words, FAST: gl.constexpr):
    """A step's scales and zero points in the shape of its words, as _operand() wants them."""
    if FAST:
        first, second = gl.inline_asm_elementwise(
            _SCALES, "=r,=r,h", [scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        first = first.broadcast_to(words.shape)
        second = second.broadcast_to(words.shape)
    else:
        first = scale.to(gl.float32).broadcast_to(words.shape)
        if zero is None:
            second = gl.full(words.shape, 8.0, gl.float32, words.type.layout)
        else:
            second = zero.to(gl.float32).broadcast_to(words.shape)
    scale_a, scale_b = _halves(first)
    zero_a, zero_b = _halves(second)
    return scale_a, scale_b, zero_a, zero_b


@gluon.jit
def _words(stage, WARPS: gl.constexpr):
    """Words [BN, t, i] of a step."""
    BN: gl.constexpr = stage.shape[0]
    words = stage.load(_layout_of_rows(BN, WARPS)).reshape(BN, 4, 4)
    return gl.convert_layout(words, _layout_of_words(BN, WARPS), assert_trivial=True)


@gluon.jit
def _x_half(stage, HALF: gl.constexpr):
    """k 64 * HALF .. of x [BLOCK_M, 128] -> [64, BLOCK_M]."""
    return stage.slice(HALF * 64, 64, 1).permute((1, 0))


# of an accumulator, that are added at a time: there are no registers for more
_COLUMNS = gl.constexpr(32)


@gluon.jit
def _inside(acc, first, WIDTH: gl.constexpr):
    """Offsets of acc [BN, m], whose columns begin at `first`, in a matrix [BN, WIDTH]."""
    n = gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    m = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    return n.expand_dims(1) * WIDTH + (first + m).expand_dims(0)


@gluon.jit
def _add_parts(acc, ptr, first, parts, WIDTH: gl.constexpr):
    """((part 0 + part 1) + ..) + acc, of as many `parts` [BN, WIDTH] at ptr."""
    if acc.shape[1] > _COLUMNS:
        halved = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1)
        left, right = halved.split()
        left = _add_parts(left, ptr, first, parts, WIDTH)
        right = _add_parts(right, ptr, first + acc.shape[1] // 2, parts, WIDTH)
        out = gl.join(left, right).permute(0, 2, 1).reshape(acc.shape)
        return gl.convert_layout(out, acc.type.layout, assert_trivial=True)
    else:
        at = _inside(acc, first, WIDTH)
        total = gl.load(ptr + at, cache_modifier=".cg")
        for _ in range(1, parts):
            ptr += acc.shape[0] * WIDTH
            total += gl.load(ptr + at, cache_modifier=".cg")
        return total + acc


@gluon.jit(do_not_specialize=["token", "M", "steps", "split_k"])
def _gemm_hopper_kernel(
    x_desc,
    w_desc,
    y_desc,
    y_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    part_ptr,
    flag_ptr,
    token,
    M,
    N,
    steps,
    n_groups,
    split_k,
    GROUP_N: gl.constexpr,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    # whether K is a multiple of a step
    WHOLE_STEPS: gl.constexpr,
    # whether W is in this format, or in COALESCED
    ACT_QUANT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = x_desc.dtype
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    # an fp32 x is bf16 here, beside scales that are not
    BF16: gl.constexpr = DTYPE == gl.bfloat16 and scale_ptr.dtype.element_ty == gl.bfloat16
    FAST: gl.constexpr = BF16 and zero_ptr is None
    WORDS: gl.constexpr = _layout_of_words(BLOCK_N, WARPS)
    ACROSS: gl.constexpr = 2 if ACT_QUANT else 1
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    pid = gl.program_id(0)
    tile = pid // split_k
    k_slice = pid % split_k
    n0, m0 = _tile(tile, gl.cdiv(N, BLOCK_N), gl.cdiv(M, BLOCK_M), GROUP_N)
    n0 *= BLOCK_N
    m0 *= BLOCK_M
    begin = steps * k_slice // split_k
    end = steps * (k_slice + 1) // split_k

    xs = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, 16], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    _barrier()
    for s in gl.static_range(STAGES):
        ok = begin + s < end
        _expect(x_desc, w_desc, full, s, ok)
        _fetch_words(w_desc, ws, full, s, n0, begin + s, ok)
    if PDL:
        # weights are nobody's output; x is that of the kernel before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for s in gl.static_range(STAGES):
        _fetch_x(x_desc, xs, full, s, m0, begin + s, begin + s < end)

    r = gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(ACROSS, WORDS)))
    row = gl.minimum(n0 + r, N - 1)
    scale = _groups(scale_ptr, row, begin, n_groups, GROUP, WHOLE_STEPS, WORDS, ACROSS)
    zero = None
    if zero_ptr is not None:
        zero = _groups(zero_ptr, row, begin, n_groups, GROUP, WHOLE_STEPS, WORDS, ACROSS)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    stage = 0
    phase = 0
    mbarrier.wait(full.index(0), 0)
    words = _words(ws.index(0), WARPS)
    words_a, words_b = _halves(words)
    scale_a, scale_b, zero_a, zero_b = _prepare(scale, zero, words, FAST)
    following = gl.minimum(begin + 1, steps - 1)
    scale = _groups(scale_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS, ACROSS)
    if zero_ptr is not None:
        zero = _groups(zero_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS, ACROSS)
    z_a = _operand(words_a, scale_a, zero_a, DTYPE, FAST, ACT_QUANT, OPERAND)
    acc = warpgroup_mma(z_a, _x_half(xs.index(0), 0), acc, is_async=True)
    acc, z_a = warpgroup_mma_wait(1, deps=[acc, z_a])
    for step in range(begin + 1, end):
        z_b = _operand(words_b, scale_b, zero_b, DTYPE, FAST, ACT_QUANT, OPERAND)
        acc = warpgroup_mma(z_b, _x_half(xs.index(stage), 1), acc, is_async=True)
        done = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        mbarrier.wait(full.index(stage), phase)
        words = _words(ws.index(stage), WARPS)
        acc, z_a = warpgroup_mma_wait(1, deps=[acc, z_a])
        words_a, words_b = _halves(words)
        scale_a, scale_b, zero_a, zero_b = _prepare(scale, zero, words, FAST)
        # of the step after this one
        following = gl.minimum(step + 1, steps - 1)
        scale = _groups(scale_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS, ACROSS)
        if zero_ptr is not None:
            zero = _groups(zero_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS, ACROSS)
        z_a = _operand(words_a, scale_a, zero_a, DTYPE, FAST, ACT_QUANT, OPERAND)
        acc = warpgroup_mma(z_a, _x_half(xs.index(stage), 0), acc, is_async=True)
        acc, z_b = warpgroup_mma_wait(1, deps=[acc, z_b])
        _barrier()
        at = step - 1 + STAGES
        _expect(x_desc, w_desc, full, done, at < end)
        _fetch_words(w_desc, ws, full, done, n0, at, at < end)
        _fetch_x(x_desc, xs, full, done, m0, at, at < end)
    z_b = _operand(words_b, scale_b, zero_b, DTYPE, FAST, ACT_QUANT, OPERAND)
    acc = warpgroup_mma(z_b, _x_half(xs.index(stage), 1), acc, is_async=True)
    acc, z_a, z_b = warpgroup_mma_wait(0, deps=[acc, z_a, z_b])
    if part_ptr is None:
        _finish(acc, bias_ptr, y_desc, y_ptr, xs, n0, m0, M, N, FAST)
    else:
        TILE: gl.constexpr = BLOCK_N * BLOCK_M
        others = split_k - 1
        first = tile * others
        parts = part_ptr + first.to(gl.int64) * TILE
        if k_slice < others:
            gl.store(parts + k_slice * TILE + _inside(acc, 0, BLOCK_M), acc)
            _barrier()
            gl.atomic_xchg(flag_ptr + first + k_slice, token, sem="release")
        else:
            for other in range(others):
                flag = flag_ptr + first + other
                while gl.atomic_add(flag, 0, sem="acquire") != token:
                    pass
                gl.store(flag, 0)
            acc = _add_parts(acc, parts, 0, others, BLOCK_M)
            _finish(acc, bias_ptr, y_desc, y_ptr, xs, n0, m0, M, N, FAST)


@gluon.jit
def _finish(acc, bias_ptr, y_desc, y_ptr, xs, n0, m0, M, N, FAST: gl.constexpr):
    """acc [BN, BM] -> y[m0 .., n0 ..], through the memory of x, which is not needed any more."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    if FAST:
        acc *= BF16_UNIT
    elif xs.dtype == gl.float16:
        acc *= 1.0 / FP16_LIFT
    n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, acc.type.layout))
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        acc += bias.expand_dims(1)
    if y_desc is not None:
        ys = xs.index(0).slice(0, BLOCK_N, 1)
        _barrier()
        ys.permute((1, 0)).store(acc.to(y_desc.dtype))
        fence_async_shared()
        _barrier()
        _store(y_desc, [m0, n0], ys)
        tma.store_wait(0)
    else:
        m = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, acc.type.layout))
        mask = (n < N).expand_dims(1) & (m < M).expand_dims(0)
        at = m.to(gl.int64).expand_dims(0) * N + n.expand_dims(1)
        gl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def gemm_hopper(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: HopperPlan,
) -> None:
    """y [M, N] from x [M, K] (bf16 or fp16; 16-byte aligned rows) and contiguous W [N, *]
    or [1, N, *]. zero_point and bias [N] may be None. y is contiguous: bf16, fp16 or fp32.

    qdata is COALESCED, or ACT_QUANT, for which x is [M, padded_k(K)] in word order.
    """
    m = x.shape[0]
    n, n_groups = scale.shape[-2:]
    words = qdata.view(torch.int32).view(n, -1)
    steps = words.shape[1] // 16
    tiles = triton.cdiv(n, plan.block_n) * triton.cdiv(m, plan.block_m)
    split_k = min(plan.split_k, steps)
    parts = flags = None
    if split_k > 1:
        # sums of 4 bytes and flags of 8 in one allocation
        sums = tiles * (split_k - 1) * plan.block_m * plan.block_n
        parts = torch.empty(sums + 2 * tiles * (split_k - 1), device=x.device, dtype=torch.float32)
        flags = parts[sums:].view(torch.int64)
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    y_desc = None
    if y.dtype == x.dtype and n % 8 == 0 and y.data_ptr() % 16 == 0:
        y_desc = _descriptor(y, [plan.block_m, plan.block_n], dtype)
    _gemm_hopper_kernel[(tiles * split_k,)](
        _descriptor(x, [plan.block_m, 128], dtype),
        _descriptor(words, [plan.block_n, 16], gl.int32),
        y_desc,
        y,
        scale,
        zero_point,
        bias,
        parts,
        flags,
        # odd and of 8 bytes: one specialisation
        random.getrandbits(60) | 1 << 61 | 1,
        m,
        n,
        steps,
        n_groups,
        split_k,
        GROUP_N=plan.group_n,
        GROUP=0 if n_groups == 1 else group_size,
        WHOLE_STEPS=n_groups * group_size % 128 == 0,
        ACT_QUANT=qdata.dtype == ACT_QUANT.qdata_dtype,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        num_warps=plan.num_warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )


def aligned_rows(x: Tensor) -> Tensor:
    """x [M, K] (K a multiple of 8), or a copy that the tensor memory accelerator can read."""
    # rows of an expanded x are 0 apart
    apart = x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0
    if apart and x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(t: Tensor, block: list[int], dtype: gl.dtype) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block, layout)
