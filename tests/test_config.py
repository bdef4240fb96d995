"""What quantize_ does with our configs: what becomes int4, what stays as it is, what raises."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

import w4tensor
from tests.weights import CLASSES, DTYPES
from w4tensor import Int4ActQuantTensor, W4ActQuantConfig, W4CoalescedConfig, with_experts
from w4tensor.config import MIN_OUT_FEATURES
from w4tensor.errors import Unsupported
from w4tensor.layout import check_multiple_values

CONFIGS = dict(zip((W4CoalescedConfig, W4ActQuantConfig), CLASSES, strict=True))
both_configs = pytest.mark.parametrize(
    ("config", "cls"), CONFIGS.items(), ids=["coalesced", "act_quant"]
)


def notes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.note for row in w4tensor.summary(model, "cpu").rows}


# what can never work raises when the config is made


@both_configs
@pytest.mark.parametrize("group_size", [0, 1, 8, 48, 127, 512, -2, None, "128", 128.0, True, [128]])
def test_an_impossible_group_size_raises_at_once(config, cls, group_size):
    with pytest.raises(Unsupported, match="group_size"):
        config(group_size=group_size)


@both_configs
@pytest.mark.parametrize("algorithm", ["", "HQQ", "best", None, 1, ["hqq"]])
def test_an_unknown_algorithm_raises_at_once(config, cls, algorithm):
    with pytest.raises(Unsupported, match="algorithm"):
        config(algorithm=algorithm)


@pytest.mark.parametrize("size", [0, 16, 48, 256, -2, None, "32", [32], 32.0])
def test_an_impossible_activation_group_raises_at_once(size):
    with pytest.raises(Unsupported, match="act_group_size"):
        W4ActQuantConfig(act_group_size=size)


@both_configs
def test_unknown_arguments_raise_at_once(config, cls):
    with pytest.raises(TypeError):
        config(block_size=128)
    if config is W4CoalescedConfig:
        with pytest.raises(TypeError):
            config(act_group_size=32)


# what is quantised


@both_configs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
def test_a_linear_becomes_int4(config, cls, dtype, group_size):
    linear = nn.Linear(256, 64).to(dtype)
    plain = copy.deepcopy(linear)
    model = nn.Sequential(linear)
    quantize_(model, config(group_size=group_size))
    assert model[0] is linear and isinstance(linear.weight, cls)
    assert isinstance(linear.weight, nn.Parameter) and not linear.weight.requires_grad
    assert linear.weight.dtype == dtype
    assert linear.weight.group_size == (256 if group_size == -1 else group_size)
    assert linear.bias.requires_grad and torch.equal(linear.bias, plain.bias)
    x = torch.randn(5, 256).to(dtype)
    noise = (linear(x).double() - plain(x).double()).norm() / plain(x).double().norm()
    assert noise < 0.2
    w = cls.from_hp(plain.weight, group_size)
    assert torch.equal(linear(x), F.linear(x, w, plain.bias))


@both_configs
@pytest.mark.parametrize("algorithm", ["symmetric", "min_max", "hqq"])
def test_the_algorithm_is_used(config, cls, algorithm):
    linear = nn.Linear(128, 64)
    expected = cls.from_hp(linear.weight, 128, algorithm)
    quantize_(nn.Sequential(linear), config(algorithm=algorithm))
    assert torch.equal(linear.weight.qdata, expected.qdata)
    assert (linear.weight.zero_point is None) == (algorithm == "symmetric")


def test_the_activation_group_is_used():
    for size in (32, 64, 128, -1):
        model = nn.Sequential(nn.Linear(128, 64))
        quantize_(model, W4ActQuantConfig(act_group_size=size))
        assert model[0].weight.act_group_size == size


@both_configs
def test_the_defaults_are_those_of_the_issue(config, cls):
    assert config().group_size == 128
    if config is W4ActQuantConfig:
        assert config().act_group_size == 32


@both_configs
def test_quantising_on_meta(config, cls):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 64))
    quantize_(model, config())
    assert isinstance(model[0].weight, cls) and model[0].weight.device.type == "meta"


@both_configs
def test_a_filter_chooses(config, cls):
    model = nn.ModuleDict({"a": nn.Linear(128, 64), "b": nn.Linear(128, 64)})
    quantize_(model, config(), filter_fn=lambda module, name: name == "b")
    assert type(model["a"].weight) is nn.Parameter and isinstance(model["b"].weight, cls)


# what is left alone, and why


class Router(nn.Linear):
    pass


class Experts(nn.Module):
    """Stacked weights as transformers holds them, and a bias beside them."""

    def __init__(self, k: int = 128, n: int = 192) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, n, k))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, n))
        self.scale = nn.Parameter(torch.ones(n))


LEFT_ALONE = {
    "K that no group divides": (lambda: nn.Linear(100, 64), "K=100 is not a multiple"),
    "K smaller than the group": (lambda: nn.Linear(64, 64), "K=64 is not a multiple"),
    "a gate": (lambda: nn.Linear(128, MIN_OUT_FEATURES - 1), "N=63 is below 64"),
    "one row": (lambda: nn.Linear(128, 1), "N=1 is below 64"),
    "a router": (lambda: Router(128, 256), "a router"),
    "float64": (lambda: nn.Linear(128, 64).double(), "torch.float64"),
    "float8": (lambda: nn.Linear(128, 64).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
}


@both_configs
@pytest.mark.parametrize(("make", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_a_linear_that_cannot_be_is_left_alone_and_says_why(config, cls, make, reason):
    model = nn.Sequential(make(), nn.Linear(128, 64))
    before = model[0].weight
    quantize_(model, config())
    assert model[0].weight is before and type(before) is nn.Parameter
    assert reason in notes(model)["0.weight"]
    assert isinstance(model[1].weight, cls) and notes(model)["1.weight"] == ""


@both_configs
def test_the_smallest_that_is_worth_it(config, cls):
    model = nn.Sequential(nn.Linear(128, MIN_OUT_FEATURES))
    quantize_(model, config())
    assert isinstance(model[0].weight, cls)


@both_configs
def test_quantising_twice_changes_nothing(config, cls):
    model = nn.Sequential(nn.Linear(128, 64))
    quantize_(model, config())
    once = model[0].weight
    for again in CONFIGS:
        quantize_(model, again(algorithm="min_max"))
        assert model[0].weight is once
    assert "already quantised" in notes(model)["0.weight"]


@both_configs
def test_weights_that_torchao_has_quantised_stay_so(config, cls):
    model = nn.Sequential(nn.Linear(128, 64))
    quantize_(model, Int8WeightOnlyConfig())
    before = model[0].weight
    quantize_(model, config())
    assert model[0].weight is before
    assert notes(model)["0.weight"] == "already quantised (Int8Tensor)"


@both_configs
def test_a_second_config_takes_what_the_first_left(config, cls):
    model = nn.Sequential(nn.Linear(96, 64))
    quantize_(model, config(group_size=128))
    assert "K=96" in notes(model)["0.weight"]
    quantize_(model, config(group_size=32))
    assert isinstance(model[0].weight, cls) and notes(model)["0.weight"] == ""


@both_configs
def test_two_linears_that_share_a_weight_keep_sharing_it(config, cls):
    model = nn.ModuleDict(
        {"a": nn.Linear(128, 64), "b": nn.Linear(128, 64), "c": nn.Linear(128, 64)}
    )
    model["b"].weight = model["a"].weight
    quantize_(model, config())
    assert model["a"].weight is model["b"].weight and type(model["a"].weight) is nn.Parameter
    assert isinstance(model["c"].weight, cls)
    said = notes(model)
    assert said["a.weight"].startswith("tied") and said["b.weight"] == "tied to a.weight"


@both_configs
def test_a_linear_that_shares_with_an_embedding_keeps_sharing_it(config, cls):
    model = nn.ModuleDict({"embed": nn.Embedding(128, 128), "head": nn.Linear(128, 128)})
    model["head"].weight = model["embed"].weight
    quantize_(model, config())
    assert model["head"].weight is model["embed"].weight
    assert type(model["head"].weight) is nn.Parameter
    assert notes(model)["head.weight"] == "tied to embed.weight"


@both_configs
def test_one_linear_under_two_names_is_quantised_once(config, cls):
    linear = nn.Linear(128, 64)
    model = nn.ModuleDict({"a": linear, "b": linear})
    quantize_(model, config())
    assert model["a"] is model["b"] and isinstance(linear.weight, cls)


@both_configs
def test_modules_that_hold_each_other_in_a_circle(config, cls):
    inner, outer = nn.ModuleDict(), nn.ModuleDict({"up": nn.Linear(128, 64)})
    outer["inner"], inner["outer"] = inner, outer
    quantize_(outer, FqnToConfig({"up.weight": config()}), filter_fn=None)
    assert isinstance(outer["up"].weight, cls)


@both_configs
def test_others_who_hold_a_weight_do_not_make_it_tied(config, cls):
    """An optimizer, a state_dict, a list, a module that is gone."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(128, 64))
    other = nn.Linear(128, 64)
    other.weight = model[1].weight
    del other
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = (list(model.parameters()), dict(model.named_parameters()), model.state_dict())
    quantize_(model, config())
    assert all(isinstance(module.weight, cls) for module in model)
    assert len(held) == 3 and optimizer is not None


