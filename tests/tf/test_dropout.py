"""Dropout and layerdrop of Keras models."""

import numpy as np
import pytest

from tests.helpers.keras_models import (
    BIASED_OLMO2,
    CONFIGS,
    IDS,
    INPUTS,
    LABELS,
    make,
    olmo2,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")

from olmozoo.tf.layers import dropout


def test_dropout_drops_its_share_and_scales_the_rest():
    x = tf.ones((400, 500))
    dropped = dropout(x, 0.3, tf.constant([1, 2])).numpy()
    assert abs((dropped == 0).mean() - 0.3) < 0.005
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(dropout(x, 0.3, tf.constant([1, 2])), dropped)
    assert np.any(dropout(x, 0.3, tf.constant([1, 3])) != dropped)
    assert dropout(x, 0.3, None) is x


def test_attention_dropout_is_alive_in_training_alone():
    model = olmo2(config=BIASED_OLMO2.replace(attention_dropout=0.3))
    np.testing.assert_array_equal(model(IDS).logits, olmo2()(IDS).logits)
    first, second = (model(IDS, training=True, output_attentions=True) for _ in range(2))
    assert np.any(first.logits != second.logits)
    longer = np.tile(IDS, (1, 12))
    weights = model(longer, training=True, output_attentions=True).attentions[0].numpy()
    kept = model(longer, output_attentions=True).attentions[0].numpy()
    seen = kept > 0
    assert abs((weights[seen] == 0).mean() - 0.3) < 0.01
    survivors = seen & (weights != 0)
    np.testing.assert_allclose(weights[survivors], kept[survivors] / 0.7, rtol=1e-4)
    dropped = [seen & (layer.numpy() == 0) for layer in model(longer, training=True, output_attentions=True).attentions]
    assert np.any(dropped[0] != dropped[1])


@pytest.mark.parametrize(
    ("kind", "compiled"), [("dropout", False), ("dropout", True), ("attention_dropout", True), ("layerdrop", True)]
)
def test_opt_drops_in_training_alone(kind, compiled):
    model, plain = (make("OPT", config=CONFIGS["OPT"].replace(**{kind: rate})) for rate in (0.5, 0.0))

    def call(training):
        return model(**INPUTS, training=training).logits

    run = tf.function(call) if compiled else call
    expected = plain(**INPUTS).logits.numpy()
    for _ in range(2):
        np.testing.assert_allclose(run(False), expected, atol=1e-5)
    model.base_model.seeds.state.assign([5, 0])
    answers = [run(True).numpy() for _ in range(6)]
    distinct = {answer.tobytes() for answer in answers}
    assert len(distinct) == (2 if kind == "layerdrop" else 6)
    np.testing.assert_array_equal(model.predict(INPUTS, verbose=0).logits, plain.predict(INPUTS, verbose=0).logits)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_the_mean_over_dropouts_is_the_inference(kind):
    """With an MLP that adds nothing and no final norm, what is dropped acts linearly: its mean is the undropped."""
    model = make("OPT", config=CONFIGS["OPT"].replace(**{kind: 0.4}, _remove_final_layer_norm=True))
    block = model.model.decoder.blocks[0]
    block.fc2.kernel.assign(tf.zeros_like(block.fc2.kernel))
    block.fc2.bias.assign(tf.zeros_like(block.fc2.bias))
    expected = model.model(IDS[:1]).last_hidden_state.numpy()
    model.model.seeds.state.assign([5, 0])
    drawn = model.model(np.repeat(IDS[:1], 8000, 0), training=True).last_hidden_state.numpy()
    spread = drawn.std(0)
    assert spread.max() > 0.1
    error = np.abs(drawn.mean(0) - expected[0])
    assert (error <= 5 * spread / np.sqrt(8000) + 1e-5).all()


def test_layerdrop_leaves_out_its_share_of_layers():
    model = make("OPT", "Model", config=CONFIGS["OPT"].replace(layerdrop=0.3, _remove_final_layer_norm=True))

    @tf.function
    def left_out():
        states = model(IDS, training=True, output_hidden_states=True).hidden_states
        return tf.reduce_all(states[0] == states[1])

    model.seeds.state.assign([5, 0])
    share = np.mean([left_out() for _ in range(1000)])
    assert abs(share - 0.3) < 0.06  # four standard deviations


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_drops_the_same(compiled):
    rates = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3, "num_hidden_layers": 3}
    model = make("OPT", config=CONFIGS["OPT"].replace(**rates), dtype="float64")

    def gradients():
        with tf.GradientTape() as tape:
            loss = model(**INPUTS, **LABELS["ForCausalLM"], training=True).loss
        return loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_weights)]

    def seeded(seed):
        model.model.seeds.state.assign([seed, 0])
        loss, found = (tf.function(gradients) if compiled else gradients)()
        return [loss.numpy(), *(g.numpy() for g in found)]

    plain, other = seeded(3), seeded(4)
    assert plain[0] != other[0]
    model.gradient_checkpointing_enable()
    for ours, theirs in zip(seeded(3), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
