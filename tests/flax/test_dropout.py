"""Dropout and layerdrop of Flax models."""

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OPT
from tests.helpers.flax_models import (
    all_close,
    ask,
    close,
    make,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from olmozoo import flax

DROPS = {
    "dropout": (flax.FlaxOPTForCausalLM, SMALL_OPT),
    "attention_dropout": (flax.FlaxOPTForCausalLM, SMALL_OPT),
    "layerdrop": (flax.FlaxOPTForCausalLM, SMALL_OPT),
    "olmo": (flax.FlaxOlmoForCausalLM, SMALL_OLMO),
    "olmo2": (flax.FlaxOlmo2ForCausalLM, SMALL_OLMO2),
}


def dropping(kind, share):
    """A model of which one kind of dropout is on."""
    cls, config = DROPS[kind]
    field = "attention_dropout" if kind.startswith("olmo") else kind
    quiet = {"dropout": 0.0} if cls is flax.FlaxOPTForCausalLM else {}
    return make(cls, config.replace(**{**quiet, field: share}))


@pytest.mark.parametrize("kind", DROPS)
def test_dropout_is_alive_in_training_alone(kind):
    model, off = dropping(kind, 0.5), dropping(kind, 0.0)
    ids, mask = left_padded(model.config)
    still = ask(off, ids, mask).logits
    assert np.array_equal(ask(model, ids, mask).logits, still)
    assert np.array_equal(ask(model, ids, mask, dropout_rng=jax.random.key(0)).logits, still)
    assert np.array_equal(ask(off, ids, mask, deterministic=False).logits, still)  # nothing to draw: no key is needed
    train = jax.jit(lambda key: model(ids, mask, deterministic=False, dropout_rng=key).logits)
    draws = [train(jax.random.key(seed)) for seed in range(24)]
    assert np.array_equal(train(jax.random.key(3)), draws[3])
    assert len({np.asarray(draw).tobytes() for draw in draws}) > 3  # of the four ways that two layers can be dropped
    assert len({np.asarray(draw).tobytes() for draw in (*draws, still)}) > 3
    field = "attention_dropout" if kind.startswith("olmo") else kind
    for call in (model, jax.jit(model, static_argnames="deterministic")):
        with pytest.raises(InputError, match=rf"{field} is 0\.5: pass `dropout_rng`"):
            call(ids, mask, deterministic=False)


def test_a_layer_is_dropped_as_often_as_layerdrop_says():
    config = SMALL_OPT.replace(num_hidden_layers=1, layerdrop=0.3, dropout=0.0)
    model = make(flax.FlaxOPTForCausalLM, config)
    ids, mask = left_padded(config)
    keys = jax.random.split(jax.random.key(0), 2000)
    still = ask(model, ids, mask, output_hidden_states=True).hidden_states
    last = jax.jit(
        jax.vmap(
            lambda key: (
                model.module.bind({"params": model.params}, rngs={"dropout": key})
                .model(ids[1:2], mask[1:2], output_hidden_states=True, deterministic=False)
                .hidden_states[1]
            )
        )
    )(keys)
    project = model.params["model"]["decoder"]["project_out"]["kernel"]
    skipped = np.abs(last - (still[0] @ project)[1:2]).max((1, 2, 3)) < 1e-4
    kept = np.abs(last - still[1][1:2]).max((1, 2, 3)) < 1e-4
    assert (skipped ^ kept).all()
    assert abs(skipped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(keys))


def test_attention_weights_are_dropped_as_often_as_said_and_keep_their_mean():
    model = dropping("attention_dropout", 0.25)
    ids, mask = left_padded(model.config)
    still = np.asarray(ask(model, ids, mask, output_attentions=True).attentions[0])
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = jax.jit(
        jax.vmap(
            lambda key: model(ids, mask, deterministic=False, dropout_rng=key, output_attentions=True).attentions[0]
        )
    )(keys)
    seen = np.broadcast_to(still > 1e-6, drawn.shape)
    zeros = np.asarray(drawn) == 0
    assert abs(zeros[seen].mean() - 0.25) < 0.005
    assert close(np.where(zeros, still, drawn * 0.75), still)
    assert np.abs(drawn.mean(0) - still).max() < 0.15


def test_what_sublayers_put_out_is_dropped_as_often_as_said():
    config = SMALL_OPT.replace(num_hidden_layers=1, dropout=0.25, word_embed_proj_dim=40, do_layer_norm_before=True)
    model = make(flax.FlaxOPTForCausalLM, config.replace(_remove_final_layer_norm=True))
    for name in ("kernel", "bias"):  # an MLP that adds nothing, so that what is left is what attention added
        leaf = model.params["model"]["decoder"]["layers"]["0"]["fc2"]
        leaf[name] = jnp.zeros_like(leaf[name])
    ids, mask = left_padded(config)
    before, after = ask(model, ids, mask, output_hidden_states=True).hidden_states
    added = np.asarray(after - before)
    keys = jax.random.split(jax.random.key(0), 400)

    def draw(key):
        return model(ids, mask, deterministic=False, dropout_rng=key, output_hidden_states=True).hidden_states[1]

    # One key after another: in a product of this many rows with a matrix of zeros, as fc2 is here, jaxlib 0.10.2 reads
    # memory that nothing has written to on the CPU.
    drawn = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
    drawn = np.asarray(drawn) - before
    dropped, kept = np.abs(drawn) < 1e-4, np.abs(drawn - added / 0.75) < 1e-4
    assert (dropped | kept).all()
    assert abs(dropped[:, np.abs(added) > 1e-3].mean() - 0.25) < 0.005


@pytest.mark.parametrize("kind", DROPS)
def test_gradient_checkpointing_draws_the_same_dropout(kind):
    model = dropping(kind, 0.3)
    ids, mask = left_padded(model.config)

    def gradients():
        def loss(params, key):
            return model(ids, mask, params=params, labels=ids, deterministic=False, dropout_rng=key).loss

        graded = jax.jit(jax.value_and_grad(loss))
        return [graded(model.params, jax.random.key(seed)) for seed in range(3)]

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert all_close(again, plain)
    assert len({float(loss) for loss, _ in again}) > 1
