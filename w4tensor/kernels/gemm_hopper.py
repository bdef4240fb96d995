"""Y[M, N] = X[M, K] @ dequant(W)[N, K].T on Hopper, in Gluon: the loop of hopper_loop.py by tiles.

A program has a tile, or a slice of its K; slices and their ordered sums are those of
hopper_slices.py. Where there are more tiles than the card holds at a time, programs share them
(gemm_hopper_persistent.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from w4tensor.kernels.gemm_hopper_persistent import gemm_hopper_persistent_kernel
from w4tensor.kernels.groups import groups_together
from w4tensor.kernels.hopper_loop import accumulate
from w4tensor.kernels.hopper_memory import barrier, descriptor, tokens_of
from w4tensor.kernels.hopper_operand import layout_of_rows
from w4tensor.kernels.hopper_output import finish, memory_of_y
from w4tensor.kernels.hopper_slices import (
    add_parts,
    await_parts,
    first_tokens,
    memory_of_sums,
    store_part,
    tile_at,
    token_of_launch,
)
from w4tensor.kernels.launcher import Launcher
from w4tensor.layout import ACT_QUANT

if TYPE_CHECKING:
    from torch import Tensor

    from w4tensor.dispatch_hopper import HopperPlan


# sums of a tile up to which its programs ask for their first scales before x is there: 4096 x 4096,
# 8 tokens 6.3 -> 5.8 us, 64 8.7 -> 8.2; larger tiles gain up to 3 % by it or lose as much
_SCALES_FIRST = gl.constexpr(64 * 64)


@gluon.jit(do_not_specialize=["token", "M", "steps", "split_k"])
def _gemm_hopper_kernel(
    x_desc,
    # of the second run of tokens, where a tile has two
    more_x_desc,
    w_desc,
    y_desc,
    more_y_desc,
    y_ptr,
    scale_ptr,
    zero_ptr,
    # of int8 x, or None: multiples of the rows' groups, and scales of the tokens
    multiple_ptr,
    x_scale_ptr,
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
    # groups of a row that are loaded at a time
    TOGETHER: gl.constexpr,
    # whether W is in this format, or in COALESCED
    ACT_QUANT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    PIPELINED: gl.constexpr,
):
    FIRST: gl.constexpr = tokens_of(x_desc.block_shape)
    MORE: gl.constexpr = 0 if more_x_desc is None else more_x_desc.block_shape[0]
    # the first half of all tokens and the last, which overlap
    HALVES: gl.constexpr = len(x_desc.block_shape) == 3
    BLOCK_M: gl.constexpr = FIRST + MORE
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    INT8: gl.constexpr = multiple_ptr is not None
    if INT8:
        factor_ptr = multiple_ptr
    else:
        factor_ptr = scale_ptr
    scales = scale_ptr, multiple_ptr, x_scale_ptr
    tile = gl.program_id(0) // split_k
    k_slice = gl.program_id(0) % split_k
    n0, m0 = tile_at(tile, gl.cdiv(N, BLOCK_N), gl.cdiv(M, BLOCK_M), GROUP_N)
    n0 *= BLOCK_N
    m0 *= BLOCK_M
    if BLOCK_M < 256:
        # the last tile begins early enough to be whole; which of those that share tokens stores
        # last does not matter, as they sum over the same slices
        m0 = gl.minimum(m0, gl.maximum(M - BLOCK_M, 0))
    begin = steps * k_slice // split_k
    end = steps * (k_slice + 1) // split_k
    r = gl.arange(0, BLOCK_N, layout_of_rows(BLOCK_N, WARPS, ACT_QUANT, x_desc.dtype))
    row = gl.minimum(n0 + r, N - 1)
    m = first_tokens(m0, M, FIRST, MORE)
    if MORE:
        x_descs = x_desc, more_x_desc
        y_descs = y_desc, more_y_desc
        columns = 0, FIRST
    else:
        x_descs = (x_desc,)
        y_descs = (y_desc,)
        columns = (0,)
    acc, xs = accumulate(
        x_descs,
        w_desc,
        (m, n0, n0),
        row,
        factor_ptr,
        zero_ptr,
        n_groups,
        begin,
        end,
        steps,
        BLOCK_N,
        GROUP,
        TOGETHER,
        ACT_QUANT,
        "none",
        WARPS,
        STAGES,
        PDL,
        PIPELINED,
        BLOCK_M * BLOCK_N <= _SCALES_FIRST,
    )
    if part_ptr is not None:
        TILE: gl.constexpr = BLOCK_N * BLOCK_M
        others = split_k - 1
        first = tile * others
        parts = part_ptr + first.to(gl.int64) * TILE
        if k_slice < others:
            for i in gl.static_range(len(acc)):
                store_part(parts + k_slice * TILE + columns[i] * BLOCK_N, acc[i])
            barrier()
            gl.atomic_xchg(flag_ptr + first + k_slice, token, sem="release")
            return
        await_parts(flag_ptr + first, others, token)
    for i in gl.static_range(len(acc)):
        sums = acc[i]
        if part_ptr is not None:
            sums = add_parts(sums, parts + columns[i] * BLOCK_N, others, TILE)
        memory = xs[i].index(0)
        if INT8 and y_desc is not None:
            memory = memory_of_y(y_descs[i], BLOCK_N)
        finish(sums, scales, n_groups, bias_ptr, y_descs[i], y_ptr, memory, n0, m[i], M, N, HALVES)
    if y_desc is not None:
        tma.store_wait(0)


# rows of a tile of up to 64 tokens
MANY_PAST_THE_END = 12


def boxes_of_tokens(block_m: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a tile that come together, and the rest of them, of which there may be none.

    Gluon's tiles are of powers of two, the matrix unit's are not: 96 tokens are 64 and 32. Rows
    past the end, which the tensor memory accelerator fills with zeros, cost more time than tokens
    do: of a tile that has many come the first half of its tokens and the last, which overlap
    (8192 x 28672, us: 33 tokens 59, with zeros or as two boxes 66; 127 tokens 88, 105).
    """
    first = 1 << block_m.bit_length() - 1
    if block_m > first:
        return (first,), (block_m - first,)
    past_the_end = block_m - m
    if first // 2 < m and past_the_end >= (1 if block_m > 64 else MANY_PAST_THE_END):
        return (2, first // 2), ()
    return (first,), ()


# of a thread, for tiles of (tokens, rows) that are slices of K, whose weights are unpacked in the
# shortest way with a scale a step: then six programs, some of the next launch, share a
# multiprocessor (4096 x 14336, 8 tokens: 15 us, not 18). Tiles that are not cut lose by it (57344 x
# 8192, 8 tokens: 88 us, not 74), and so do finer scales (43008 x 5376, group 32: 57 us, not 46).
# From 3.9 on, Triton's code would spill
_BEFORE_3_9 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
MAX_REGISTERS = {(8, 64): 80} if _BEFORE_3_9 else {}
# of int8 x, by (tokens, rows, warps): two programs share a multiprocessor, where some would take
# two registers too many
MAX_REGISTERS_INT8 = {(128, 128, 8): 128}

_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}
_launch_gemm = Launcher(_gemm_hopper_kernel, anew={"token": token_of_launch})
_launch_persistent = Launcher(gemm_hopper_persistent_kernel, anew={"token": token_of_launch})


