"""Many tokens on Hopper: rows sorted by expert, each tile of them times its expert's weights.

What kernels/grouped.py does, with the loop of kernels/gemm_hopper.py: x and words come by the
tensor memory accelerator, and the matrix unit multiplies one half of a step while the other half is
unpacked. x has to stand sorted in memory (gather_rows), W to be COALESCED.

With a gate, a tile takes BLOCK_N / 2 gate rows and the up rows of the same outputs; each 16 rows of
the operand are 8 of the ones and 8 of the others, so that one thread has both sums of an output:

    halves         words of rows n0 .. and of rows N / 2 + n0 .., one below the other
    interleaved    words of rows 2 n0 .., gate and up in turn
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from w4tensor.kernels.gate import activate, gated
from w4tensor.kernels.gemm_hopper import (
    BF16_UNIT,
    _barrier,
    _descriptor,
    _groups,
    _halves,
    _layout_of_words,
    _load,
    _operand,
    _prepare,
    _x_half,
    aligned_rows,
)
from w4tensor.kernels.unpack import FP16_LIFT

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_experts import HopperGroupedPlan

# columns of x that a program of gather_rows copies
GATHERED = 1024


@triton.jit(do_not_specialize=["n_experts"])
def _gather_kernel(
    x_ptr,
    order_ptr,
    offs_ptr,
    out_ptr,
    n_experts,
    K,
    stride_x,
    X_DIV: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # rows of sentinels are nobody's
    if row < tl.load(offs_ptr + n_experts - 1):
        x_row = tl.load(order_ptr + row).to(tl.int64) // X_DIV
        tl.store(
            out_ptr + row * K + k, tl.load(x_ptr + x_row * stride_x + k, mask=k < K), mask=k < K
        )


def gather_rows(x: Tensor, order: Tensor, offs: Tensor, x_div: int, pdl: bool) -> Tensor:
    """x [T, K] -> [pairs, K]: row r is x[order[r] // x_div]; those from offs[-1] on are unset."""
    k = x.shape[1]
    out = torch.empty(order.numel(), k, device=x.device, dtype=x.dtype)
    _gather_kernel[(order.numel(), triton.cdiv(k, GATHERED))](
        x,
        order,
        offs,
        out,
        offs.numel(),
        k,
        x.stride(0),
        X_DIV=x_div,
        BLOCK=GATHERED,
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@gluon.constexpr_function
def _layout_in_memory(rows, warps, gate):
    """Words [BN, (t, i)] as they stand in shared memory, dealt out as the operand wants them."""
    half, lane, warp = {
        "none": (8, 1, 16),
        "halves": (rows // 2, 1, 8),
        "interleaved": (1, 2, 16),
    }[gate]
    more = [[warp * warps, 0]] if rows > 16 * warps else []
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [half, 0]] + more,
        lane_bases=[[0, 4], [0, 8], [lane, 0], [2 * lane, 0], [4 * lane, 0]],
        warp_bases=[[warp * w, 0] for w in (1, 2, 4) if w < warps],
        block_bases=[],
        shape=[rows, 16],
    )


@gluon.jit
def _words(stage, WARPS: gl.constexpr, GATE: gl.constexpr):
    """Words [BN, t, i] of a step, in the order of the operand's rows."""
    BN: gl.constexpr = stage.shape[0]
    words = stage.load(_layout_in_memory(BN, WARPS, GATE))
    if GATE == "halves":
        words = words.reshape(2, BN // 16, 8, 16).permute(1, 0, 2, 3)
    elif GATE == "interleaved":
        words = words.reshape(BN // 16, 8, 2, 16).permute(0, 2, 1, 3)
    words = words.reshape(BN, 4, 4)
    return gl.convert_layout(words, _layout_of_words(BN, WARPS), assert_trivial=True)


@gluon.jit
def _weight_row(i, n0, N, GATE: gl.constexpr):
    """Row of W for row i of the operand, kept inside N."""
    if GATE == "none":
        return gl.minimum(n0 + i, N - 1)
    else:
        n = gl.minimum(n0 + i // 16 * 8 + i % 8, N // 2 - 1)
        half = i // 8 % 2
        if GATE == "halves":
            return n + half * (N // 2)
        else:
            return 2 * n + half


@gluon.jit
def _expect(x_desc, xs, ws, full, stage, ok):
    BYTES: gl.constexpr = xs.shape[1] * 256 + ws.shape[1] * 64
    mbarrier.expect(full.index(stage), BYTES, pred=ok)


@gluon.jit
def _fetch_words(w_desc, ws, full, stage, row, N, step, ok, GATE: gl.constexpr):
    HALF: gl.constexpr = ws.shape[1] // 2
    barrier = full.index(stage)
    words = ws.index(stage)
    if GATE == "halves":
        gate = words.slice(0, HALF, 0)
        up = words.slice(HALF, HALF, 0)
        _load(w_desc, [row, step * 16], barrier, gate, pred=ok)
        row_up = row + N // 2
        _load(w_desc, [row_up, step * 16], barrier, up, pred=ok)
    else:
        _load(w_desc, [row, step * 16], barrier, words, pred=ok)


@gluon.jit
def _fetch_x(x_desc, xs, full, stage, row, step, ok):
    at = [row, step * 128]
    _load(x_desc, at, full.index(stage), xs.index(stage), pred=ok)


@gluon.jit(do_not_specialize=["rows", "steps"])
def _grouped_hopper_kernel(
    x_desc,
    w_desc,
    order_ptr,
    tiles_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    N,
    E,
    steps,
    n_groups,
    BLOCK_N: gl.constexpr,
    SCATTER: gl.constexpr,
    # 0 where the row is one group
    GROUP: gl.constexpr,
    WHOLE_STEPS: gl.constexpr,
    GATE: gl.constexpr,
    ACT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = x_desc.dtype
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    # an fp32 x is bf16 here, beside scales that are not
    BF16: gl.constexpr = DTYPE == gl.bfloat16 and scale_ptr.dtype.element_ty == gl.bfloat16
    FAST: gl.constexpr = BF16 and zero_ptr is None
    WORDS: gl.constexpr = _layout_of_words(BLOCK_N, WARPS)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    OUT: gl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid_n = gl.program_id(0)
    tile_ptr = tiles_ptr + gl.program_id(1) * 3
    expert = gl.load(tile_ptr)
    first = gl.load(tile_ptr + 1)
    end = gl.load(tile_ptr + 2)
    # slots of the list that no expert needed are empty
    if first < end:
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        # rows behind the last expert are zero
        if expert < E:
            n0 = pid_n * OUT
            w_row = expert * N + (2 * n0 if GATE == "interleaved" else n0)
            xs = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], x_desc.layout)
            ws = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, 16], w_desc.layout)
            full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
            for s in gl.static_range(STAGES):
                mbarrier.init(full.index(s), count=1)
            fence_async_shared()
            _barrier()
            for s in gl.static_range(STAGES):
                _expect(x_desc, xs, ws, full, s, s < steps)
                _fetch_words(w_desc, ws, full, s, w_row, N, s, s < steps, GATE)
                _fetch_x(x_desc, xs, full, s, first, s, s < steps)

            i = gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(1, WORDS)))
            # experts are rows of one long matrix
            row = expert.to(gl.int64) * N + _weight_row(i, n0, N, GATE)
            scale = _groups(scale_ptr, row, 0, n_groups, GROUP, WHOLE_STEPS, WORDS)
            zero = None
            if zero_ptr is not None:
                zero = _groups(zero_ptr, row, 0, n_groups, GROUP, WHOLE_STEPS, WORDS)
            stage = 0
            phase = 0
            mbarrier.wait(full.index(0), 0)
            words = _words(ws.index(0), WARPS, GATE)
            words_a, words_b = _halves(words)
            scale_a, scale_b, zero_a, zero_b = _prepare(scale, zero, words, FAST)
            following = gl.minimum(1, steps - 1)
            scale = _groups(scale_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS)
            if zero_ptr is not None:
                zero = _groups(zero_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS)
            z_a = _operand(words_a, scale_a, zero_a, DTYPE, FAST, OPERAND)
            acc = warpgroup_mma(z_a, _x_half(xs.index(0), 0), acc, is_async=True)
            acc, z_a = warpgroup_mma_wait(1, deps=[acc, z_a])
            for step in range(1, steps):
                z_b = _operand(words_b, scale_b, zero_b, DTYPE, FAST, OPERAND)
                acc = warpgroup_mma(z_b, _x_half(xs.index(stage), 1), acc, is_async=True)
                done = stage
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
                mbarrier.wait(full.index(stage), phase)
                words = _words(ws.index(stage), WARPS, GATE)
                acc, z_a = warpgroup_mma_wait(1, deps=[acc, z_a])
                words_a, words_b = _halves(words)
                scale_a, scale_b, zero_a, zero_b = _prepare(scale, zero, words, FAST)
                # of the step after this one
                following = gl.minimum(step + 1, steps - 1)
                scale = _groups(scale_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS)
                if zero_ptr is not None:
                    zero = _groups(zero_ptr, row, following, n_groups, GROUP, WHOLE_STEPS, WORDS)
                z_a = _operand(words_a, scale_a, zero_a, DTYPE, FAST, OPERAND)
                acc = warpgroup_mma(z_a, _x_half(xs.index(stage), 0), acc, is_async=True)
                acc, z_b = warpgroup_mma_wait(1, deps=[acc, z_b])
                _barrier()
                ahead = step - 1 + STAGES
                _expect(x_desc, xs, ws, full, done, ahead < steps)
                _fetch_words(w_desc, ws, full, done, w_row, N, ahead, ahead < steps, GATE)
                _fetch_x(x_desc, xs, full, done, first, ahead, ahead < steps)
            z_b = _operand(words_b, scale_b, zero_b, DTYPE, FAST, OPERAND)
            acc = warpgroup_mma(z_b, _x_half(xs.index(stage), 1), acc, is_async=True)
            acc, z_a, z_b = warpgroup_mma_wait(0, deps=[acc, z_a, z_b])
            if FAST:
                acc *= BF16_UNIT
            elif DTYPE == gl.float16:
                acc *= 1.0 / FP16_LIFT
            if bias_ptr is not None:
                b = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
                bias = gl.load(bias_ptr + expert.to(gl.int64) * N + _weight_row(b, n0, N, GATE))
                acc += bias.to(gl.float32).expand_dims(1)
        _store(acc, y_ptr, order_ptr, pid_n, first, end, N, SCATTER, GATE, ACT)


