"""One call resolved, in no framework: settings, ids, shapes, random numbers."""

import json
import warnings

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.generation import prepare as module
from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.prepare import prepare, uniforms
from olmozoo.generation.processors import RULES
from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import CONFIGS


def config_of(name):
    return CONFIGS[name].replace(pad_token_id=1, eos_token_id=3, max_position_embeddings=96)


def call(ids, mask=None, defaults=None, config="olmo2", **settings):
    return prepare(defaults or GenerationConfig(), config_of(config), settings, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"do_sample": True, "top_p": 0}, "top_p is 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"do_sample": True, "min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is"),
        ({"bad_words_ids": [[900]]}, "900"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "do_sample": True}, "draws nothing"),
        ({"num_beams": 2, "num_return_sequences": 3}, "larger than num_beams"),
        ({"num_return_sequences": 3}, "greedy decoding, which has one answer"),
        ({"prompt_lookup_num_tokens": 3, "do_sample": True}, "for greedy decoding"),
        ({"num_beams": 2, "streamer": object()}, "a streamer cannot show beam search"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"min_length": -1}, "min_length is -1"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "more than the 5 tokens"),
        ({"max_length": 9, "max_new_tokens": None}, "no room"),
        ({"do_sample": True, "seed": -1}, "seed is -1"),
        ({"do_sample": True, "stream_index": [1, 2]}, "stream_index has 2 numbers"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"stop_strings": [""]}, "stop_strings is"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_say_why(settings, named):
    config = config_of("olmo2")
    ids, mask = left_padded(config, length=9)
    streamer = settings.get("streamer")
    changes = {"max_new_tokens": 14, **{key: value for key, value in settings.items() if key != "streamer"}}
    with pytest.raises(InputError, match=named):
        prepare(GenerationConfig(), config, changes, input_ids=ids, attention_mask=mask, streamer=streamer)


@pytest.mark.filterwarnings("ignore:.*no effect without do_sample")
def test_settings_of_sampling_do_not_matter_without_sampling():
    unused = {"temperature": 0.0, "top_p": 1.5, "top_k": -1, "min_p": 2, "seed": -1}
    plain = call([[5, 6]])
    for found in (call([[5, 6]], **unused), call([[5, 6]], defaults=GenerationConfig(**unused))):
        assert found.options == plain.options
        assert found.values.keys() == plain.values.keys()
    with pytest.raises(InputError, match=r"temperature is 0.0, expected a number above 0 \(do_sample=False takes"):
        call([[5, 6]], defaults=GenerationConfig(**unused), do_sample=True)


def test_none_switches_a_setting_off():
    defaults = GenerationConfig(
        max_new_tokens=7,
        do_sample=True,
        temperature=2.0,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        bad_words_ids=[[5]],
        min_new_tokens=3,
        eos_token_id=[3, 4],
        stop_strings="a",
    )
    kinds = [type(rule).__name__ for rule in call([[5]], defaults=defaults, stop_strings=None).options.rules]
    assert kinds == [kind.__name__ for kind in RULES]  # in Transformers' order
    off = call([[5]], defaults=defaults, **dict.fromkeys(defaults.to_dict()), top_k=None)
    assert off.layout.max_new == 20
    assert off.options == call([[5]], min_new_tokens=0).options
    assert not off.values["is_end"].any()
    sampled = call(
        [[5]], defaults=defaults, do_sample=True, temperature=None, top_p=None, top_k=None, stop_strings=None
    )
    assert not {"Temperature", "TopKTopP"} & {type(rule).__name__ for rule in sampled.options.rules}
    assert call([[5]]).values["is_end"].nonzero()[0].tolist() == [3]  # the model's own, where nothing is given
    assert call([[5]], eos_token_id=None).values["is_end"].sum() == 0


def test_ids_outside_the_vocabulary_are_named():
    for ids, named in (
        ([[5, 6], [7, 61]], "input_ids has 61 in row 1, column 1: expected ids from 0 to 60"),
        ([[-100, 5]], "input_ids has -100 in row 0, column 0"),
        ([[2**40]], f"input_ids has {2**40} in row 0"),
        ([[2**70]], f"input_ids has {2**70} in row 0"),
        ([[5], [5, 6]], "rows of different lengths"),
    ):
        with pytest.raises(InputError, match=named):
            call(ids)


def test_lengths_are_bounded_by_positions_or_by_memory(monkeypatch):
    with pytest.raises(InputError, match="the model has 96 positions"):
        call([[5]], config="opt", max_new_tokens=10**7)
    with pytest.raises(InputError, match=r"1 rows of 1 tokens and 2147483647 new ones need \d+\.\d GiB"):
        call([[5]], max_new_tokens=2**31 - 1)
    with pytest.raises(InputError, match=r"need \d+\.\d GiB"):
        call([[5]], max_new_tokens=2**28, output_scores=True)
    for whole, expected in ((True, "498.0 GiB"), (False, "178.0 GiB")):  # two layers of three have a window
        with pytest.raises(InputError, match=f"need {expected}"):
            call([[5]], config="olmo3", max_new_tokens=2**31 - 1, return_dict_in_generate=whole)
    found = call([[5]], max_new_tokens=9, prompt_lookup_num_tokens=10**6)
    assert found.mask.shape == (1, 1 + 9 + 9)


