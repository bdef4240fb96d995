"""What stands between an experts block's two products, on fp32 accumulators."""

from __future__ import annotations

import triton
import triton.language as tl

# gpt-oss: act(gate) * (up + 1), both clamped
CLAMP = tl.constexpr(7.0)
CLAMPED_ALPHA = tl.constexpr(1.702)


@triton.jit
def activate(v, ACT: tl.constexpr):
    """act(v) of a model without a gate, or of the gate alone."""
    if ACT == "none":
        return v
    elif ACT == "silu":
        return v * tl.sigmoid(v)
    elif ACT == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        return v * tl.sigmoid(1.5957691216057308 * v * (1.0 + 0.044715 * v * v))
    else:
        tl.static_assert(ACT == "relu2", "no such activation")
        positive = tl.maximum(v, 0.0)
        return positive * positive


@triton.jit
def gated(gate, up, ACT: tl.constexpr):
    """act(gate) * up, or gpt-oss's clamped form of it."""
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, CLAMP)
        up = tl.minimum(tl.maximum(up, -CLAMP), CLAMP)
        return gate * tl.sigmoid(CLAMPED_ALPHA * gate) * (up + 1.0)
    else:
        return activate(gate, ACT) * up
