"""Dense transformers models, quantised by plain quantize_ and otherwise untouched.

Each is built small from its config and compared with a copy whose Linears are the definition in
plain torch: the dequantised weight, and for W4A8 the activation rounded to int8 before it.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn
from torchao.quantization import quantize_

import w4tensor
from tests.hf.models import (
    BUDGET,
    GROUPED,
    SIZES,
    DefinedLinear,
    causal,
    defined,
    difference,
    every_config,
    generated,
    inputs,
    made,
    named,
    quantised_linears,
)
from w4tensor import W4ActQuantConfig, W4CoalescedConfig
from w4tensor.tensors.packed import PackedInt4


def llama() -> nn.Module:
    return causal(hf.LlamaConfig(**GROUPED))


def qwen2() -> nn.Module:
    """q, k and v have biases; they must not be zero to be seen."""
    model = causal(hf.Qwen2Config(**GROUPED))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def qwen3() -> nn.Module:
    return causal(hf.Qwen3Config(**GROUPED, head_dim=64, tie_word_embeddings=True))


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention"]
    return causal(hf.Gemma3TextConfig(**GROUPED, head_dim=32, sliding_window=4, layer_types=kinds))


def phi3() -> nn.Module:
    return causal(hf.Phi3Config(**GROUPED, bos_token_id=1, eos_token_id=2))


def opt() -> nn.Module:
    sizes = {"ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 64}
    return causal(hf.OPTConfig(**SIZES, **sizes, pad_token_id=0))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(**{**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 70})
    )


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=160,
            d_model=128,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            max_source_positions=8,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        )
    )


DECODERS = [llama, qwen2, qwen3, gemma3, phi3, opt]
OTHERS = [bert, vit, whisper]
# whose output layer is the input embedding
TIED = [qwen3, gemma3, opt, bert, whisper]


@every_config
@named(DECODERS + OTHERS)
def test_forward_equals_the_definition(build, config):
    model = made(build)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output = model.get_output_embeddings()
    if build in TIED:
        names -= {name for name, module in model.named_modules() if module is output}
    quantize_(model, config)
    assert set(quantised_linears(model)) == names
    with torch.no_grad():
        y = model(**inputs(model)).logits
        expected = defined(model)(**inputs(model)).logits
    act_group_size = getattr(config, "act_group_size", None)
    assert difference(y, expected) <= BUDGET[act_group_size]
    if act_group_size is not None:
        exact = defined(model)
        for module in exact.modules():
            if isinstance(module, DefinedLinear):
                module.act_group_size = None
        with torch.no_grad():
            unrounded = exact(**inputs(model)).logits
        assert difference(unrounded, expected) > 2 * BUDGET[act_group_size]


@every_config
@named([*DECODERS, whisper])
def test_generate_gives_the_definition_s_tokens(build, config):
    model = made(build)
    quantize_(model, config)
    tokens = generated(model)
    assert tokens.shape[0] == 2
    assert torch.equal(tokens, generated(defined(model)))


@every_config
@named(DECODERS)
def test_static_cache_generate_compiles_without_a_graph_break(build, config):
    model = made(build)
    quantize_(model, config)
    expected = generated(model)
    torch._dynamo.reset()
    # generate() compiles by itself on accelerators only
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    tokens = generated(model, cache_implementation="static")
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@every_config
@named([qwen3, bert, whisper])
def test_tied_embeddings_stay_tied_and_the_summary_says_so(build, config):
    model = made(build)
    quantize_(model, config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    notes = [row.note for row in w4tensor.summary(model).rows if row.note.startswith("tied to ")]
    assert len(notes) == 1
    model.tie_weights()
    assert head.weight is embedding.weight and not isinstance(head.weight, PackedInt4)


@every_config
def test_gpt2_is_left_alone_but_for_its_head_and_the_summary_says_why(config):
    sizes = {"n_embd": 128, "n_layer": 1, "n_head": 4, "vocab_size": 160, "n_positions": 32}
    torch.manual_seed(0)
    model = causal(
        hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    ).eval()
    quantize_(model, config)
    rows = {row.name: row for row in w4tensor.summary(model).rows}
    assert rows["lm_head.weight"].kernels
    left = {name: row.note for name, row in rows.items() if not row.kernels}
    assert left["transformer.h.0.attn.c_attn.weight"] == "Conv1D, not a Linear"
    assert left["transformer.h.0.mlp.c_proj.weight"] == "Conv1D, not a Linear"
    with torch.no_grad():
        y, expected = model(**inputs(model)).logits, defined(model)(**inputs(model)).logits
    assert difference(y, expected) <= BUDGET[getattr(config, "act_group_size", None)]


@pytest.mark.parametrize("cls", [W4CoalescedConfig, W4ActQuantConfig], ids=["w4a16", "w4a8"])
def test_k_that_128_does_not_divide_is_padded_inside(cls):
    torch.manual_seed(0)
    sizes = {**GROUPED, "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3}
    model = causal(hf.LlamaConfig(**{**sizes, "num_key_value_heads": 3})).eval()
    quantize_(model, cls(group_size=64))
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.shape == (192, 320) and weight.scale.shape == (192, 5)
    assert weight.qdata.shape[-1] * weight.packing.codes == 384
    with torch.no_grad():
        y, expected = model(**inputs(model)).logits, defined(model)(**inputs(model)).logits
    assert difference(y, expected) <= BUDGET[getattr(weight, "act_group_size", None)]


def test_a_group_that_does_not_divide_k_is_left_alone_and_the_summary_says_why():
    torch.manual_seed(0)
    model = causal(hf.LlamaConfig(**{**GROUPED, "intermediate_size": 192})).eval()
    quantize_(model, W4CoalescedConfig(group_size=128))
    rows = {row.name: row for row in w4tensor.summary(model).rows}
    assert rows["model.layers.0.mlp.down_proj.weight"].note == (
        "K=192 is not a multiple of group_size=128; use group_size=64"
    )
    assert rows["model.layers.0.mlp.up_proj.weight"].kernels


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_loses_no_more_than_the_definition_does(config, dtype):
    """Against the definition in fp32: at most twice the error of the definition in `dtype`."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED), dtype=dtype).eval()
    quantize_(model, config)
    plain = defined(model)
    for module in plain.modules():
        if isinstance(module, DefinedLinear):
            module.to(dtype)
    with torch.no_grad():
        y = model(**inputs(model)).logits
        from_plain = plain(**inputs(model)).logits
        exact = defined(model).float()(**inputs(model)).logits
    budget = 2 * difference(from_plain.float(), exact)
    assert y.dtype == dtype
    assert difference(y.float(), exact) <= budget
