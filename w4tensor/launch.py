"""A checked problem on a CUDA device -> its plan -> its kernels. The only importer of kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from w4tensor import arch, dispatch, moe, reference
from w4tensor.dispatch import DecodePlan, DequantPlan, GemmPlan, Problem, ReferencePlan
from w4tensor.dispatch_act_quant import (
    ActQuantDecodePlan,
    ActQuantDp4aPlan,
    ActQuantGemmPlan,
    ActQuantHopperPlan,
    ActQuantIntegerPlan,
    ActQuantRoundedPlan,
)
from w4tensor.dispatch_experts import (
    ExpertsProblem,
    plan_experts,
    plan_gathered,
    plan_grouped,
)
from w4tensor.dispatch_gemv import GemvPlan
from w4tensor.dispatch_hopper import HopperPlan
from w4tensor.dispatch_int8 import Int8Plan
from w4tensor.kernels.act_quant_decode import act_quant_decode
from w4tensor.kernels.act_quant_dequantize import act_quant_dequantize
from w4tensor.kernels.act_quant_dp4a import act_quant_dp4a
from w4tensor.kernels.act_quant_gemm import act_quant_gemm
from w4tensor.kernels.decode import decode
from w4tensor.kernels.dequantize import dequantize
from w4tensor.kernels.gemm import gemm
from w4tensor.kernels.gemm_hopper import gemm_hopper
from w4tensor.kernels.gemv import aligned, gemv
from w4tensor.kernels.hopper_memory import aligned_rows
from w4tensor.kernels.int8_hopper import int8_hopper
from w4tensor.kernels.quantize_activation import quantize_activation as quantize_codes
from w4tensor.kernels.quantize_activation import round_activation
from w4tensor.layout import ACT_QUANT, COALESCED
from w4tensor.plans_experts import ExpertsPlan

__all__ = [
    "act_quant_linear",
    "coalesced_linear",
    "experts",
    "gathered_linear",
    "grouped_linear",
    "quantize_activation",
]

_ACT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _on_its_device(run: Callable) -> Callable:
    """`run`, whose first operand is x, on x's device: kernels start on the current one."""

    @functools.wraps(run)
    def there(x: Tensor, *operands):
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(x, *operands)
        with torch.cuda.device(x.device):
            return run(x, *operands)

    return there


@functools.lru_cache(maxsize=4096)
def _plan(device: int, *problem):
    target = arch.current(device)
    assert target is not None, "a CUDA tensor without CUDA"
    return dispatch.plan(Problem(*problem), target)


@functools.lru_cache(maxsize=4096)
def _plan_experts(device: int, problem: ExpertsProblem) -> ExpertsPlan | None:
    target = arch.current(device)
    assert target is not None, "a CUDA tensor without CUDA"
    return plan_experts(problem, target)


