"""Keras weights and archives, and the TensorFlow files of Transformers 4."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import dtype_of
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.formats import CONFIGS, FIXTURES, MODELS, answer, copy_of, model_of, tree


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_keras_files_are_those_that_keras_writes(tmp_path, family, head):
    keras = pytest.importorskip("keras")
    h5py = pytest.importorskip("h5py")
    source = write_checkpoint(tmp_path / "source", CONFIGS[family], head, dtype=dtype_of("bfloat16"))
    model = model_of("tf", family, head, source)
    model.save(tmp_path / "theirs.keras")
    convert_checkpoint(source, tmp_path / "there", to="keras")
    convert_checkpoint(source, tmp_path / "there2", to="keras-weights")

    def content(stream) -> dict:
        """Every dataset's dtype, attributes and bytes, and every layer's name, by place."""
        found = {}

        def see(place, item):
            if isinstance(item, h5py.Dataset):
                found[place] = (item.dtype, dict(item.attrs), item[()].tobytes())
            elif item.attrs and place != "vars":  # the whole model's name, which Keras numbers
                found[place] = dict(item.attrs)

        with h5py.File(stream, "r") as file:
            file.visititems(see)
        # A norm without weights leaves its name there, and nobody reads it.
        weights = {place for place, value in found.items() if isinstance(value, tuple)}
        return {at: value for at, value in found.items() if "norm" not in at or {at, f"{at}/0"} & weights}

    ours, theirs = (zipfile.ZipFile(path) for path in (tmp_path / "there" / "model.keras", tmp_path / "theirs.keras"))
    with ours, theirs:
        assert content(ours.open("model.weights.h5")) == content(theirs.open("model.weights.h5"))
        assert content(tmp_path / "there2" / "model.weights.h5") == content(theirs.open("model.weights.h5"))
        mine, keras_own = (json.loads(archive.read("config.json")) for archive in (ours, theirs))
        mine["config"]["name"] = keras_own["config"]["name"]  # Keras numbers them
        assert mine == keras_own
        assert ours.testzip() is None
    expected = answer("tf", model, CONFIGS[family])
    loaded = keras.models.load_model(tmp_path / "there" / "model.keras")
    assert np.array_equal(answer("tf", loaded, CONFIGS[family]), expected)
    fresh = type(model)(CONFIGS[family], dtype="bfloat16", seed=5)
    fresh.load_weights(tmp_path / "there2" / "model.weights.h5")
    assert np.array_equal(answer("tf", fresh, CONFIGS[family]), expected)


def test_a_compiled_keras_model_with_its_optimizer_is_read(tmp_path):
    keras = pytest.importorskip("keras")
    source = write_checkpoint(tmp_path / "source", CONFIGS["opt"], dtype="float32")
    model = model_of("tf", "opt", "causal_lm", source)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    ids, mask = left_padded(CONFIGS["opt"])
    model.fit({"input_ids": ids, "attention_mask": mask, "labels": ids}, epochs=1, verbose=0)
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save(tmp_path / "there" / "model.keras")
    again = model_of("tf", "opt", "causal_lm", tmp_path / "there")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), again.get_weights(), strict=True))


def test_an_old_tensorflow_head_is_the_embedding_whatever_the_config_says(tmp_path):
    pytest.importorskip("h5py")
    shutil.copytree(FIXTURES / "tf", tmp_path / "tf")
    config = json.loads((tmp_path / "tf" / "config.json").read_text())
    (tmp_path / "tf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert_checkpoint(tmp_path / "tf", tmp_path / "there", to="safetensors")
    found = Checkpoint(tmp_path / "there")
    assert found["lm_head.weight"].tobytes() == found["model.decoder.embed_tokens.weight"].tobytes()


@pytest.mark.parametrize(
    "spell",
    [
        lambda path: path.removeprefix("tfopt_for_causal_lm/"),
        lambda path: path.partition("/model/")[2],
        lambda path: path.partition("/decoder/")[2],
        lambda path: path.replace("embed_tokens/weight", "embed_tokens/embeddings"),
        lambda path: path.replace("model/decoder/", "model.decoder."),
        lambda path: path.removesuffix(":0"),
    ],
)
def test_names_that_lack_a_part_are_understood(tmp_path, spell):
    h5py = pytest.importorskip("h5py")
    shutil.copytree(FIXTURES / "tf", tmp_path / "tf")
    with h5py.File(FIXTURES / "tf" / "tf_model.h5") as old, h5py.File(tmp_path / "tf" / "tf_model.h5", "w") as new:
        names = []
        old["model"].visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            new[f"model/{spell(name)}"] = old["model"][name][()]
    found, expected = Checkpoint(tmp_path / "tf"), Checkpoint(FIXTURES / "tf")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected.tensors)


def h5_link(h5py, file):
    file["model/extra"] = h5py.ExternalLink("/etc/passwd", "/x")
    del file["model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/bias:0"]


def h5_compressed(h5py, file):
    name = "model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/bias:0"
    del file[name]
    file.create_dataset(name, data=np.zeros(96, np.float32), chunks=True, compression="gzip")


def h5_bomb(h5py, file):
    name = "model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/bias:0"
    del file[name]
    file.create_dataset(name, shape=(1 << 40,), dtype=np.float32)


def h5_outside(h5py, file):
    name = "model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/bias:0"
    del file[name]
    file.create_dataset(name, shape=(96,), dtype=np.float32, external=[("/etc/passwd", 0, 384)])


def h5_virtual(h5py, file):
    name = "model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/bias:0"
    del file[name]
    layout = h5py.VirtualLayout((96,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (96,))
    file.create_virtual_dataset(name, layout)


def h5_text(h5py, file):
    file["model/decoder/layers.0/fc3/kernel:0"] = "text"


def h5_unknown(h5py, file):
    file["model/decoder/head/kernel:0"] = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (h5_link, r"missing: model\.decoder\.layers\.0\.fc1\.bias \[96\]"),
        (h5_compressed, "bias:0: it is empty, compressed or in another file"),
        (h5_bomb, "bias:0: it is empty, compressed or in another file"),
        (h5_outside, "bias:0: it is empty, compressed or in another file"),
        (h5_virtual, "bias:0: it is empty, compressed or in another file"),
        (h5_text, "kernel:0: dtype is object"),
        (h5_unknown, "model/decoder/head/kernel:0 is not the name of a weight of OPT"),
    ],
)
def test_a_hostile_h5_is_refused_and_named(tmp_path, spoil, problem):
    h5py = pytest.importorskip("h5py")
    path = copy_of("tf", tmp_path / "a")
    with h5py.File(path, "r+") as file:
        spoil(h5py, file)
    with pytest.raises(CheckpointError, match=problem):
        convert_checkpoint(tmp_path / "a", tmp_path / "never", to="safetensors")
    assert not (tmp_path / "never").exists()


def test_a_keras_archive_runs_nothing_of_its_config(tmp_path):
    pytest.importorskip("h5py")
    source = write_checkpoint(tmp_path / "source", CONFIGS["opt"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to="keras")
    path, trace = tmp_path / "there" / "model.keras", tmp_path / "trace"
    with zipfile.ZipFile(path) as archive:
        weights = archive.read("model.weights.h5")
    attack = {"module": "os", "class_name": "mkdir", "config": {"path": str(trace)}, "registered_name": "mkdir"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(attack))
        archive.writestr("model.weights.h5", weights)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)
    assert not trace.exists()
    for spoiled, problem in ((b"PK nothing", "not a zip archive"), (path.read_bytes()[:-40], "not a zip archive")):
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=problem):
            Checkpoint(tmp_path / "there")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", weights)
    with pytest.raises(CheckpointError, match="is compressed or truncated"):
        Checkpoint(tmp_path / "there")
