"""torch._grouped_mm with stacked int4 weights on a CUDA device, against the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor, reference

from .test_linear import _poison, codes, rel_err  # noqa: F401

pytestmark = pytest.mark.gpu


def expected(x, w, offs):
    dense = reference.dequantize(*w.to_codes()).double()
    y = torch.zeros(x.shape[0], dense.shape[1], dtype=torch.float64, device="cuda")
    start = 0
    for e, end in enumerate(offs.tolist()):
        y[start:end] = x[start:end].double() @ dense[e].mT
        start = end
    return y


@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
@pytest.mark.parametrize("zero", [None, "fractional"])
@pytest.mark.parametrize("rows", [1, 9, 64, 700])
def test_rows_meet_their_experts(rows, zero, group_size):
    for dtype, budget in ((torch.bfloat16, 3e-3), (torch.float16, 6e-4)):
        q, scale, zero_point = codes(96, 384, group_size, zero, dtype, stack=(7,))
        w = CudaCoalescedInt4Tensor.from_codes(q, scale, zero_point, group_size=group_size)
        x = torch.randn(rows, 384, device="cuda", dtype=dtype)
        # some experts have no rows, and the last rows no expert
        ends = torch.randint(0, rows + 1, (7,)).sort().values.clamp(max=max(rows - 2, 1))
        offs = ends.to("cuda", torch.int32)
        y = torch._grouped_mm(x, w.transpose(-2, -1), offs=offs)
        ref = expected(x, w, offs)
        assert rel_err(y, ref) <= max(budget, 2 * rel_err(ref.to(dtype), ref))
        assert (y[offs[-1] :] == 0).all()
        assert torch.equal(y, torch._grouped_mm(x, w.transpose(-2, -1), offs=offs))


def test_a_graph_replays_with_other_offsets():
    q, scale, _ = codes(96, 384, 128, None, torch.bfloat16, stack=(5,))
    w = CudaCoalescedInt4Tensor.from_codes(q, scale, group_size=128).transpose(-2, -1)
    x = torch.randn(50, 384, device="cuda", dtype=torch.bfloat16)
    offs = torch.tensor([10, 20, 30, 40, 50], device="cuda", dtype=torch.int32)
    torch._grouped_mm(x, w, offs=offs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = torch._grouped_mm(x, w, offs=offs)
    for ends in ([0, 0, 50, 50, 50], [1, 2, 3, 4, 5], [50] * 5):
        offs.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, torch._grouped_mm(x, w, offs=offs))


def test_int8_activations_keep_their_definition():
    q, scale, _ = codes(96, 384, 128, None, torch.bfloat16, stack=(3,))
    w = Int4ActQuantTensor.from_codes(q, scale, group_size=128, act_group_size=32)
    x = torch.randn(20, 384, device="cuda", dtype=torch.bfloat16)
    offs = torch.tensor([4, 4, 20], device="cuda", dtype=torch.int32)
    y = torch._grouped_mm(x, w.transpose(-2, -1), offs=offs)
    x_q, x_scale = reference.quantize_activation(x, 32)
    ref = expected(x_q.double() * x_scale.double().repeat_interleave(32, -1), w, offs)
    assert rel_err(y, ref) <= 3e-3
