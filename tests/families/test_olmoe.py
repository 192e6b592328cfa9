"""The configs of OLMoE and FlexOlmo: experts, and how many parameters one token is computed with."""

import json

import pytest

from olmozoo import ConfigError, FlexOlmoConfig, ModelConfig, OlmoeConfig

SMALL = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 99}


@pytest.mark.parametrize(
    ("preset", "count", "active", "experts"),
    [
        ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280, (64, 8)),
        ("flexolmo-7x7b", 33_270_665_216, 33_270_665_216, (7, 7)),
        ("flexolmo-2x7b", 11_627_401_216, 11_627_401_216, (2, 2)),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count, active, experts):
    config = ModelConfig.from_preset(preset)
    assert sum(config.count_parameters().values()) == count
    assert config.count_active() == active
    assert (config.num_experts, config.num_experts_per_tok) == experts
    assert config.norm_topk_prob is False


@pytest.mark.parametrize("family", [OlmoeConfig, FlexOlmoConfig])
def test_defaults_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    ours, theirs = family().to_dict(), getattr(transformers, family.__name__)().to_dict()
    assert {name: theirs[name] for name in ours if name in theirs} == {n: v for n, v in ours.items() if n in theirs}
    assert ours.keys() - theirs.keys() <= {"rope_theta", "rope_scaling"}
    assert theirs["rope_parameters"]["rope_theta"] == ours["rope_theta"]


def test_the_other_name_of_num_experts_is_read():
    config = OlmoeConfig.from_dict({**SMALL, "num_local_experts": 9})
    assert config.num_experts == 9
    assert "num_local_experts" not in config.to_dict()
    assert OlmoeConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 100_000}, "num_experts is 100000, expected an integer of at least 1 and at most 33,333"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5, .* at most 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ({"output_router_logits": "yes"}, "output_router_logits is 'yes'"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
        ({"clip_qkv": "no"}, "clip_qkv is 'no'"),
    ],
)
def test_a_wrong_value_names_its_field(fields, named):
    with pytest.raises(ConfigError, match=named):
        OlmoeConfig.from_dict({**SMALL, **fields})


def test_tensors_of_experts_name_their_stack():
    config = FlexOlmoConfig(**SMALL, num_experts=12, num_experts_per_tok=2, pad_token_id=1)
    table = {parameter.name: parameter for parameter in config.parameters()}
    found = table["model.layers.2.mlp.experts.11.down_proj.weight"]
    assert found.stack == ("model.layers.2.mlp.experts.down_proj.weight", 11)
    assert (found.group, found.shape) == ("experts", (48, 50))
    router = table["model.layers.2.mlp.gate.weight"]
    assert (router.stack, router.group, router.shape) == (None, "router", (12, 48))
