"""Decoding in every wing: against Transformers where that has the same, against each other, and against itself."""

import contextlib
import copy
import importlib
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from olmozoo import GenerationConfig, InputError
from olmozoo.backends import load
from olmozoo.generation.processors import is_bad
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import WINGS, let_programs_go, scope

NAMES = ["olmo2", "olmo-clip-tied", "opt-projected-post-norm"]
NEW, LENGTH = 14, 9
# Rules that change the scores; each is tried with greedy and with beam search.
RULES = {
    "plain": {},
    "penalty": {"repetition_penalty": 1.4},
    "no word twice": {"no_repeat_ngram_size": 1},
    "no pair twice": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
    "bad words": {"bad_words_ids": [[5], [44, 35], [9, 34, 26], [3]]},
    "several ends": {"eos_token_id": [3, 8, 44]},
    "not before in all": {"min_length": LENGTH + 6, "eos_token_id": [3, 8, 44]},
    "not before": {"min_new_tokens": 6, "eos_token_id": [3, 8, 44]},
}
BEAMS = {
    "three": {"num_beams": 3},
    "short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    "long": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 3},
    "hopeful": {"num_beams": 4, "length_penalty": 1.5, "early_stopping": "never"},
    "early": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": [3, 8, 44, 13, 9, 35]},
    # With so many ends, an early one is often overtaken by a beam that only "never" goes on with.
    "patient": {"num_beams": 2, "length_penalty": 1.5, "early_stopping": "never", "eos_token_id": [3, *range(40, 60)]},
}
SEARCHES = {
    **{f"greedy, {name}": rules for name, rules in RULES.items()},
    **{f"three beams, {name}": {"num_beams": 3, **rules} for name, rules in RULES.items() if rules},
    **{f"beams, {name}": beams for name, beams in BEAMS.items()},
}
SAMPLES = {
    "plain": {},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "nucleus": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.05, "top_k": 0},
    "all": {"top_k": 9, "top_p": 0.95, "min_p": 0.01, "temperature": 1.7, "repetition_penalty": 1.3},
    "no pair twice": {"no_repeat_ngram_size": 2, "top_k": 3},
}


CASES = itertools.count(1)


