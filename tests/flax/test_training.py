"""Losses, gradients and training steps of Flax models."""

import numpy as np
import pytest

from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import SMALL_OLMO2
from tests.helpers.flax_models import (
    ALL,
    all_close,
    ask,
    close,
    labelled,
    make,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")


from olmozoo import flax


def test_gradients_are_those_of_the_loss(model, batch, x64):
    ids, mask = batch
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
    double = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, dtype=np.float64, _do_init=False)

    def loss(params):
        output = double(ids, mask, params=params, labels=np.where(mask == 1, ids, -100))
        return output.loss, output.logits

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradient = graded(params)
    chances = np.exp(logits[:, :-1]) / np.exp(logits[:, :-1]).sum(-1, keepdims=True)
    picked = np.take_along_axis(chances, ids[:, 1:, None], axis=-1)[..., 0]
    assert close(value, -np.log(picked)[mask[:, 1:] == 1].mean(), 1e-12)
    for seed in range(3):
        stream = np.random.default_rng(seed)
        way = jax.tree.map(lambda leaf, stream=stream: stream.standard_normal(leaf.shape), params)
        ahead, back = (
            graded(jax.tree.map(lambda leaf, step, by=by: leaf + by * step, params, way))[0][0] for by in (1e-6, -1e-6)
        )
        slope = sum(np.vdot(*pair) for pair in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
        assert close(slope, (ahead - back) / 2e-6, 1e-6)


def test_labels_that_are_all_ignored_give_no_loss_and_no_nan(model, batch):
    ids, mask = batch
    loss = jax.jit(jax.value_and_grad(lambda params: model(ids, mask, params=params, labels=0 * ids - 100).loss))
    value, gradient = loss(model.params)
    assert value == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(batch):
    ids, mask = batch
    model = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2)

    def loss(params):
        return model(ids, mask, params=params, labels=ids).loss

    def recomputed():
        return str(jax.make_jaxpr(jax.grad(loss))(model.params)).count("remat")

    def cache_of_training():
        return jax.eval_shape(lambda: model(ids, mask, deterministic=False, use_cache=True).past_key_values)

    assert recomputed() == 0
    plain = jax.jit(jax.grad(loss))(model.params)
    logits = model(ids, mask).logits
    model.gradient_checkpointing_enable()
    assert recomputed() >= SMALL_OLMO2.num_hidden_layers
    assert all_close(jax.jit(jax.grad(lambda params: loss(params)))(model.params), plain, 1e-6)
    output = model(ids, mask)
    assert close(output.logits, logits)
    assert output.past_key_values is not None
    assert cache_of_training() is None
    model.gradient_checkpointing_disable()
    assert recomputed() == 0
    assert cache_of_training() is not None


@pytest.mark.parametrize("tied", [True, False])
def test_the_backward_pass_copies_no_transposed_or_cut_output(tied):
    """Of a linear layer, the head and the scores; XLA's CPU copies those where a product has more than two axes."""
    config = SMALL_OLMO2.replace(num_hidden_layers=1, tie_word_embeddings=tied)
    model = flax.FlaxOlmo2ForCausalLM(config, _do_init=False)
    b, s = 3, 7
    ids = jax.ShapeDtypeStruct((b, s), np.int32)
    gradient = jax.jit(jax.grad(lambda params, ids: model(ids, params=params, labels=ids).loss))
    text = gradient.lower(model.params_shape_tree, ids).compile().as_text()
    groups, f, v = config.kv_heads, config.intermediate_size, config.vocab_size
    copies = [(f, b, s), (v, b, s), (b, s - 1, v), (b, groups, s, config.num_attention_heads // groups, s)]
    assert [shape for shape in copies if str(list(shape)).replace(" ", "") in text] == []


@pytest.mark.parametrize(
    ("cls", "checkpointing"),
    [*((cls, False) for cls in ALL), (flax.FlaxOPTForCausalLM, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_training_step_with_optax_lowers_the_loss(cls, checkpointing):
    optax = pytest.importorskip("optax")
    model = make(cls)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask = left_padded(model.config)
    labels = labelled(cls, ids)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(
            lambda params: model(ids, mask, params=params, deterministic=False, **labels).loss
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = model.params, optimizer.init(model.params)
    losses = []
    for _ in range(12):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert ask(model, ids, mask, params, **labels).loss < losses[-1]
