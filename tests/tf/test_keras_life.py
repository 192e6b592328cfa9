"""The Keras wing as Keras users live it: every family under Keras's and TensorFlow's own tools."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmozoo import Olmo2Config, OlmoConfig, OPTConfig
from tests.helpers.checkpoints import left_padded, random_values
from tests.helpers.wings import refusal

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")

from olmozoo.tf.layers import dropout

COMMON = {"vocab_size": 53, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "num_labels": 3}
ROTARY = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": None}
CONFIGS = {
    "Olmo2": Olmo2Config(**ROTARY),
    "Olmo": OlmoConfig(**ROTARY, clip_qkv=2.0, tie_word_embeddings=True),
    "OPT": OPTConfig(**COMMON, ffn_dim=24, max_position_embeddings=64, dropout=0.0, eos_token_id=None),
}
HEADS = {
    "Model": None,
    "ForCausalLM": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForQuestionAnswering": "question_answering",
}
FAMILIES = list(CONFIGS)
EVERY = [
    *((family, head) for head in ("Model", "ForCausalLM", "ForSequenceClassification") for family in FAMILIES),
    ("OPT", "ForQuestionAnswering"),
]
ONE_EACH = [("Olmo2", "ForCausalLM"), ("Olmo", "ForSequenceClassification"), ("OPT", "ForQuestionAnswering")]
ANSWERS = ("last_hidden_state", "logits", "start_logits", "end_logits")
IDS, MASK = left_padded(CONFIGS["Olmo2"], batch=4, length=9)
REAL = MASK.astype(bool)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
LABELS = {
    "ForCausalLM": {"labels": np.where(MASK, IDS, -100)},
    "ForSequenceClassification": {"labels": np.array([2, 0, 1, 1])},
    "ForQuestionAnswering": {"start_positions": np.array([1, 3, 5, 7]), "end_positions": np.array([2, 6, 8, 8])},
}


def make(family, head="ForCausalLM", config=None, **options):
    """A model whose every parameter matters: norms away from 1, biases away from 0."""
    config = config or CONFIGS[family]
    model = getattr(zoo, f"TF{family}{head}")(config, seed=None, **options)
    model.bind_parameters(
        (parameter, random_values(parameter).astype(model.variable_dtype))
        for parameter in config.parameters(HEADS[head])
        if parameter.tied_to is None
    )
    return model


def dataset(*parts):
    """Batches of dicts, or of (dict, labels)."""
    return tf.data.Dataset.from_tensor_slices(parts[0] if len(parts) == 1 else parts).batch(4)


def own_labels(head):
    """The labels as they are given beside the inputs: an array, or a tuple of two."""
    labels = tuple(LABELS[head].values())
    return labels if len(labels) > 1 else labels[0]


def logits_of(output):
    """The fields of an output, or of the answer of a served model, that hold answers."""
    return {name: np.asarray(value) for name, value in output.items() if name in ANSWERS}


def same_logits(found, expected, atol=0.0):
    """Whether two outputs are equal, leaving out what a language model says at padding."""
    found, expected = logits_of(found), logits_of(expected)
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        where = REAL if value.shape[:2] == REAL.shape else ...
        np.testing.assert_allclose(found[name][where], value[where], rtol=0, atol=atol)


def total_change(before, variables):
    return [float(np.abs(old - variable.numpy()).max()) for old, variable in zip(before, variables, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_makes_the_kernels_whole_numbers_and_keeps_them(family, tmp_path):
    model = make(family, "ForCausalLM")
    before = model(INPUTS).logits.numpy()[REAL]
    model.quantize("int8", filters="proj" if family == "Olmo2" else None)
    kernels = [weight for weight in model.weights if weight.path.endswith("/kernel")]
    assert len(kernels) > 3
    assert {kernel.dtype for kernel in kernels} == ({"int8", "float32"} if family == "Olmo2" else {"int8"})
    after = model(INPUTS).logits.numpy()[REAL]
    assert 0 < abs(after - before).max() < 0.1 * abs(before).max()
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again(INPUTS).logits.numpy()[REAL], after)


# -- compile, fit, evaluate, predict ----------------------------------------------------------------------------------


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


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), EVERY)
def test_a_keras_file_is_the_model(family, head, tmp_path):
    model = make(family, head, name="zoo")
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    same_logits(loaded(**INPUTS), model(**INPUTS))
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        assert ours.path == theirs.path
        np.testing.assert_array_equal(ours, theirs)
    lines = []
    model.summary(print_fn=lambda text, **_: lines.append(text))
    assert f"{model.num_parameters():,}" in "\n".join(lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weights_file_names_each_variable_once_and_after_its_layer(family, tmp_path):
    h5py = pytest.importorskip("h5py")
    model = make(family)
    model.save_weights(tmp_path / "m.weights.h5")
    names = []
    with h5py.File(tmp_path / "m.weights.h5") as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    names = [name for name in names if "/seeds/" not in name]
    assert len(names) == len(model.weights)
    assert not {"base_model", "stack"} & {step for name in names for step in name.split("/")}


SERVE = """
import json, sys
sys.modules["olmozoo"] = None
import numpy as np, tensorflow as tf
try:
    import olmozoo