@pytest.fixture(autouse=True)
def programs_let_go():
    """Each case compiles its own: together they would fill the memory."""
    yield
    if next(CASES) % 5 == 0:  # it takes a second
        let_programs_go()


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("decoding"), config_of(name))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """For what does not hang on the family."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), config_of("olmo2"))


def share(cases, name, wing, step=5):
    """All cases for PyTorch, and one in `step` of them where each case has to be compiled."""
    step = 1 if wing == "pt" else step
    return list(cases.items() if isinstance(cases, dict) else cases)[NAMES.index(name) % step :: step]


def skip_what_is_the_same(name, wing):
    if wing != "pt" and name == "olmo-clip-tied":
        pytest.skip("as for OLMo 2: once is enough where everything has to be compiled")


def config_of(name):
    config = CONFIGS[name].replace(pad_token_id=1, eos_token_id=3, max_position_embeddings=96)
    # A tied head on embeddings as large as the tests' makes a model that only repeats itself.
    return config.replace(tie_word_embeddings=False) if name == "olmo-clip-tied" else config


def prompts(config):
    ids, mask = left_padded(config, length=LENGTH)
    return np.where(ids == 3, 4, ids), mask


def generate(wing, model, ids, mask=None, **settings):
    """A `GenerateOutput` in NumPy."""
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, **settings}
    if wing == "pt":
        import torch

        ids, mask = (None if x is None else torch.from_numpy(np.array(x)) for x in (ids, mask))
        if isinstance(settings.get("inputs_embeds"), np.ndarray):
            settings["inputs_embeds"] = torch.from_numpy(settings["inputs_embeds"])
    with scope(wing):
        return model.generate(ids, mask, **settings)


class Recorder:
    """A streamer that keeps what it is shown."""

    def __init__(self):
        self.shown, self.ended = [], False

    def put(self, value):
        assert not self.ended
        value = np.asarray(value)
        self.shown.append(value if value.ndim == 2 else value[:, None])

    def end(self):
        self.ended = True


class Letters:
    """A tokenizer whose token i is a pair of letters."""

    PAIRS = tuple(f"{chr(97 + i % 26)}{chr(97 + i // 26)}".encode() for i in range(61))

    def token_bytes(self):
        return self.PAIRS

    def text(self, ids):
        return b"".join(self.PAIRS[int(i)] for i in ids).decode()


# -- the outside oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_greedy_and_beam_search_are_those_of_transformers(folder, name, wing):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids, mask = prompts(config_of(name))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = load(folder, wing).model
    lengths = set()
    for title, settings in share(SEARCHES, name, wing):
        expected = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        found = generate(wing, model, ids, mask, output_scores=True, **settings)
        assert np.array_equal(found.sequences, expected.sequences), title
        assert len(found.scores) == len(expected.scores), title
        for ours, reference in zip(found.scores, expected.scores, strict=True):
            np.testing.assert_allclose(np.asarray(ours), reference, atol=2e-4)
        beams = getattr(expected, "beam_indices", None)
        transitions = theirs.compute_transition_scores(
            expected.sequences, expected.scores, beams, normalize_logits=beams is None
        ).numpy()
        counted = np.asarray(found.logprobs) != 0
        np.testing.assert_allclose(np.asarray(found.logprobs)[counted], transitions[counted], atol=2e-4)
        if beams is not None:
            assert np.array_equal(found.beam_indices, beams), title
            np.testing.assert_allclose(
                np.asarray(found.sequences_scores), expected.sequences_scores, rtol=1e-4, atol=2e-4
            )
        lengths |= set((np.asarray(found.sequences)[:, LENGTH:] != 1).sum(1))
    assert len(lengths) > 2  # rows did end at different places


@pytest.mark.parametrize("wing", WINGS)
def test_the_distribution_sampled_from_is_that_of_transformers(folder, name, wing):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids, mask = prompts(config_of(name))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = load(folder, wing).model
    for _, settings in share(SAMPLES, name, wing):
        options = {"do_sample": True, "max_new_tokens": 1, "output_scores": True, **settings}
        expected = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            return_dict_in_generate=True,
            **{"top_k": 50, **options},
        ).scores[0]
        found = np.asarray(generate(wing, model, ids, mask, **options).scores[0])
        assert np.array_equal(np.isinf(found), np.isinf(expected))
        np.testing.assert_allclose(found, expected, atol=2e-4)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_a_seed_and_a_stream_give_a_row_whatever_the_batch_and_the_framework(folder, name, wing):
    ids, mask = prompts(config_of(name))
    model, reference = load(folder, wing).model, load(folder, WINGS[0].values[0]).model
    for _, settings in share(SAMPLES, name, wing):
        options = {"do_sample": True, "seed": 7, **settings}
        together = np.asarray(generate(wing, model, ids, mask, **options).sequences)
        elsewhere = generate(WINGS[0].values[0], reference, ids, mask, **options).sequences
        assert np.array_equal(together, elsewhere)
        for row in (1, 2):
            alone = generate(wing, model, ids[row : row + 1, 2 * row :], stream_index=row, **options).sequences
            answer = np.asarray(alone)[0, LENGTH - 2 * row :]
            assert np.array_equal(together[row, LENGTH : LENGTH + len(answer)], answer)
            assert (together[row, LENGTH + len(answer) :] == 1).all()


@pytest.mark.parametrize("wing", WINGS)
def test_streams_follow_rows_and_answers(small, wing):
    ids, mask = prompts(config_of("olmo2"))
    model = load(small, wing).model
    options = {"do_sample": True, "seed": 7, **SAMPLES["top_p"]}
    together = np.asarray(generate(wing, model, ids, mask, **options).sequences)
    swapped = generate(wing, model, ids[::-1], mask[::-1], stream_index=[2, 1, 0], **options).sequences
    assert np.array_equal(np.asarray(swapped)[::-1], together)
    twice = np.asarray(generate(wing, model, ids, mask, num_return_sequences=2, **options).sequences)
    second = generate(wing, model, ids[1:2], mask[1:2], num_return_sequences=2, stream_index=1, **options).sequences
    width = min(twice.shape[1], second.shape[1])
    assert np.array_equal(twice[2:4, :width], np.asarray(second)[:, :width])
    hot = {"temperature": 3.0, "do_sample": True, "top_k": 0}
    drawn = [np.asarray(generate(wing, model, ids, mask, seed=seed, **hot).sequences)[:, LENGTH:] for seed in (1, 2)]
    assert not np.array_equal(drawn[0][:, :3], drawn[1][:, :3])
    assert not np.array_equal(drawn[0][0][:3], drawn[0][1][:3])


@pytest.mark.parametrize("wing", WINGS)
def test_samples_have_the_frequencies_of_their_distribution(tmp_path, wing):
    config = config_of("olmo2")
    model = load(write_checkpoint(tmp_path, config), wing).model
    ids = np.array([[7, 30, 12]])
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 6, "max_new_tokens": 1, "output_scores": True}
    found = generate(wing, model, ids, num_return_sequences=4000, seed=1, **settings)
    scores = np.asarray(found.scores[0])[0]
    likely = np.exp(scores - scores.max())
    likely /= likely.sum()
    counts = np.bincount(np.asarray(found.sequences)[:, 3], minlength=config.vocab_size)
    assert (counts[likely == 0] == 0).all()
    assert np.abs(counts / 4000 - likely).max() < 4 * np.sqrt(0.25 / 4000)
    assert (counts > 0).sum() == 6
    chosen = np.asarray(found.sequences)[:, 3]
    np.testing.assert_allclose(np.asarray(found.logprobs)[:, 0], np.log(likely[chosen]), atol=1e-9)


# -- the same answer by other ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_streams_chunks_and_guesses_change_nothing(folder, name, wing):
    model = load(folder, wing).model
    config = config_of(name)
    ids, mask = prompts(config)
    expected = np.asarray(generate(wing, model, ids, mask).sequences)
    cases = [
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 3, "prefill_chunk_size": 100},
        {"compile": True} if wing == "pt" and name == "olmo2" else {},
    ]
    for settings in share(cases, name, wing, step=3):
        found = generate(wing, model, ids, mask, **settings)
        assert np.array_equal(found.sequences, expected), settings
        streamer = Recorder()
        assert np.array_equal(generate(wing, model, ids, mask, streamer=streamer, **settings).sequences, expected)
        assert streamer.ended
        assert np.array_equal(np.concatenate(streamer.shown, 1), expected), settings
        assert len(streamer.shown) == 1 + expected.shape[1] - LENGTH


@pytest.mark.parametrize("wing", WINGS)
def test_guesses_keep_to_the_rules(small, wing):
    ids, mask = prompts(config_of("olmo2"))
    model = load(small, wing).model
    rules = {"repetition_penalty": 1.5, "min_new_tokens": 3, "no_repeat_ngram_size": 2}
    plain = generate(wing, model, ids, mask, **rules)
    guessed = generate(wing, model, ids, mask, prompt_lookup_num_tokens=4, **rules)
    assert np.array_equal(guessed.sequences, plain.sequences)
    np.testing.assert_allclose(np.asarray(guessed.logprobs), np.asarray(plain.logprobs), atol=1e-9)


@pytest.mark.parametrize("wing", WINGS)
def test_guesses_from_the_text_save_calls(tmp_path, wing, monkeypatch):
    config = config_of("olmo2")
    model = load(write_checkpoint(tmp_path, config), wing).model
    period = np.tile(np.array([7, 30, 12, 44]), 8)[None]
    free = np.asarray(generate(wing, model, period, max_new_tokens=40, eos_token_id=[]).sequences)
    asked = np.concatenate([free, free[:, LENGTH:]], 1)[:, : config.max_position_embeddings - 8]
    calls = []
    if wing == "pt":
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
        generate(wing, model, asked, max_new_tokens=8, eos_token_id=[], prompt_lookup_num_tokens=4)
        assert len(calls) < 9
    expected = generate(wing, model, asked, max_new_tokens=8, eos_token_id=[]).sequences
    found = generate(wing, model, asked, max_new_tokens=8, eos_token_id=[], prompt_lookup_num_tokens=4).sequences
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("wing", WINGS)
def test_a_given_cache_is_gone_on_from(folder, name, wing):
    skip_what_is_the_same(name, wing)
    model = load(folder, wing).model
    config = config_of(name)
    ids, mask = prompts(config)
    first = generate(wing, model, ids, mask, max_new_tokens=5)
    text = np.asarray(first.sequences)
    whole = np.concatenate([mask, np.ones((len(text), text.shape[1] - LENGTH), mask.dtype)], 1)
    settings = {"max_new_tokens": 6, "eos_token_id": []}
    expected = np.asarray(generate(wing, model, text, whole, **settings).sequences)
    again = generate(wing, model, text, whole, past_key_values=first.past_key_values, **settings)
    assert np.array_equal(again.sequences, expected)
    assert isinstance(again.past_key_values, tuple)
    assert again.past_key_values[0][0].shape[2] == expected.shape[1] - 1

    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, :7]
    with scope(wing), contextlib.ExitStack() as stack:
        convert = np.asarray
        if wing == "pt":
            import torch

            stack.enter_context(torch.inference_mode())
            convert = torch.from_numpy
        begun = model(
            input_ids=convert(ids[:, :7].copy()),
            attention_mask=convert(mask[:, :7].copy()),
            position_ids=convert(positions),
            past_key_values=model.init_cache(len(ids), 40),
        ).past_key_values
    held = generate(wing, model, text, whole, past_key_values=begun, **settings)
    assert np.array_equal(held.sequences, expected)
    assert type(held.past_key_values).__name__ == "KVCache"
    assert int(held.past_key_values.get_seq_length()) == expected.shape[1] - 1
    longer = np.concatenate([np.asarray(held.sequences), ids[:, :3]], 1)
    longer_mask = np.concatenate([whole, np.ones((len(ids), longer.shape[1] - whole.shape[1]), whole.dtype)], 1)
    plain = generate(wing, model, longer, longer_mask, num_beams=3)
    cached = generate(wing, model, longer, longer_mask, num_beams=3, past_key_values=held.past_key_values)
    assert np.array_equal(cached.sequences, plain.sequences)
    with pytest.raises(InputError, match="input_ids has 5 positions and past_key_values"):
        generate(wing, model, text[:, :5], past_key_values=first.past_key_values)


@pytest.mark.parametrize("wing", WINGS)
def test_prompts_of_embeddings_and_of_nothing(folder, name, wing):
    model = load(folder, wing).model
    ids, mask = prompts(config_of(name))
    table = importlib.import_module(f"olmozoo.{wing}").canonical_state(model)[model.config.embedding.name]
    for settings in share([{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], name, wing, step=3):
        plain = np.asarray(generate(wing, model, ids, mask, **settings).sequences)[:, LENGTH:]
        found = generate(wing, model, None, mask, inputs_embeds=table[ids], **settings).sequences
        assert np.array_equal(found, plain)
        assert plain.shape[1] > 0
    alone = generate(wing, model, None, bos_token_id=9).sequences
    assert np.array_equal(alone, generate(wing, model, np.array([[9]])).sequences)


@pytest.mark.parametrize("wing", WINGS)
def test_stop_strings_end_a_row_with_the_token_that_completes_one(folder, name, wing):
    skip_what_is_the_same(name, wing)
    model, letters = load(folder, wing).model, Letters()
    ids, mask = prompts(config_of(name))
    settings = {"eos_token_id": [], "tokenizer": letters}
    free = np.asarray(generate(wing, model, ids, mask, **settings).sequences)
    texts = [letters.text(row[LENGTH:]) for row in free]
    # One of them is what the first prompt ends on: it was there before, and is no reason to stop.
    # Another begins in the third prompt, and does end its row.
    across = letters.text(ids[2, -1:])[1:] + texts[2][:1]
    stops = [texts[0][5:8], texts[1][9:10], letters.text(ids[0, -1:]), across, "zzzzzzzzz"]
    found = np.asarray(generate(wing, model, ids, mask, stop_strings=stops, **settings).sequences)
    for row, text in enumerate(texts):
        before = letters.text(ids[row][mask[row] == 1])
        ends = (n for n in range(2, len(text) + 2, 2) if stops_in(before, text[:n], stops))
        length = next(ends, len(text)) // 2
        assert np.array_equal(found[row, LENGTH : LENGTH + length], free[row, LENGTH : LENGTH + length])
        assert (found[row, LENGTH + length :] == 1).all()
    assert found.shape[1] < free.shape[1] or (found == 1).any()
    with pytest.raises(InputError, match="tokenizer="):
        generate(wing, model, ids, mask, stop_strings="a")
    seen = generate(wing, model, ids, mask, stop_strings=stops, num_beams=3, **settings).sequences
    reference = generate(
        WINGS[0].values[0],
        load(folder, WINGS[0].values[0]).model,
        ids,
        mask,
        stop_strings=stops,
        num_beams=3,
        **settings,
    )
    assert np.array_equal(seen, reference.sequences)


def stops_in(before, text, stops):
    """Whether a stop string ends in the last two letters of a text, perhaps having begun before it."""
    whole = before + text
    return any(whole[: len(whole) - back].endswith(stop) for stop in stops for back in (0, 1))


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing.values[0] != "pt"])
def test_programs_are_compiled_once_a_bucket_and_set_of_rules(tmp_path, wing):
    config = config_of("olmo2")
    model = load(write_checkpoint(tmp_path, config), wing).model
    ids, mask = prompts(config)
    for count, (length, new, settings) in enumerate(
        [
            (9, 14, {"do_sample": True, "temperature": 0.5, "top_p": 0.5}),
            (4, 30, {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 3, "seed": 9}),
            (7, 3, {"do_sample": True, "temperature": 0.1, "top_p": 0.1, "top_k": 30, "eos_token_id": [5, 6]}),
            (9, 14, {"num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.1}),
            (5, 21, {"num_beams": 3, "length_penalty": 1.5, "repetition_penalty": 1.9, "pad_token_id": 9}),
        ]
    ):
        generate(wing, model, ids[:, -length:], mask[:, -length:], max_new_tokens=new, **settings)
        assert model.trace_count == (2 if count < 3 else 4)


# -- short and strange prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_rules_look_back_further_than_the_text_is_long(small, wing):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float64)
    model, ids = load(small, wing).model, np.array([[25]])
    cases = [
        {"no_repeat_ngram_size": 3},
        {"no_repeat_ngram_size": 3, "num_beams": 2},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[25, 25, 50], [25, 25, 29], [25, 25, 25]]},
        {"no_repeat_ngram_size": 100},
    ]
    for settings in cases if wing == "pt" else cases[:1]:
        options = {"max_new_tokens": 6, "eos_token_id": 3, **settings}
        expected = theirs.generate(torch.from_numpy(ids), do_sample=False, pad_token_id=1, **options)
        assert np.array_equal(generate(wing, model, ids, **options).sequences, expected)
        if "num_beams" not in settings:
            drafted = generate(wing, model, ids, prompt_lookup_num_tokens=10**6, **options).sequences
            assert np.array_equal(drafted, expected)
    embeds = theirs.get_input_embeddings()(torch.from_numpy(ids)).detach()
    expected = theirs.generate(inputs_embeds=embeds, do_sample=False, pad_token_id=1, **options)
    assert np.array_equal(generate(wing, model, None, inputs_embeds=embeds.numpy(), **options).sequences, expected)


@pytest.mark.parametrize("wing", WINGS)
def test_none_switches_the_ends_off_as_in_transformers(small, wing):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float64)
    model, ids = load(small, wing).model, np.array([[5, 6], [7, 30]])
    free = np.asarray(generate(wing, model, ids, eos_token_id=[], max_new_tokens=6).sequences)
    end = int(free[0, 4])
    model.generation_config = model.generation_config.replace(eos_token_id=[end, int(free[1, 4])])
    theirs.generation_config.eos_token_id = [end, int(free[1, 4])]
    assert generate(wing, model, ids, max_new_tokens=6).sequences.shape[1] < 8
    options = {"eos_token_id": None, "max_new_tokens": 6}
    expected = theirs.generate(torch.from_numpy(ids), do_sample=False, pad_token_id=1, **options)
    found = generate(wing, model, ids, **options).sequences
    assert np.array_equal(found, expected)
    assert np.array_equal(found, free)


@pytest.mark.parametrize("wing", WINGS)
def test_given_settings_without_an_end_take_the_model_s_own(small, wing):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float64)
    model, ids = load(small, wing).model, np.array([[5, 6], [7, 30]])
    free = np.asarray(generate(wing, model, ids, eos_token_id=[], max_new_tokens=6).sequences)
    own = {"eos_token_id": int(free[0, 4]), "pad_token_id": 1}
    model.generation_config = model.generation_config.replace(**own)
    theirs.generation_config.update(**own)
    given = transformers.GenerationConfig(max_new_tokens=6)
    expected = theirs.generate(torch.from_numpy(ids), generation_config=given, do_sample=False)
    assert not np.array_equal(expected, free)
    for settings in (GenerationConfig(), given):
        options = {"generation_config": settings, "max_new_tokens": 6}
        assert np.array_equal(generate(wing, model, ids, **options).sequences, expected)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.filterwarnings("ignore:.*no effect without do_sample")
def test_temperatures_near_zero_take_the_likeliest(small, wing):
    model, ids = load(small, wing, "float32").model, np.array([[5, 6], [7, 30]])
    greedy = np.asarray(generate(wing, model, ids, temperature=0.0, do_sample=False).sequences)
    for temperature in (1e-20, 1e-39, 1e-300):
        found = generate(wing, model, ids, do_sample=True, temperature=temperature, seed=1)
        assert np.array_equal(found.sequences, greedy)
        assert (np.asarray(found.logprobs) == 0).all()


@pytest.mark.parametrize("wing", WINGS)
def test_logits_that_are_not_finite_are_an_error(tmp_path, wing):
    folder = write_checkpoint(tmp_path, config_of("olmo2"))
    ids = np.array([[7, 30], [5, 6]])
    answer = np.asarray(generate(wing, load(folder, wing).model, ids, eos_token_id=[]).sequences)[:, 2:]
    token = next(int(t) for t in answer[1, :-1] if t not in answer[0] and t not in ids)
    weights = load_file(folder / "model.safetensors")
    for value, step in ((np.nan, int(np.argmax(answer[1] == token)) + 1), (np.inf, 0)):
        name = "model.embed_tokens.weight" if step else "model.norm.weight"
        changed = {key: array.copy() for key, array in weights.items()}
        changed[name][token if step else 0] = value
        save_file(changed, folder / "model.safetensors")
        model = load(folder, wing).model
        row = 1 if step else 0
        with pytest.raises(InputError, match=f"logits are not finite: NaN or infinity in row {row} at step {step};"):
            generate(wing, model, ids, eos_token_id=[])
    if wing == "pt":
        for settings in ({"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
            with pytest.raises(InputError, match="in row 0 at step 0"):
                generate(wing, model, ids, **settings)


@pytest.mark.parametrize("wing", WINGS)
def test_single_tokens_may_be_impossible(wing):
    if wing == "pt":
        import torch

        from olmozoo.pt.generation import Namespace

        xp, convert = Namespace(torch.device("cpu")), torch.from_numpy
    elif wing == "tf":
        import tensorflow as tf

        from olmozoo.tf.generation import XP as xp

        convert = tf.constant
    else:
        import jax.numpy as jnp

        from olmozoo.flax.generation import XP as xp

        convert = jnp.asarray
    inf = np.inf
    logits = np.array([[1, 2, 3], [1, -inf, 3], [-inf] * 3, [1, inf, 3], [1, np.nan, 3], [np.nan] * 3], np.float32)
    assert np.asarray(is_bad(xp, convert(logits))).tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("wing", WINGS)
def test_ids_and_lengths_that_cannot_be_are_named(small, wing):
    model = load(small, wing).model
    for ids in ([[5, 61]], [[5, -1]], [[5, 2**40]]):
        with (
            scope(wing),
            pytest.raises(InputError, match=f"input_ids has {ids[0][1]} in row 0, column 1: expected ids"),
        ):
            model.generate(ids)
    with scope(wing), pytest.raises(InputError, match="GiB"):
        model.generate([[5]], max_new_tokens=2**31 - 1)


@pytest.mark.parametrize("wing", WINGS)
def test_ids_go_to_the_device_once_and_come_back_once(small, wing, monkeypatch):
    backend = load(small, wing)
    ids = np.array([[5, 6], [7, 30]])
    expected = np.asarray(generate(wing, backend.model, ids).sequences)
    monkeypatch.setattr(type(backend.model), "generate", None)  # the wrapper that makes tensors of them
    moved, returned = [], []
    if wing == "pt":
        import torch

        def counted(function, log):
            return lambda *args, **kwargs: log.append(np.shape(args[0])) or function(*args, **kwargs)

        for name in ("tensor", "from_numpy", "as_tensor"):
            monkeypatch.setattr(torch, name, counted(getattr(torch, name), moved))
        monkeypatch.setattr(torch.Tensor, "numpy", counted(torch.Tensor.numpy, returned))
    found = backend.generate(ids, np.ones_like(ids), max_new_tokens=NEW)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, expected)
    if wing == "pt":
        assert moved.count((2, 2)) == 0
        assert moved.count((2, 2 + NEW)) == 3  # the ids with room for the answer, and two masks
        assert returned.count((2, 2 + NEW)) == 1


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing.values[0] != "pt"])
def test_an_answer_is_one_call_of_the_compiled_loop(small, wing, monkeypatch):
    module, calls = importlib.import_module(f"olmozoo.{wing}.generation"), []

    def counted(call, streamer, read_prompt, read_answer):
        return run(
            call,
            streamer,
            lambda: calls.append("prompt") or read_prompt(),
            lambda *state: calls.append("answer") or read_answer(*state),
        )

    run = module.run
    monkeypatch.setattr(module, "run", counted)
    generate(wing, load(small, wing).model, np.array([[5, 6], [7, 30]]))
    assert calls == ["prompt", "answer"]


def test_keras_generates_where_floatx_is_float64(small):
    pytest.importorskip("tensorflow")
    program = f"""
