"""Mixture-of-experts models of transformers, quantised by with_experts and otherwise untouched."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import FqnToConfig, quantize_
from transformers.integrations import moe

import w4tensor
import w4tensor.hf
from tests.hf.models import (
    BUDGET,
    CONFIGS,
    GROUPED,
    DefinedExperts,
    DefinedLinear,
    assert_same_model,
    causal,
    defined,
    difference,
    every_config,
    generated,
    logits,
    made,
    named,
    quantised_experts,
)
from w4tensor import W4ActQuantConfig, W4CoalescedConfig, hf_experts, with_experts
from w4tensor.tensors.packed import PackedInt4

INTEGER = W4ActQuantConfig(128, act_group_size=-1, integer_scales=True)
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
IMPLEMENTATIONS = (*BUILT_IN, "w4tensor")
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
        # codes run along K: seen as [E, K, N], they are stored [E, N, K]
        transposed = build in (gpt_oss, llama4) and parameter.ndim == 3
        assert getattr(parameter, "transposed", False) == transposed
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


@pytest.mark.parametrize(
    ("implementation", "config"),
    [
        pytest.param("batched_mm", *CONFIGS[0].values, id="batched_mm-w4a16"),
        pytest.param("grouped_mm", *CONFIGS[0].values, id="grouped_mm-w4a16"),
        *(pytest.param("w4tensor", *each.values, id=f"w4tensor-{each.id}") for each in CONFIGS),
    ],
)
@every_model
def test_static_cache_generate_compiles_without_a_graph_break(build, implementation, config):
    model = choose(quantised(build, config), implementation)
    expected = generated(model)
    torch._dynamo.reset()
    # generate() compiles by itself on accelerators only
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    tokens = generated(model, cache_implementation="static")
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# our implementation: what it takes, and what it leaves to others


@pytest.fixture
def fused_calls(monkeypatch) -> list[tuple[str, str]]:
    """(gate, act) of every call of the fused operator."""
    calls = []

    def spy(*operands, gate, act):
        calls.append((gate, act))
        return fused(*operands, gate=gate, act=act)

    fused = hf_experts.experts
    monkeypatch.setattr(hf_experts, "experts", spy)
    return calls


FORMS = {
    mixtral: ("halves", "silu"),
    qwen3_moe: ("halves", "silu"),
    qwen3_5_moe: ("halves", "silu"),
    gpt_oss: ("interleaved", "clamped_swiglu"),
    deepseek_v3: ("halves", "silu"),
    olmoe: ("halves", "silu"),
    gemma4_moe: ("halves", "gelu_tanh"),
    nemotron_h: ("none", "relu2"),
}


@every_config
@every_model
def test_quantising_chooses_the_fused_operator_where_it_can(build, config, fused_calls):
    model = quantised(build, config)
    logits(model)
    experts = quantised_experts(model)
    notes = {row.note for row in w4tensor.summary(model).rows if row.note.startswith("experts")}
    if build is llama4:
        assert not fused_calls and notes == {"experts: the module has a forward of its own"}
    else:
        assert fused_calls == [FORMS[build]] * len(experts)
        assert model.config._experts_implementation == "w4tensor"
        gate, act = FORMS[build]
        assert notes == {f"experts: one fused operator (gate: {gate}, act: {act})"}


def first_experts(model: nn.Module) -> nn.Module:
    return next(iter(quantised_experts(model).values()))


def own_gate(experts: nn.Module) -> None:
    def _apply_gate(self, gate_up):
        return gate_up.chunk(2, dim=-1)[1]

    experts.__class__ = type("Own", (type(experts),), {"_apply_gate": _apply_gate})


def other_limit(experts: nn.Module) -> None:
    experts.limit = 5.0


def norm_after(experts: nn.Module) -> None:
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.RMSNorm(128)


def other_activation(experts: nn.Module) -> None:
    experts.act_fn = nn.Tanh()


def plain_weight(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.dequantize())


LEFT_TO_OTHERS = [
    pytest.param(mixtral, own_gate, "its gate is its own", id="own gate"),
    pytest.param(gpt_oss, other_limit, "limit and alpha are not (7.0, 1.702)", id="other limit"),
    pytest.param(mixtral, norm_after, "a norm follows its experts", id="norm after"),
    pytest.param(mixtral, other_activation, "its activation is none of", id="other activation"),
    pytest.param(nemotron_h, other_activation, "its activation is none of", id="without a gate"),
    pytest.param(mixtral, plain_weight, "not both int4 of one class", id="plain weight"),
]


def routed(experts: nn.Module, tokens: int, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights as a router might give them."""
    rng = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 128, generator=rng)
    ids = torch.randint(0, experts.num_experts, (tokens, top_k), generator=rng)
    return x, ids, torch.rand(tokens, top_k, generator=rng)


