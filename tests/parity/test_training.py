"""Twenty AdamW steps in each framework from the same seed, in float64: the same losses and the same weights.

What makes the three optimizers one: the same learning rate, betas and decoupled weight decay on every parameter (all
three decay all of them unless told), and a small epsilon. Keras folds the bias correction into the step size, so that
its epsilon weighs 1 / sqrt(1 - beta_2 ** step) times that of the others: at 5e-12 that is nothing, and still enough to
keep gradients that are zero but for rounding (a key's bias has them) from being blown up. Keras also rounds Python
floats to float32, and the learning rate to `keras.config.floatx()`: give it NumPy's float64 and set that to float64.
"""

import numpy as np
import pytest

from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import PRESENT, model_class, several

STEPS = 20
SETTINGS = {"learning_rate": 3e-4, "beta_1": 0.9, "beta_2": 0.95, "epsilon": 5e-12, "weight_decay": 0.1}
EXACT = {name: np.float64(value) for name, value in SETTINGS.items()}


def batches(config):
    for step in range(STEPS):
        ids, mask = left_padded(config, seed=step % 2)
        yield ids, mask, np.where(mask == 1, ids, -100)


def train_pt(config):
    import torch

    from olmozoo.pt import canonical_state

    model = model_class("pt", config.name, "ForCausalLM")(config, seed=3, dtype=torch.float64).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=SETTINGS["learning_rate"],
        betas=(SETTINGS["beta_1"], SETTINGS["beta_2"]),
        eps=SETTINGS["epsilon"],
        weight_decay=SETTINGS["weight_decay"],
    )
    losses = []
    for ids, mask, labels in batches(config):
        loss = model(torch.from_numpy(ids), torch.from_numpy(mask), labels=torch.from_numpy(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, canonical_state(model)


def train_tf(config):
    import keras

    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        return train_keras(model_class("tf", config.name, "ForCausalLM")(config, seed=3, dtype="float64"), config)
    finally:
        keras.config.set_floatx(floatx)


def train_keras(model, config):
    import keras
    import tensorflow as tf

    from olmozoo.tf import canonical_state

    optimizer = keras.optimizers.AdamW(**EXACT)
    losses = []
    for ids, mask, labels in batches(config):  # `fit` does the same, but reports a running mean in float32
        with tf.GradientTape() as tape:
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, training=True).loss
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        losses.append(float(loss))
    return losses, canonical_state(model)


def train_flax(config):
    import jax
    import optax

    from olmozoo.flax import canonical_state

    with jax.enable_x64(True):
        model = model_class("flax", config.name, "ForCausalLM")(config, seed=3, dtype="float64")
        optimizer = optax.adamw(
            SETTINGS["learning_rate"],
            b1=SETTINGS["beta_1"],
            b2=SETTINGS["beta_2"],
            eps=SETTINGS["epsilon"],
            weight_decay=SETTINGS["weight_decay"],
        )

        @jax.jit
        def step(params, state, ids, mask, labels):
            def loss_of(params):
                return model(ids, mask, params=params, labels=labels, deterministic=False).loss

            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        params, losses = model.params, []
        state = optimizer.init(params)
        for ids, mask, labels in batches(config):
            params, state, loss = step(params, state, ids, mask, labels)
            losses.append(float(loss))
        return losses, canonical_state(model, params)


TRAIN = {"pt": train_pt, "tf": train_tf, "flax": train_flax}


@several
@pytest.mark.parametrize("name", ["olmo2-mqa-bias-tied", "olmo-bias", "opt-projected-post-norm"])
def test_twenty_steps_of_adamw_agree(name):
    config = CONFIGS[name]
    # Larger initial weights than usual: attention is then far from uniform, and no gradient near rounding.
    config = config.replace(**{"init_std": 0.2, "dropout": 0.0} if config.name == "OPT" else {"initializer_range": 0.2})
    losses, weights = TRAIN[PRESENT[0]](config)
    assert losses[-1] < losses[0] - 0.02
    table = {p.name: p for p in config.parameters("causal_lm")}
    for wing in PRESENT[1:]:
        other_losses, other_weights = TRAIN[wing](config)
        assert np.abs(np.subtract(losses, other_losses)).max() <= 1e-8, wing
        for key, value in weights.items():
            if not key.endswith("k_proj.bias"):  # the softmax does not see that one: its gradient is zero
                assert np.abs(value - table[key].initial(3, "float64")).max() > 1e-3, key
            assert np.abs(value - other_weights[key]).max() <= 1e-7, (wing, key)
