"""The config of OLMo 3: types of layers, windows, and rotary positions by the type of layer in every spelling."""

import json

import numpy as np
import pytest

from olmozoo import ConfigError, ModelConfig, Olmo3Config

FULL, SLIDING = "full_attention", "sliding_attention"
SMALL = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 5, "num_attention_heads": 6, "vocab_size": 99}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("preset", "count"), [("olmo3-7b", 7_298_011_136), ("olmo3-7b-8k", 7_298_011_136), ("olmo3-32b", 32_233_522_176)]
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    config = ModelConfig.from_preset(preset)
    assert sum(config.count_parameters().values()) == count
    assert config.windows == (4096, 4096, 4096, None) * (config.num_hidden_layers // 4)
    assert (config.rope() == config.rope(SLIDING)) == (preset == "olmo3-7b-8k")
    assert (config.vocab_size, config.rope_theta, config.eos_token_id) == (100278, 500000.0, 100257)


def test_every_fourth_layer_is_full_by_default():
    config = Olmo3Config(**SMALL, sliding_window=7)
    assert config.layer_types == [SLIDING, SLIDING, SLIDING, FULL, SLIDING]
    assert config.windows == (7, 7, 7, None, 7)
    assert config.to_dict()["layer_types"] == config.layer_types
    assert Olmo3Config(**SMALL, layer_types=[FULL] * 5, sliding_window=None).windows == (None,) * 5
    preset = Olmo3Config.from_preset("olmo3-7b", num_hidden_layers=2)
    assert preset.layer_types == [SLIDING, SLIDING]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_types": [FULL] * 4}, "layer_types has 4 entries, expected num_hidden_layers = 5"),
        ({"layer_types": [FULL] * 4 + ["chunked_attention"]}, "layer_types is .*'sliding_attention'"),
        ({"layer_types": "full_attention"}, "layer_types is 'full"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"sliding_window": None}, "sliding_window is None, expected an integer"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_rope_theta": 0.5}, "sliding_rope_theta is 0.5"),
        ({"rope_parameters": {FULL: "yarn"}}, "rope_parameters.full_attention is 'yarn'"),
        ({"rope_parameters": {SLIDING: {"rope_type": "linear"}}}, "factor"),
    ],
)
def test_a_wrong_value_names_its_field(fields, named):
    with pytest.raises(ConfigError, match=named):
        Olmo3Config.from_dict({**SMALL, **fields})


def meaning(file, **overrides):
    config = Olmo3Config.from_dict({**SMALL, **file}, **overrides)
    assert Olmo3Config.from_dict(json.loads(config.to_json())) == config
    sliding = config.rope_theta if config.sliding_rope_theta is None else config.sliding_rope_theta
    return config.rope_theta, config.rope_scaling, sliding, config.sliding_rope_scaling


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({}, (5e5, None, 5e5, None)),
        ({"rope_theta": 1e4}, (1e4, None, 1e4, None)),
        ({"rope_theta": 1e4, "rope_scaling": YARN}, (1e4, YARN, 1e4, None)),
        ({"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": None}, (1e4, None, 1e4, None)),
        (
            {"rope_parameters": {FULL: {**YARN, "rope_theta": 1e6}, SLIDING: {**LINEAR, "rope_theta": 1e4}}},
            (1e6, YARN, 1e4, LINEAR),
        ),
        ({"rope_parameters": {FULL: {**YARN, "rope_theta": 1e6}, SLIDING: None}}, (1e6, YARN, 5e5, None)),
        ({"rope_theta": 1e4, "rope_parameters": {FULL: YARN, SLIDING: LINEAR}}, (1e4, YARN, 1e4, LINEAR)),
        # Flat: scaling is of full layers, theta of all. Transformers adds types when it saves such a file again.
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}}, (1e6, YARN, 1e6, None)),
        (
            {
                "rope_parameters": {
                    **{**YARN, "rope_theta": 1e6},
                    **{kind: {"rope_type": "default", "rope_theta": 5e5} for kind in (FULL, SLIDING)},
                }
            },
            (1e6, YARN, 1e6, None),
        ),
    ],
)
def test_every_spelling_of_rope_is_read(file, expected):
    assert meaning(file) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"rope_theta": 1e6}, (1e6, YARN, 1e6, None)),
        ({"rope_scaling": None}, (5e5, None, 5e5, None)),
        ({"sliding_rope_theta": 1e4}, (5e5, YARN, 1e4, None)),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, (1e4, LINEAR, 1e4, None)),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}}, (1e6, None, 1e4, None)),
    ],
)
@pytest.mark.parametrize("spelling", ["legacy", "by type", "both"])
def test_overrides_go_before_the_file(spelling, override, expected):
    legacy = {"rope_theta": 5e5, "rope_scaling": YARN}
    by_type = {
        "rope_parameters": {
            FULL: {**YARN, "rope_theta": 5e5},
            SLIDING: {"rope_type": "default", "rope_theta": 5e5},
        }
    }
    file = {"legacy": legacy, "by type": by_type, "both": legacy | by_type}[spelling]
    assert meaning(file, **override) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": YARN},
        {"rope_theta": 1e6, "rope_scaling": YARN, "sliding_rope_theta": 1e4},
        {"rope_theta": 1e4, "sliding_rope_scaling": LINEAR},
    ],
)
def test_transformers_reads_what_is_written(fields):
    transformers = pytest.importorskip("transformers")
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    config = Olmo3Config(**SMALL, **fields)
    written = config.to_dict()
    assert (written["rope_theta"], written["rope_scaling"]) == (config.rope_theta, config.rope_scaling)
    theirs = transformers.Olmo3Config.from_dict(written)
    tables = Olmo3RotaryEmbedding(theirs)
    for kind in (FULL, SLIDING):
        rope = config.rope(kind)
        np.testing.assert_allclose(rope.inv_freq, getattr(tables, f"{kind}_inv_freq"), rtol=3e-7)
        assert rope.scale == pytest.approx(getattr(tables, f"{kind}_attention_scaling"))
    assert Olmo3Config.from_dict(theirs.to_dict()).rope(SLIDING) == config.rope(SLIDING)
    assert Olmo3Config.from_dict(theirs.to_dict()).rope() == config.rope()


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.Olmo3Config().to_dict(), Olmo3Config().to_dict()
    assert {name: theirs[name] for name in ours if name in theirs} == {n: v for n, v in ours.items() if n in theirs}
    assert ours.keys() - theirs.keys() <= {"rope_theta", "rope_scaling"}
