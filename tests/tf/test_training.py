"""Losses, gradients and `fit` of Keras models: callbacks, policies, LoRA and several devices."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.keras_models import (
    BIASED_OLMO2,
    FAMILIES,
    IDS,
    INPUTS,
    LABELS,
    MASK,
    OLMOE,
    ONE_EACH,
    REAL,
    dataset,
    make,
    olmo2,
    own_labels,
    same_logits,
    total_change,
)
from tests.helpers.wings import refusal

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")


def test_fit_evaluate_and_predict_with_the_models_own_loss():
    model = olmo2()
    model.compile(keras.optimizers.Adam(1e-2))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    logits, targets = model(IDS, MASK).logits.numpy()[:, :-1], LABELS["ForCausalLM"]["labels"][:, 1:]
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    loss = losses[targets != -100].mean()
    np.testing.assert_allclose(model(IDS, MASK, labels=LABELS["ForCausalLM"]["labels"]).loss, loss, rtol=1e-5)
    within, beside = (
        dataset({**inputs, "labels": LABELS["ForCausalLM"]["labels"]}),
        dataset(inputs, LABELS["ForCausalLM"]["labels"]),
    )
    for data in (within, beside):
        np.testing.assert_allclose(model.evaluate(data, verbose=0), loss, rtol=1e-5)
    np.testing.assert_allclose(model.evaluate(inputs, LABELS["ForCausalLM"]["labels"], verbose=0), loss, rtol=1e-5)
    for data in (within, beside):
        losses = model.fit(data, epochs=3, verbose=0).history["loss"]
        assert losses == sorted(losses, reverse=True)
    with pytest.raises(InputError, match="no labels"):
        model.evaluate(inputs, verbose=0)
    with pytest.raises(InputError, match="takes no sample_weight"):
        model.evaluate(inputs, LABELS["ForCausalLM"]["labels"], sample_weight=np.ones(4), verbose=0)

    expected = model(IDS, MASK).logits.numpy()
    for data in (within.rebatch(3), inputs, [IDS, MASK]):
        output = model.predict(data, verbose=0)
        assert output.keys() == ["logits"]
        assert isinstance(output.logits, np.ndarray)
        np.testing.assert_allclose(output["logits"][REAL], expected[REAL], atol=1e-5)
    assert model.model.predict(IDS, verbose=0).keys() == ["last_hidden_state"]


def test_loss_with_nothing_to_learn_is_zero(model):
    assert model(IDS, labels=np.full_like(IDS, -100)).loss == 0


def test_recomputing_gives_the_same_gradients():
    model = olmo2("float64", BIASED_OLMO2.replace(attention_dropout=0.3))

    def gradients():
        with tf.GradientTape() as tape:
            loss = model(IDS, MASK, labels=LABELS["ForCausalLM"]["labels"], training=True).loss
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_weights)]

    def seeded(function):
        model.model.seeds.state.assign([3, 0])
        return [g.numpy() for g in function()]

    plain = seeded(gradients)
    calls = []
    for block in model.model.blocks:
        block.mlp.act = lambda x, act=block.mlp.act: (calls.append(None), act(x))[1]
    model.gradient_checkpointing_enable()
    for function in (gradients, tf.function(gradients)):
        calls.clear()
        for ours, theirs in zip(seeded(function), plain, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)
        assert len(calls) == 4  # each of two blocks forward, and once more backward
    model.gradient_checkpointing_disable()
    calls.clear()
    seeded(gradients)
    assert len(calls) == 2


@pytest.mark.parametrize(("family", "head"), ONE_EACH)
def test_fit_evaluate_and_predict_with_the_own_loss_and_every_callback(family, head, tmp_path):
    model = make(family, head)
    model.compile(keras.optimizers.Adam(3e-3))
    loss = float(model(**INPUTS, **LABELS[head]).loss)
    within, beside = dataset({**INPUTS, **LABELS[head]}), dataset(INPUTS, own_labels(head))
    for data in (within, beside, dataset(INPUTS, LABELS[head])):
        np.testing.assert_allclose(model.evaluate(data, verbose=0), loss, rtol=1e-5)
    callbacks = [
        keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True),
        keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), monitor="loss", save_best_only=True),
        keras.callbacks.EarlyStopping(monitor="val_loss", min_delta=1e6, patience=2),
    ]
    board = importlib.util.find_spec("tensorboard") is not None  # TensorFlow no longer brings it along
    if board:
        callbacks.append(keras.callbacks.TensorBoard(str(tmp_path / "logs"), histogram_freq=1))
    history = model.fit(within, validation_data=beside, epochs=9, verbose=0, callbacks=callbacks).history
    assert len(history["loss"]) == 3  # the first epoch is the best there can be, two more are waited for
    assert history["loss"][0] > history["loss"][2]
    assert bool(list((tmp_path / "logs").rglob("events*"))) == board

    # The third epoch was the best: what was written after it is the model as it stands.
    predicted = model.predict(within.rebatch(3), verbose=0)
    same_logits(predicted, model(**INPUTS), atol=1e-5)
    same_logits(keras.models.load_model(tmp_path / "best.keras").predict(beside, verbose=0), predicted, atol=1e-5)
    again = make(family, head)
    again.load_weights(tmp_path / "1.weights.h5")
    assert max(total_change([v.numpy() for v in again.weights], model.weights)) > 1e-3
    again.load_weights(tmp_path / "3.weights.h5")
    same_logits(again(**INPUTS), model(**INPUTS))


@pytest.mark.parametrize(
    ("family", "head"),
    [("OPT", "ForCausalLM"), ("Olmo2", "ForSequenceClassification"), ("OPT", "ForQuestionAnswering")],
)
def test_a_users_loss_and_metrics(family, head):
    model = make(family, head)
    loss, targets = keras.losses.SparseCategoricalCrossentropy(from_logits=True), LABELS[head]
    if head == "ForCausalLM":
        targets = {"labels": np.roll(IDS, -1, axis=1)}
    several = len(targets) > 1
    hits = [keras.metrics.SparseCategoricalAccuracy(name=name) for name in targets]
    model.compile(
        keras.optimizers.Adam(3e-3),
        loss=[loss, loss] if several else loss,
        metrics=[[metric] for metric in hits] if several else hits,
        jit_compile=False,
    )
    answers = [logits for name, logits in model(**INPUTS).items() if name.endswith("logits")]
    y = tuple(targets.values()) if several else targets["labels"]
    for data in (dataset({**INPUTS, **targets}), dataset(INPUTS, y)):
        found = model.evaluate(data, verbose=0, return_dict=True)
        expected = sum(float(loss(t, logits)) for t, logits in zip(targets.values(), answers, strict=True))
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
        for (name, target), logits in zip(targets.items(), answers, strict=True):
            np.testing.assert_allclose(found[name], (np.argmax(logits, -1) == target).mean(), rtol=1e-5)
    history = model.fit(data, epochs=3, verbose=0).history
    assert history["loss"][2] < history["loss"][0]
    assert set(targets) <= set(history)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("family", "head"), [("OPT", "ForCausalLM"), *ONE_EACH])
def test_metrics_see_what_the_own_loss_sees(family, head, jit):
    model = make(family, head)
    output = model(**INPUTS)
    if head == "ForCausalLM":
        labels = {"labels": np.where(MASK, IDS, -100)}
        pairs = [(labels["labels"][:, 1:], output.logits[:, :-1])]
    elif head == "ForSequenceClassification":
        labels = {"labels": np.array([2, -100, 1, 1])}
        pairs = [(labels["labels"], output.logits)]
    else:
        labels = {"start_positions": np.array([1, 3, 9, 7]), "end_positions": np.array([2, 9, 9, 8])}
        pairs = [
            (np.where(labels["start_positions"] == 9, -100, labels["start_positions"]), output.start_logits),
            (np.where(labels["end_positions"] == 9, -100, labels["end_positions"]), output.end_logits),
        ]
    expected = [np.mean((np.argmax(logits, -1) == y)[y != -100]) for y, logits in pairs]
    losses = [
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)(y, logits)
        for y, logits in pairs
    ]
    several = len(pairs) > 1
    crossentropy = [keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name=f"ce{i}") for i in range(2)]
    metrics = [["accuracy", crossentropy[0]], ["accuracy", crossentropy[1]]]
    model.compile(keras.optimizers.SGD(0.0), metrics=metrics if several else metrics[0], jit_compile=jit)
    y = tuple(labels.values()) if several else labels["labels"]
    for data in (dataset({**INPUTS, **labels}), dataset(INPUTS, y)):
        for found in (
            model.evaluate(data, verbose=0, return_dict=True),
            {name: values[0] for name, values in model.fit(data, verbose=0).history.items()},
        ):
            assert len(found) == 1 + 2 * len(pairs)
            accuracies = [value for name, value in found.items() if "accuracy" in name]
            entropies = [value for name, value in found.items() if name.endswith(("ce0", "ce1"))]
            np.testing.assert_allclose(accuracies, expected, rtol=1e-5)
            np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-4)
            np.testing.assert_allclose(np.mean(entropies), np.mean(losses), rtol=1e-4)
    with pytest.raises(InputError, match="give one of them"):
        model.compile(metrics=["accuracy"], weighted_metrics=["accuracy"])


@pytest.mark.parametrize(
    ("family", "low"), [("Olmo2", "bfloat16"), ("Olmo", "float16"), ("OPT", "bfloat16"), ("OPT", "float16")]
)
def test_mixed_policies_train(family, low):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(f"mixed_{low}")  # as users set it: for all that is made from here on
    try:
        model = make(family)
    finally:
        keras.config.set_dtype_policy(before)
    assert {variable.dtype for variable in model.weights} == {"float32"}
    assert {layer.compute_dtype for layer in model._flatten_layers()} == {low}
    assert model(**INPUTS).logits.dtype == low
    expected = make(family, dtype="float32")(**INPUTS).logits.numpy()[REAL]
    error = np.abs(tf.cast(model(**INPUTS).logits, "float32").numpy()[REAL] - expected).max() / expected.std()
    assert 0 < error < (0.2 if low == "bfloat16" else 0.03)
    model.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
    old = [variable.numpy() for variable in model.weights]
    losses = model.fit(dataset({**INPUTS, **LABELS["ForCausalLM"]}), epochs=6, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.05
    changes = total_change(old, model.weights)
    assert np.isfinite(changes).all()
    assert max(changes) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_learns_and_is_merged_when_asked(family, tmp_path):
    model = make(family)
    first = model(**INPUTS).logits.numpy()
    answer = model.generate(IDS, MASK, max_new_tokens=6).numpy()
    with pytest.raises(InputError, match=r"no layer query; there are .*q_proj"):
        model.enable_lora(2, target_names=["query"])
    model.enable_lora(2, target_names=["q_proj", "v_proj"])
    adapters = []
    for block in model.base_model.stack.blocks:
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj):
            adapters += [layer.lora_kernel_a, layer.lora_kernel_b]
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in adapters}
    np.testing.assert_array_equal(model(**INPUTS).logits, first)  # one factor starts at zero

    before = {id(v): v.numpy() for v in model.weights}
    model.compile(keras.optimizers.Adam(0.1), jit_compile=False)
    losses = model.fit(dataset({**INPUTS, **LABELS["ForCausalLM"]}), epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.02
    for variable in model.weights:
        changed = np.any(variable.numpy() != before[id(variable)])
        assert changed == any(variable is adapter for adapter in adapters), variable.path

    for keep in ("save", "pt"):
        assert "2 layers have LoRA adapters that are not merged" in refusal(model, keep, tmp_path)
    tuned = model(**INPUTS)
    model.merge_lora()
    same_logits(model(**INPUTS), tuned, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert len(merged.weights) == len(model.weights) - len(adapters)
    model.save(tmp_path / "m.keras")
    for again in (merged, keras.models.load_model(tmp_path / "m.keras")):
        same_logits(again(**INPUTS), model(**INPUTS), atol=1e-4)
        tuned = model.generate(IDS, MASK, max_new_tokens=6).numpy()
        np.testing.assert_array_equal(again.generate(IDS, MASK, max_new_tokens=6), tuned)
    assert np.any(tuned != answer)


RELOADED = """
import json, sys
import numpy as np
import olmozoo.tf
import keras
from tests.helpers.keras_models import IDS, LABELS, MASK, dataset
model = keras.models.load_model(sys.argv[1])
logits = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
trainable = sorted(v.path for v in model.trainable_variables)
data = dataset({"input_ids": IDS, "attention_mask": MASK, **LABELS["ForCausalLM"]})
loss = model.fit(data, verbose=0).history["loss"]
np.savez(sys.argv[2], logits=logits, trainable=trainable, loss=loss, weights=[v.numpy().sum() for v in model.weights])
"""


@pytest.mark.parametrize("how", ["lora", "lora of experts", "frozen", "all frozen but norms"])
def test_lora_survives_a_keras_file(how, tmp_path):
    model = make("Olmoe", config=OLMOE) if how == "lora of experts" else make("OPT")
    if how == "lora of experts":
        model.enable_lora(2, lora_alpha=3, target_names=["q_proj", "gate_proj", "down_proj"])
        assert model.model.blocks[0].mlp.experts.down_proj.lora_kernel_b.shape == (3, 2, 16)
    elif how == "lora":
        model.enable_lora(2, lora_alpha=3)
    elif how == "frozen":
        model.model.stack.blocks[0].trainable = False
    else:
        model.base_model.trainable = False
        model.base_model.stack.final_layer_norm.trainable = True
        model.base_model.trainable_weights  # noqa: B018
    model.compile(keras.optimizers.Adam(0.05), jit_compile=False)
    data = dataset({**INPUTS, **LABELS["ForCausalLM"]})
    model.fit(data, verbose=0)
    model.save(tmp_path / "m.keras")
    command = [sys.executable, "-c", RELOADED, tmp_path / "m.keras", tmp_path / "out.npz"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["logits"], model(**INPUTS).logits, atol=1e-5)
    assert found["trainable"].tolist() == sorted(v.path for v in model.trainable_variables)
    folder = tmp_path / "folder"
    model.config.save_pretrained(folder)
    shutil.copy(tmp_path / "m.keras", folder / "model.keras")
    if how.startswith("lora"):  # read without Keras, and as weights into a model without adapters: merged
        merged = type(model).from_pretrained(folder)
        same_logits(merged(**INPUTS), model(**INPUTS), atol=1e-4)
        model.save_weights(tmp_path / "m.weights.h5")
        plain = type(model)(model.config, seed=1)
        plain.load_weights(tmp_path / "m.weights.h5")
        same_logits(plain(**INPUTS), model(**INPUTS), atol=1e-4)
        with pytest.raises(InputError, match=r"save 'model\.keras'"):
            model.save(tmp_path / "m.h5")
    np.testing.assert_allclose(found["loss"], model.fit(data, verbose=0).history["loss"], rtol=1e-4)
    np.testing.assert_allclose(found["weights"], [v.numpy().sum() for v in model.weights], rtol=1e-3, atol=1e-3)


MIRRORED = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, sys.argv[1])
import contextlib
import keras
import numpy as np
from tests.helpers.keras_models import CONFIGS, IDS, dataset, make

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
found = {}
for family in ("Olmo2", "OPT"):  # rotary positions and learned ones
    runs = []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        with scope:
            model = make(family)
            model.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
        labels = np.where(np.arange(9) < 4, -100, IDS)
        losses = model.fit(dataset({"input_ids": IDS, "labels": labels}), epochs=3, verbose=0).history["loss"]
        runs.append(losses)
    found[family] = runs
with strategy.scope():
    model = make("OPT", config=CONFIGS["OPT"].replace(dropout=0.2, layerdrop=0.2))
    model.compile(keras.optimizers.Adam(1e-2))
found["dropping"] = model.fit(dataset({"input_ids": IDS, "labels": IDS}), epochs=3, verbose=0).history["loss"]
print(json.dumps(found))
"""


def test_mirrored_devices_learn_as_one_does():
    """Each replica's loss is a mean over its own labels: as many labels in each make it that of the whole batch."""
    command = [sys.executable, "-c", MIRRORED, str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert np.isfinite(found.pop("dropping")).all()
    assert set(found) == {"Olmo2", "OPT"}
    for one, two in found.values():
        np.testing.assert_allclose(one, two, rtol=1e-4)
        assert one[-1] < one[0] - 0.05
