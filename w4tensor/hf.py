"""What transformers needs to save and load int4 models. Optional; nothing happens at import.

    w4tensor.hf.enable()
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=TorchAoConfig(W4CoalescedConfig())
    )
    model.save_pretrained(target)  # and from_pretrained(target) gives the same bits back

enable() must also run in the process that reloads; experts that it loads run on our implementation
(hf_experts.py), as those that quantize_ made. torchao offers no call to register a tensor
class for safetensors or a config for JSON; its documentation says to extend these lists. Nor does
transformers let a class say what its data are called: it knows six names, to which enable() adds
the multiples of integer scales.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchao.core.config import AOBaseConfig

from w4tensor import hf_experts
from w4tensor.errors import Unsupported
from w4tensor.tensors import CudaCoalescedInt4Tensor, Int4ActQuantTensor, linear_weight
from w4tensor.tensors.packed import PackedInt4

__all__ = ["attach_quantizer", "enable"]

TENSOR_CLASSES = (CudaCoalescedInt4Tensor, Int4ActQuantTensor)


def enable() -> None:
    """Let torchao and transformers save and load our tensors and configs. May be called again.

    Raises:
        Unsupported: another package has registered a tensor class of the same name.

    >>> enable()
    >>> enable()
    """
    from torchao.core import config as ao_config
    from torchao.prototype.safetensors import safetensors_utils

    classes = safetensors_utils.ALLOWED_CLASSES
    names = safetensors_utils.ALLOWED_TENSORS_SUBCLASSES
    for cls in TENSOR_CLASSES:
        # files name classes without their module: two of a name would read each other's bytes
        if classes.setdefault(cls.__name__, cls) is not cls:
            other = classes[cls.__name__]
            raise Unsupported(
                f"torchao already knows a {cls.__name__} from {other.__module__}; load and save "
                "the two kinds of model in separate processes"
            )
        if cls.__name__ not in names:
            names.append(cls.__name__)
    ao_config.ALLOWED_AO_MODULES.add("w4tensor")
    global _watching
    if not _watching and find_spec("transformers") is not None:
        _watching = True
        hf_experts.register()
        _name_multiples()
        # a file holds no word of what a config's handler does, and none runs on reload
        register_module_parameter_registration_hook(_settle_loaded)


_watching = False


def _name_multiples() -> None:
    """Let transformers collect `multiple` with the other data of a weight that it loads."""
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    known = getattr(TorchAoHfQuantizer, "serialized_names", None)
    if not isinstance(known, property) or known.fget is None:
        # of a release that reads names another way
        return
    ask = known.fget

    def serialized_names(self: Any) -> dict[str, list[str]]:
        return {name: [*data, f"_{name}_multiple"] for name, data in ask(self).items()}

    setattr(TorchAoHfQuantizer, "serialized_names", property(serialized_names))  # noqa: B010


def _settle_loaded(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """What a config's handler does beside quantising."""
    if linear_weight.wants(module, name):
        linear_weight.as_linear_weight(parameter)
    elif isinstance(parameter, PackedInt4) and parameter.ndim == 3:
        # where torch is about to put it; choose looks at both weights of the module
        module._parameters[name] = parameter
        hf_experts.choose(module)


def attach_quantizer(model: Any, config: AOBaseConfig) -> None:
    """Make save_pretrained work on a transformers model that plain quantize_ has quantised.

    Args:
        model: a PreTrainedModel.
        config: what quantize_ was given; it goes into the saved config.json.

    >>> from torchao.quantization import quantize_
    >>> from transformers import BertConfig, BertModel
    >>> from w4tensor import W4CoalescedConfig
    >>> sizes = dict(hidden_size=128, num_hidden_layers=1, intermediate_size=128)
    >>> model = BertModel(BertConfig(**sizes, num_attention_heads=2, vocab_size=8))
    >>> quantize_(model, W4CoalescedConfig())
    >>> attach_quantizer(model, W4CoalescedConfig())
    >>> model.hf_quantizer.is_serializable()
    True
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    enable()
    quantizer = AutoHfQuantizer.from_config(TorchAoConfig(config), pre_quantized=False)
    quantizer.modules_to_not_convert = []
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)
