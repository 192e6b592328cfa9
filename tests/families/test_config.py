"""Configs, parameter tables and initial values, with no framework."""

import dataclasses
import json

import numpy as np
import pytest

from olmozoo import ConfigError, ModelConfig, Olmo2Config
from olmozoo.families.registry import MODEL_TYPES

SMALL = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 99}


def test_defaults_are_the_published_ones():
    assert Olmo2Config().to_dict() == {
        "model_type": "olmo2",
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-5,
    }


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("olmo2-1b", 1_484_916_736),
        ("olmo2-7b", 7_298_617_344),
        ("olmo2-13b", 13_716_198_400),
        ("olmo2-32b", 32_234_279_936),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    config = ModelConfig.from_preset(preset)
    assert sum(config.count_parameters().values()) == count
    assert config.rms_norm_eps == 1e-6
    assert config.eos_token_id == 100257


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ConfigError, match="olmo2-13b"):
        Olmo2Config.from_preset("olmo2-3b")


def test_a_config_survives_json_with_keys_it_does_not_know():
    data = {**Olmo2Config(**SMALL).to_dict(), "architectures": ["Olmo2ForCausalLM"], "my_own": {"a": [1, 2]}}
    config = ModelConfig.from_dict(json.loads(json.dumps(data)))
    assert type(config) is Olmo2Config
    assert config.to_dict() == data
    assert config.my_own == {"a": [1, 2]}
    assert ModelConfig.from_dict(json.loads(config.to_json())) == config
    with pytest.raises(AttributeError, match="no_such"):
        _ = config.no_such


def test_both_spellings_of_rope_mean_the_same():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    old = Olmo2Config.from_dict({**SMALL, "rope_theta": 5e5, "rope_scaling": scaling})
    new = Olmo2Config.from_dict({**SMALL, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old == new
    assert new.rope_theta == 5e5
    with pytest.raises(ConfigError, match="rope_theta is 0"):
        Olmo2Config.from_dict({**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 0}})
    plain = Olmo2Config.from_dict({**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}})
    assert plain == Olmo2Config(**SMALL, rope_theta=3e4)
    alias = Olmo2Config.from_dict({**SMALL, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert alias.rope() == Olmo2Config(**SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0}).rope()


YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "file", [{"rope_parameters": {**YARN, "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": YARN}]
)
@pytest.mark.parametrize(
    ("override", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, YARN),
        ({"rope_scaling": LINEAR}, 5e5, LINEAR),
        ({"rope_parameters": LINEAR}, 5e5, LINEAR),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e6}}, 1e6, LINEAR),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6, None),
        ({"rope_scaling": None}, 5e5, None),
        ({"rope_parameters": None}, 5e5, None),
        ({}, 5e5, YARN),
    ],
)
def test_what_is_not_overridden_of_rope_is_that_of_the_file(file, override, theta, scaling):
    config = Olmo2Config.from_dict({**SMALL, **file}, **override)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", 50),
        ("hidden_size", "48"),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 2.0),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 0),
        ("intermediate_size", None),
        ("hidden_act", "tanhshrink"),
        ("max_position_embeddings", True),
        ("initializer_range", -0.1),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("attention_dropout", 1.0),
        ("attention_bias", 1),
        ("tie_word_embeddings", None),
        ("eos_token_id", "</s>"),
        ("pad_token_id", 1.5),
        ("rope_theta", 0.0),
        ("rope_scaling", "linear"),
        ("problem_type", "guessing"),
    ],
)
def test_a_wrong_value_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field):
        Olmo2Config.from_dict({**SMALL, field: value})


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "spiral", "factor": 2.0}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 1.0}, "factor"),
        ({"rope_type": "dynamic", "factor": "2"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}, "beta_fast"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4}, "short_factor"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_wrong_rope_scaling_names_its_field(scaling, named):
    with pytest.raises(ConfigError, match=named):
        Olmo2Config(**SMALL, rope_scaling=scaling)


def test_foreign_and_unknown_model_types_are_refused():
    with pytest.raises(ConfigError, match=r"'llama'.*olmo2"):
        ModelConfig.from_dict({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"'gpt2'.*'olmo2'"):
        Olmo2Config.from_dict({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match="hiden_size"):
        Olmo2Config.from_dict(SMALL, hiden_size=3)


def test_labels_come_from_id2label_or_their_number():
    assert Olmo2Config(**SMALL).num_labels == 2
    config = Olmo2Config.from_dict({**SMALL, "id2label": {"0": "no", "1": "yes", "2": "so"}})
    assert (config.num_labels, config.id2label[2], config.label2id["so"]) == (3, "so", 2)
    assert Olmo2Config.from_dict(config.to_dict()) == config
    assert Olmo2Config.from_dict(config.to_dict(), num_labels=5).num_labels == 5
    with pytest.raises(ConfigError, match="num_labels"):
        Olmo2Config(**SMALL, num_labels=2, id2label={0: "a", 1: "b", 2: "c"})


def test_configs_are_read_from_and_written_to_folders(tmp_path):
    config = Olmo2Config(**SMALL, rope_theta=3e4)
    config.save_pretrained(tmp_path / "new")
    assert Olmo2Config.from_pretrained(tmp_path / "new") == config
    assert Olmo2Config.from_pretrained(tmp_path / "new", rope_theta=1e6).rope_theta == 1e6
    (tmp_path / "new" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Olmo2Config.from_pretrained(tmp_path / "new")


@pytest.mark.pt
@pytest.mark.parametrize("family", MODEL_TYPES.values(), ids=lambda family: family.name)
def test_the_table_is_that_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = family.from_dict({**SMALL, "num_key_value_heads": 2, "attention_bias": True, "pad_token_id": 1})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config.to_dict())
        ).state_dict()
    for name in [name for name in theirs if ".experts." in name]:  # Transformers 5 stacks them in memory
        parts = theirs.pop(name).unbind()
        for expert, part in enumerate(parts):
            stem = f"{name.rpartition('.')[0]}.{expert}"
            if name.endswith("gate_up_proj"):
                theirs[f"{stem}.gate_proj.weight"], theirs[f"{stem}.up_proj.weight"] = part.chunk(2)
            else:
                theirs[f"{stem}.down_proj.weight"] = part
    ours = {parameter.name: parameter.shape for parameter in config.parameters("causal_lm")}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert all(len(p.axes) == len(p.shape) for p in config.parameters("causal_lm"))


def test_initial_values_depend_on_seed_and_name_alone():
    config = Olmo2Config(**SMALL)
    table = {p.name: p for p in config.parameters("causal_lm")}
    q, k = table["model.layers.1.self_attn.q_proj.weight"], table["model.layers.1.self_attn.k_proj.weight"]
    assert np.array_equal(q.initial(3), q.initial(3))
    assert not np.array_equal(q.initial(3), q.initial(4))
    assert not np.array_equal(q.initial(3), k.initial(3))
    assert np.array_equal(q.initial(3, "float64").astype("float32"), q.initial(3))
    assert np.array_equal(q.initial(3), dataclasses.replace(q, axes=("a", "b")).initial(3))
    big = dataclasses.replace(q, shape=(1100, 1000))
    assert abs(big.initial(0).std() / config.initializer_range - 1) < 2e-3
    assert abs(big.initial(0).mean()) < 1e-4
    assert np.array_equal(
        dataclasses.replace(big, shape=(2, 3)).initial(0), big.initial(0).reshape(-1)[:6].reshape(2, 3)
    )
    assert table["model.norm.weight"].initial(0).tolist() == [1.0] * 48
