"""What a user hands to quantize_: two configs and their handlers. They name a tensor, no kernel."""

from __future__ import annotations

import gc
import re
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from w4tensor import hf_experts
from w4tensor.checks import check_act_group_size
from w4tensor.errors import Unsupported
from w4tensor.layout import SCALE_DTYPES, check_group_size
from w4tensor.quantize import ALGORITHMS, Algorithm
from w4tensor.tensors import CudaCoalescedInt4Tensor, Int4ActQuantTensor, linear_weight

__all__ = [
    "MIN_OUT_FEATURES",
    "REASONS_ATTRIBUTE",
    "W4ActQuantConfig",
    "W4CoalescedConfig",
    "with_experts",
]

# gates and state-space projections below this many rows gain nothing and decide much
MIN_OUT_FEATURES = 64
# where a handler leaves, on a module, why it left a parameter alone: {parameter name: reason}
REASONS_ATTRIBUTE = "_w4tensor_left_alone"
# stacked weights [E, .., ..] as transformers names them; a module of experts may itself be the root
EXPERTS = (
    r"(.*experts\.)?(gate_up|gate|up|down)_proj",
    # JetMoE
    r".*\b(input|output)_linear\.weight",
)


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
    # set by with_experts
    _reaches_experts: ClassVar[bool] = False

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
        integer_scales: make a row's scales multiples of one number (quantize.py), with which
            products of many tokens are faster than with bf16 weights: benchmarks/README.md. Only
            with act_group_size=-1 and algorithm="symmetric".

    Raises:
        Unsupported: a value that could never work.

    >>> from torchao.quantization import quantize_
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> quantize_(model, W4ActQuantConfig(act_group_size=32))
    """

    act_group_size: int = 32
    integer_scales: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_act_group_size(self.act_group_size)
        if self.integer_scales and (self.act_group_size != -1 or self.algorithm != "symmetric"):
            raise Unsupported(
                f"integer_scales with act_group_size={self.act_group_size} and algorithm="
                f"{self.algorithm!r}: they serve activations with one scale a token "
                "(act_group_size=-1) and symmetric weights"
            )

    def _quantize(self, weight: torch.Tensor) -> torch.Tensor:
        return Int4ActQuantTensor.from_hp(
            weight,
            self.group_size,
            self.algorithm,
            integer_scales=self.integer_scales,
            act_group_size=self.act_group_size,
        )


def with_experts(config: W4CoalescedConfig) -> FqnToConfig:
    """`config` for every Linear and every stack of experts of a transformers model.

    torchao wants filter_fn=None beside it. It is as good for TorchAoConfig(..) of from_pretrained.

    >>> from torchao.quantization import quantize_
    >>> from transformers import MixtralConfig, MixtralModel
    >>> sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=1, vocab_size=8)
    >>> model = MixtralModel(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    >>> quantize_(model, with_experts(W4CoalescedConfig()), filter_fn=None)
    >>> type(model.layers[0].mlp.experts.down_proj).__name__
    'CudaCoalescedInt4Tensor'
    """
    config = replace(config)
    # torchao writes no private attribute to JSON
    config.__dict__["_reaches_experts"] = True
    chosen = OrderedDict((f"re:{pattern}", config) for pattern in EXPERTS)
    with warnings.catch_warnings():
        # no pattern of names says "every Linear"
        warnings.filterwarnings("ignore", message="Config Deprecation: _default")
        return FqnToConfig(chosen | {"_default": config})


@register_quantize_module_handler(W4ActQuantConfig)
@register_quantize_module_handler(W4CoalescedConfig)
def _quantize_parameter(
    module: nn.Module, config: W4CoalescedConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace one parameter of `module` by its int4 tensor, or note on the module why not."""
    _look_around(module, config)
    if module._parameters.get(parameter_name) is None:
        return module
    reason = _why_not(module, parameter_name, config) or _why_tied(module, parameter_name)
    if reason is not None:
        reasons = module.__dict__.setdefault(REASONS_ATTRIBUTE, {})
        reasons[parameter_name] = reason
        return module
    weight = getattr(module, parameter_name).detach()
    if hf_experts.is_transposed(module, weight):
        # codes run along K wherever the model has it
        quantised = config._quantize(weight.mT).mT
    else:
        quantised = config._quantize(weight)
    if linear_weight.wants(module, parameter_name):
        quantised = linear_weight.as_linear_weight(quantised)
    module._parameters[parameter_name] = nn.Parameter(quantised, requires_grad=False)
    # an earlier config may have left it alone
    module.__dict__.get(REASONS_ATTRIBUTE, {}).pop(parameter_name, None)
    hf_experts.choose(module)
    return module


def _why_not(module: nn.Module, name: str, config: W4CoalescedConfig) -> str | None:
    weight = getattr(module, name)
    if isinstance(weight, TorchAOBaseTensor):
        return f"already quantised ({type(weight).__name__})"
    if weight.ndim not in (2, 3) or (weight.ndim == 2 and not isinstance(module, nn.Linear)):
        return f"a {weight.ndim}-D {type(module).__name__} parameter is not a Linear or an expert"
    if weight.dtype not in SCALE_DTYPES:
        return f"{weight.dtype} is not a float of 2 or 4 bytes"
    if module in _in_routers:
        return "a router: its choices are worth more than its bytes"
    n, k = weight.mT.shape[-2:] if hf_experts.is_transposed(module, weight) else weight.shape[-2:]
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
    """How many modules of the model hold this very parameter."""
    # its dict and this call: the count of a parameter that nobody else refers to, no caller either
    if sys.getrefcount(module._parameters[name]) <= 2:
        return 1
    weight = module._parameters[name]
    return sum(
        any(value is weight for value in owner._parameters.values()) for owner in _models[module]
    )


# a module -> all of the models that hold it; and the Linears of their routers
_models: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_in_routers: WeakSet[nn.Module] = WeakSet()


def _look_around(module: nn.Module, config: W4CoalescedConfig) -> None:
    """Once for a model: find its modules and its routers, and say if its experts stay behind.

    quantize_ shows a handler one module at a time and nothing around it.
    """
    if module in _models:
        return
    roots = _roots(module)
    model = WeakSet(each for root in roots for each in root.modules())
    for each in model:
        _models[each] = model
        if re.search("router|gating", type(each).__name__.lower()):
            _in_routers.update(part for part in each.modules() if isinstance(part, nn.Linear))
    if isinstance(module, nn.Linear) and not config._reaches_experts:
        for root in roots:
            _warn_of_experts(root, config)


def _roots(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that hold `module`."""
    holders: dict[int, list[nn.Module]] = {}
    for holder in gc.get_objects():
        # isinstance would ask objects of other packages for their __class__
        if issubclass(type(holder), nn.Module):
            for child in holder.__dict__.get("_modules", {}).values():
                holders.setdefault(id(child), []).append(holder)
    family, outer = {id(module): module}, [module]
    while outer:
        outer = [h for each in outer for h in holders.get(id(each), ()) if id(h) not in family]
        family |= {id(each): each for each in outer}
    # modules may hold each other in a circle
    return [each for each in family.values() if id(each) not in holders] or [module]


def _warn_of_experts(root: nn.Module, config: W4CoalescedConfig) -> None:
    found = {
        f"{owner_name}.{name}": parameter
        for owner_name, owner in root.named_modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.ndim == 3
        if any(re.fullmatch(pattern, f"{owner_name}.{name}") for pattern in EXPERTS)
        if _why_not(owner, name, config) is None
    }
    if not found:
        return
    whole = sum(parameter.numel() for parameter in root.parameters())
    share = sum(parameter.numel() for parameter in found.values()) / whole
    name, parameter = next(iter(found.items()))
    warnings.warn(
        f"{share:.0%} of the weights of this {type(root).__name__} are experts and stay "
        f"{parameter.dtype} unless a pattern names them ({len(found)} stacks, {name} ..): by "
        "itself this config reaches Linears only. To have both in int4: "
        f"quantize_(model, w4tensor.with_experts({config}), filter_fn=None)",
        stacklevel=2,
    )
