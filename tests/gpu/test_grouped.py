"""torch._grouped_mm with stacked int4 weights on a CUDA device, against the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, reference

from .test_linear import _poison, codes, rel_err  # noqa: F401

pytestmark = pytest.mark.gpu


act_groups = pytest.mark.parametrize("act_group_size", [None, 32, 128, -1])


def weight(stack, k, group_size, zero, dtype, act_group_size=None):
    # so many that one row's outputs have the error that budgets are of, which is a mean
    q, scale, zero_point = codes(1440, k, group_size, zero, dtype, stack=(stack,))
    if act_group_size is None:
        return CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=group_size)
    fields = {"group_size": group_size, "act_group_size": act_group_size}
    return Int4ActQuantTensor.from_codes(q, scale, zero_point, **fields)


def seen(x, w):
    """x, or what its codes mean where the weight quantises it, in fp64."""
    if w.act_group_size is None:
        return x.double()
    x_q, x_scale = reference.quantize_activation(x, w.act_group_size)
    group = x.shape[1] if w.act_group_size == -1 else w.act_group_size
    return x_q.double() * x_scale.double().repeat_interleave(group, -1)[:, : x.shape[1]]


def expected(x, w, offs):
    """The definition in fp64."""
    x = seen(x, w)
    dense = reference.dequantize(*w.to_codes()).double()
    y = torch.zeros(x.shape[0], dense.shape[1], dtype=torch.float64, device="cuda")
    start = 0
    for e, end in enumerate(offs.tolist()):
        y[start:end] = x[start:end] @ dense[e].mT
        start = end
    return y


@act_groups
@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
@pytest.mark.parametrize("zero", [None, "fractional"])
@pytest.mark.parametrize("rows", [0, 1, 9, 64, 700])
def test_rows_meet_their_experts(rows, zero, group_size, act_group_size):
    for dtype, budget in ((torch.bfloat16, 3e-3), (torch.float16, 6e-4)):
        w = weight(7, 384, group_size, zero, dtype, act_group_size)
        x = torch.randn(rows, 384, device="cuda", dtype=dtype)
        # some experts have no rows, and the last rows no expert
        ends = torch.randint(0, rows + 1, (7,)).sort().values.clamp(max=max(rows - 2, min(rows, 1)))
        offs = ends.to("cuda", torch.int32)
        y = torch._grouped_mm(x, w.transpose(-2, -1), offs=offs)
        ref = expected(x, w, offs)
        # kernels with 16-bit activations round what the codes mean to 16 bits
        budget += rel_err(seen(x, w).to(dtype), seen(x, w))
        assert rel_err(y, ref) <= max(budget, 2 * rel_err(ref.to(dtype), ref))
        assert (y[ends[-1] :] == 0).all()
        torch.cuda.set_sync_debug_mode("error")
        again = torch._grouped_mm(x, w.transpose(-2, -1), offs=offs)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(y, again)


@act_groups
@pytest.mark.parametrize("rows", [1, 50, 700])
def test_a_graph_replays_with_other_offsets(rows, act_group_size):
    w = weight(5, 384, 128, None, torch.bfloat16, act_group_size).transpose(-2, -1)
    x = torch.randn(rows, 384, device="cuda", dtype=torch.bfloat16)
    offs = torch.full((5,), rows, device="cuda", dtype=torch.int32)
    torch._grouped_mm(x, w, offs=offs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = torch._grouped_mm(x, w, offs=offs)
    for part in ([0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.4, 0.6, 0.8, 1]):
        offs.copy_((torch.tensor(part) * rows).int())
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, torch._grouped_mm(x, w, offs=offs))


@act_groups
def test_fp32_activations(act_group_size):
    w = weight(3, 384, 128, None, torch.bfloat16, act_group_size)
    for rows in (1, 20, 400):
        x = torch.randn(rows, 384, device="cuda")
        offs = torch.tensor([0, rows // 2, rows], device="cuda", dtype=torch.int32)
        y = torch._grouped_mm(x, w.transpose(-2, -1), offs=offs)
        assert y.dtype == torch.float32
        assert rel_err(y, expected(x, w, offs)) <= 3e-3
