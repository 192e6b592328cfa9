"""Settings of configs and of generation that can be set on a model, and fields that cannot."""

import copy
import pickle

import numpy as np
import pytest

from olmozoo import ConfigError, GenerationConfig, InputError, ModelConfig
from olmozoo.backends import load
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import WINGS


@pytest.fixture(params=["olmo2", "olmo-bias", "opt"])
def config(request):
    return ModelConfig.from_dict(CONFIGS[request.param].to_dict())


def test_settings_of_behaviour_can_be_set(config):
    for name, value in {"use_cache": False, "pad_token_id": None, "eos_token_id": [3, 5], "bos_token_id": 7}.items():
        setattr(config, name, value)
        assert getattr(config, name) == value
        assert config.to_dict()[name] == value
    config.problem_type = "regression"
    config.output_attentions = True  # no field has it
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cache", 1),
        ("pad_token_id", "x"),
        ("eos_token_id", [1.5]),
        ("problem_type", "guess"),
        ("id2label", {0: "a"}),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(config, name, value):
    before = config.to_dict()
    with pytest.raises(ConfigError, match=name if name != "id2label" else "num_labels"):
        setattr(config, name, value)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "name", ["hidden_size", "vocab_size", "num_labels", "head_dim", "tie_word_embeddings", "replace"]
)
def test_fixed_fields_say_so(config, name):
    with pytest.raises(
        ConfigError, match=rf"{name} is fixed once the config is made: make a new config with replace()"
    ):
        setattr(config, name, 8)
    config.hidden_size = config.hidden_size  # as it is


def test_a_copy_does_not_follow_a_setting(config):
    copies = [config.replace(), copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))]
    config.use_cache = False
    config.output_hidden_states = True
    for other in copies:
        assert other.use_cache
        assert "output_hidden_states" not in other
    assert "use_cache" in config
    assert "text_config" not in config


def test_private_attributes_are_not_written(config):
    before = config.to_dict()
    config._attn_implementation = "sdpa"
    config.name_or_path = "here"
    assert config.to_dict() == before
    assert config.replace(use_cache=False).name_or_path == "here"


def test_generation_settings_can_be_set():
    settings = GenerationConfig()
    settings.pad_token_id = 5
    settings.max_new_tokens = 3
    settings.eos_token_id = None
    settings.cache_implementation = "static"  # no field has it
    assert settings.to_dict() == {
        "pad_token_id": 5,
        "max_new_tokens": 3,
        "eos_token_id": (),
        "cache_implementation": "static",
    }
    for name, value in {"max_new_tokens": 0, "pad_token_id": "x", "num_beams": 0}.items():
        with pytest.raises(InputError, match=name):
            setattr(settings, name, value)
    settings.temperature = 0.0  # unused without sampling
    settings.do_sample = True
    with pytest.raises(InputError, match="temperature"):
        settings.check()


@pytest.mark.parametrize("wing", WINGS)
def test_a_model_obeys_what_is_set(tmp_path, wing):
    backend = load(write_checkpoint(tmp_path, CONFIGS["opt"]), wing)
    ids = np.array([[5, 9, 23]])
    model = backend.model
    assert "past_key_values" in backend.forward(ids, np.ones_like(ids))
    model.config.use_cache = False
    model.config.output_hidden_states = True
    output = backend.forward(ids, np.ones_like(ids))
    assert "past_key_values" not in output
    assert len(output["hidden_states"]) == 3
    first = backend.generate(ids, np.ones_like(ids), max_new_tokens=4)
    model.generation_config.eos_token_id = int(first[0, 3])
    model.generation_config.max_new_tokens = 9
    assert backend.generate(ids, np.ones_like(ids)).shape == (1, 4)


@pytest.mark.parametrize("wing", WINGS)
def test_training_calls_keep_no_cache(tmp_path, wing):
    backend = load(write_checkpoint(tmp_path, CONFIGS["opt"].replace(dropout=0.0)), wing)
    ids = np.array([[5, 9, 23]])
    training = {"pt": {}, "tf": {"training": True}, "flax": {"deterministic": False}}[wing]
    if wing == "pt":
        backend.model.train()
    assert "past_key_values" not in backend.forward(ids, np.ones_like(ids), **training)
    assert "past_key_values" in backend.forward(ids, np.ones_like(ids), use_cache=True, **training)


@pytest.mark.parametrize("wing", WINGS)
def test_unknown_arguments_are_named_and_none_is_no_argument(tmp_path, wing):
    backend = load(write_checkpoint(tmp_path, CONFIGS["olmo2"]), wing)
    ids = np.array([[5, 9, 23]])
    backend.forward(ids, np.ones_like(ids), token_type_ids=None, head_mask=None)
    with pytest.raises(InputError, match=r"Olmo2\w+ has no argument head_mask"):
        backend.forward(ids, np.ones_like(ids), head_mask=np.ones(4))
