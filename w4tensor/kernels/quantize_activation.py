"""x -> int8 codes and fp32 scales: scale = absmax / 127, codes = round_half_even(x / scale).

    x [rows, K]            one program a run of BLOCK activations of one row
      | a | a | a | .. |   tile [BLOCK / GROUP, GROUP]: one scale an activation group
      | s         | .. |   the same tile as [BLOCK / SUM_GROUP, SUM_GROUP]: one sum a weight group

A group of zeros has scale 0 and codes 0. A group that holds Inf or NaN has scale NaN and codes 0,
so that its token, and no other, comes out as NaN. Codes are padded with zeros to whole blocks of
K; scales and sums are stored group-major, [.., groups, M], so that a tile of tokens reads a run.
Division and rounding are IEEE: a statement in plain torch gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w4tensor.kernels.launcher import Launcher
from w4tensor.kernels.unpack import use_asm
from w4tensor.kernels.unpack_act_quant import word_order
from w4tensor.layout import padded_k

# activations that one program quantises, where no group is a whole row
BLOCK = 1024
# scales of a group take a multiple of this many tokens, so that tiles of tokens load vectors
TOKEN_PAD = 16
ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit(do_not_specialize=["M", "n_groups", "n_sum_groups"])
def _quantize_kernel(
    x_ptr,
    # int8 codes, or in 16 bits what they mean
    out_ptr,
    scale_ptr,
    sum_ptr,
    M,
    K,
    out_width,
    stride_x,
    stride_scale,
    n_groups,
    n_sum_groups,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SUM_GROUP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SILU_MUL: tl.constexpr,
    # of what is stored; K is then padded to whole blocks
    WORD_ORDER: tl.constexpr,
    PDL: tl.constexpr,
    OVERLAP: tl.constexpr,
    ASM: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    if OVERLAP:
        # the product may start now, and waits for the end of this kernel before it reads codes
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    group = tl.arange(0, BLOCK // GROUP)
    # [groups, GROUP]
    k = chunk * BLOCK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x_ptrs = x_ptr + row * stride_x + k
    x = tl.load(x_ptrs, mask=k < K, other=0.0).to(tl.float32)
    if SILU_MUL:
        up = tl.load(x_ptrs + K, mask=k < K, other=0.0).to(tl.float32)
        # silu(x) = x / (1 + exp(-x))
        x = tl.div_rn(x, 1.0 + tl.exp(-x)) * up

    # as integers, sizes are in order, Inf is beyond them and NaN beyond Inf
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    finite = absmax < float("inf")
    scale = tl.div_rn(absmax, tl.full(absmax.shape, 127.0, tl.float32))
    # only subnormal scales pass 127
    codes = tl.clamp(_quotient(x, absmax, scale, ASM), -127.0, 127.0)
    # adding 1.5 * 2**23 rounds to an integer, half to even, which stands in the lowest byte
    codes = tl.where(finite[:, None], codes, 0.0) + ROUNDING
    byte = codes.to(tl.int32, bitcast=True).to(tl.int8)
    codes -= ROUNDING
    scale = tl.where(finite, scale, float("nan"))
    means = codes * scale[:, None]
    out = byte if scale_ptr is not None else means.to(out_ptr.dtype.element_ty)
    if WORD_ORDER:
        out = word_order(out.reshape(BLOCK)).reshape(BLOCK // GROUP, GROUP)
    tl.store(out_ptr + row * out_width + k, out, mask=k < out_width)

    if scale_ptr is not None:
        g = chunk * (BLOCK // GROUP) + group
        scale_ptrs = scale_ptr + (row // M * n_groups + g) * stride_scale + row % M
        tl.store(scale_ptrs, scale, mask=g < n_groups)
    if sum_ptr is not None:
        sums = codes if PER_TOKEN else means
        sums = tl.sum(sums.reshape(BLOCK // SUM_GROUP, SUM_GROUP), 1)
        g = chunk * (BLOCK // SUM_GROUP) + tl.arange(0, BLOCK // SUM_GROUP)
        sum_ptrs = sum_ptr + (row // M * n_sum_groups + g) * stride_scale + row % M
        tl.store(sum_ptrs, sums, mask=g < n_sum_groups)


@triton.jit
def _quotient(x, absmax, scale, ASM: tl.constexpr):
    """x [groups, GROUP] / scale, rounded once; anything where absmax is not finite.

    Two corrections of x times the reciprocal, each by the remainder, which is exact, give the bits
    of a division (Markstein, IBM J. Res. Dev. 34, 1990) for a third of its instructions.
    """
    if ASM:
        # where remainders would be subnormal, everything is 2**100 times as large
        lift = tl.where(absmax < 2.0**-60, 2.0**100, 1.0)
        divisor = tl.where(scale > 0, scale * lift, 1.0)
        reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)[:, None]
        x *= lift[:, None]
        q = x * reciprocal
        for _ in tl.static_range(2):
            q = tl.fma(tl.fma(q, -divisor[:, None], x), reciprocal, q)
        return q
    else:
        # Triton's interpreter rounds the product of a multiply-add
        divisor = tl.where(scale > 0, scale, 1.0)[:, None]
        return tl.div_rn(x, tl.broadcast_to(divisor, x.shape))


def quantize_activation(
    x: Tensor,
    act_group_size: int,
    sum_group_size: int | None = None,
    silu_mul: bool = False,
    pdl: bool = False,
    overlap: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [E, M, K] -> codes int8 [E, M, padded_k(K)], scale [E, groups, M], sums or None.

    sum_group_size: the weights' group size where they have zero points. The third result is then
        fp32 [E, K / sum_group_size, M]: what the activations of each weight group, codes times
        scale, add up to; with act_group_size -1, what their codes alone add up to.
    silu_mul: x is [E, M, 2 K], and silu(first half) * second half is what is quantised.
    pdl: start under programmatic dependent launch. overlap: let a product that is launched so begin
        before this kernel is done.
    """
    e, m, width = x.shape
    k = width // 2 if silu_mul else width
    # a multiple that keeps vectors of scales aligned, and the scales of a batch apart
    stride = -(-m // TOKEN_PAD) * TOKEN_PAD
    n_groups = 1 if act_group_size == -1 else -(-k // act_group_size)
    codes = torch.empty(e, m, padded_k(k), dtype=torch.int8, device=x.device)
    scale = torch.empty(e, n_groups, stride, dtype=torch.float32, device=x.device)
    sums = None
    if sum_group_size is not None:
        n_sums = k // sum_group_size
        sums = torch.empty(e, n_sums, stride, dtype=torch.float32, device=x.device)
    _launch(x, codes, scale, sums, act_group_size, sum_group_size, silu_mul, pdl, overlap)
    return codes, scale[..., :m], None if sums is None else sums[..., :m]


def round_activation(
    x: Tensor,
    act_group_size: int,
    silu_mul: bool = False,
    word_order: bool = False,
    pdl: bool = False,
    overlap: bool = True,
) -> Tensor:
    """x [E, M, K] -> [E, M, K]: what its codes mean, rounded to x's dtype, bf16 for fp32.

    word_order: -> [E, M, padded_k(K)] in the order that kernels/unpack_act_quant.py calls so.
    silu_mul, pdl, overlap: as in quantize_activation.
    """
    e, m, width = x.shape
    k = width // 2 if silu_mul else width
    dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    out = torch.empty(e, m, padded_k(k) if word_order else k, dtype=dtype, device=x.device)
    _launch(x, out, None, None, act_group_size, None, silu_mul, pdl, overlap, word_order)
    return out


_launch_quantize = Launcher(_quantize_kernel)


def _launch(
    x: Tensor,
    out: Tensor,
    scale: Tensor | None,
    sums: Tensor | None,
    act_group_size: int,
    sum_group_size: int | None,
    silu_mul: bool,
    pdl: bool,
    overlap: bool,
    word_order: bool = False,
) -> None:
    e, m, width = x.shape
    k = width // 2 if silu_mul else width
    x = x.reshape(e * m, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    per_token = act_group_size == -1
    whole_row = 1 << (out.shape[-1] - 1).bit_length()
    block = whole_row if per_token or sum_group_size == k else min(BLOCK, whole_row)
    # no group is wider than the tile
    block = max(block, act_group_size)
    if e * m == 0:
        return
    _launch_quantize(
        (e * m, -(-out.shape[-1] // block)),
        x,
        out,
        scale,
        sums,
        m,
        k,
        out.shape[-1],
        x.stride(0),
        0 if scale is None else scale.stride(-2),
        0 if scale is None else scale.shape[-2],
        0 if sums is None else sums.shape[-2],
        BLOCK=block,
        GROUP=block if per_token else act_group_size,
        SUM_GROUP=block if sum_group_size == k else sum_group_size,
        PER_TOKEN=per_token,
        SILU_MUL=silu_mul,
        WORD_ORDER=word_order,
        PDL=pdl,
        OVERLAP=pdl and overlap,
        ASM=use_asm(),
        num_warps=min(16, max(1, block // 256)),
        **({"launch_pdl": True} if pdl else {}),
    )
