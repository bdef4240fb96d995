"""What a user hands to quantize_: two configs and their handlers. They name a tensor, no kernel."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from w4tensor.errors import Unsupported
from w4tensor.layout import SCALE_DTYPES, check_group_size
from w4tensor.ops import check_act_group_size
from w4tensor.quantize import ALGORITHMS, Algorithm
from w4tensor.tensors import CudaCoalescedInt4Tensor, Int4ActQuantTensor

__all__ = ["MIN_OUT_FEATURES", "REASONS_ATTRIBUTE", "W4ActQuantConfig", "W4CoalescedConfig"]

# gates and state-space projections below this many rows gain nothing and decide much
MIN_OUT_FEATURES = 64
# where a handler leaves, on a module, why it left a parameter alone: {parameter name: reason}
REASONS_ATTRIBUTE = "_w4tensor_left_alone"


@dataclass
class W4CoalescedConfig(AOBaseConfig):
    """int4 weights, bf16 or fp16 activations: Linear weights become CudaCoalescedInt4Tensor.

    Args:
        group_size: weights a scale along K: 16, 32, 64, 128, 256, or -1 for the whole row.
        algorithm: how codes are chosen, as quantize.quantize_weight: "symmetric", "min_max", "hqq".
        version: of this config; 1.

    Raises:
        Unsupported: a value that could never work.

    >>> from torchao.quantization import quantize_
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> quantize_(model, W4CoalescedConfig(group_size=128))
    """

    group_size: int = 128
    algorithm: Algorithm = "symmetric"
    version: int = 1

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.algorithm not in ALGORITHMS:
            raise Unsupported(f"algorithm={self.algorithm!r} is not one of {ALGORITHMS}")

    def _quantize(self, weight: torch.Tensor) -> torch.Tensor:
        return CudaCoalescedInt4Tensor.from_hp(weight, self.group_size, self.algorithm)


@dataclass
class W4ActQuantConfig(W4CoalescedConfig):
    """int4 weights, int8 activations: Linear weights become Int4ActQuantTensor.

    Args:
        group_size, algorithm, version: as W4CoalescedConfig.
        act_group_size: activations a scale along K: 32, 64, 128, or -1 for one a token.

    Raises:
        Unsupported: a value that could never work.

    >>> from torchao.quantization import quantize_
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> quantize_(model, W4ActQuantConfig(act_group_size=32))
    """

    act_group_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_act_group_size(self.act_group_size)

    def _quantize(self, weight: torch.Tensor) -> torch.Tensor:
        return Int4ActQuantTensor.from_hp(
            weight, self.group_size, self.algorithm, act_group_size=self.act_group_size
        )


@register_quantize_module_handler(W4ActQuantConfig)
@register_quantize_module_handler(W4CoalescedConfig)
def _quantize_parameter(
    module: nn.Module, config: W4CoalescedConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace one parameter of `module` by its int4 tensor, or note on the module why not."""
    if module._parameters.get(parameter_name) is None:
        return module
    reason = _why_not(module, parameter_name, config) or _why_tied(module, parameter_name)
    if reason is not None:
        reasons = module.__dict__.setdefault(REASONS_ATTRIBUTE, {})
        reasons[parameter_name] = reason
        return module
    quantised = config._quantize(getattr(module, parameter_name))
    module._parameters[parameter_name] = nn.Parameter(quantised, requires_grad=False)
    # an earlier config may have left it alone
    module.__dict__.get(REASONS_ATTRIBUTE, {}).pop(parameter_name, None)
    return module


def _why_not(module: nn.Module, name: str, config: W4CoalescedConfig) -> str | None:
    weight = getattr(module, name)
    if isinstance(weight, TorchAOBaseTensor):
        return f"already quantised ({type(weight).__name__})"
    if weight.ndim not in (2, 3) or (weight.ndim == 2 and not isinstance(module, nn.Linear)):
        return f"a {weight.ndim}-D {type(module).__name__} parameter is not a Linear or an expert"
    if weight.dtype not in SCALE_DTYPES:
        return f"{weight.dtype} is not a float of 2 or 4 bytes"
    if "router" in type(module).__name__.lower():
        return "a router: its choices are worth more than its bytes"
    n, k = weight.shape[-2:]
    if n < MIN_OUT_FEATURES:
        return f"N={n} is below {MIN_OUT_FEATURES}: a gate or router, nothing to gain"
    try:
        check_group_size(config.group_size, k)
    except Unsupported as error:
        return str(error)
    return None


def _why_tied(module: nn.Module, name: str) -> str | None:
    if getattr(module, name).ndim == 2 and _owners(module, name) > 1:
        return "tied: another module holds the same parameter and would lose it"
    return None


def _owners(module: nn.Module, name: str) -> int:
    """How many modules hold this very parameter. quantize_ shows a handler one module at a time."""
    # its dict and this call: the count of a parameter that nobody else refers to, no caller either
    if sys.getrefcount(module._parameters[name]) <= 2:
        return 1
    weight = module._parameters[name]
    return sum(
        any(value is weight for value in owner.__dict__.get("_parameters", {}).values())
        for owner in gc.get_objects()
        # isinstance would ask objects of other packages for their __class__
        if issubclass(type(owner), nn.Module)
    )
