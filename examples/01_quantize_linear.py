"""One Linear, from float to int4 and through a product: python examples/01_quantize_linear.py"""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import quantize_

from w4tensor import W4CoalescedConfig, reference, summary

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 256)).to(device, torch.bfloat16)
x = torch.randn(3, 512, device=device, dtype=torch.bfloat16)
exact = model(x)

quantize_(model, W4CoalescedConfig(group_size=128))
print(model[0].weight)
print(summary(model))

# what the weight means: w[n, k] = (q[n, k] - 8) * scale[n, k // 128]
q, scale, zero_point = model[0].weight.to_codes()
print(f"codes {q.min()}..{q.max()}, {tuple(scale.shape)} scales, zero_point {zero_point}")
w = reference.dequantize(q, scale, zero_point)

# the answer is x @ w.T + bias to the last bits of bfloat16; the weight itself lost a little
y = model(x)
by_hand = (x.float() @ w.T + model[0].bias.float()).to(x.dtype)
print(f"from the formula: {(y - by_hand).norm() / by_hand.norm():.1e}")
print(f"from the unquantised layer: {(y - exact).norm() / exact.norm():.1e}")
