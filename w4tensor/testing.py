"""What tests and benchmarks share: shapes of real models, random int4 weights, error measures.

Pure torch; needs no GPU and imports no kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from w4tensor import reference
from w4tensor.layout import MAX_MULTIPLE, check_group_size
from w4tensor.quantize import unit_of

__all__ = [
    "ACT_QUANT_SQNR_DB",
    "DENSE_SHAPES",
    "Int4Codes",
    "MOE_REL_ERR_BUDGET",
    "MOE_SHAPES",
    "MoeShape",
    "REL_ERR_BUDGET",
    "Shape",
    "TOKENS",
    "ZeroPoint",
    "random_codes",
    "random_routing",
    "rel_err",
    "sqnr_db",
]

ZeroPoint = Literal["symmetric", "integer", "fractional"]

# relative Frobenius error of a W4A16 product against fp64 on the same dequantised weight
REL_ERR_BUDGET = {torch.bfloat16: 3e-3, torch.float16: 6e-4}
# of a whole experts block in bf16: two products, an activation and a weighted sum
MOE_REL_ERR_BUDGET = 5e-3
# signal to noise of int8 activations on Gaussian x, by activation group
ACT_QUANT_SQNR_DB = {32: 38.0}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Linear [n, k] of a real model, with the group size that is usual for it."""

    n: int
    k: int
    model: str
    layer: str
    group_size: int = 128

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass(frozen=True, slots=True)
class MoeShape:
    """An experts block: gate_up [experts, 2 inter, hidden], down [experts, hidden, inter]."""

    experts: int
    top_k: int
    hidden: int
    inter: int
    model: str
    tokens: tuple[int, ...]
    group_size: int = 128

    @property
    def name(self) -> str:
        return f"E{self.experts}-top{self.top_k}-H{self.hidden}-I{self.inter}"


DENSE_SHAPES = (
    Shape(4096, 4096, "llama-3-8b", "o_proj"),
    Shape(6144, 4096, "llama-3-8b", "qkv_proj"),
    Shape(28672, 4096, "llama-3-8b", "gate_up_proj"),
    Shape(4096, 14336, "llama-3-8b", "down_proj"),
    Shape(128256, 4096, "llama-3-8b", "lm_head"),
    Shape(8192, 8192, "llama-3-70b", "o_proj"),
    Shape(57344, 8192, "llama-3-70b", "gate_up_proj"),
    Shape(8192, 28672, "llama-3-70b", "down_proj"),
    Shape(12352, 2048, "qwen3.5-35b-a3b", "linear attention in_proj"),
    Shape(9216, 2048, "qwen3.5-35b-a3b", "qkv_proj with gate"),
    Shape(2048, 4096, "qwen3.5-35b-a3b", "o_proj"),
    Shape(1024, 2048, "qwen3.5-35b-a3b", "shared expert gate_up_proj"),
    Shape(2048, 512, "qwen3.5-35b-a3b", "shared expert down_proj"),
    Shape(256, 2048, "qwen3.5-35b-a3b", "router"),
    Shape(1, 2048, "qwen3.5-35b-a3b", "shared expert gate"),
    Shape(248320, 2048, "qwen3.5-35b-a3b", "lm_head"),
    Shape(43008, 5376, "gemma-4-31b", "gate_up_proj", 32),
    Shape(5376, 21504, "gemma-4-31b", "down_proj", 32),
    Shape(5376, 8192, "gemma-4-31b", "o_proj", 32),
    Shape(5120, 2880, "gpt-oss-20b", "qkv_proj", 32),
    Shape(2880, 4096, "gpt-oss-20b", "o_proj", 32),
)

# both sides of every border that dispatch has had, and the powers of two
TOKENS: tuple[int, ...] = (1, 2, 3, 4, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 384)
TOKENS += (512, 1024, 2048, 4096, 8192)

