"""Attention in sliding windows: the numbers of Transformers, and every way to the same text gives them."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from olmozoo.backends import load
from olmozoo.families.config import ModelConfig
from olmozoo.generation.state import DecodeOptions
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import BOUND, CONFIGS, REFERENCE
from tests.helpers.wings import WINGS, model_class, scope

FIXTURE = Path(__file__).parents[1] / "fixtures" / "olmo3"  # written, and answered, by Transformers 5.23
ENDLESS = {"eos_token_id": None, "pad_token_id": 1}
WINDOW, LENGTH, NEW = 4, 13, 11


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURE / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("spelling", ["config.json", "config_published_spelling.json"])
@pytest.mark.parametrize("wing", WINGS)
def test_a_checkpoint_of_transformers_gives_its_numbers(tmp_path, expected, spelling, wing):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    shutil.copy(FIXTURE / spelling, tmp_path / "config.json")
    model, ids, mask = load(tmp_path, wing), expected["input_ids"], expected["attention_mask"]
    real = mask.astype(bool)
    found = model.forward(ids, mask, output_hidden_states=True)
    assert np.abs(found["logits"] - expected["logits"])[real].max() < 5e-5
    for i, hidden in enumerate(found["hidden_states"]):
        assert np.abs(hidden - expected[f"hidden_{i}"])[real].max() < 5e-5, i
    alone = model.forward(ids[1:2], np.ones_like(ids[1:2]))
    assert np.abs(alone["logits"] - expected["logits_nomask"]).max() < 5e-5
    if spelling == "config.json":
        length = ids.shape[1]
        greedy = model.generate(ids, mask, max_new_tokens=expected["greedy"].shape[1] - length, **ENDLESS)
        assert np.array_equal(greedy, expected["greedy"])
        beams = model.generate(ids, mask, max_new_tokens=expected["beam"].shape[1] - length, num_beams=3, **ENDLESS)
        assert np.array_equal(beams, expected["beam"])


def test_both_spellings_of_the_config_are_one():
    configs = [
        ModelConfig.from_dict(json.loads((FIXTURE / name).read_text()))
        for name in ("config.json", "config_published_spelling.json")
    ]
    assert len({repr((c.rope(), c.rope("sliding_attention"), c.windows)) for c in configs}) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = CONFIGS["olmo3"].replace(max_position_embeddings=96, eos_token_id=None)
    return write_checkpoint(tmp_path_factory.mktemp("windows"), config)


def uncached(model, ids, mask, new):
    """Greedy decoding by whole forward calls."""
    for _ in range(new):
        last = model.forward(ids, mask)["logits"][:, -1]
        ids = np.concatenate([ids, last.argmax(-1)[:, None]], 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
    return ids


@pytest.fixture(scope="module")
def greedy(folder):
    model = load(folder, REFERENCE, "float64")
    ids, mask = left_padded(model.model.config, length=LENGTH)
    return ids, mask, uncached(model, ids, mask, NEW)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk_size": 3},  # shorter than the window
        {"prefill_chunk_size": 6, "prompt_lookup_num_tokens": 6},  # longer
        {"compile": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("wing", WINGS)
def test_every_way_to_decode_is_the_uncached_forward(folder, greedy, wing, settings):
    if "compile" in settings and wing != "pt":
        pytest.skip("the other wings always compile")
    ids, mask, expected = greedy
    found = load(folder, wing, "float64").generate(ids, mask, max_new_tokens=NEW, **settings)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("wing", WINGS)
def test_the_window_is_of_slots(folder, wing):
    """A query sees itself and the window - 1 keys before it, whatever its position ids."""
    model = load(folder, wing, "float64")
    ids, _ = left_padded(model.model.config, batch=1, length=LENGTH)
    weights = model.forward(ids, np.ones_like(ids), output_attentions=True)["attentions"]
    slots = np.arange(LENGTH)
    causal = slots <= slots[:, None]
    near = causal & (slots > slots[:, None] - WINDOW)
    for layer, seen in enumerate((near, causal, near)):
        assert np.array_equal(weights[layer][0, 0] > 0, seen), layer


@pytest.mark.parametrize("wing", WINGS)
def test_a_mask_of_four_dimensions_is_the_answer_itself(folder, wing):
    model = load(folder, wing, "float64")
    ids, _ = left_padded(model.model.config, batch=1, length=LENGTH)
    slots = np.arange(LENGTH)
    causal = (slots <= slots[:, None])[None, None]
    near = causal & (slots > slots[:, None] - WINDOW)
    masks = (np.ones_like(ids), causal, near)
    plain, whole, windowed = (model.forward(ids, m, output_hidden_states=True)["hidden_states"] for m in masks)
    assert np.abs(windowed[1] - plain[1]).max() <= BOUND  # after the first layer, which slides
    assert np.abs(windowed[2] - plain[2]).max() > 1e-3  # the second is full, and this mask is not
    assert np.abs(whole[1] - plain[1]).max() > 1e-3


PIECES = (5, 1, 1, 3, -2, 1, 3, -1, 4, 1)  # positions that a call reads; a negative number is of positions dropped


def in_pieces(wing, model, cache, ids, mask):
    """Float64 logits of `PIECES`, over a cache of the compiled loop."""
    found = np.zeros((*ids.shape, model.config.vocab_size))
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    if wing == "flax":
        import jax

        call = jax.jit(lambda ids, positions, cache: model(ids, mask, positions, past_key_values=cache))
    else:

        def call(ids, positions, cache):
            return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)

    start = 0
    for piece in PIECES:
        if piece < 0:
            start += piece
            length = cache.length + piece
            cache = cache.replace(length=length) if wing == "flax" else cache._replace(length=length)
            continue
        seen = slice(start, start + piece)
        output = call(ids[:, seen], positions[:, seen].astype(np.int32), cache)
        cache, found[:, seen] = output.past_key_values, np.asarray(output.logits)
        start += piece
    assert start == ids.shape[1]
    return found, cache


@pytest.mark.parametrize("window", [1, WINDOW, 30])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing.values[0] != "pt"])
def test_a_ring_gives_the_numbers_of_the_uncached_forward(folder, wing, window, blocks, monkeypatch):
    """Token by token and several at once, beyond its end and back again, under padding."""
    module, layers = (importlib.import_module(f"olmozoo.{wing}.{name}") for name in ("cache", "layers"))
    with scope(wing):
        model = model_class(wing, "Olmo3", "ForCausalLM").from_pretrained(folder, sliding_window=window)
        ids, mask = left_padded(model.config, length=sum(PIECES))
        expected = np.asarray(model(input_ids=ids, attention_mask=mask).logits)
        if blocks:
            monkeypatch.setattr(layers, "SCORE_BYTES", 1)
            monkeypatch.setattr(layers, "MIN_ROWS", {wing: 2})
        cache = module.WindowCache.create(model.config, len(ids), ids.shape[1], "float64", spare=4)
        found, kept = in_pieces(wing, model, cache, ids, mask)
    ring = min(ids.shape[1], window + 4)
    assert [key.shape[-2] for key in kept.keys] == [ring, ids.shape[1], ring]
    assert np.abs(found - expected)[mask == 1].max() <= BOUND


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing.values[0] != "pt"])
def test_the_compiled_loop_keeps_windows_alone(folder, greedy, wing, monkeypatch):
    generation = importlib.import_module(f"olmozoo.{wing}.generation")
    slots, answer = [], generation.GenerationMixin._answer

    def watched(self, *arguments, **options):
        cache = next(argument for argument in arguments if hasattr(argument, "keys") and hasattr(argument, "length"))
        slots.append([key.shape[-2] for key in cache.keys])
        return answer(self, *arguments, **options)

    monkeypatch.setattr(generation.GenerationMixin, "_answer", watched)
    backend = load(folder, wing, "float64")
    ids, mask, expected = greedy
    start = [x[:, :9] for x in (ids, mask)]
    with scope(wing):
        past = backend.model(*start, position_ids=np.maximum(start[1].cumsum(1) - 1, 0), use_cache=True).past_key_values
    for settings, kept, whole in (
        ({}, WINDOW, 80),
        ({"prefill_chunk_size": 3}, WINDOW + 2, 82),  # 16 rounded up to chunks, and 64
        ({"prefill_chunk_size": 5, "prompt_lookup_num_tokens": 6}, WINDOW + 6, 90),
        ({"past_key_values": past}, WINDOW, 84),  # with nothing between the 9 and the 4 positions
        ({"past_key_values": past, "prefill_chunk_size": 3}, WINDOW + 2, 84),
        ({"return_dict_in_generate": True}, 80, 80),
    ):
        with scope(wing):
            found = np.asarray(backend.model._generate(ids, mask, max_new_tokens=NEW, **settings).sequences)
        assert np.array_equal(found, expected), settings
        assert slots[-1] == [kept, whole, kept], settings


@pytest.mark.parametrize("wing", WINGS)
def test_beams_over_windows_are_those_over_whole_caches(folder, greedy, wing, monkeypatch):
    backend = load(folder, wing, "float64")
    ids, mask, _ = greedy
    found = backend.generate(ids, mask, max_new_tokens=NEW, num_beams=3)
    monkeypatch.setattr(DecodeOptions, "returns_cache", True)
    whole = load(folder, wing, "float64").generate(ids, mask, max_new_tokens=NEW, num_beams=3)
    assert np.array_equal(found, whole)


@pytest.mark.pt
@pytest.mark.parametrize("spare", [1, 3])
def test_a_cache_of_windows_gives_the_same_tokens_and_keeps_few(folder, greedy, monkeypatch, spare):
    torch = pytest.importorskip("torch")
    from olmozoo.pt import generation

    caches, statics = [], []

    class Watched(generation.WindowCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    class WatchedStatic(generation.StaticCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            statics.append(self)

    monkeypatch.setattr(generation, "SPARE", spare)
    monkeypatch.setattr(generation, "WindowCache", Watched)
    monkeypatch.setattr(generation, "StaticCache", WatchedStatic)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the same numbers, sooner
    backend = load(folder, "pt", "float64")
    ids, mask, expected = greedy
    whole = backend.model._generate(ids, mask, max_new_tokens=NEW, return_dict_in_generate=True)
    assert not caches
    assert np.array_equal(np.asarray(whole.sequences), expected)
    lookup = {"prefill_chunk_size": 5, "prompt_lookup_num_tokens": 6}
    for settings in ({}, {"prefill_chunk_size": 3}, lookup, {"compile": True}, {"compile": True, **lookup}):
        assert np.array_equal(backend.generate(ids, mask, max_new_tokens=NEW, **settings), expected), settings
        kept = WINDOW + max(spare, 1 + settings.get("prompt_lookup_num_tokens", 0))
        cache = statics[-1] if "compile" in settings else caches[-1]
        full = cache.max_length
        assert full >= expected.shape[1] - 1 > kept
        assert [key.shape[2] for key in cache.keys] == [kept, full, kept]
    start = [torch.from_numpy(x[:, :9]) for x in (ids, mask, np.maximum(mask.cumsum(1) - 1, 0))]
    past = backend.model(*start, use_cache=True).past_key_values
    for compile in (False, True):
        found = backend.generate(ids, mask, max_new_tokens=NEW, past_key_values=past, compile=compile)
        assert np.array_equal(found, expected)