# parameters by name, and stacks of experts


@both_configs
def test_experts_are_quantised_by_parameter_name(config, cls):
    model = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(128, 64)})
    dense = model["experts"].gate_up_proj.detach().clone()
    # the regex also meets the bias [E, N] beside the weight, which must stay
    quantize_(model, FqnToConfig({r"re:.*experts\.gate_up_proj.*": config(64)}), filter_fn=None)
    experts = model["experts"]
    assert type(experts.gate_up_proj) is cls and experts.gate_up_proj.shape == (4, 192, 128)
    assert type(experts.gate_up_proj_bias) is nn.Parameter
    assert "2-D Experts" in notes(model)["experts.gate_up_proj_bias"]
    assert type(model["head"].weight) is nn.Parameter
    expected = cls.from_hp(dense, 64)
    assert torch.equal(experts.gate_up_proj.qdata, expected.qdata)
    x = torch.randn(3, 128)
    for e in range(4):
        y = F.linear(x, experts.gate_up_proj[e])
        assert torch.equal(y, F.linear(x, expected[e]))


class Layer(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.Linear(128, 64)
        self.router = Router(128, 128)
        self.experts = Experts(**sizes)


def test_with_experts_reaches_linears_and_experts():
    for config, cls in CONFIGS.items():
        model = nn.ModuleList([Layer(), Layer()])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_(model, with_experts(config(group_size=64)), filter_fn=None)
        int4 = {name for name, p in model.named_parameters() if isinstance(p, cls)}
        assert int4 == {
            f"{i}.{name}" for i in range(2) for name in ("attention.weight", "experts.gate_up_proj")
        }
        assert all(p.group_size == 64 for p in model.parameters() if isinstance(p, cls))


@both_configs
def test_with_experts_on_a_layer_and_on_the_experts_alone(config, cls):
    model = nn.ModuleList([Layer(), Layer()])
    quantize_(model[0], with_experts(config()), filter_fn=None)
    quantize_(model[1].experts, with_experts(config()), filter_fn=None)
    assert type(model[0].experts.gate_up_proj) is type(model[1].experts.gate_up_proj) is cls
    assert isinstance(model[0].attention.weight, cls)
    assert type(model[1].attention.weight) is nn.Parameter


@both_configs
def test_with_experts_leaves_its_config_as_it_was_and_survives_json(config, cls, monkeypatch):
    from torchao.core import config as ao_config

    made = config(group_size=32)
    both = with_experts(made)
    assert made == config(group_size=32) and vars(made) == vars(config(group_size=32))
    monkeypatch.setattr(
        ao_config, "ALLOWED_AO_MODULES", ao_config.ALLOWED_AO_MODULES | {"w4tensor"}
    )
    assert config_from_dict(config_to_dict(both)) == both
    assert both != with_experts(config(group_size=64))


@both_configs
def test_experts_that_stay_behind_are_told_once_a_model(config, cls):
    model = nn.ModuleList([Layer(), Layer()])
    with pytest.warns(UserWarning) as told:
        quantize_(model, config(group_size=64))
        quantize_(model, config(group_size=64))
    (warning,) = told
    text = str(warning.message)
    share = 2 * 4 * 192 * 128 / sum(p.numel() for p in model.parameters())
    assert f"{share:.0%} of the weights of this ModuleList" in text
    assert "2 stacks, 0.experts.gate_up_proj" in text and "stay torch.float32" in text
    # what it says to do can be done as it stands
    other = nn.ModuleList([Layer()])
    names = {"quantize_": quantize_, "model": other, "w4tensor": w4tensor, config.__name__: config}
    exec(text.partition("int4: ")[2], names)
    assert type(other[0].experts.gate_up_proj) is cls
    assert other[0].experts.gate_up_proj.group_size == 64


@both_configs
def test_a_second_model_is_told_again_and_only_of_its_own_experts(config, cls):
    dense, first = nn.Sequential(nn.Linear(128, 64)), nn.Sequential(Layer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(dense, config())
        # nothing that this config would quantise stays behind
        quantize_(nn.Sequential(Layer(k=100)), config())
        quantize_(nn.Sequential(Layer(n=32)), config())
    with pytest.warns(UserWarning, match="1 stacks, 0.experts"):
        quantize_(first, config())
    second = nn.Sequential(nn.Identity(), Layer())
    with pytest.warns(UserWarning, match="1 stacks, 1.experts"):
        # a part of it: the model around is what the warning is about
        quantize_(second[1], config())


class Holder(nn.Module):
    """What transformers calls [E, K, N]."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 192, 128))


@both_configs
def test_transposed_experts_are_quantised_along_k(config, cls):
    model = nn.ModuleDict({"experts": Holder()})
    dense = model["experts"].down_proj.detach().clone()
    quantize_(model, with_experts(config(group_size=64)), filter_fn=None)
    w = model["experts"].down_proj
    assert type(w) is cls and w.transposed and w.shape == (3, 192, 128)
    expected = cls.from_hp(dense.mT.contiguous(), 64)
    assert torch.equal(w.qdata, expected.qdata) and torch.equal(w.scale, expected.scale)
    assert w.qdata.is_contiguous() and w.scale.is_contiguous()
    x = torch.randn(3, 5, 192)
    assert torch.equal(torch.bmm(x, w), torch.bmm(x, expected.mT))


@both_configs
def test_a_linear_inside_a_router_is_left_alone(config, cls):
    class TopKGating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(128, 128)

    model = nn.ModuleDict({"gate": TopKGating(), "up": nn.Linear(128, 128)})
    quantize_(model, config())
    assert type(model["gate"].layer.weight) is nn.Parameter
    assert notes(model)["gate.layer.weight"].startswith("a router")
    assert isinstance(model["up"].weight, cls)


@both_configs
def test_a_vector_by_name_is_ignored(config, cls):
    model = nn.ModuleDict({"experts": Experts()})
    before = model["experts"].scale
    quantize_(model, FqnToConfig({"experts.scale": config(64)}), filter_fn=None)
    assert model["experts"].scale is before
    linear = nn.Sequential(nn.Linear(128, 64))
    quantize_(linear, FqnToConfig({"0.bias": config(64)}), filter_fn=None)
    assert type(linear[0].bias) is nn.Parameter and type(linear[0].weight) is nn.Parameter


@both_configs
def test_a_linear_by_parameter_name(config, cls):
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))
    quantize_(model, FqnToConfig({"1.weight": config(64)}), filter_fn=None)
    assert type(model[0].weight) is nn.Parameter and isinstance(model[1].weight, cls)


@both_configs
def test_experts_that_cannot_be_are_left_alone(config, cls):
    for experts, reason in ((Experts(k=100), "K=100"), (Experts(n=32), "N=32")):
        model = nn.ModuleDict({"experts": experts})
        quantize_(model, FqnToConfig({r"re:.*gate_up_proj": config()}), filter_fn=None)
        assert type(experts.gate_up_proj) is nn.Parameter
        assert reason in notes(model)["experts.gate_up_proj"]


@both_configs
def test_other_modules_weights_are_left_alone(config, cls):
    model = nn.Sequential(nn.Embedding(128, 128), nn.Conv1d(128, 128, 1), nn.LayerNorm(128))
    quantize_(model, FqnToConfig({r"re:.*weight": config()}), filter_fn=None)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert "Embedding" in notes(model)["0.weight"]


@both_configs
def test_a_weight_that_is_not_finite_is_an_error(config, cls):
    model = nn.Sequential(nn.Linear(128, 64))
    with torch.no_grad():
        model[0].weight[3, 5] = float("nan")
    with pytest.raises(Unsupported, match="Inf or NaN"):
        quantize_(model, config())


# configs as JSON


@both_configs
def test_a_config_becomes_a_dict(config, cls):
    made = config(group_size=64, algorithm="hqq")
    data = config_to_dict(made)
    assert data["_type"] == config.__name__
    assert data["_data"]["group_size"] == 64 and data["_data"]["algorithm"] == "hqq"
    assert made == config(group_size=64, algorithm="hqq") and made != config()


@both_configs
def test_a_dict_becomes_a_config_once_torchao_may_look_here(config, cls, monkeypatch):
    from torchao.core import config as ao_config

    made = config(group_size=32)
    with pytest.raises(ValueError, match="Failed to find class"):
        monkeypatch.setattr(
            ao_config, "ALLOWED_AO_MODULES", ao_config.ALLOWED_AO_MODULES - {"w4tensor"}
        )
        config_from_dict(config_to_dict(made))
    monkeypatch.setattr(
        ao_config, "ALLOWED_AO_MODULES", ao_config.ALLOWED_AO_MODULES | {"w4tensor"}
    )
    assert config_from_dict(config_to_dict(made)) == made


# integer scales

INTEGER = dict(act_group_size=-1, integer_scales=True)


@pytest.mark.parametrize(
    "changes",
    [dict(act_group_size=size) for size in (32, 64, 128)]
    + [dict(algorithm=algorithm) for algorithm in ("hqq", "min_max")],
    ids=str,
)
def test_integer_scales_that_could_never_work_raise_at_once(changes):
    with pytest.raises(Unsupported, match="integer_scales with act_group_size=.* and algorithm="):
        W4ActQuantConfig(**(INTEGER | changes))
    assert not W4ActQuantConfig(**(INTEGER | changes | {"integer_scales": False})).integer_scales
    with pytest.raises(Unsupported, match="integer_scales"):
        W4ActQuantConfig(integer_scales=True)
    with pytest.raises(TypeError):
        W4CoalescedConfig(integer_scales=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_a_linear_becomes_int4_with_integer_scales(dtype, group_size):
    linear = nn.Linear(256, 64).to(dtype)
    plain = copy.deepcopy(linear)
    quantize_(nn.Sequential(linear), W4ActQuantConfig(group_size, **INTEGER))
    w = linear.weight
    assert isinstance(w, Int4ActQuantTensor) and w.act_group_size == -1
    check_multiple_values(w.multiple, w.scale)
    expected = Int4ActQuantTensor.from_hp(plain.weight, group_size, integer_scales=True)
    assert torch.equal(w.qdata, expected.qdata) and torch.equal(w.multiple, expected.multiple)
    x = torch.randn(5, 256).to(dtype)
    noise = (linear(x).double() - plain(x).double()).norm() / plain(x).double().norm()
    assert noise < 0.2


def test_without_integer_scales_there_are_no_multiples():
    for made in (W4ActQuantConfig(), W4ActQuantConfig(act_group_size=-1)):
        model = nn.Sequential(nn.Linear(128, 64))
        quantize_(model, made)
        assert model[0].weight.multiple is None


def test_experts_get_integer_scales():
    model = nn.ModuleDict({"layer": Layer(), "experts": Holder()})
    dense = model["experts"].down_proj.detach().clone()
    config = with_experts(W4ActQuantConfig(64, **INTEGER))
    quantize_(model, config, filter_fn=None)
    int4 = {name: p for name, p in model.named_parameters() if isinstance(p, Int4ActQuantTensor)}
    assert set(int4) == {
        "layer.attention.weight",
        "layer.experts.gate_up_proj",
        "experts.down_proj",
    }
    for w in int4.values():
        check_multiple_values(w.multiple, w.scale)
    # transposed ones too, along K
    w = model["experts"].down_proj
    expected = Int4ActQuantTensor.from_hp(dense.mT.contiguous(), 64, integer_scales=True)
    assert w.transposed and torch.equal(w.multiple, expected.multiple)


def test_integer_scales_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 64))
    quantize_(model, W4ActQuantConfig(**INTEGER))
    assert model[0].weight.multiple.device.type == "meta"


def test_a_config_with_integer_scales_survives_json(monkeypatch):
    from torchao.core import config as ao_config

    monkeypatch.setattr(
        ao_config, "ALLOWED_AO_MODULES", ao_config.ALLOWED_AO_MODULES | {"w4tensor"}
    )
    made = W4ActQuantConfig(**INTEGER)
    assert config_from_dict(config_to_dict(made)) == made
    assert made != W4ActQuantConfig(act_group_size=-1)
    # one that was written before there were any
    data = config_to_dict(W4ActQuantConfig(act_group_size=-1))
    del data["_data"]["integer_scales"]
    assert config_from_dict(data) == W4ActQuantConfig(act_group_size=-1)
