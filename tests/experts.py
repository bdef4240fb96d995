"""Experts blocks for the tests, and what they are, in plain torch and no code of the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.weights import CLASSES, DTYPES, ZEROS, Case, exact_x
from w4tensor import Int4ActQuantTensor
from w4tensor.layout import ACT_QUANT, COALESCED, LAYOUT_VERSION

ACTS = {
    "none": lambda v: v,
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "gelu": lambda v: v / 2 * (1 + torch.erf(v / 2**0.5)),
    "gelu_tanh": lambda v: v / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    "relu2": lambda v: v.clamp(min=0) ** 2,
}


def round_to_int8(x: Tensor, group: int) -> Tensor:
    """What int8 codes of x [K] mean, in fp64; scales and codes are made in fp32."""
    x = x.float()
    parts = []
    for part in x.split(len(x) if group == -1 else group):
        scale = part.abs().max() / torch.tensor(127.0)
        parts.append((part / scale).round().double() * scale.double() if scale > 0 else part)
    return torch.cat([part.double() for part in parts])


@dataclass(frozen=True)
class Block:
    """gate_up [E, 2 I, H] (or I rows) and down [E, H, I]: all that decides an answer."""

    cls: type = CLASSES[0]
    experts: int = 4
    hidden: int = 64
    inter: int = 32
    top_k: int = 2
    group_sizes: tuple[int, int] = (32, 16)
    zero: str = "symmetric"
    dtype: torch.dtype = torch.float32
    bias: bool = False
    gate: str = "halves"
    act: str = "silu"
    act_group_size: int = 32

    def cases(self) -> tuple[Case, Case]:
        rows = self.inter if self.gate == "none" else 2 * self.inter
        options: dict[str, Any] = dict(cls=self.cls, stack=(self.experts,), zero=self.zero)
        first, second = self.group_sizes
        return (
            Case(n=rows, k=self.hidden, group_size=first, **options),
            Case(n=self.hidden, k=self.inter, group_size=second, seed=1, **options),
        )

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.bias:
            return None, None
        rng = torch.Generator().manual_seed(2)
        return tuple(
            torch.randint(-8, 9, (self.experts, case.n), generator=rng).to(self.dtype) / 4
            for case in self.cases()
        )

    def load(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, ids with duplicates and sentinels, and router weights."""
        rng = torch.Generator().manual_seed(seed)
        x = exact_x(tokens, self.hidden, dtype=self.dtype, seed=seed) / 512
        ids = torch.randint(-1, self.experts + 1, (tokens, self.top_k), generator=rng)
        return x, ids, torch.rand(tokens, self.top_k, generator=rng)

    @property
    def acts_on(self) -> int | None:
        return self.act_group_size if self.cls is Int4ActQuantTensor else None

    def operands(self) -> dict[str, Any]:
        """The operator's arguments but x, ids and weight."""
        layout = COALESCED if self.acts_on is None else ACT_QUANT
        found: dict[str, Any] = {
            "act_group_size": self.acts_on,
            "gate": self.gate,
            "act": self.act,
            "layout_version": LAYOUT_VERSION,
        }
        for name, case, bias in zip(("gate_up", "down"), self.cases(), self.biases(), strict=True):
            q, scale, zero_point = case.codes()
            found |= {
                f"{name}_qdata": layout.pack(q),
                f"{name}_scale": scale,
                f"{name}_zero_point": zero_point,
                f"{name}_bias": bias,
                f"{name}_group_size": case.g,
            }
        return found

    def tensors(self) -> tuple[Any, Any]:
        fields = {} if self.acts_on is None else {"act_group_size": self.acts_on}
        first, second = (case.weight(**fields) for case in self.cases())
        return first, second

    def expected(self, x: Tensor, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """y in fp64, and the size of what was summed for it.

        y[t] = sum over j of weight[t, j] * (down[e] @ f(gate_up[e] @ x[t])), e = ids[t, j]
        """
        (first, second), (b1, b2) = (case.dense() for case in self.cases()), self.biases()
        y = torch.zeros(len(x), self.hidden, dtype=torch.float64)
        size = torch.zeros_like(y)
        for t, j in torch.cartesian_prod(torch.arange(len(x)), torch.arange(ids.shape[1])):
            e = int(ids[t, j])
            if not 0 <= e < self.experts:
                continue
            h = first[e] @ self._seen(x[t]) + (0 if b1 is None else b1[e].double())
            h = self._seen(self._f(h).to(x.dtype))
            out = second[e] @ h + (0 if b2 is None else b2[e].double())
            y[t] += weight[t, j].double() * out
            size[t] += weight[t, j].double() * (second[e].abs() @ h.abs() + 1)
        return y, size

    def _seen(self, x: Tensor) -> Tensor:
        return x.double() if self.acts_on is None else round_to_int8(x, self.act_group_size)

    def _f(self, h: Tensor) -> Tensor:
        if self.gate == "none":
            return ACTS[self.act](h)
        half = len(h) // 2
        gate, up = (h[:half], h[half:]) if self.gate == "halves" else (h[0::2], h[1::2])
        if self.act == "clamped_swiglu":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        return ACTS[self.act](gate) * up

    def with_(self, **changes: Any) -> Block:
        return replace(self, **changes)


@st.composite
def blocks(draw) -> Block:
    """Any legal block, small. Where int8 codes of h decide, h is the same in fp32 and fp64."""
    gate = draw(st.sampled_from(["halves", "interleaved", "none"]))
    cls = draw(st.sampled_from(CLASSES))
    acts = [*ACTS] if gate == "none" else [*ACTS, "clamped_swiglu"]
    if cls is Int4ActQuantTensor:
        acts = ["none", "relu2"] if gate == "none" else ["none"]
    sizes = [(16, 48), (32, 64), (-1, 33), (-1, 100), (64, 192)]
    first, hidden = draw(st.sampled_from(sizes))
    second, inter = draw(st.sampled_from([*sizes, (-1, 1), (-1, 8)]))
    return Block(
        cls=cls,
        experts=draw(st.integers(1, 5)),
        hidden=hidden,
        inter=inter,
        top_k=draw(st.integers(0, 6)),
        group_sizes=(first, second),
        zero=draw(st.sampled_from(ZEROS)),
        # int8 codes of an h that was rounded to 16 bits first have ties
        dtype=draw(st.sampled_from(DTYPES)) if cls is CLASSES[0] else torch.float32,
        bias=draw(st.booleans()),
        gate=gate,
        act=draw(st.sampled_from(acts)),
        act_group_size=draw(st.sampled_from([32, 64, 128, -1])),
    )
