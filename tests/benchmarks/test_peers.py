"""The blocks and products that the benchmarks time compute what they are compared as."""

from __future__ import annotations

import pytest
import torch

from benchmarks import experts, peers
from w4tensor.testing import random_codes, random_routing, rel_err

# int8 activations round what the others keep
BUDGET = {"bf16": 0.01, "int8g32": 0.02}


@pytest.mark.parametrize("act", BUDGET)
@pytest.mark.parametrize(
    "impl", ["w4tensor", "w4tensor-grouped", "w4tensor-batched", "bf16", "bf16-batched"]
)
def test_experts_block_is_the_definition(impl, act):
    gate_up = random_codes(6, 256, 128, zero_point="integer")
    down = random_codes(6, 128, 128, seed=1)
    ids, weights = random_routing(5, experts=6, top_k=2, seed=2)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    if impl.startswith("bf16") and act != "bf16":
        with pytest.raises(peers.Refused):
            experts.EXPERTS[impl](gate_up, down, peers.ACTS[act])
        return
    block = experts.EXPERTS[impl](gate_up, down, peers.ACTS[act]).copy().route(ids, weights)
    expected = experts.reference_block(x, ids, weights, gate_up, down)
    assert rel_err(block(x), expected) < BUDGET[act]


def test_reference_block_on_one_pair():
    """One token on one expert, against the formula written out."""
    gate_up = random_codes(3, 64, 32, group_size=32)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    weight = torch.tensor([[0.5]])
    down = random_codes(3, 32, 32, group_size=32)
    y = experts.reference_block(x, torch.tensor([[2]]), weight, gate_up, down)
    gate, up = (gate_up.dequantize()[2] @ x[0]).chunk(2)
    expected = 0.5 * down.dequantize()[2] @ (gate * gate.sigmoid() * up)
    torch.testing.assert_close(y[0], expected)


@pytest.mark.parametrize("act", ["bf16", "fp16", "int8g32", "int8token"])
def test_linear_adapters_copy_their_weights(act):
    codes = random_codes(16, 128, dtype=peers.ACTS[act].dtype)
    linear = peers.Ours(codes, peers.ACTS[act])
    twin = linear.copy()
    assert twin.weight.qdata.data_ptr() != linear.weight.qdata.data_ptr()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3)).to(peers.ACTS[act].dtype)
    assert torch.equal(twin(x), linear(x))
    assert rel_err(linear(x), x.float() @ codes.dequantize().mT) < 0.05
