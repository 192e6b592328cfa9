"""Attention by blocks of queries, as for long texts: the numbers of attention at once, forward and backward."""

import importlib

import numpy as np
import pytest

from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import WINGS, model_class, scope

NAMES = ["olmo2", "olmo-bias", "opt-projected-post-norm", *(name for name in CONFIGS if name.startswith("olmo3"))]


@pytest.fixture(params=WINGS)
def wing(request):
    return request.param


def by_blocks(monkeypatch, wing, rows):
    """Make attention run by blocks of so many queries."""
    layers = importlib.import_module(f"olmozoo.{wing}.layers")
    monkeypatch.setattr(layers, "MASK_BYTES" if wing == "pt" else "SCORE_BYTES", 1)
    monkeypatch.setattr(layers, "MIN_ROWS", {wing: rows})
    used = []
    run = layers.QueryBlocks.run
    monkeypatch.setattr(layers.QueryBlocks, "run", lambda self, *args: used.append(self.rows) or run(self, *args))
    return used


def values(x):
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def loss_and_gradients(wing, model, ids, mask, labels):
    if wing == "pt":
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    if wing == "tf":
        import tensorflow as tf

        variables = model.trainable_variables

        @tf.function(jit_compile=True, autograph=False)
        def compute(ids, mask, labels):
            with tf.GradientTape() as tape:
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, training=True).loss
            return loss, tape.gradient(loss, [variable.value for variable in variables])

        loss, gradients = compute(*map(tf.constant, (ids, mask, labels)))
        return loss.numpy(), {
            v.path: tf.convert_to_tensor(g).numpy() for v, g in zip(variables, gradients, strict=True)
        }
    import jax
    from flax.traverse_util import flatten_dict

    def of(params):
        return model(ids, mask, params=params, labels=labels, deterministic=False).loss

    loss, gradients = jax.jit(jax.value_and_grad(of))(model.params)
    return np.asarray(loss), {"/".join(path): np.asarray(g) for path, g in flatten_dict(gradients).items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_attention_at_once(wing, name, monkeypatch):
    config = CONFIGS[name].replace(**({"dropout": 0.0} if CONFIGS[name].name == "OPT" else {}))
    ids, mask = left_padded(config)
    labels = np.where(mask == 1, ids, -100)
    with scope(wing):
        model = model_class(wing, config.name, "ForCausalLM")(config, seed=1, dtype="float64")
        expected = loss_and_gradients(wing, model, ids, mask, labels)
        logits = values(model(input_ids=ids, attention_mask=mask).logits)
        used = by_blocks(monkeypatch, wing, rows=3)
        found = loss_and_gradients(wing, model, ids, mask, labels)
        again = values(model(input_ids=ids, attention_mask=mask).logits)
    assert set(used) == {3}
    assert abs(found[0] - expected[0]) < 1e-12
    assert np.abs((again - logits)[mask == 1]).max() < 1e-12
    for path, gradient in expected[1].items():
        assert np.abs(found[1][path] - gradient).max() < 1e-12, path


@pytest.mark.parametrize("name", ["olmo2", *(name for name in CONFIGS if name.startswith("olmo3"))][:2])
def test_a_cached_and_chunked_prompt_gives_the_same_tokens(wing, name, monkeypatch):
    config = CONFIGS[name]
    ids, mask = left_padded(config)
    with scope(wing):
        model = model_class(wing, config.name, "ForCausalLM")(config, seed=1, dtype="float64")
        expected = np.asarray(model._generate(ids, mask, max_new_tokens=9).sequences)
        used = by_blocks(monkeypatch, wing, rows=3)
        model = model_class(wing, config.name, "ForCausalLM")(config, seed=1, dtype="float64")
        found = [
            np.asarray(model._generate(ids, mask, max_new_tokens=9, prefill_chunk_size=chunk).sequences)
            for chunk in (None, 7)
        ]
    assert used
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], expected)


def test_weights_and_masks_of_four_dimensions_are_computed_at_once(wing, monkeypatch):
    config = CONFIGS["olmo2"]
    ids, mask = left_padded(config)
    with scope(wing):
        model = model_class(wing, config.name, "ForCausalLM")(config, seed=1, dtype="float64")
        used = by_blocks(monkeypatch, wing, rows=3)
        output = model(input_ids=ids, attention_mask=mask, output_attentions=True)
        whole = np.tril(np.ones((len(ids), 1, ids.shape[1], ids.shape[1]), bool)) & (mask == 1)[:, None, None]
        whole |= np.eye(ids.shape[1], dtype=bool)[None, None]
        again = model(input_ids=ids, attention_mask=whole)
    assert used == []
    assert output.attentions[0].shape[-2:] == (ids.shape[1], ids.shape[1])
    assert np.abs((values(output.logits) - values(again.logits))[mask == 1]).max() < 1e-12