def gemm_hopper(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
    plan: HopperPlan,
    multiple: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> None:
    """y [M, N] from x [M, K] (bf16 or fp16; 16-byte aligned rows) and contiguous W [N, *]
    or [1, N, *]. zero_point and bias [N] may be None. y is contiguous: bf16, fp16 or fp32.

    qdata is COALESCED, or ACT_QUANT, for which x is [M, padded_k(K)] in word order.

    With x_scale fp32 [M], x is int8 [M, padded_k(K)] in its own order, qdata is ACT_QUANT, and
    multiple, int8 like scale, is scale over the unit of its row (hopper_multiples.py); tiles have
    one run of tokens.
    """
    (m, k), row = x.shape, x.stride(0)
    n, n_groups = scale.shape[-2:]
    words = qdata.view(torch.int32)
    steps = words.shape[-1] // 16
    tiles = -(-n // plan.block_n) * -(-m // plan.block_m)
    split_k = min(plan.split_k, steps)
    dtype = _GLUON[x.dtype]
    y_dtype = _GLUON.get(y.dtype)
    is_int8 = x.dtype == torch.int8
    first, second = boxes_of_tokens(plan.block_m, m)
    stores = y_dtype is not None if is_int8 else y.dtype == x.dtype
    by_tiles = stores and n % 8 == 0 and y.data_ptr() % 16 == 0
    options: dict[str, Any] = {"launch_pdl": True} if plan.pdl else {}
    # each has a tile, and a tile's ends have as many steps as the ring has stages, or there is
    # nothing to share. The other kernel stores y one by one: it has registers for addresses
    shared = by_tiles and 0 < plan.programs <= tiles and steps >= 3 * plan.num_stages
    # rounds of whole tiles before what is shared evenly, and sums that are stored
    rounds, stored = 0, tiles * (split_k - 1)
    if shared:
        rounds = tiles // plan.programs - 1
        stored = plan.programs * plan.even
    else:
        shortest = zero_point is None and x.dtype == scale.dtype == torch.bfloat16
        scale_a_step = n_groups == 1 or group_size >= 128
        if split_k > 1 and shortest and scale_a_step:
            cap = MAX_REGISTERS.get((plan.block_m, plan.block_n))
            options |= {"maxnreg": cap} if cap else {}
        if is_int8:
            cap = MAX_REGISTERS_INT8.get((plan.block_m, plan.block_n, plan.num_warps))
            options |= {"maxnreg": cap} if cap else {}

    parts, flags = memory_of_sums(stored, plan.block_m * plan.block_n, x.device)

    def of_x(tokens: tuple[int, ...]) -> TensorDescriptor | None:
        return descriptor(x, (m, k), row, (*tokens, 128), dtype) if tokens else None

    def of_y(tokens: tuple[int, ...]) -> TensorDescriptor | None:
        stored = tokens and by_tiles
        return descriptor(y, (m, n), n, (*tokens, plan.block_n), y_dtype) if stored else None

    launch = _launch_persistent if shared else _launch_gemm
    launch(
        (plan.programs if shared else tiles * split_k,),
        of_x(first),
        of_x(second),
        descriptor(words, (n, 16 * steps), 16 * steps, (plan.block_n, 16), gl.int32),
        of_y(first),
        of_y(second),
        *(() if shared else (y,)),
        scale,
        zero_point,
        multiple,
        x_scale,
        bias,
        parts,
        flags,
        token_of_launch(),
        m,
        n,
        steps,
        n_groups,
        *((tiles, rounds) if shared else (split_k,)),
        GROUP_N=plan.group_n,
        GROUP=0 if n_groups == 1 else group_size,
        TOGETHER=groups_together(n_groups, group_size, plan.block_m),
        ACT_QUANT=qdata.dtype == ACT_QUANT.qdata_dtype,
        WARPS=plan.num_warps,
        STAGES=plan.num_stages,
        PDL=plan.pdl,
        PIPELINED=plan.pipelined,
        num_warps=plan.num_warps,
        **options,
    )
