"""Decoding in every wing: against Transformers where that has the same, against each other, and against itself."""

import contextlib
import copy
import importlib
import itertools
import pickle
import warnings

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.backends import load
from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.prepare import prepare, uniforms
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


def test_uniform_numbers_belong_to_a_seed_and_a_stream():
    draws = uniforms(5, [0, 3], 100)
    assert draws.dtype == np.float32
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.array_equal(uniforms(5, [3], 7), draws[1:, :7])
    assert np.array_equal(draws[0], np.random.Generator(np.random.Philox(key=[5, 0])).random(100, np.float32))
    assert not np.array_equal(uniforms(6, [0], 100), draws[:1])
    assert uniforms((1 << 64) - 1, [(1 << 64) - 1], 2).shape == (1, 2)


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


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2}, "min_p is 2"),
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
        ({"num_beams": 2, "streamer": Recorder()}, "a streamer cannot show beam search"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"min_length": -1}, "min_length is -1"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "more than the 5 tokens"),
        ({"max_length": 9, "max_new_tokens": None}, "no room"),
        ({"seed": -1}, "seed is -1"),
        ({"do_sample": True, "stream_index": [1, 2]}, "stream_index has 2 numbers"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"stop_strings": [""]}, "stop_strings is"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_say_why(settings, named):
    config = config_of("olmo2")
    ids, mask = prompts(config)
    streamer = settings.get("streamer")
    changes = {"max_new_tokens": NEW, **{key: value for key, value in settings.items() if key != "streamer"}}
    with pytest.raises(InputError, match=named):
        prepare(GenerationConfig(), config, changes, input_ids=ids, attention_mask=mask, streamer=streamer)


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_refuses_them(small, wing):
    model = load(small, wing).model
    with pytest.raises(InputError, match=r"temperature is 0\.0"):
        generate(wing, model, np.array([[5, 6]]), do_sample=True, temperature=0.0)
    with pytest.raises(InputError, match="a streamer cannot show beam search"):
        generate(wing, model, np.array([[5, 6]]), num_beams=2, streamer=Recorder())


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
    assert call(np.full((1, 90), 5), max_new_tokens=6).prompt == 90
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
        assert (call.rules.beams, int(call.knobs["max_new"])) == (2, 7)


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


def test_generation_settings_survive_a_file():
    data = {"temperature": 0.7, "top_k": None, "do_sample": True, "typical_p": 0.3, "transformers_version": "4.57.6"}
    settings = GenerationConfig.from_dict(data)
    assert settings.top_k == 50
    assert settings.to_dict() == {key: value for key, value in data.items() if value is not None}


def test_settings_of_a_file_that_generate_does_not_have_are_told():
    ids = np.full((1, 3), 5)
    idle = {"guidance_scale": 1.0, "typical_p": 1.0, "suppress_tokens": None, "num_beam_groups": 1, "sequence_bias": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(idle | {"cache_implementation": None}, config_of("olmo2"), {}, input_ids=ids, attention_mask=None)
    defaults = idle | {"guidance_scale": 1.5, "suppress_tokens": [4]}
    with pytest.warns(UserWarning, match="generate goes without suppress_tokens, guidance_scale, which the generation"):
        prepare(defaults, config_of("olmo2"), {}, input_ids=ids, attention_mask=None)