def _whole_rows(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What kernels read. Slices along K are strided, and copied."""
    zero_point = None if zero_point is None else zero_point.contiguous()
    return qdata.contiguous(), scale.contiguous(), zero_point


def _are_whole_rows(qdata: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    rest = zero_point is None or zero_point.is_contiguous()
    return rest and qdata.is_contiguous() and scale.is_contiguous()


def _stack(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    act_group_size: int | None = None,
    multiple: Tensor | None = None,
) -> moe.Stack:
    """Stacked weights as kernels take them; a bias may be a slice of N."""
    qdata, scale, zero_point = _whole_rows(qdata, scale, zero_point)
    bias = None if bias is None else bias.contiguous()
    multiple = None if multiple is None else multiple.contiguous()
    return moe.Stack(qdata, scale, zero_point, group_size, bias, act_group_size, multiple)


def _sixteen_bit(x: Tensor) -> Tensor:
    """What the matrix unit takes: fp32 activations are rounded to bf16, whose range is theirs."""
    x = x.bfloat16() if x.dtype == torch.float32 else x
    return x if x.stride(-1) == 1 else x.contiguous()


@_on_its_device
def coalesced_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """x [.., K] and W [N, *], or x [E, M, K] and W [E, N, *], as ops.linear defines it."""
    n, k = qdata.shape[-2], x.shape[-1]
    stacked = qdata.ndim == 3
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    x3 = _sixteen_bit(x if stacked else x.reshape(1, -1, k))
    e, m, _ = x3.shape
    plan = _plan(x.device.index, m, n, k, group_size, _ACT_NAMES[x3.dtype], zero_point is None, e)
    bias = None if bias is None else bias.contiguous()
    if not _are_whole_rows(qdata, scale, zero_point):
        qdata, scale, zero_point = _whole_rows(qdata, scale, zero_point)
        if isinstance(plan, (DecodePlan, HopperPlan)):
            # a dependent launch reads weights while the kernel ahead, a copy, still writes them
            plan = replace(plan, pdl=False)
        elif isinstance(plan, GemvPlan):
            plan = replace(plan, pdl="none")
    if isinstance(plan, ReferencePlan):
        w = reference.dequantize(COALESCED.unpack(qdata, k), scale, zero_point)
        return y.copy_(reference.linear(x, w, bias))
    run_coalesced(plan, x3, qdata, scale, zero_point, bias, y.view(e, m, n), group_size)
    return y


def run_coalesced(
    plan: GemvPlan | DecodePlan | GemmPlan | HopperPlan | DequantPlan,
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group_size: int,
) -> None:
    """y [E, M, N] from x [E, M, K] and contiguous W [E, N, *] or, if E is 1, [N, *]."""
    weight = qdata, scale, zero_point
    if isinstance(plan, GemvPlan):
        rows = aligned(x.flatten(0, 1))
        gemv(rows, *weight, bias, y.flatten(0, 1), group_size, plan)
    elif isinstance(plan, DecodePlan):
        decode(x, *weight, bias, y, group_size, plan)
    elif isinstance(plan, HopperPlan):
        gemm_hopper(aligned_rows(x[0]), *weight, bias, y[0], group_size, plan)
    elif isinstance(plan, GemmPlan):
        gemm(x, *weight, bias, y, group_size, plan)
    else:
        _by_blocks(dequantize, x[0], *weight, group_size, bias, y[0], plan.rows)


def _by_blocks(
    dequantize_rows: Callable,
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    rows: int,
) -> None:
    """y [M, N] = x @ W.T + bias by blocks of rows of W, through one workspace that stays in L2."""
    n, k = y.shape[1], x.shape[1]
    bias = None if bias is None else bias.to(x.dtype)
    workspace = torch.empty(min(rows, n), k, device=x.device, dtype=x.dtype)
    for first in range(0, n, rows):
        w = workspace[: min(rows, n - first)]
        dequantize_rows(qdata, scale, zero_point, w, first, group_size)
        columns = y[:, first : first + rows]
        part = None if bias is None else bias[first : first + rows]
        if x.dtype != y.dtype:
            columns.copy_(torch.mm(x, w.t(), out_dtype=y.dtype))
            if part is not None:
                columns += part
        elif part is None:
            torch.mm(x, w.t(), out=columns)
        else:
            torch.addmm(part, x, w.t(), out=columns)


@_on_its_device
def grouped_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offs: Tensor,
    group_size: int,
    act_group_size: int | None,
) -> Tensor:
    """x [T, K] sorted by expert and W [E, N, *] -> [T, N], as ops.grouped_linear defines it."""
    if x.shape[0] == 0:
        return x.new_empty(0, qdata.shape[1])
    target = arch.current(x.device.index)
    assert target is not None, "a CUDA tensor without CUDA"
    stack = _stack(qdata, scale, zero_point, group_size, None, act_group_size)
    plan = plan_grouped(x.shape[0], qdata.shape[0], x.shape[1], group_size, target, act_group_size)
    return moe.grouped_linear(x, offs, stack, plan)


@_on_its_device
def gathered_linear(
    x: Tensor,
    ids: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    act_group_size: int | None,
) -> Tensor:
    """x [S, K], ids [S] and W [E, N, *] -> [S, N], as ops.gathered_linear defines it."""
    (rows, k), (n_experts, n) = x.shape, qdata.shape[:2]
    if 0 in (rows, n_experts):
        return x.new_zeros(rows, n)
    target = arch.current(x.device.index)
    assert target is not None, "a CUDA tensor without CUDA"
    stack = _stack(qdata, scale, zero_point, group_size, None, act_group_size)
    sizes = rows, n_experts, n, k, group_size
    plan = plan_gathered(*sizes, target, act_group_size, zero_point is None)
    return moe.gathered_linear(x, ids, stack, plan)


@_on_its_device
def experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    gate_up: tuple,
    down: tuple,
    gate: str,
    act: str,
) -> Tensor | None:
    """x [T, H] -> [T, H], as ops.experts defines it; None on a device without kernels.

    gate_up, down: the fields of moe.Stack, in its order.
    """
    first, second = _stack(*gate_up), _stack(*down)
    n_experts, hidden = second.qdata.shape[:2]
    inter = second.scale.shape[-1] * second.group_size
    if 0 in (*ids.shape, n_experts):
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    # tiles that refuse the finer groups refuse the block; a whole row may be less than the 16 that
    # they refuse
    group_sizes = first.group_size, second.group_size
    group_size = 16 if 16 in group_sizes else min(group_sizes)
    symmetric = first.zero_point is None and second.zero_point is None
    integer_scales = first.multiple is not None and second.multiple is not None
    sizes = n_experts, hidden, inter, group_size, first.act_group_size, symmetric, integer_scales
    plan = _plan_experts(x.device.index, ExpertsProblem(len(ids), ids.shape[1], *sizes))
    if plan is None:
        return None
    return moe.experts(x, ids, weight, first, second, plan, gate, act)


@_on_its_device
def act_quant_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    act_group_size: int,
    multiple: Tensor | None = None,
) -> Tensor:
    """x [.., K] and W [N, *], or x [E, M, K] and W [E, N, *], as ops.linear defines it."""
    n, k = qdata.shape[-2], x.shape[-1]
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    x3 = x if qdata.ndim == 3 else x.reshape(1, -1, k)
    e, m, _ = x3.shape
    symmetric = zero_point is None
    kind = "int8", symmetric, e, act_group_size, multiple is not None
    plan = _plan(x.device.index, m, n, k, group_size, *kind)
    bias = None if bias is None else bias.contiguous()
    if isinstance(plan, GemvPlan):
        if not _are_whole_rows(qdata, scale, zero_point):
            qdata, scale, zero_point = _whole_rows(qdata, scale, zero_point)
            plan = replace(plan, pdl="none")
        rows = x3 if x3.stride(-1) == 1 else x3.contiguous()
        gemv(
            aligned(rows.flatten(0, 1), 16),
            qdata,
            scale,
            zero_point,
            bias,
            y.view(e * m, n),
            group_size,
            plan,
            act_group_size=act_group_size,
        )
        return y
    # a launch that quantises stands between a copy and what may start before it is done
    qdata, scale, zero_point = _whole_rows(qdata, scale, zero_point)
    if isinstance(plan, ActQuantIntegerPlan):
        assert multiple is not None
        multiple = multiple.contiguous()
        early = dict(pdl=plan.gemm.pdl, overlap=plan.overlap)
        codes, x_scale, _ = quantize_codes(x3, act_group_size, **early)
        operands = qdata, scale, None, bias, y.view(m, n), group_size, plan.gemm
        gemm_hopper(codes[0], *operands, multiple, x_scale[0, 0])
        return y
    if isinstance(plan, ActQuantHopperPlan):
        early = dict(pdl=plan.gemm.pdl, overlap=plan.overlap)
        x2 = round_activation(x3, act_group_size, word_order=True, **early)[0]
        gemm_hopper(x2, qdata, scale, zero_point, bias, y.view(m, n), group_size, plan.gemm)
        return y
    if isinstance(plan, ActQuantRoundedPlan):
        x2 = round_activation(x3, act_group_size)[0]
        weight = (qdata, scale, zero_point, group_size)
        _by_blocks(act_quant_dequantize, x2, *weight, bias, y.view(m, n), plan.rows)
        return y
    run = _ACT_QUANT_KERNELS.get(type(plan))
    if run is None:
        q = ACT_QUANT.unpack(qdata, k)
        return reference.act_quant_linear(x, q, scale, zero_point, act_group_size, bias)
    sum_group_size = None if symmetric else group_size
    early = dict(pdl=getattr(plan, "pdl", False), overlap=getattr(plan, "overlap", True))
    codes, x_scale, x_sum = quantize_codes(x3, act_group_size, sum_group_size, **early)
    run(
        codes,
        x_scale,
        x_sum,
        qdata.view(e, n, -1),
        scale.view(e, n, -1),
        None if zero_point is None else zero_point.view(e, n, -1),
        bias,
        y.view(e, m, n),
        group_size,
        act_group_size,
        plan,
    )
    return y


_ACT_QUANT_KERNELS: dict[type, Callable] = {
    ActQuantDp4aPlan: act_quant_dp4a,
    ActQuantDecodePlan: act_quant_decode,
    ActQuantGemmPlan: act_quant_gemm,
    Int8Plan: int8_hopper,
}


@_on_its_device
def quantize_activation(x: Tensor, act_group_size: int) -> tuple[Tensor, Tensor]:
    """x [.., K] -> int8 [.., K] and fp32 [.., groups], as reference.quantize_activation."""
    k = x.shape[-1]
    codes, scale, _ = quantize_codes(x.reshape(1, -1, k), act_group_size)
    return (
        codes[..., :k].reshape(x.shape).contiguous(),
        scale[0].mT.reshape(*x.shape[:-1], -1).contiguous(),
    )