@gluon.constexpr_function
def _layout_of_stores(out, warps):
    """[BM, OUT], 16 bytes of a row to a lane."""
    across = min(32, out // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _store(
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
):
    """f(acc [BN, BM]) -> the rows of y."""
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
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty).permute(1, 0), STORED)
    row = first + gl.arange(0, BM, gl.SliceLayout(1, STORED))
    n = pid_n * OUT + gl.arange(0, OUT, gl.SliceLayout(0, STORED))
    inside = row < end
    y_row = row
    if SCATTER:
        y_row = gl.load(order_ptr + row, mask=inside, other=0)
    at = y_row.to(gl.int64).expand_dims(1) * n_out + n.expand_dims(0)
    gl.store(y_ptr + at, y, mask=inside.expand_dims(1) & (n < n_out).expand_dims(0))


def multiply_grouped_hopper(
    x: Tensor,
    order: Tensor | None,
    tiles: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: HopperGroupedPlan,
    *,
    scatter: bool = False,
    gate: str = "none",
    act: str = "none",
) -> Tensor:
    """Fill the rows of y [rows, N], or [rows, N / 2] with a gate, that `tiles` lists.

    Args:
        x: [rows, K], sorted by expert. The rest as kernels/grouped.py has it, qdata COALESCED and
            contiguous.
    """
    n_experts, n = qdata.shape[:2]
    k = x.shape[1]
    if tiles.shape[0] == 0:
        return y
    words = qdata.view(torch.int32).flatten(0, 1)
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    fetched = plan.block_n // 2 if gate == "halves" else plan.block_n
    out = plan.block_n if gate == "none" else plan.block_n // 2
    n_out = n if gate == "none" else n // 2
    _grouped_hopper_kernel[(triton.cdiv(n_out, out), tiles.shape[0])](
        _descriptor(aligned_rows(x), [plan.block_m, 128], dtype),
        _descriptor(words, [fetched, 16], gl.int32),
        order,
        tiles,
        y,
        scale,
        zero_point,
        bias,
        n,
        n_experts,
        words.shape[1] // 16,
        scale.shape[-1],
        BLOCK_N=plan.block_n,
        SCATTER=scatter,
        GROUP=0 if scale.shape[-1] == 1 else group_size,
        WHOLE_STEPS=k % 128 == 0,
        GATE=gate,
        ACT=act,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        num_warps=plan.num_warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y