MOE_SHAPES = (
    MoeShape(256, 8, 2048, 512, "qwen3.5-35b-a3b", (1, 4, 16, 64, 256, 1600, 4096)),
    MoeShape(8, 2, 4096, 14336, "mixtral-8x7b", (1, 4, 16, 64, 512)),
    MoeShape(128, 8, 2048, 768, "qwen3-30b-a3b", (1, 4, 16, 64, 256, 1024, 4096)),
    MoeShape(32, 4, 2880, 2880, "gpt-oss-20b", (1, 4, 16, 64, 256, 1024, 4096), 64),
    MoeShape(64, 8, 2048, 1024, "olmoe-7b", (1, 4, 16, 64, 256, 1024, 4096)),
)


@dataclass(frozen=True, slots=True)
class Int4Codes:
    """A weight before packing: q uint8 [.., N, K]; scale, zero_point and multiple (of integer
    scales, layout.py) [.., N, K / group_size]."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    multiple: Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.q.shape[-1] // self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """What a kernel must read at the least: half a byte a code, scales and zero points."""
        zero_point = 0 if self.zero_point is None else self.zero_point.nbytes
        return self.q.numel() // 2 + self.scale.nbytes + zero_point

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q - zero_point) * scale, computed in fp32."""
        return reference.dequantize(self.q, self.scale, self.zero_point).to(dtype)


def random_codes(
    *shape: int,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    zero_point: ZeroPoint = "symmetric",
    device: torch.device | str = "cpu",
    seed: int = 0,
    integer_scales: bool = False,
) -> Int4Codes:
    """Random codes [.., N, K] whose products with Gaussian x have a standard deviation near 1.

    >>> codes = random_codes(2, 256, group_size=128, zero_point="fractional")
    >>> codes.scale.shape, codes.group_size
    (torch.Size([2, 2]), 128)
    """
    k = shape[-1]
    groups = (*shape[:-1], k // check_group_size(group_size, k))
    g = torch.Generator(device).manual_seed(seed)
    q = torch.randint(0, 16, shape, dtype=torch.uint8, device=device, generator=g)
    # 16 equally likely codes have a standard deviation of 4.6
    scale = (torch.rand(groups, device=device, generator=g) + 0.5) / (4.6 * math.sqrt(k))
    zero = None
    if zero_point == "integer":
        zero = torch.randint(4, 12, groups, device=device, generator=g).half()
    elif zero_point == "fractional":
        zero = (torch.rand(groups, device=device, generator=g) * 8 + 4).half()
    multiple = None
    if integer_scales:
        unit = unit_of(scale.amax(-1, keepdim=True), dtype)
        multiple = (scale / unit).round().clamp(1, MAX_MULTIPLE).to(torch.int8)
        scale = unit * multiple
    return Int4Codes(q, scale.to(dtype), zero, multiple)


def random_routing(
    tokens: int,
    experts: int,
    top_k: int,
    *,
    zipf: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """ids int64 [tokens, top_k], all different in a token, and weights fp32 that sum to 1.

    Expert e is drawn in proportion to (e + 1) ** -zipf: 0 is uniform.

    >>> ids, weights = random_routing(3, experts=8, top_k=2)
    >>> ids.shape, weights.sum(-1)
    (torch.Size([3, 2]), tensor([1., 1., 1.]))
    """
    g = torch.Generator(device).manual_seed(seed)
    rank = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
    probability = (rank**-zipf).expand(tokens, experts)
    ids = torch.multinomial(probability, top_k, replacement=False, generator=g)
    logits = torch.randn(tokens, top_k, device=device, generator=g)
    return ids, logits.softmax(-1)


def rel_err(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected| in the Frobenius norm; NaN where y has one.

    >>> rel_err(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    0.0
    """
    expected = expected.double()
    scale = torch.linalg.vector_norm(expected).clamp(min=1e-300)
    return (torch.linalg.vector_norm(y.double() - expected) / scale).item()


def sqnr_db(y: Tensor, expected: Tensor) -> float:
    """Signal to quantisation noise in decibels: -20 log10 of rel_err, infinite where equal.

    >>> round(sqnr_db(torch.tensor([1.01]), torch.tensor([1.0])))
    40
    """
    error = rel_err(y, expected)
    return math.inf if error == 0 else -20 * math.log10(error)
