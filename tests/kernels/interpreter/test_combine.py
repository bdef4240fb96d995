"""kernels/combine.py in Triton's interpreter, against the sum it is defined as."""

from __future__ import annotations

import pytest
import torch

from w4tensor.kernels.combine import combine


@pytest.mark.parametrize("slices", [None, 1, 3])
@pytest.mark.parametrize("tokens,top_k,n", [(1, 1, 1), (3, 2, 40), (2, 4, 1030)])
def test_slots_and_slices_are_added_in_order(tokens, top_k, n, slices):
    g = torch.Generator().manual_seed(n)
    pairs = torch.randn(slices or 1, tokens * top_k, n, generator=g)
    ids = torch.randint(0, 4, (tokens, top_k), generator=g)
    # a sentinel, whose rows nobody wrote
    ids[-1, 0] = 4
    pairs[:, (tokens - 1) * top_k] = torch.nan
    weight = torch.rand(tokens, top_k, generator=g)
    y = torch.full((tokens, n), torch.nan)
    assert combine(pairs if slices else pairs[0], ids, weight, y, n_experts=4) is y
    expected = torch.zeros(tokens, n)
    for t in range(tokens):
        for j in range(top_k):
            if ids[t, j] < 4:
                row = pairs[0, t * top_k + j]
                for part in pairs[1:, t * top_k + j]:
                    row = row + part
                expected[t] += row * weight[t, j]
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