import keras
keras.config.set_floatx("float64")
from olmozoo.tf import TFOlmo2ForCausalLM
model = TFOlmo2ForCausalLM.from_pretrained({str(small)!r})
rules = dict(repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[5, 6]], min_new_tokens=3)
sampling = dict(do_sample=True, seed=1, temperature=1.5, top_k=0, top_p=0.8, min_p=0.01)
for settings in (dict(rules, **sampling), dict(prompt_lookup_num_tokens=3, prefill_chunk_size=16), dict(num_beams=2)):
    print(model.generate([[5, 6, 7]], max_new_tokens=5, return_dict_in_generate=True, **settings).sequences.numpy())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("[[ 5  6  7") == 3


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_refuses_them(small, wing):
    model = load(small, wing).model
    with pytest.raises(InputError, match=r"temperature is 0\.0"):
        generate(wing, model, np.array([[5, 6]]), do_sample=True, temperature=0.0)
    with pytest.raises(InputError, match="a streamer cannot show beam search"):
        generate(wing, model, np.array([[5, 6]]), num_beams=2, streamer=Recorder())


def test_copies_of_a_compiled_model_are_their_own(tmp_path):
    torch = pytest.importorskip("torch")
    ids = np.array([[7, 30, 12]])
    model = load(write_checkpoint(tmp_path, config_of("olmo2")), "pt").model
    before = generate("pt", model, ids, compile=True).sequences
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert not np.array_equal(generate("pt", other, ids, compile=True).sequences, before)
    assert np.array_equal(generate("pt", pickle.loads(pickle.dumps(model)), ids).sequences, before)
