"""Keras weights and archives, and the TensorFlow files of Transformers 4."""

import json
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint import bounded
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.formats import keras as keras_format
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


# -- the HDF5 library runs in a process of its own --------------------------------------------------------------------


def write_h5(path: Path, **options) -> dict[str, np.ndarray]:
    """A file with names as Keras gives them, by h5py alone; returns its weights by canonical name."""
    h5py = pytest.importorskip("h5py")
    stream = np.random.default_rng(0)
    values = {
        "embed_tokens.weight": stream.random((7, 3), np.float32),
        "layers.0.up_proj.weight": stream.random((3, 5), np.float32),
        "layers.0.up_proj.bias": stream.random(5, np.float32).astype(dtype_of("bfloat16")),
        "layers.1.up_proj.weight": stream.random((3, 5)).astype(np.float64),
    }
    with h5py.File(path, "w", **options) as file:
        group = file.create_group("layers/model/embed/vars")
        group.attrs["name"] = "embed_tokens"
        group["0"] = values["embed_tokens.weight"]
        for layer in range(2):
            file.create_group(f"layers/model/blocks/block_{layer}/vars").attrs["name"] = str(layer)
            group = file.create_group(f"layers/model/blocks/block_{layer}/up/vars")
            group.attrs["name"] = "up_proj"
            group["0"] = values[f"layers.{layer}.up_proj.weight"]
        bias = file["layers/model/blocks/block_0/up/vars"].create_dataset(
            "1", data=values["layers.0.up_proj.bias"].view("V2")
        )
        bias.attrs["dtype"] = "bfloat16"
    return {name: value.T if name.endswith("up_proj.weight") else value for name, value in values.items()}


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        array = found[name].read()
        assert (array.dtype, array.shape, array.tobytes()) == (value.dtype, value.shape, value.tobytes())


def archived(path: Path) -> Path:
    """The file in an archive, behind another one."""
    archive = path.with_suffix(".keras")
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("config.json", "{}" * 13)
        stream.write(path, "model.weights.h5")
    return archive


@pytest.mark.parametrize("options", [{}, {"userblock_size": 1024}, {"libver": "latest"}], ids=str)
def test_values_are_read_where_the_library_says_they_are(tmp_path, options):
    expected = write_h5(tmp_path / "x.weights.h5", **options)
    same(keras_format.read_weights(tmp_path / "x.weights.h5"), expected)
    same(keras_format.read(archived(tmp_path / "x.weights.h5")), expected)


