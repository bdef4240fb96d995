"""A mixture-of-experts model in int4: its Linears, its stacked experts, and what runs them.

A small Mixtral with random weights, built from its config; a real one goes the same way.
"""

import torch
from torchao.quantization import quantize_
from transformers import MixtralConfig, MixtralForCausalLM

from w4tensor import W4CoalescedConfig, summary, with_experts

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=512)
heads = dict(num_attention_heads=4, num_key_value_heads=2)
config = MixtralConfig(**sizes, **heads, num_local_experts=8, dtype=torch.bfloat16)
model = MixtralForCausalLM(config).to(device, torch.bfloat16).eval()

prompt = torch.arange(1, 33, device=device)[None]
with torch.no_grad():
    before = model(prompt).logits.float()
quantize_(model, with_experts(W4CoalescedConfig(group_size=32)), filter_fn=None)
with torch.no_grad():
    after = model(prompt).logits.float()

print(summary(model))
print(f"logits moved by {(after - before).norm() / before.norm():.3f} of their norm")
print("continues with", model.generate(prompt, max_new_tokens=5, do_sample=False)[0, -5:].tolist())
