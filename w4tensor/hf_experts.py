"""Experts modules of transformers: how their weights lie. Nothing here imports transformers."""

from __future__ import annotations

import sys

from torch import Tensor, nn

__all__ = ["is_transposed"]


def is_transposed(module: nn.Module, weight: Tensor) -> bool:
    """Whether `module` holds its stacked `weight` as [E, K, N]."""
    if weight.ndim != 3:
        return False
    if getattr(module, "is_transposed", False) is True:
        return True
    # the one class that multiplies by [E, K, N] and has no attribute to say so
    llama4 = sys.modules.get("transformers.models.llama4.modeling_llama4")
    return llama4 is not None and isinstance(module, llama4.Llama4TextExperts)
