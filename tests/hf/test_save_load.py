"""Quantised transformers models through files and back, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, safe_open, save_file
from torchao.core import config as ao_config
from torchao.prototype.safetensors import safetensors_utils
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import quantize_

import w4tensor
import w4tensor.hf
from tests.hf.models import assert_same_model
from w4tensor import W4ActQuantConfig, W4CoalescedConfig
from w4tensor.errors import Unsupported

CONFIGS = [
    pytest.param(W4CoalescedConfig(), id="w4a16"),
    pytest.param(W4CoalescedConfig(group_size=32, algorithm="hqq"), id="w4a16-hqq"),
    pytest.param(W4ActQuantConfig(act_group_size=64, algorithm="min_max"), id="w4a8"),
    pytest.param(W4ActQuantConfig(128, act_group_size=-1, integer_scales=True), id="w4a8-integer"),
]
every_config = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture(autouse=True)
def enabled():
    w4tensor.hf.enable()


def llama(tied: bool = False) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        tie_word_embeddings=tied,
    )
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@every_config
def test_from_pretrained_quantises_and_reloads_bit_exactly(config, tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=hf.TorchAoConfig(config)
    ).eval()
    model.save_pretrained(tmp_path / "int4")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()
    # transformers leaves the output layer alone: two layers of seven Linears
    assert assert_same_model(model, again) == 14
    by_quantize = llama()
    quantize_(by_quantize.model, config)
    assert assert_same_model(model, by_quantize) == 14


@every_config
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_attach_quantizer_saves_what_plain_quantize_made(config, tied, tmp_path):
    model = llama(tied)
    quantize_(model, config)
    w4tensor.hf.attach_quantizer(model, config)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert assert_same_model(model, again) == (14 if tied else 15)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.config.quantization_config.quant_type == config


@every_config
def test_the_file_is_as_small_as_the_summary_says(config, tmp_path):
    model = llama()
    quantize_(model, config)
    w4tensor.hf.attach_quantizer(model, config)
    model.save_pretrained(tmp_path)
    held = sum(row.bytes_after for row in w4tensor.summary(model).rows)
    norms = sum(2 * p.numel() for p in model.parameters() if p.ndim == 1)
    header = 64 * 1024
    assert 0 < (tmp_path / "model.safetensors").stat().st_size - held - norms < header


def test_without_attach_quantizer_saving_after_quantize_fails_loudly(tmp_path):
    model = llama()
    quantize_(model, W4CoalescedConfig())
    with pytest.raises(RuntimeError):
        model.save_pretrained(tmp_path)


def test_a_checkpoint_of_another_layout_version_is_refused(tmp_path):
    model = llama()
    quantize_(model, W4CoalescedConfig())
    w4tensor.hf.attach_quantizer(model, W4CoalescedConfig())
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = "model.layers.0.mlp.up_proj.weight"
    described = json.loads(metadata[name])
    described["_data"]["layout_version"] += 1
    metadata[name] = json.dumps(described)
    tensors = load_file(path)
    with pytest.raises(ValueError, match="layout_version is 2, expected 1"):
        unflatten_tensor_state_dict(tensors, metadata)
    save_file(tensors, path, metadata)
    # transformers prints the reason in its report and raises this at the end
    with pytest.raises(RuntimeError, match="CONVERSION"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@every_config
def test_torch_save_of_a_state_dict_weights_only(config, tmp_path):
    model = llama()
    quantize_(model, config)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assigned = llama()
    assigned.load_state_dict(state, assign=True)
    assert assert_same_model(model, assigned) == 15
    copied = llama()
    torch.nn.init.zeros_(copied.lm_head.weight)
    quantize_(copied, config)
    copied.load_state_dict(state)
    assert assert_same_model(model, copied) == 15


def test_enable_may_be_called_again_and_only_adds():
    names = list(safetensors_utils.ALLOWED_TENSORS_SUBCLASSES)
    modules = set(ao_config.ALLOWED_AO_MODULES)
    w4tensor.hf.enable()
    assert safetensors_utils.ALLOWED_TENSORS_SUBCLASSES == names
    assert ao_config.ALLOWED_AO_MODULES == modules and "w4tensor" in modules
    assert {"Int4Tensor", "CudaCoalescedInt4Tensor", "Int4ActQuantTensor"} <= set(names)


def test_enable_refuses_to_replace_another_package_s_class(monkeypatch):
    class CudaCoalescedInt4Tensor:
        pass

    classes = safetensors_utils.ALLOWED_CLASSES
    monkeypatch.setitem(classes, "CudaCoalescedInt4Tensor", CudaCoalescedInt4Tensor)
    with pytest.raises(Unsupported, match="already knows a CudaCoalescedInt4Tensor"):
        w4tensor.hf.enable()
    assert classes["CudaCoalescedInt4Tensor"] is CudaCoalescedInt4Tensor