@every_config
@pytest.mark.parametrize(("build", "change", "reason"), LEFT_TO_OTHERS)
def test_an_unknown_block_goes_to_the_built_in_path(build, change, reason, config, fused_calls):
    model = quantised(build, config)
    experts = first_experts(model)
    operands = routed(experts, 7)
    with torch.no_grad():
        before = experts(*operands)
        assert len(fused_calls) == 1
        change(experts)
        y = experts(*operands)
        assert len(fused_calls) == 1
        (note,) = {row.note for row in w4tensor.summary(experts).rows if row.kernels}
        assert note.startswith("experts: grouped_mm or batched_mm, as") and reason in note
        choose(model, "grouped_mm")
        assert torch.equal(y, experts(*operands))
    # what was changed matters, and is not simply ignored
    assert change is plain_weight or difference(y, before) > 0.01


@pytest.mark.parametrize("tokens", [1, hf_experts.BATCHED_TOKENS, hf_experts.BATCHED_TOKENS + 1])
def test_the_built_in_path_is_the_one_that_generate_takes(tokens):
    """On a device batched_mm for few tokens; on a CPU transformers never leaves grouped_mm."""
    few = tokens <= hf_experts.BATCHED_TOKENS
    for device, expected in (
        ("meta", moe.batched_mm_experts_forward if few else moe.grouped_mm_experts_forward),
        ("cpu", moe.grouped_mm_experts_forward),
    ):
        assert hf_experts._built_in(torch.empty(tokens, 8, device=device)) is expected


