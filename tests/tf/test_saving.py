"""Saving and loading Keras models: checkpoints, Keras files, SavedModels and TensorFlow checkpoints."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.keras_models import (
    BIASED_OLMO2,
    CONFIGS,
    EVERY,
    FAMILIES,
    IDS,
    INPUTS,
    MASK,
    ONE_EACH,
    make,
    same_logits,
)
from tests.helpers.wings import refusal

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_load_and_save_give_the_same_bytes(tmp_path, dtype):
    folder = write_checkpoint(tmp_path / "a", BIASED_OLMO2, dtype=dtype)
    model = zoo.TFAutoModelForCausalLM.from_pretrained(folder)
    assert {variable.dtype for variable in model.weights} == {dtype}
    model.save_pretrained(tmp_path / "b")
    zoo.TFOlmo2ForCausalLM.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == weights
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "c" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_what_lies_aligned_is_the_mapped_file_and_never_changes_it(tmp_path):
    config = BIASED_OLMO2.replace(vocab_size=64, hidden_size=32)  # all sizes are multiples of 64 bytes
    folder = write_checkpoint(tmp_path / "a", config, dtype="float32")
    data = (folder / "model.safetensors").read_bytes()
    header, values = data[8 : 8 + int.from_bytes(data[:8], "little")], data[8 + int.from_bytes(data[:8], "little") :]
    header += b" " * (-(8 + len(header)) % 64)  # TensorFlow shares memory at multiples of 64 bytes
    before = len(header).to_bytes(8, "little") + header + values
    (folder / "model.safetensors").write_bytes(before)
    model = zoo.TFOlmo2ForCausalLM.from_pretrained(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    bounds = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for variable in model.weights:
        address = np.frombuffer(variable.value.read_value(), np.float32).ctypes.data  # of the memory itself
        assert any(low <= address < high for low, high in bounds) == (not variable.path.endswith("/kernel"))
        variable.value.assign_add(variable.value)
    assert (folder / "model.safetensors").read_bytes() == before
    model.save_pretrained(folder)
    for name, array in load_file(folder / "model.safetensors").items():
        assert np.array_equal(array, 2 * load(before)[name])


def test_keras_file_round_trip(tmp_path):
    model = zoo.TFOlmo2ForCausalLM(
        BIASED_OLMO2.replace(tie_word_embeddings=True), seed=5, name="zoo", dtype="mixed_bfloat16"
    )
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(IDS, IDS, verbose=0)
    model.generation_config = model.generation_config.replace(max_new_tokens=2)
    model.generate(IDS[:1])  # what it compiled is not saved
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for again in (loaded, pickle.loads(pickle.dumps(model))):
        assert type(again) is zoo.TFOlmo2ForCausalLM
        assert again.config == model.config
        assert again.generation_config == model.generation_config
        assert again.dtype_policy.name == "mixed_bfloat16"
        assert [v.path for v in again.weights] == [v.path for v in model.weights]
        for ours, theirs in zip(model.weights, again.weights, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert loaded.optimizer.iterations == 1
    base = zoo.TFOlmo2Model(BIASED_OLMO2, seed=6)
    base.save(tmp_path / "base.keras")
    np.testing.assert_array_equal(
        keras.models.load_model(tmp_path / "base.keras")(IDS).last_hidden_state, base(IDS).last_hidden_state
    )


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
