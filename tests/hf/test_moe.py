"""Mixture-of-experts models of transformers, quantised by with_experts and otherwise untouched."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn
from torchao.quantization import quantize_

from tests.hf.models import (
    BUDGET,
    GROUPED,
    DefinedExperts,
    DefinedLinear,
    causal,
    defined,
    difference,
    every_config,
    generated,
    inputs,
    made,
    named,
    quantised_experts,
)
from w4tensor import with_experts
from w4tensor.tensors.packed import PackedInt4

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}


def with_biases(model: nn.Module) -> nn.Module:
    """transformers starts biases at zero, where nobody sees them."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def mixtral() -> nn.Module:
    return causal(hf.MixtralConfig(**GROUPED, num_local_experts=6, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    return causal(hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=6, norm_topk_prob=True))


def qwen3_5_moe() -> nn.Module:
    """Linear attention, shared experts and their gate of one row."""
    attention = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 32}
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    dims = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    shared = {"num_experts": 6, "shared_expert_intermediate_size": 128}
    sizes = {**GROUPED, **EXPERTS, **attention, **heads, **dims, **shared}
    return causal(hf.Qwen3_5MoeTextConfig(**sizes))


def gpt_oss() -> nn.Module:
    """Transposed, interleaved, clamped and biased; weights large enough to be clamped."""
    sizes = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 4}
    model = with_biases(causal(hf.GptOssConfig(**GROUPED, **sizes)))
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            nn.init.normal_(parameter, std=0.5)
    return model


def deepseek_v3() -> nn.Module:
    """One dense layer, then experts in groups, with a shared one."""
    lora = {"q_lora_rank": 128, "kv_lora_rank": 128}
    dims = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    groups = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = {**GROUPED, **EXPERTS, **lora, **dims, **groups, "num_key_value_heads": 4}
    return causal(hf.DeepseekV3Config(**sizes))


def olmoe() -> nn.Module:
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "eos_token_id": 1}
    return causal(hf.OlmoeConfig(**GROUPED, **sizes))


def gemma4_moe() -> nn.Module:
    """Experts beside a dense block, GELU by tanh, a router that is a Linear with 64 rows."""
    attention = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    heads = {"head_dim": 32, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
    experts = {"enable_moe_block": True, "num_experts": 64, "top_k_experts": 2}
    sizes = {**GROUPED, **attention, **heads, **experts, "moe_intermediate_size": 128}
    return causal(hf.Gemma4TextConfig(**sizes))


def llama4() -> nn.Module:
    """torch.bmm on all experts: no implementation can be chosen."""
    sizes = {"intermediate_size_mlp": 128, "head_dim": 32, "interleave_moe_layer_step": 1}
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_chunk_size": 32}
    return causal(hf.Llama4TextConfig(**GROUPED, **sizes, **experts))


def nemotron_h() -> nn.Module:
    """Mamba, attention, experts without a gate, whose activation is a squared ReLU."""
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2}
    experts = {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "moe_latent_size": None}
    sizes = {**GROUPED, **EXPERTS, **mamba, **experts, "moe_shared_expert_intermediate_size": 128}
    del sizes["num_hidden_layers"]
    return causal(hf.NemotronHConfig(**sizes, hybrid_override_pattern="M*E", head_dim=32))


BUILT_IN = ("eager", "batched_mm", "grouped_mm")
IMPLEMENTATIONS = BUILT_IN
MODELS = [
    mixtral,
    qwen3_moe,
    qwen3_5_moe,
    gpt_oss,
    deepseek_v3,
    olmoe,
    gemma4_moe,
    llama4,
    nemotron_h,
]
every_model = named(MODELS)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def quantised(build, config) -> nn.Module:
    model = made(build)
    quantize_(model, with_experts(config), filter_fn=None)
    assert quantised_experts(model)
    return model


def choose(model: nn.Module, implementation: str) -> nn.Module:
    if hasattr(next(iter(quantised_experts(model).values())), "has_gate"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


@every_config
@every_model
def test_every_linear_and_expert_is_quantised_and_nothing_else(build, config):
    plain = made(build)
    model = quantised(build, config)
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        module = plain.get_submodule(module_name)
        router = "router" in name or name.endswith("mlp.gate.weight")
        linear = isinstance(module, nn.Linear) and leaf == "weight" and module.out_features >= 64
        expected = (linear or parameter.ndim == 3) and not router and "conv1d" not in name
        assert isinstance(parameter, PackedInt4) == expected, name
        if not expected:
            assert torch.equal(parameter, plain.get_parameter(name)), name
        else:
            assert parameter.shape == plain.get_parameter(name).shape
            assert difference(parameter.dequantize(), plain.get_parameter(name)) < 0.2


@every_config
@every_model
def test_every_implementation_equals_the_definition(build, config):
    model = quantised(build, config)
    plain = defined(model)
    expected = logits(plain)
    act_group_size = getattr(config, "act_group_size", None)
    for implementation in IMPLEMENTATIONS:
        assert difference(logits(choose(model, implementation)), expected) <= BUDGET[act_group_size]
    # the experts have weight enough for a wrong one to show
    for module in plain.modules():
        if isinstance(module, DefinedExperts):
            module.experts.down_proj.data = module.experts.down_proj.data.roll(1, 0)
    assert difference(logits(plain), expected) > 10 * BUDGET[act_group_size]
    if act_group_size is not None:
        exact = defined(model)
        for module in exact.modules():
            if isinstance(module, (DefinedLinear, DefinedExperts)):
                module.act_group_size = None
        assert difference(logits(exact), expected) > 2 * BUDGET[act_group_size]


@every_config
@every_model
def test_generate_gives_the_definition_s_tokens(build, config):
    model = quantised(build, config)
    expected = generated(defined(model))
    for implementation in IMPLEMENTATIONS:
        assert torch.equal(generated(choose(model, implementation)), expected)