def test_the_library_is_not_imported(tmp_path):
    write_h5(tmp_path / "x.weights.h5")
    code = (
        "import sys; from pathlib import Path; from olmozoo.checkpoint.formats import keras\n"
        f"print(sum(t.read().size for t in keras.read_weights(Path({str(tmp_path / 'x.weights.h5')!r})).values()))\n"
        "print('h5py' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split() == ["56", "False"], done.stderr


def test_values_are_read_by_several_threads_at_once(tmp_path):
    expected = write_h5(tmp_path / "x.weights.h5")
    found = keras_format.read_weights(tmp_path / "x.weights.h5")
    wrong = []

    def read():
        for _ in range(200):
            wrong.extend(n for n, value in expected.items() if found[n].read().tobytes() != value.tobytes())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_values_are_a_copy(tmp_path):
    """Keras writes into a file that is there."""
    path = tmp_path / "x.weights.h5"
    expected = write_h5(path)
    found = keras_format.read_weights(path)
    arrays = {name: tensor.read() for name, tensor in found.items()}
    path.write_bytes(bytes(100))
    assert all(arrays[name].tobytes() == value.tobytes() for name, value in expected.items())
    with pytest.raises(CheckpointError, match=r"h5: layers/model/embed/vars/0 cannot be read: 84 bytes at its end are"):
        found["embed_tokens.weight"].read()


def never_ends(data: bytes) -> bytes:
    """The free space of a heap of texts is 0 bytes long: the library goes on to the next object, which is itself."""
    start = data.index(b"GCOL")
    place, index, size = start + 16, -1, 0
    while index:
        index, size = struct.unpack_from("<H6xQ", data, place)
        place += 16 + -(-size // 8) * 8 if index else 0
    assert size
    return data[: place + 8] + bytes(8) + data[place + 16 :]


def asks_for_gigabytes(data: bytes) -> bytes:
    """A text is 4 GB long: the library allocates that before it looks whether the file has it."""
    place = data.index(struct.pack("<Q", data.index(b"GCOL"))) - 4  # of its length, before the place of its heap
    assert struct.unpack_from("<I", data, place)[0] < 20
    return data[: place + 3] + b"\xf0" + data[place + 4 :]


HOSTILE = {
    "never ends": (never_ends, r"it takes more than 0\.5 seconds"),
    "asks for gigabytes": (asks_for_gigabytes, ".*memory allocation failed"),
}


@pytest.mark.parametrize("kind", ["weights", "archive"])
@pytest.mark.parametrize("name", HOSTILE)
def test_damages_that_the_library_does_not_survive_are_refused(tmp_path, monkeypatch, name, kind):
    damage, message = HOSTILE[name]
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    path = tmp_path / "model.weights.h5"
    write_h5(path)
    path.write_bytes(damage(path.read_bytes()))
    path, read = (path, keras_format.read_weights) if kind == "weights" else (archived(path), keras_format.read)
    with pytest.raises(CheckpointError, match=rf"{path.name} is not a readable HDF5 file: {message}"):
        read(path)


def test_so_many_names_are_refused(tmp_path):
    """Each group's path has all names before it."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        group = file
        for _ in range(200):
            group = group.create_group("x" * 1000)
    assert (tmp_path / "x.weights.h5").stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="its names have more than 16,777,216 characters"):
        keras_format.read_weights(tmp_path / "x.weights.h5")


def odd_big_endian(h5py, group):
    group["0"] = np.zeros((3, 5), ">f4")
    return "vars/0: dtype is >f4, expected one of"


def odd_bits(h5py, group):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(126)
    h5py.h5d.create(group.id, b"0", kind, h5py.h5s.create_simple((3, 5))).write(
        h5py.h5s.ALL, h5py.h5s.ALL, np.ones((3, 5), np.float32)
    )
    return "vars/0: dtype is a floating-point type of its own, expected one of"


def odd_bytes(h5py, group):
    group["0"] = np.zeros((3, 5), "V2")
    return r"vars/0: dtype is \|V2, expected one of"


def odd_time(h5py, group):
    h5py.h5d.create(group.id, b"0", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((3, 5)))
    return "vars/0: No NumPy equivalent for TypeTimeID exists"


def odd_scalar(h5py, group):
    group["0"] = h5py.Empty("f4")
    return "vars/0: it is empty, compressed or in another file"


def odd_name(h5py, group):
    group["0"] = np.zeros((3, 5), np.float32)
    group.attrs["name"] = 5
    return "vars/0 is not the name of a weight"


def odd_adapter(h5py, group):
    group["0"] = np.zeros((3, 5), np.float32)
    group["lora_a"] = np.zeros((3, 2), np.float32)
    return "vars/0: .*vars/lora_b is not there, .*vars/lora_a is"


@pytest.mark.parametrize("spoil", [odd_big_endian, odd_bits, odd_bytes, odd_time, odd_scalar, odd_name, odd_adapter])
def test_what_is_no_plain_weight_is_named(tmp_path, spoil):
    h5py = pytest.importorskip("h5py")
    write_h5(tmp_path / "x.weights.h5")
    with h5py.File(tmp_path / "x.weights.h5", "r+") as file:
        group = file.create_group("layers/model/blocks/block_1/down/vars")
        group.attrs["name"] = "down_proj"
        message = spoil(h5py, group)
        spoil(h5py, file.create_group("optimizer/vars"))  # and nobody reads it there
    with pytest.raises(CheckpointError, match=message) as error:
        keras_format.read_weights(tmp_path / "x.weights.h5")
    assert "1 problem(s)" in str(error.value)
