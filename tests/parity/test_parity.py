"""The three wings against one another in float64, where a difference is a bug and not rounding."""

import numpy as np
import pytest

from olmozoo.backends import load
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import (
    BOUND,
    CONFIGS,
    GRADIENT_BOUND,
    LENGTH_DEPENDENT,
    OTHERS,
    REFERENCE,
)
from tests.helpers.wings import WINGS, gradients, step_by_step


@pytest.fixture(params=CONFIGS, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(name), CONFIGS[name])


def masks(config):
    """Ids with a mask for each way of padding; longer than the trained length of the rotary configs."""
    ids, left = left_padded(config, batch=3, length=19)
    hole = np.ones_like(ids)
    hole[1, 6:9] = 0
    return {
        "none": (ids, np.ones_like(ids)),
        "left": (ids, left),
        "right": (ids, left[:, ::-1].copy()),
        "hole": (ids, hole),
    }


def largest(found, expected, real):
    assert found.dtype == expected.dtype == np.float64
    return float(np.abs(found - expected)[real].max())


@pytest.mark.parametrize("wing", OTHERS)
def test_every_hidden_state_and_attention_agrees(folder, wing):
    config = load(folder, REFERENCE).model.config
    reference, other = load(folder, REFERENCE, "float64"), load(folder, wing, "float64")
    for padding, (ids, mask) in masks(config).items():
        real = mask.astype(bool)
        options = {"output_hidden_states": True, "output_attentions": True}
        expected, found = (model.forward(ids, mask, **options) for model in (reference, other))
        assert np.abs(expected["logits"]).max() > 0.1
        assert largest(found["logits"], expected["logits"], real) <= BOUND, padding
        assert len(found["hidden_states"]) == config.num_hidden_layers + 1
        for kind, where in (("hidden_states", real), ("attentions", (slice(None), slice(None), real[0]))):
            for ours, theirs in zip(found[kind], expected[kind], strict=True):
                if kind == "attentions":
                    ours, theirs = ours.swapaxes(1, 2)[real], theirs.swapaxes(1, 2)[real]
                    where = ...
                assert largest(ours, theirs, where) <= BOUND, (padding, kind)
        assert all(np.isfinite(value).all() for value in (found["logits"], expected["logits"]))


@pytest.mark.parametrize("wing", OTHERS)
def test_loss_and_gradients_agree(folder, wing):
    ids, mask = left_padded(load(folder, REFERENCE).model.config, length=12)
    labels = np.where(mask == 1, ids, -100)
    labels[0, 5] = -100
    loss, expected = gradients(REFERENCE, load(folder, REFERENCE, "float64").model, ids, mask, labels=labels)
    other_loss, found = gradients(wing, load(folder, wing, "float64").model, ids, mask, labels=labels)
    assert abs(loss - other_loss) <= BOUND
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.abs(expected[name]).max() > 0, name
        assert np.abs(found[name] - expected[name]).max() <= GRADIENT_BOUND, name


@pytest.mark.parametrize("cache", ["tuple", "object"])
@pytest.mark.parametrize("wing", WINGS)
def test_cached_decoding_is_the_uncached_forward(folder, name, wing, cache):
    if name in LENGTH_DEPENDENT:
        pytest.skip("dynamic and longrope change with the length: cached keys keep the rotation they were written with")
    model = load(folder, wing, "float64")
    ids, mask = left_padded(model.model.config, length=11)
    real = mask.astype(bool)
    assert largest(step_by_step(wing, folder, ids, mask, cache), model.forward(ids, mask)["logits"], real) <= BOUND


@pytest.mark.parametrize("wing", OTHERS)
def test_greedy_tokens_agree(folder, wing):
    config = load(folder, REFERENCE).model.config
    ids, mask = left_padded(config, length=7)
    expected, found = (load(folder, w, "float64").generate(ids, mask, max_new_tokens=15) for w in (REFERENCE, wing))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_has_no_nan_at_padding(folder, wing, dtype):
    model = load(folder, wing, dtype)
    for ids, mask in masks(model.model.config).values():
        output = model.forward(ids, mask, output_hidden_states=True)
        assert all(np.isfinite(value).all() for value in (output["logits"], *output["hidden_states"]))


@pytest.mark.parametrize("wing", WINGS)
def test_save_load_save_gives_the_same_bytes_in_every_wing(name, wing, tmp_path):
    write_checkpoint(tmp_path / "0", CONFIGS[name], dtype="float32")
    load(tmp_path / "0", REFERENCE).model.save_pretrained(tmp_path / "a")
    load(tmp_path / "a", wing).model.save_pretrained(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("wing", OTHERS)
def test_the_same_seed_starts_from_the_same_bits(wing, tmp_path):
    from importlib import import_module

    for name in ("olmo2-mqa-bias-tied", "olmo-bias", "opt-projected-post-norm"):
        saved = []
        for each in (REFERENCE, wing):
            prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[each]
            cls = getattr(import_module(f"olmozoo.{each}"), f"{prefix}{CONFIGS[name].name}ForCausalLM")
            cls(CONFIGS[name], seed=5).save_pretrained(tmp_path / name / each)
            saved.append((tmp_path / name / each / "model.safetensors").read_bytes())
        assert saved[0] == saved[1], name
