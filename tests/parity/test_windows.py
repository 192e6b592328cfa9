"""Attention in sliding windows: the numbers of Transformers, and every way to the same text gives them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from olmozoo.backends import load
from olmozoo.families.config import ModelConfig
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import BOUND, CONFIGS, REFERENCE
from tests.helpers.wings import WINGS

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


@pytest.mark.pt
@pytest.mark.parametrize("spare", [1, 3])
def test_a_cache_of_windows_gives_the_same_tokens_and_keeps_few(folder, greedy, monkeypatch, spare):
    torch = pytest.importorskip("torch")
    from olmozoo.pt import generation

    caches = []

    class Watched(generation.WindowCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    monkeypatch.setattr(generation, "SPARE", spare)
    monkeypatch.setattr(generation, "WindowCache", Watched)
    backend = load(folder, "pt", "float64")
    ids, mask, expected = greedy
    beams = np.asarray(
        backend.model._generate(ids, mask, max_new_tokens=NEW, num_beams=3, return_dict_in_generate=True).sequences
    )
    assert not caches
    for settings in ({}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 5, "prompt_lookup_num_tokens": 6}):
        assert np.array_equal(backend.generate(ids, mask, max_new_tokens=NEW, **settings), expected), settings
        kept = WINDOW + max(spare, 1 + settings.get("prompt_lookup_num_tokens", 0))
        full = caches[-1].max_length
        assert full >= expected.shape[1] - 1 > kept
        assert [key.shape[2] for key in caches[-1].keys] == [kept, full, kept]
    assert np.array_equal(backend.generate(ids, mask, max_new_tokens=NEW, num_beams=3), beams)
    start = [torch.from_numpy(x[:, :9]) for x in (ids, mask, np.maximum(mask.cumsum(1) - 1, 0))]
    past = backend.model(*start, use_cache=True).past_key_values
    assert np.array_equal(backend.generate(ids, mask, max_new_tokens=NEW, past_key_values=past), expected)