def test_prompts_of_compiled_loops_are_padded_to_a_few_lengths_and_no_further_than_needed():
    config = config_of("olmo2").replace(max_position_embeddings=256)
    settings = {"attention_mask": None, "compiled": True}
    for length, slots in ((1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128)):
        ids = np.full((2, length), 5)
        layout = prepare(GenerationConfig(), config, {"max_new_tokens": length}, input_ids=ids, **settings).layout
        assert (layout.past_slots, layout.prompt_slots, layout.text_slots) == (0, slots, slots)
        assert layout.answer_slots == max(64, slots)
    layout = prepare(GenerationConfig(), config, {"max_new_tokens": 3}, input_ids=ids, **settings, cached=60).layout
    assert (layout.past_slots, layout.prompt_slots, layout.text_slots) == (64, 16, 128)


def test_a_rule_is_one_setting_and_one_class(monkeypatch):
    class OnlyEven:
        @classmethod
        def create(cls, request):
            return (
                (cls(), {"odd": np.arange(request.vocab_size) % 2 == 1}) if request.settings.min_length == 2 else None
            )

        def process(self, xp, values, text, scores):
            return xp.where(values["odd"], -np.inf, scores)

    monkeypatch.setattr(module, "RULES", (*RULES, OnlyEven))
    found = call([[5, 6, 7]], min_length=2)
    assert [type(rule) for rule in found.options.rules] == [OnlyEven]
    assert found.values["odd"].sum() == 30


def test_shapes_that_cannot_be_are_named():
    config = config_of("opt")

    def call(ids, mask=None, **settings):
        return prepare(GenerationConfig(), config, settings, input_ids=ids, attention_mask=mask)

    for ids, named in (
        (np.zeros((0, 3), int), "shape"),
        (np.zeros(3, int), "shape"),
        (np.zeros((1, 2)), "dtype float64"),
    ):
        with pytest.raises(InputError, match=named):
            call(ids)
    with pytest.raises(InputError, match="attention_mask has shape"):
        call(np.ones((1, 3), int), np.ones((1, 2)))
    with pytest.raises(InputError, match="90 tokens and 7 new ones are 97, and the model has 96 positions"):
        call(np.ones((1, 90), int), np.ones((1, 90)), max_new_tokens=7)
    assert call(np.full((1, 90), 5), max_new_tokens=6).layout.prompt == 90
    with pytest.raises(InputError, match="or a bos_token_id"):
        call(None)
    with pytest.warns(UserWarning, match="temperature, seed has no effect"):
        call(np.full((1, 3), 5), temperature=2.0, seed=1)


def test_settings_come_in_any_form():
    config = config_of("olmo2")
    ids = np.full((1, 3), 5)
    given = {"num_beams": 3, "max_new_tokens": 7}
    for form in (GenerationConfig(**given), given, type("Config", (), {"to_dict": lambda self: given})()):
        call = prepare(form, config, {"num_beams": 2}, input_ids=ids, attention_mask=None)
        assert (call.options.beams, int(call.values["max_new"])) == (2, 7)


def test_generation_settings_survive_a_file():
    data = {"temperature": 0.7, "top_k": None, "do_sample": True, "typical_p": 0.3, "transformers_version": "4.57.6"}
    settings = GenerationConfig.from_dict(data)
    assert settings.top_k == 50
    assert settings.to_dict() == {key: value for key, value in data.items() if value is not None}


def test_generate_warns_of_settings_of_a_file_that_it_ignores():
    ids = np.full((1, 3), 5)
    idle = {"guidance_scale": 1.0, "typical_p": 1.0, "suppress_tokens": None, "num_beam_groups": 1, "sequence_bias": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(idle | {"cache_implementation": None}, config_of("olmo2"), {}, input_ids=ids, attention_mask=None)
    defaults = idle | {"guidance_scale": 1.5, "suppress_tokens": [4]}
    with pytest.warns(UserWarning, match="generate ignores suppress_tokens, guidance_scale, which the generation"):
        prepare(defaults, config_of("olmo2"), {}, input_ids=ids, attention_mask=None)


def test_uniform_numbers_belong_to_a_seed_and_a_stream():
    draws = uniforms(5, [0, 3], 100)
    assert draws.dtype == np.float32
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.array_equal(uniforms(5, [3], 7), draws[1:, :7])
    assert np.array_equal(draws[0], np.random.Generator(np.random.Philox(key=[5, 0])).random(100, np.float32))
    assert not np.array_equal(uniforms(6, [0], 100), draws[:1])
    assert uniforms((1 << 64) - 1, [(1 << 64) - 1], 2).shape == (1, 2)


def test_settings_in_a_config_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {
        "max_length": 30,
        "min_length": 3,
        "num_beams": 2,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [6, 7]],
        "length_penalty": 0.7,
        "early_stopping": True,
        "top_k": None,
    }
    config = CONFIGS["olmo2"].to_dict() | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = GenerationConfig.from_folder(tmp_path, type(CONFIGS["olmo2"]).from_folder(tmp_path))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path, "config.json")
    for name, value in settings.items():
        if value is not None:
            assert getattr(found, name) == getattr(theirs, name) == value
    assert found.to_dict().items() >= {name: value for name, value in settings.items() if value is not None}.items()
    (tmp_path / "generation_config.json").write_text("{}")  # then config.json has no say
    found = GenerationConfig.from_folder(tmp_path, type(CONFIGS["olmo2"]).from_folder(tmp_path))
    assert found.num_beams == 1
    assert transformers.GenerationConfig.from_pretrained(tmp_path).num_beams in (1, None)


def test_a_text_past_the_trained_positions_warns():
    config = CONFIGS["olmo2"]
    ids = np.full((1, 10), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(GenerationConfig(), config, {"max_new_tokens": 6}, input_ids=ids, attention_mask=None)
    with pytest.warns(UserWarning, match=r"10 tokens and 7 new ones are 17, .* 16 positions"):
        prepare(GenerationConfig(), config, {"max_new_tokens": 7}, input_ids=ids, attention_mask=None)