except ImportError:
    pass
else:
    raise SystemExit("olmozoo was there")
for folder in json.loads(sys.argv[1]):
    served = tf.saved_model.load(folder)
    inputs = np.load(folder + "/inputs.npz")
    output = served.serve(inputs["input_ids"], inputs["attention_mask"])
    assert type(output) is dict, type(output)
    np.savez(folder + "/output.npz", **output)
    for rows, length in ((1, 1), (3, 5)):
        ids = tf.constant(inputs["input_ids"][:rows, -length:], tf.int32)
        named = served.signatures["serving_default"](input_ids=ids, attention_mask=tf.ones_like(ids))
        for name, value in served.serve(ids, tf.ones_like(ids)).items():
            assert value.shape[0] == rows
            np.testing.assert_allclose(named[name], value, rtol=0, atol=1e-5)
"""


def test_a_saved_model_serves_without_the_library(tmp_path):
    models = {}
    for family, head in ONE_EACH:
        folder = tmp_path / f"{family}{head}"
        models[str(folder)] = make(family, head)
        models[str(folder)].export(folder, verbose=False)
        np.savez(folder / "inputs.npz", **INPUTS)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, json.dumps(list(models))], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        same_logits(np.load(Path(folder) / "output.npz"), model(**INPUTS), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_has_gradients(tmp_path, family):
    model = make(family)
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    repeated = np.where(np.arange(IDS.shape[1]) % 2, IDS, IDS[:, :1])  # a token's gradient has several parts
    ids, mask = tf.constant(repeated, tf.int32), tf.constant(MASK, tf.int32)

    def gradients(call, variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(call(ids, mask)["logits"]))
        return tape.gradient(loss, variables)

    variables = loaded.signatures["serving_default"].variables
    served = {v.numpy().tobytes(): grad for v, grad in zip(variables, gradients(loaded.serve, variables), strict=True)}
    own = gradients(model, [weight.value for weight in model.trainable_weights])
    assert len(served) == len(own)
    for weight, expected in zip(model.trainable_weights, own, strict=True):
        if not weight.path.endswith("k_proj/bias"):  # the softmax does not see that one: its gradient is rounding
            found, atol = served[weight.numpy().tobytes()], 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol, err_msg=weight.path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_tensorflow_holds_every_variable(family, tmp_path):
    model, other = make(family), getattr(zoo, f"TF{family}ForCausalLM")(CONFIGS[family], seed=5)
    path = tf.train.Checkpoint(model=model).write(tmp_path / "ckpt")
    tf.train.Checkpoint(model=other).read(path).assert_consumed()
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


@pytest.mark.parametrize("keep", ["save", "tf"])
def test_variables_that_the_config_does_not_know_are_named_and_not_lost(keep, tmp_path):
    tied = make("Olmo")
    tied.lm_head = keras.layers.Dense(53, use_bias=False, name="own")
    tied(**INPUTS)
    assert re.search(r"unexpected: \S*own/kernel \(16, 53\)", refusal(tied, keep, tmp_path))

    smaller = make("Olmo2")
    smaller.lm_head = keras.layers.Dense(52, use_bias=False)
    smaller(**INPUTS)
    assert "wrong shape: lm_head.weight is (16, 52), expected (16, 53)" in refusal(smaller, keep, tmp_path)


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_learns_and_is_merged_when_saved(family, tmp_path):
    model = make(family)
    first = model(**INPUTS).logits.numpy()
    answer = model.generate(IDS, MASK, max_new_tokens=6).numpy()
    for layer in model._flatten_layers():
        if not list(layer._flatten_layers(include_self=False)):
            layer.trainable = False
    adapters = []
    for block in model.base_model.stack.blocks:
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj):
            layer.trainable = True
            layer.enable_lora(2)
            if layer.use_bias:
                layer.bias.trainable = False
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

    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert len(merged.weights) == len(model.weights) - len(adapters)
    model.save(tmp_path / "m.keras")
    for again in (merged, keras.models.load_model(tmp_path / "m.keras")):
        same_logits(again(**INPUTS), model(**INPUTS), atol=1e-4)
        tuned = model.generate(IDS, MASK, max_new_tokens=6).numpy()
        np.testing.assert_array_equal(again.generate(IDS, MASK, max_new_tokens=6), tuned)
    assert np.any(tuned != answer)


# -- several devices --------------------------------------------------------------------------------------------------

MIRRORED = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, sys.argv[1])
import contextlib
import keras
import numpy as np
from tests.tf.test_keras_life import CONFIGS, IDS, dataset, make

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
found = {}
for family in CONFIGS:
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
    assert set(found) == set(FAMILIES)
    for one, two in found.values():
        np.testing.assert_allclose(one, two, rtol=1e-4)
        assert one[-1] < one[0] - 0.05


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_scales_the_rest():
    x = tf.ones((400, 500))
    dropped = dropout(x, 0.3, tf.constant([1, 2])).numpy()
    assert abs((dropped == 0).mean() - 0.3) < 0.005
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(dropout(x, 0.3, tf.constant([1, 2])), dropped)
    assert np.any(dropout(x, 0.3, tf.constant([1, 3])) != dropped)
    assert dropout(x, 0.3, None) is x


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


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_embeddings(family):
    model = make(family, dtype="float64")
    table = model.get_input_embeddings()
    for ids, mask in ((IDS, MASK), (IDS[:, 4:], MASK[:, 4:]), (np.tile(IDS[:, 8:], 30), None)):
        given = np.ones_like(ids) if mask is None else mask
        expected = model.generate(ids, given, max_new_tokens=7).numpy()[:, ids.shape[1] :]
        np.testing.assert_array_equal(
            model.generate(inputs_embeds=table(ids), attention_mask=mask, max_new_tokens=7), expected
        )
        np.testing.assert_array_equal(
            model.generate(None, mask, inputs_embeds=np.asarray(table(ids)), max_new_tokens=7), expected
        )
        end, row = int(expected[0, 2]), list(expected[0])
        ended = model.generate(
            inputs_embeds=table(ids), attention_mask=mask, max_new_tokens=7, eos_token_id=end, pad_token_id=3
        )
        stop = row.index(end) + 1
        np.testing.assert_array_equal(ended[0], (row[:stop] + [3] * 7)[: ended.shape[1]])
    assert model.trace_count == 4  # two of ids and two of embeddings


@pytest.mark.parametrize(
    ("family", "tied", "rows"), [("Olmo2", False, 70), ("Olmo", True, 40), ("OPT", True, 70), ("OPT", False, 40)]
)
def test_resized_embeddings_are_those_of_pytorch(family, tied, rows, tmp_path):
    pt = pytest.importorskip("olmozoo.pt", reason="olmozoo[pt] is not installed")
    model = make(family, config=CONFIGS[family].replace(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    other = getattr(pt, f"{family}ForCausalLM").from_pretrained(tmp_path)
    before = model(np.minimum(IDS, 39), MASK).logits.numpy()
    layer = model.resize_token_embeddings(rows)
    other.resize_token_embeddings(rows)
    assert layer is model.get_input_embeddings()
    assert (model.get_output_embeddings() is layer) == tied
    assert model.config == model.model.config == other.config
    assert model.config.vocab_size == rows
    table = [p for p in model.config.parameters("causal_lm") if p.tied_to is None]
    assert len(model.weights) == len(table)
    found, expected = zoo.canonical_state(model), pt.canonical_state(other)
    assert {name: array.shape for name, array in found.items()} == {p.name: p.shape for p in table}
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
    after = model(np.minimum(IDS, 39), MASK).logits.numpy()
    assert after.shape == (*IDS.shape, rows)
    kept = min(rows, 53)
    np.testing.assert_allclose(after[..., :kept][REAL], before[..., :kept][REAL], atol=1e-5)
    model.save_pretrained(tmp_path / "resized")
    again = type(model).from_pretrained(tmp_path / "resized")
    np.testing.assert_array_equal(again(np.minimum(IDS, 39), MASK).logits, after)
    assert model.generate(IDS % 40, MASK, max_new_tokens=3).shape == (4, 12)