@every_config
@named([mixtral, gpt_oss])
def test_gradients_go_to_the_built_in_path(build, config, fused_calls):
    model = quantised(build, config)
    experts = first_experts(model)
    plain = DefinedExperts(copy.deepcopy(experts))
    x, ids, weight = routed(experts, 5)
    grads = []
    for block in (experts, plain):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        block(leaves[0], ids, leaves[1]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert not fused_calls
    # rounding to int8 counts as the identity, and the definition's rounding has no slope
    if isinstance(config, W4ActQuantConfig):
        assert all(torch.isfinite(grad).all() and grad.norm() > 0 for grad in grads[0])
    else:
        assert all(difference(*pair) < 1e-5 for pair in zip(*grads, strict=True))
    with torch.no_grad():
        experts(x, ids, weight)
    assert len(fused_calls) == 1


@functools.cache
def blocks(build, config_type) -> tuple[nn.Module, nn.Module]:
    experts = first_experts(quantised(build, config_type()))
    return experts, DefinedExperts(copy.deepcopy(experts))


@pytest.mark.parametrize("config_type", [W4CoalescedConfig, W4ActQuantConfig])
@named([mixtral, gpt_oss, gemma4_moe, nemotron_h])
@given(data=st.data(), tokens=st.integers(0, 6), top_k=st.integers(1, 4))
def test_any_routing_equals_the_definition(build, config_type, data, tokens, top_k):
    """Empty and crowded experts, an expert twice in a token, sentinels of expert parallelism."""
    experts, plain = blocks(build, config_type)
    x, _, weight = routed(experts, tokens, top_k)
    hit = data.draw(st.integers(1, experts.num_experts), label="experts that may be hit")
    choice = st.lists(st.integers(0, hit - 1), min_size=tokens * top_k, max_size=tokens * top_k)
    ids = torch.tensor(data.draw(choice), dtype=torch.int64).view(tokens, top_k)
    with torch.no_grad():
        y = experts(x, ids, weight)
        expected = plain(x, ids, weight)
        assert y.shape == x.shape and y.dtype == x.dtype
        # a code that rounding moves is 2e-3 of one token; a wrong expert is all of it
        budget = 1e-5 if config_type is W4CoalescedConfig else 5e-3
        assert (y - expected).norm() <= budget * expected.norm()
        # what another rank holds: its weights are zero already
        elsewhere = ids == 0
        far = ids.masked_fill(elsewhere, experts.num_experts)
        y = experts(x, far, weight.masked_fill(elsewhere, 0.0))
        expected = plain(x, ids, weight.masked_fill(elsewhere, 0.0))
        assert (y - expected).norm() <= budget * expected.norm()


@every_config
@named([mixtral, gpt_oss, nemotron_h])
def test_one_graph_serves_any_number_of_tokens(build, config):
    experts = first_experts(quantised(build, config))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    with torch.no_grad():
        for tokens in (3, 8, 1000):
            operands = routed(experts, tokens)
            for t in operands:
                torch._dynamo.mark_dynamic(t, 0)
            assert torch.equal(compiled(*operands), experts(*operands))
    assert counter.frame_count == 1


def test_decoding_leaves_our_implementation_alone(monkeypatch):
    """generate turns grouped_mm into batched_mm on every device but a CPU."""
    model = quantised(mixtral, W4CoalescedConfig())
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with model._optimize_model_for_decode():
        assert model.config._experts_implementation == "w4tensor"
    choose(model, "grouped_mm")
    with model._optimize_model_for_decode():
        assert model.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_a_choice_of_the_user_stays(implementation, fused_calls):
    model = made(mixtral)
    model.set_experts_implementation(implementation)
    quantize_(model, with_experts(W4CoalescedConfig()), filter_fn=None)
    assert model.config._experts_implementation == implementation
    logits(model)
    assert not fused_calls
    notes = {row.note for row in w4tensor.summary(model).rows if "experts" in row.note}
    assert notes == {f"experts: {implementation}, as the model's config says"}


def test_weights_that_round_activations_differently_are_not_fused(fused_calls):
    model = made(mixtral)
    for name, size in (("gate_up_proj", 32), ("down_proj", 64)):
        patterns = {f"re:.*experts.{name}": W4ActQuantConfig(act_group_size=size)}
        quantize_(model, FqnToConfig(patterns), filter_fn=None)
    assert model.config._experts_implementation == "grouped_mm"
    logits(model)
    assert not fused_calls


# experts that stay behind


def test_a_plain_config_says_that_experts_stay_behind():
    model = made(mixtral)
    with pytest.warns(UserWarning, match="of this MixtralForCausalLM are experts") as told:
        quantize_(model, W4CoalescedConfig())
    assert len(told) == 1
    rows = {row.name: row for row in w4tensor.summary(model).rows}
    left = rows["model.layers.0.mlp.experts.down_proj"]
    assert left.note == "experts: with_experts(config) would quantise them" and not left.kernels
    assert rows["model.layers.0.self_attn.q_proj.weight"].kernels
    # and then they can still be had
    quantize_(model, with_experts(W4CoalescedConfig()), filter_fn=None)
    assert len(quantised_experts(model)) == 2


def test_from_pretrained_says_it_too(tmp_path):
    made(mixtral).save_pretrained(tmp_path)
    config = W4CoalescedConfig()
    with pytest.warns(UserWarning, match="of this MixtralForCausalLM are experts") as told:
        hf.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=hf.TorchAoConfig(config)
        )
    assert len([w for w in told if "experts" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*experts")
        hf.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=hf.TorchAoConfig(with_experts(config))
        )


# through files and back


@pytest.mark.parametrize("config", [*CONFIGS, INTEGER], ids=str)
@named([mixtral, gpt_oss, nemotron_h])
def test_save_and_reload_bit_exactly(build, config, tmp_path):
    w4tensor.hf.enable()
    both = with_experts(config)
    made(build).save_pretrained(tmp_path / "plain")
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=hf.TorchAoConfig(both)
    ).eval()
    assert model.config._experts_implementation == "w4tensor"
    model.save_pretrained(tmp_path / "int4")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()
    assert again.config._experts_implementation == "w4tensor"
    assert again.config.quantization_config.quant_type == both
    assert assert_same_model(model, again) > 2 * len(quantised_experts(model)) > 0
    by_quantize = quantised(build, config)
    w4tensor.hf.attach_quantizer(by_quantize, both)
    by_quantize.save_pretrained(tmp_path / "quantised")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval()
    assert assert_same_model(by_quantize, again) > 2 * len(quantised_experts(model))


def test_a_model_that_is_unpickled_whole_brings_our_implementation(monkeypatch):
    model = quantised(mixtral, W4CoalescedConfig())
    data = pickle.dumps(model)
    # as in a process that has quantised nothing
    monkeypatch.delitem(moe.ExpertsInterface._global_mapping, "w4tensor")
    again = pickle.loads(data)
    assert again.config._experts_implementation == "w4tensor"
    assert_same_model(again, model)


@named([mixtral, gpt_oss])
def test_integer_scales_equal_those_without_multiples(build):
    """On a CPU; what kernels make of them is a GPU's to test."""
    model = quantised(build, INTEGER)
    int4 = [p for p in model.parameters() if isinstance(p, PackedInt4)]
    assert int4 and all(p.multiple is not None for p in int4)
    plain = copy.deepcopy(model)
    for p in plain.parameters():
        if isinstance(p, PackedInt4):
            p.multiple = None
    for implementation in IMPLEMENTATIONS:
        y = logits(choose(model, implementation))
        assert torch.equal(y, logits(choose(plain, implementation)))
