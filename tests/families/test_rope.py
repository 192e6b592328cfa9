"""Rotary frequencies against Transformers, for every kind."""

import numpy as np
import pytest

from olmozoo import Olmo2Config

KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 100,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.1] * 16,
        "long_factor": [2.0, 3.0] * 8,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("length", [50, 300, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind, length):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**KINDS[kind], "rope_theta": 5e5}
    theirs = transformers.Olmo2Config(
        hidden_size=192, num_attention_heads=6, max_position_embeddings=256, rope_parameters=parameters
    )
    rope = Olmo2Config.from_dict(theirs.to_dict()).rope()
    if kind == "default":
        expected, scale = 5e5 ** -(np.arange(0, 32, 2) / 32), 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, None, seq_len=length)
    np.testing.assert_allclose(rope.frequencies(length), np.asarray(expected), rtol=3e-7)
    assert rope.scale == pytest.approx(scale, rel=1e-12)


def test_the_length_matters_to_dynamic_and_longrope_alone():
    for kind, scaling in KINDS.items():
        rope = Olmo2Config(
            hidden_size=192, num_attention_heads=6, max_position_embeddings=256, rope_scaling=scaling
        ).rope()
        same = np.array_equal(rope.frequencies(40), rope.frequencies(5000))
        assert same == (kind not in ("dynamic", "longrope")), kind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("yarn", "llama3", "longrope"))])
def test_the_original_length_may_stand_at_the_top_of_a_file_and_goes_first(kind):
    transformers = pytest.importorskip("transformers")
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding

    data = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 256}
    parameters = {**KINDS[kind], "rope_theta": 5e5}
    expected = Olmo2Config.from_dict(
        {**data, "rope_parameters": {**parameters, "original_max_position_embeddings": 32}}
    )
    data["original_max_position_embeddings"] = 32
    found = Olmo2Config.from_dict({**data, "rope_parameters": parameters})
    theirs = transformers.Olmo2Config.from_dict({**data, "rope_parameters": dict(parameters)})
    np.testing.assert_allclose(found.rope().frequencies(20), Olmo2RotaryEmbedding(theirs).inv_freq, rtol=3e-7)
    assert found.rope() == expected.rope() != make(KINDS[kind]).rope()
    assert Olmo2Config.from_dict(found.to_dict()).rope() == found.rope()
    again = Olmo2Config.from_dict(data, rope_theta=5e5, rope_scaling=KINDS[kind])  # a change made in the call
    assert again.rope() == found.rope()
    assert "original_max_position_embeddings" not in (Olmo2Config.from_dict(data).rope_scaling or {})


def make(scaling):
    return Olmo2Config(
        hidden_size=192, num_attention_heads=6, max_position_embeddings=256, rope_theta=5e5, rope_scaling=scaling
    )
