"""The assembly of kernels/unpack.py against its shift-and-mask twin, for every word pattern."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from w4tensor.kernels.unpack import unpack  # noqa: E402

pytestmark = pytest.mark.gpu


@triton.jit
def _unpack_kernel(w_ptr, out_ptr, N, BLOCK: tl.constexpr, ASM: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(w_ptr + i, mask=i < N, other=0)
    e0, e1, e2, e3, e4, e5, e6, e7 = unpack(words, out_ptr.dtype.element_ty, ASM)
    tl.store(out_ptr + 0 * N + i, e0, mask=i < N)
    tl.store(out_ptr + 1 * N + i, e1, mask=i < N)
    tl.store(out_ptr + 2 * N + i, e2, mask=i < N)
    tl.store(out_ptr + 3 * N + i, e3, mask=i < N)
    tl.store(out_ptr + 4 * N + i, e4, mask=i < N)
    tl.store(out_ptr + 5 * N + i, e5, mask=i < N)
    tl.store(out_ptr + 6 * N + i, e6, mask=i < N)
    tl.store(out_ptr + 7 * N + i, e7, mask=i < N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_assembly_is_its_twin(dtype):
    random = torch.randint(-(2**31), 2**31, (10_000,), device="cuda")
    # each nibble alone at each of its sixteen values
    single = torch.tensor([v << 4 * at for at in range(8) for v in range(16)], device="cuda")
    words = torch.cat([random, single]).to(torch.int32)
    n = words.numel()
    out = torch.full((2, 8, n), float("nan"), device="cuda", dtype=dtype)
    for asm in (False, True):
        _unpack_kernel[(triton.cdiv(n, 256),)](words, out[int(asm)], n, BLOCK=256, ASM=asm)
    assert torch.equal(out[0], out[1])
    # and the twin is the format: element e = 4p + 2q + r at nibble 4r + 2p + q
    for e in range(8):
        p, q, r = e >> 2, e >> 1 & 1, e & 1
        codes = words.long() >> 4 * (4 * r + 2 * p + q) & 15
        assert torch.equal(out[0, e].float(), (codes.float() - 8) / 4)
