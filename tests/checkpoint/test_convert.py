"""Between frameworks: every format and back bit for bit, what others' loaders say to it, and what broken files do."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

import olmozoo
from olmozoo import CheckpointError, InputError, Olmo2Config, OlmoConfig, OPTConfig
from olmozoo.backends import load
from olmozoo.checkpoint.convert import FORMATS, convert_checkpoint, head_of
from olmozoo.checkpoint.formats._bundle import Bundle, checksum_of, masked, write_index, write_values
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import BAND, Output, dtype_of
from olmozoo.checkpoint.writer import save_checkpoint
from olmozoo.families.parameter import ARCHITECTURES
from olmozoo.hub import resolve
from tests.helpers.checkpoints import left_padded, random_values, write_checkpoint
from tests.helpers.hub_server import HubServer
from tests.helpers.wings import WINGS, scope

FIXTURES = Path(__file__).parents[1] / "fixtures" / "transformers4_opt"
COMMON = {"vocab_size": 51, "num_hidden_layers": 3, "max_position_embeddings": 32, "pad_token_id": 1}
CONFIGS = {
    "olmo": OlmoConfig(
        **COMMON, hidden_size=24, num_attention_heads=4, intermediate_size=20, attention_bias=True, eos_token_id=0
    ),
    "olmo2": Olmo2Config(
        **COMMON, hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=20, eos_token_id=0
    ),
    "opt": OPTConfig(**COMMON, hidden_size=16, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=8, dropout=0.0),
}
MODELS = [(family, head) for family, config in CONFIGS.items() for head in (None, *config.heads)]
STREAMED = ["safetensors", "pt-bin", "keras", "keras-weights", "flax-msgpack"]  # a tensor at a time


def needs(to: str) -> None:
    library = {"pt-bin": "torch", "keras": "h5py", "keras-weights": "h5py", "savedmodel": "tensorflow"}
    pytest.importorskip({**library, "orbax": "orbax.checkpoint"}.get(to, "numpy"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_of(wing: str, family: str, head, folder: Path, **options):
    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[wing]
    rooms = __import__(f"olmozoo.{wing}", fromlist=["x"])
    cls = getattr(rooms, prefix + CONFIGS[family].name + ARCHITECTURES[head])
    with scope(wing):
        return cls.from_pretrained(folder, **options)


def answer(wing: str, model, config) -> np.ndarray:
    """The first of a model's outputs for a left-padded batch, at its real tokens."""
    ids, mask = left_padded(config)
    with scope(wing):
        if wing == "pt":
            import torch

            with torch.inference_mode():
                output = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).to_tuple()[0].numpy()
        else:
            output = np.asarray(model(input_ids=ids, attention_mask=mask).to_tuple()[0])
    return output[mask.astype(bool)] if output.shape[:2] == mask.shape else output


# -- every format and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "savedmodel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_format_and_back_is_byte_identical(tmp_path, to, dtype):
    needs(to)
    there = tmp_path / "a %41 #?é"
    for family, head in MODELS:
        source = write_checkpoint(tmp_path / "source", CONFIGS[family], head, dtype=dtype_of(dtype))
        convert_checkpoint(source, there, to=to, verify=True)
        assert (there / "model.safetensors").exists() == (to == "safetensors")
        assert head_of(there, CONFIGS[family], Checkpoint(there)) == head
        convert_checkpoint(there, tmp_path / "back", to="safetensors")
        assert tree(tmp_path / "back") == tree(source)
    convert_checkpoint(there, there, to="safetensors")  # in place, from its own files
    assert tree(there) == tree(source)


def test_a_mixture_of_half_dtypes_keeps_each_where_it_can(tmp_path):
    pytest.importorskip("h5py")
    source = tmp_path / "source"
    config = CONFIGS["olmo2"]
    kinds = {"norm": dtype_of("float16"), "linear": dtype_of("bfloat16")}
    save_checkpoint(
        source,
        config,
        "causal_lm",
        read=lambda p: random_values(p).astype(kinds.get(p.kind, kinds["linear"])),
        dtype=lambda p: kinds.get(p.kind, kinds["linear"]),
    )
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    convert_checkpoint(source, tmp_path / "there", to="flax-msgpack", verify=True)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)
    convert_checkpoint(source, tmp_path / "keras", to="keras-weights", verify=True)
    there = Checkpoint(tmp_path / "keras")
    assert {info.dtype.name for info in there.tensors.values()} == {"float32"}
    for name in there.tensors:
        assert np.array_equal(there[name], Checkpoint(source)[name].astype(np.float32))


@pytest.mark.parametrize("architectures", [["Olmo2Model"], 7, None])
def test_a_head_that_the_config_does_not_name_is_not_lost(tmp_path, architectures):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    convert_checkpoint(source, tmp_path / "there", to="safetensors")
    assert set(Checkpoint(tmp_path / "there").tensors) == set(Checkpoint(source).tensors)


@pytest.mark.parametrize(("family", "head", "dtype"), [("olmo", None, "bfloat16"), ("opt", "causal_lm", "float32")])
def test_a_saved_model_serves_and_comes_back(tmp_path, monkeypatch, family, head, dtype):
    tf = pytest.importorskip("tensorflow")
    there = tmp_path / "a %41 #?é"
    config = CONFIGS[family]
    if family == "opt":
        config = config.replace(dropout=0.1)  # which brings a variable that is no weight
    source = write_checkpoint(tmp_path / "source", config, head, dtype=dtype_of(dtype))
    asked = []
    can_ask = hasattr(os, "posix_fadvise")
    if can_ask:
        monkeypatch.setattr(os, "posix_fadvise", lambda *call: asked.append(os.fstat(call[0]).st_size))
    monkeypatch.setattr("olmozoo.checkpoint.PASSING", 5000)
    monkeypatch.setattr("olmozoo.checkpoint.BAND", 1000)
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # of whoever converts; it takes TensorFlow all the same
    convert_checkpoint(source, there, to="savedmodel", verify=True)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if can_ask:
        assert 3 < total // 7000 <= len(asked) <= total // 5000, "the values pass through memory"
    assert asked == sorted(asked)
    assert {path.name for path in there.iterdir()} <= {"config.json", "generation_config.json", "saved_model"}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", None)
        convert_checkpoint(there, tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)
    variables = [name for name, _ in tf.train.list_variables(str(there / "saved_model/variables/variables"))]
    table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
    assert len(variables) == len(table) + 1, "each is there once, and the names"
    if dtype == "float32":
        ids, mask = left_padded(config)
        loaded = tf.saved_model.load(str(there / "saved_model"))
        served = loaded.serve(tf.constant(ids), tf.constant(mask))
        expected = answer("tf", model_of("tf", family, head, source), config)
        assert np.abs(served["logits"].numpy()[mask.astype(bool)] - expected).max() < 1e-5


def test_a_saved_model_is_made_without_the_weights(tmp_path, monkeypatch):
    """What else is a process of its own runs in this one, to be looked at."""
    pytest.importorskip("tensorflow")
    from olmozoo.checkpoint.formats import _saved_model_writer as saved_model
    from olmozoo.tf.base import PreTrainedModel

    class Here:
        returncode = 0

        def __init__(self, command, **options):
            self.arguments = command[command.index("-c") + 2 :]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def communicate(self, told):
            monkeypatch.setattr(sys, "stdin", io.StringIO(told.decode()))
            saved_model.export(*self.arguments)

        def kill(self):
            pass

    export, sizes, ends = PreTrainedModel.export, [], []

    def measured(model, folder, **options):
        export(model, folder, **options)
        sizes.append((folder / "variables/variables.data-00000-of-00001").stat().st_size)
        sizes.append(sum(weight.value.read_value().numpy().nbytes for weight in model.weights))

    monkeypatch.setattr(PreTrainedModel, "export", measured)
    monkeypatch.setattr(saved_model.subprocess, "Popen", Here)
    monkeypatch.setattr(saved_model.gc, "disable", lambda: None)
    monkeypatch.setattr(saved_model.os, "_exit", ends.append)
    for name in ("jax", "matplotlib"):  # which it does without
        monkeypatch.setitem(sys.modules, name, None)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to="savedmodel")
    graph = len(Bundle(tmp_path / "there/saved_model/variables/variables").read_text("_CHECKPOINTABLE_OBJECT_GRAPH"))
    values, held = sizes
    assert held == 4 * sum(parameter.tied_to is None for parameter in CONFIGS["olmo2"].parameters("causal_lm"))
    assert graph < values < graph + held + 1000
    assert ends == [0]


def test_what_fails_beside_a_saved_model_is_told(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    with monkeypatch.context() as patch:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/keras.py").write_text("raise ValueError('of no use')")
        patch.syspath_prepend(tmp_path / "broken")
        with pytest.raises(CheckpointError, match="TensorFlow could not write: ValueError: of no use"):
            convert_checkpoint(source, tmp_path / "there", to="savedmodel")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "broken"}

    started = []

    class Spied(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr("olmozoo.saved_model.subprocess.Popen", Spied)
    large = tmp_path / "large"
    save_checkpoint(
        large,
        CONFIGS["olmo2"],
        "causal_lm",
        read=lambda parameter: np.full(parameter.shape, 1e9, np.float32),
        dtype=lambda parameter: np.float32,
    )
    with pytest.raises(CheckpointError, match="too large for float16"):
        convert_checkpoint(large, tmp_path / "there", to="savedmodel", dtype="float16")
    assert started[0].returncode == -signal.SIGKILL, "the other process goes on"
    assert not (tmp_path / "there").exists()


def test_a_bundle_is_what_tensorflow_saves(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    dtypes = [dtype_of(name) for name in ("bfloat16", "float16", "float32", "float64")]
    rng = np.random.default_rng(0)
    arrays = {f"layer {i}/é": rng.standard_normal((i % 5, i * 3)).astype(dtypes[i % 4]) for i in range(300)}
    arrays["z" * 200], arrays["zz"] = np.ones(1, np.float32), np.ones((700, 300), np.float32)
    outputs = [Output(name, array.dtype, array.shape, lambda a=array: a) for name, array in arrays.items()]
    monkeypatch.setattr("olmozoo.bundle.CHECKED", 1001)  # which ends within values
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_index(ours, write_values(ours, outputs))
    save_bundle(theirs, arrays)
    data = tmp_path / "ours.data-00000-of-00001"
    assert data.read_bytes() == (tmp_path / "theirs.data-00000-of-00001").read_bytes()
    reader, expected = (tf.train.load_checkpoint(str(prefix)) for prefix in (ours, theirs))
    assert reader.get_variable_to_shape_map() == expected.get_variable_to_shape_map()
    assert reader.get_variable_to_dtype_map() == expected.get_variable_to_dtype_map()
    for name, array in arrays.items():
        np.testing.assert_array_equal(reader.get_tensor(name), array)
    with pytest.raises(FileExistsError):
        write_values(ours, outputs)
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(tf.errors.OpError, match="Checksum does not match"):
        tf.train.load_checkpoint(str(ours)).get_tensor("zz")


def save_bundle(prefix: Path, arrays: dict, slices: str = "") -> None:
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(arrays),
        shape_and_slices=[slices] * len(arrays),
        tensors=list(arrays.values()),
    )


def test_bundles_that_tensorflow_saves_are_read(tmp_path):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    dtypes = [dtype_of(name) for name in ("bfloat16", "float16", "float32", "float64")]
    arrays = {f"layer {i}/é": rng.standard_normal((i % 5, i * 3)).astype(dtypes[i % 4]) for i in range(500)}
    text = bytes(range(256)) * 200
    save_bundle(tmp_path / "one", arrays)
    save_bundle(tmp_path / "two", {"text": tf.constant(text), "empty": tf.constant(b""), "ids": np.arange(3)})
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(tmp_path / "one"), str(tmp_path / "two")], destination_prefix=str(tmp_path / "both")
    )
    bundle = Bundle(tmp_path / "both")
    assert bundle.places.keys() == {*arrays, "text", "empty", "ids"}
    for name, array in arrays.items():
        assert bundle.describe(name) == (array.dtype, array.shape)
        np.testing.assert_array_equal(bundle.read(name), array, strict=True)
    assert bundle.read_text("text") == text
    assert bundle.read_text("empty") == b""
    with pytest.raises(CheckpointError, match="ids has TensorFlow's dtype 9"):
        bundle.describe("ids")
    with pytest.raises(CheckpointError, match="ids is no text"):
        bundle.read_text("ids")
    with pytest.raises(CheckpointError, match="has no nothing"):
        bundle.read("nothing")
    for suffix, said in (("data-00001-of-00002", "checksum of text is another"), ("index", "checksum in it is wrong")):
        file = tmp_path / f"both.{suffix}"
        data = file.read_bytes()
        file.write_bytes(data.replace(b"\0\1\2\3", b"\0\1\2\4", 1) if suffix != "index" else b"\1" + data[1:])
        with pytest.raises(CheckpointError, match=said):
            Bundle(tmp_path / "both").read_text("text")
        file.write_bytes(data)

    save_bundle(tmp_path / "part", {"a": np.ones((2, 3), np.float32)}, "4 3 0,2:0,3")
    with pytest.raises(CheckpointError, match="a lies in slices"):
        Bundle(tmp_path / "part")
    entry = write_values(tmp_path / "far", [Output("a", dtypes[2], (3,), lambda: np.ones(3, np.float32))])["a"]
    for problem, changed in {
        "ends at byte 16 of far": entry._replace(offset=4),
        "ends at byte": entry._replace(offset=2**63),
        "12 bytes, which are not": entry._replace(shape=(4,)),
        "bytes, which are not": entry._replace(shape=(2**40, 2**40)),
        "checksum of a is another": entry._replace(checksum=entry.checksum ^ 1),
    }.items():
        write_index(tmp_path / "far", {"a": changed})
        with pytest.raises(CheckpointError, match=problem):
            Bundle(tmp_path / "far").read("a")
        (tmp_path / "far.index").unlink()


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, b"b", b""), (0, b"a", b"")], "not in order"),
        ([(0, b"a", b""), (0, b"a", b"")], "not in order"),
        ([(0, b"k" * 90, b""), *[(90, bytes([i]), b"") for i in range(3)]], "too many"),
        ([(0, b"a", b"\x12\x05\x12")], "is broken"),
        ([(0, b"a", b"\x20" + b"\xff" * 11)], "does not end"),
        ([(0, b"a", b"\x20\x80")], "does not end"),
        ([(0, b"a", b"\x20\x01")], "ends at byte 1 of odd.data-00000-of-00001, which has 0"),
    ],
)
def test_a_crafted_index_is_refused(tmp_path, monkeypatch, rows, problem):
    """Each row of a table: the bytes that its key has in common with the last one, the others, and its value."""
    pytest.importorskip("google_crc32c")
    monkeypatch.setattr("olmozoo.bundle.MAX_HEADER", 360)
    data = b""

    def block(*rows) -> bytes:
        nonlocal data
        content = b"".join(bytes([shared, len(own), len(value)]) + own + value for shared, own, value in rows)
        content += struct.pack("<2I", 0, 1)
        place = bytes([len(data) & 127 | 128, len(data) >> 7, len(content) & 127 | 128, len(content) >> 7])
        data += content + b"\0" + struct.pack("<I", masked(checksum_of(content + b"\0")))
        return place

    entries = block((0, b"", b"\x08\x01"), *rows)
    index = block((0, b"z", entries))
    data += (b"\0\0" + index).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    (tmp_path / "odd.index").write_bytes(data)
    (tmp_path / "odd.data-00000-of-00001").touch()
    with pytest.raises(CheckpointError, match=problem):
        Bundle(tmp_path / "odd")
    (tmp_path / "odd.index").write_bytes(bytes(361))
    with pytest.raises(CheckpointError, match="361 bytes, more than 360"):
        Bundle(tmp_path / "odd")


def test_a_saved_model_that_keras_tracked_is_read(tmp_path):
    keras = pytest.importorskip("keras")
    import tensorflow as tf

    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype="float32")
    model = model_of("tf", "olmo", "causal_lm", source)
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None, None), tf.int32)]
    archive.add_endpoint("serve", lambda ids: model(ids, use_cache=False).logits, input_signature=signature)
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    archive.write_out(str(tmp_path / "there/saved_model"), verbose=False)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize("to", ["safetensors", "pt-bin", "flax-msgpack"])
def test_shards(tmp_path, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to, max_shard_size="9KB", verify=True)
    shards = [path for path in (tmp_path / "there").iterdir() if "-of-" in path.name]
    assert len(shards) > 2
    assert all(shard.stat().st_size < 9000 + 4096 for shard in shards)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)


def test_settings_and_tokenizer_come_along_and_old_ones_go(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32", max_shard_size="4KB")
    (target / "generation_config.json").write_text('{"top_k": 7}')
    (target / "notes.txt").write_text("kept")
    (source / "tokenizer.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    convert_checkpoint(source, target, to="flax-msgpack")
    assert sorted(tree(target)) == [
        "additional_chat_templates/tools.jinja",
        "config.json",
        "flax_model.msgpack",
        "notes.txt",
        "tokenizer.json",
    ]
    (source / "generation_config.json").write_text('{"top_k": 9}')
    (source / "tokenizer.json").rename(source / "vocab.json")  # of another kind: what stays of the old would be read
    convert_checkpoint(source, target, to="safetensors")
    assert sorted(set(tree(target)) & {"tokenizer.json", "vocab.json", "notes.txt"}) == ["notes.txt", "vocab.json"]
    assert json.loads((target / "generation_config.json").read_text()) == {"top_k": 9}


def test_a_cast_is_named_in_the_config_and_never_overflows(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "half", to="safetensors", dtype="bfloat16", verify=True)
    assert Checkpoint(tmp_path / "half").dtype == dtype_of("bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    for parameter in CONFIGS["olmo2"].parameters("causal_lm"):
        expected = random_values(parameter).astype(np.float32).astype(dtype_of("bfloat16"))
        assert Checkpoint(tmp_path / "half")[parameter.name].tobytes() == expected.tobytes()
    big = tmp_path / "big"
    olmozoo.checkpoint.save_checkpoint(
        big,
        CONFIGS["olmo2"],
        "causal_lm",
        read=lambda p: np.full(p.shape, 1e6, np.float32),
        dtype=lambda p: "float32",
    )
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight has 1224 value\(s\) too large for float16"):
        convert_checkpoint(big, tmp_path / "never", to="safetensors", dtype="float16")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("back", [1, 3_000_000])
def test_what_was_written_wrong_is_found_and_does_not_take_its_place(tmp_path, monkeypatch, back):
    config = CONFIGS["olmo2"].replace(vocab_size=40_000)
    source = write_checkpoint(tmp_path / "source", config, dtype="float32")
    assert config.vocab_size * config.hidden_size * 4 > 3_000_000 > 2 * BAND, "the last tensor has several bands"
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32")
    before = tree(target)
    write = FORMATS["safetensors"]

    def spoil(job, staging):
        write(job, staging)
        with (staging / "model.safetensors").open("r+b") as stream:
            stream.seek(-back, os.SEEK_END)
            stream.write(b"\x77")

    monkeypatch.setitem(FORMATS, "safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"not what was read: 1 problem\(s\)\n  - lm_head\.weight differs"):
        convert_checkpoint(source, target, to="safetensors", verify=True)
    assert tree(target) == before


# -- others' loaders --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", CONFIGS)
def test_flax_and_orbax_alone_read_the_wings_own_tree(tmp_path, family):
    serialization = pytest.importorskip("flax.serialization")
    import jax
    import orbax.checkpoint as ocp

    source = write_checkpoint(tmp_path / "source", CONFIGS[family], dtype=dtype_of("bfloat16"))
    params = model_of("flax", family, "causal_lm", source).params
    convert_checkpoint(source, tmp_path / "there", to="flax-msgpack")
    convert_checkpoint(source, tmp_path / "orb", to="orbax")
    from_flax = serialization.msgpack_restore((tmp_path / "there" / "flax_model.msgpack").read_bytes())
    folder = (tmp_path / "orb" / "orbax").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        from_orbax = checkpointer.restore(folder, target=params)
        untold = checkpointer.restore(folder)
    older = ocp.PyTreeCheckpointer().restore(folder)
    for found in (from_flax, from_orbax, untold, older):
        assert jax.tree.structure(found) == jax.tree.structure(params)
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), b), params, found)
        assert all(jax.tree.leaves(same))
    # And the reverse: what they write is read.
    for path, write in (
        ("flax_model.msgpack", lambda file: file.write_bytes(serialization.to_bytes(params))),
        *(
            ("orbax", lambda folder, options=options: orbax_save(folder, params, **options))
            for options in (
                {},
                {"use_zarr3": True},
                {"use_ocdbt": False},
                {"use_ocdbt": False, "use_compression": False},
                {"use_ocdbt": False, "use_zarr3": True},
            )
        ),
    ):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        shutil.copytree(source, tmp_path / "own", ignore=shutil.ignore_patterns("*.safetensors"))
        write(tmp_path / "own" / path)
        convert_checkpoint(tmp_path / "own", tmp_path / "back", to="safetensors")
        assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"dtype": ">f4"}, {"order": "F"}, {"chunks": [24, 50]}, {"compressor": {"id": "zlib"}}, {"filters": []}],
)
def test_orbax_arrays_in_folders_are_read_however_they_lie(tmp_path, metadata):
    tensorstore = pytest.importorskip("tensorstore")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to="orbax")
    expected = Checkpoint(source)["lm_head.weight"]
    place = tmp_path / "there" / "orbax" / "lm_head.kernel"
    shutil.rmtree(place)
    spec = {"driver": "zarr", "kvstore": f"file://{place}/", "metadata": {"compressor": None, **metadata}}
    array = tensorstore.open(spec, create=True, dtype=expected.dtype, shape=expected.T.shape).result()
    array.write(expected.T).result()
    assert np.array_equal(Checkpoint(tmp_path / "there")["lm_head.weight"], expected)


def orbax_save(folder: Path, params, **options) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(params))


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}])
def test_an_orbax_piece_that_is_not_there_is_missed(tmp_path, options):
    tensorstore = pytest.importorskip("tensorstore")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype="float32")
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    folder = tmp_path / "there" / "orbax"
    orbax_save(folder, model_of("flax", "olmo", "causal_lm", source).params, **options)
    assert Checkpoint(tmp_path / "there")["lm_head.weight"].any()
    store = f"file://{folder}/" if options else {"driver": "ocdbt", "base": f"file://{folder}/"}
    store = tensorstore.KvStore.open(store).result()
    store.delete_range(tensorstore.KvStore.KeyRange("lm_head.kernel/0", "lm_head.kernel/1")).result()
    with pytest.raises(CheckpointError, match=r"lm_head.kernel has 0 of its 1 pieces"):
        Checkpoint(tmp_path / "there")


def test_an_orbax_checkpoint_is_found_where_a_manager_put_it(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    import orbax.checkpoint as ocp

    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    params = model_of("flax", "olmo2", "causal_lm", source).params
    with ocp.CheckpointManager((tmp_path / "there" / "orbax").absolute()) as manager:
        manager.save(7, args=ocp.args.StandardSave(params))
        manager.wait_until_finished()
        shutil.copytree(tmp_path / "there" / "orbax" / "7", tmp_path / "there" / "orbax" / "8.orbax-checkpoint-tmp")
        convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
        assert tree(tmp_path / "back") == tree(source)
        manager.save(9, args=ocp.args.StandardSave(params))
    with pytest.raises(CheckpointError, match=r"holds several Orbax checkpoints, expected one: 7/default, 9/default"):
        Checkpoint(tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "orbax")
    (tmp_path / "there" / "orbax" / "nothing").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"orbax is not an Orbax checkpoint: it has no manifest.ocdbt"):
        Checkpoint(tmp_path / "there")


def test_arrays_of_many_chunks_are_those_of_flax(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(sys.modules["olmozoo.convert"], "FLAX_CHUNK", 512)
    monkeypatch.setattr(sys.modules["olmozoo.checkpoint"], "BAND", 300)  # which ends at other places
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 512)
    source = write_checkpoint(tmp_path / "source", CONFIGS["opt"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to="flax-msgpack", verify=True)
    data = (tmp_path / "there" / "flax_model.msgpack").read_bytes()
    assert data.count(b"__msgpack_chunked_array__") > 10
    tree_of_arrays = serialization.msgpack_restore(data)
    assert serialization.to_bytes(tree_of_arrays) == data


@pytest.mark.parametrize("to", ["safetensors", "pt-bin"])
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_loads_it(tmp_path, family, to):
    transformers = pytest.importorskip("transformers")
    import torch

    source = write_checkpoint(tmp_path / "source", CONFIGS[family], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to, max_shard_size="9KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there").eval()
    ids, mask = left_padded(CONFIGS[family])
    with torch.inference_mode():
        logits = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    expected = answer("pt", model_of("pt", family, "causal_lm", source), CONFIGS[family])
    assert np.abs(logits[mask.astype(bool)] - expected).max() < 2e-5


def test_torch_maps_what_we_write_and_takes_it_as_tensors_alone(tmp_path):
    torch = pytest.importorskip("torch")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype=dtype_of("bfloat16"))
    convert_checkpoint(source, tmp_path / "there", to="pt-bin")
    state = torch.load(tmp_path / "there" / "pytorch_model.bin", weights_only=True, mmap=True)
    checkpoint = Checkpoint(source)
    assert state.keys() == checkpoint.tensors.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() % 64 == 0
        assert tensor.view(torch.int16).numpy().tobytes() == checkpoint[name].tobytes()


# -- what Transformers 4 wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize(
    ("name", "bound"),
    [(n, 1e-5) for n in ("tf", "tf-base", "tf-shard", "tf-safetensors", "flax", "flax-base", "flax-shard")]
    + [(n, 1e-5) for n in ("flax-bf16", "flax-untied", "flax-safetensors")]
    + [("tf-fp16", 2e-2)],  # computed in float16 there
)
def test_files_of_transformers_4_give_its_answers(wing, name, bound):
    if name.startswith("tf"):
        pytest.importorskip("h5py")
    folder, expected = FIXTURES / name, np.load(FIXTURES / name / "expected.npz")
    ids = expected["input_ids"]
    backend = load(folder, wing, "float32")
    found = backend.forward(ids, np.ones_like(ids), output_hidden_states=True)
    if name.endswith("base"):
        assert np.abs(found["hidden_states"][-1] - expected["out"]).max() < bound
    else:
        assert np.abs(found["logits"] - expected[expected.files[-1]]).max() < bound
    own = {"tf-fp16": "float16", "flax-bf16": "bfloat16"}.get(name, "float32")
    assert Checkpoint(folder).dtype == dtype_of(own)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_files_of_transformers_4_become_a_canonical_folder(tmp_path, name):
    if name.startswith("tf"):
        pytest.importorskip("h5py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint(FIXTURES / name, tmp_path / "there", to="safetensors", verify=True)
    old, new = Checkpoint(FIXTURES / name), Checkpoint(tmp_path / "there")
    base = name.endswith("base")
    for tensor in new.tensors:
        source = f"model.{tensor}" if base and name.startswith("tf") else tensor
        assert new[tensor].tobytes() == old[source].tobytes()


def test_an_old_tensorflow_head_is_the_embedding_whatever_the_config_says(tmp_path):
    pytest.importorskip("h5py")
    shutil.copytree(FIXTURES / "tf", tmp_path / "tf")
    config = json.loads((tmp_path / "tf" / "config.json").read_text())
    (tmp_path / "tf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert_checkpoint(tmp_path / "tf", tmp_path / "there", to="safetensors")
    found = Checkpoint(tmp_path / "there")
    assert found["lm_head.weight"].tobytes() == found["model.decoder.embed_tokens.weight"].tobytes()


def test_names_that_no_weight_has_are_refused_with_their_file(tmp_path):
    shutil.copytree(FIXTURES / "flax-shard", tmp_path / "a")
    index = tmp_path / "a" / "flax_model.msgpack.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["model/decoder/secret"] = next(iter(entries["weight_map"].values()))
    index.write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack\.index\.json: model\.decoder: 'secret' is none of"):
        Checkpoint(tmp_path / "a")
    shutil.copytree(FIXTURES / "flax-safetensors", tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"project_in.kernel", b"project_in.secret"))
    with pytest.raises(CheckpointError, match=r"b/model\.safetensors: model\.decoder\.project_in: 'secret' is none of"):
        Checkpoint(tmp_path / "b")


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


@pytest.mark.parametrize("name", ["tf", "tf-shard", "flax", "flax-shard"])
def test_a_repository_with_old_files_alone_is_downloaded(monkeypatch, tmp_path, name):
    from huggingface_hub.utils import close_session

    old = tree(FIXTURES / name)
    with HubServer() as server:
        server.attach(monkeypatch, tmp_path)
        close_session()
        server.add_repo("org/old", {"main": {**old, "README.md": b"#", "tf_model.h5.bak": b""}})
        found = tree(resolve("org/old", need="weights"))
        assert found == {file: data for file, data in old.items() if file != "expected.npz"}
        close_session()


# -- live models ------------------------------------------------------------------------------------------------------


PAIRS = [(a, b) for a in ("pt", "tf", "flax") for b in ("pt", "tf", "flax") if a != b]


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_a_live_model_of_another_wing_gives_the_same_and_shares_nothing(tmp_path, source, to):
    for wing in (source, to):
        pytest.importorskip({"pt": "torch", "tf": "tensorflow", "flax": "flax"}[wing])
    for family, head in [("olmo", "sequence_classification"), ("olmo2", "causal_lm"), ("opt", None)]:
        config = CONFIGS[family]
        folder = write_checkpoint(tmp_path / f"{family}", config, head)
        model = model_of(source, family, head, folder, tie_word_embeddings=False)
        model.generation_config = model.generation_config.replace(top_k=3)
        with scope("flax"):
            made = olmozoo.convert(model, to=to)
        assert type(made).__module__.startswith(f"olmozoo.{to}.")
        assert made.config == model.config
        assert made.head == head
        assert made.generation_config == model.generation_config
        before = answer(source, model, config)
        assert np.abs(answer(to, made, config) - before).max() < 1e-9
        disturb(to, made)
        assert np.abs(answer(to, made, config) - before).max() > 1e-3
        assert np.array_equal(answer(source, model, config), before)
        with scope("flax"):
            made = olmozoo.convert(model, to=to)  # anew: what was disturbed may have moved
        after = answer(to, made, config)
        disturb(source, model)
        assert np.array_equal(answer(to, made, config), after)


def disturb(wing: str, model) -> None:
    """Change every weight in place, as training does."""
    if wing == "pt":
        import torch

        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
    elif wing == "tf":
        for variable in model.weights:
            variable.value.assign_add(variable.value * 0.25)
    else:
        import jax

        with jax.enable_x64(True):
            model.params = jax.tree.map(lambda leaf: leaf * 1.25, model.params)


def test_a_live_model_keeps_its_dtype_its_tie_and_its_mode(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    folder = write_checkpoint(tmp_path / "a", CONFIGS["opt"], dtype=dtype_of("bfloat16"))
    model = model_of("pt", "opt", "causal_lm", folder)
    keras_model = olmozoo.convert(model, to="tf")
    assert keras_model.variable_dtype == keras_model.compute_dtype == "bfloat16"
    back = olmozoo.convert(keras_model, to="pt")
    assert back.lm_head.weight is back.get_input_embeddings().weight
    assert not back.training
    assert olmozoo.convert(model.train(), to="pt").training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
        assert back.state_dict()[name].dtype == torch.bfloat16


def test_live_conversion_refuses_what_it_does_not_know(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="a Linear is no model of olmozoo"):
        olmozoo.convert(torch.nn.Linear(2, 2), to="tf")
    with pytest.raises(InputError, match="to is 'mxnet', expected one of pt, tf, flax"):
        olmozoo.convert(torch.nn.Linear(2, 2), to="mxnet")


# -- memory, crashes and full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", STREAMED)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, to, dtype):
    needs(to)
    config = CONFIGS["olmo2"].replace(vocab_size=2000, hidden_size=96, intermediate_size=3000, num_hidden_layers=6)
    source = write_checkpoint(tmp_path / "source", config, dtype=dtype_of("bfloat16"))
    convert_checkpoint(source, tmp_path / "warm", to=to, dtype=dtype)
    largest = max(p.size for p in config.parameters("causal_lm")) * (4 if dtype else 2)
    tracemalloc.start()
    convert_checkpoint(source, tmp_path / "there", to=to, dtype=dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest + 600_000  # what libraries allocate meanwhile
    assert sum(p.size for p in config.parameters("causal_lm")) * (4 if dtype else 2) > 8 * largest


PEAK = """
import resource, sys
from olmozoo.checkpoint import convert_checkpoint
peaks = []
for source in sys.argv[1:3]:
    convert_checkpoint(source, source + "-there", to=sys.argv[3])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.parametrize("to", [name for name in FORMATS if name not in STREAMED])
def test_libraries_hold_few_tensors_at_a_time(tmp_path, to):
    needs(to)
    config = CONFIGS["olmo2"].replace(hidden_size=768, intermediate_size=8192, num_hidden_layers=4, vocab_size=64)
    for name, made in (("small", CONFIGS["olmo2"]), ("large", config)):
        write_checkpoint(tmp_path / name, made, dtype="float32")
    arguments = (tmp_path / "small", tmp_path / "large", to)
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    sizes = [parameter.size * 4 for parameter in config.parameters("causal_lm")]
    assert int(done.stdout) < 4 * max(sizes)
    assert sum(sizes) > 12 * max(sizes)


@pytest.mark.parametrize("to", ["safetensors", "pt-bin", "keras", "keras-weights", "flax-msgpack", "orbax"])
def test_a_disk_that_takes_no_more_leaves_the_old_folder(tmp_path, to):
    needs(to)
    config = CONFIGS["olmo2"].replace(vocab_size=5000)
    source = write_checkpoint(tmp_path / "source", config, dtype="float32")
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32")
    before = tree(target)
    code = (
        "import resource, signal, sys\n"
        "from olmozoo.checkpoint import convert_checkpoint\n"
        "from olmozoo import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try: convert_checkpoint(sys.argv[1], sys.argv[2], to=sys.argv[3])\n"
        "except CheckpointError as error: print('told:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code, source, target, to], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("told:"), done.stderr
    assert tree(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source", CONFIGS["opt"], dtype="float32")

    def full(self, stream):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Output, "write", full)
    for to in STREAMED:
        needs(to)
        with pytest.raises(CheckpointError, match="the disk is full"):
            convert_checkpoint(source, tmp_path / "there", to=to)
    assert not (tmp_path / "there").exists()


def test_a_conversion_that_is_killed_leaves_the_old_folder_and_the_next_one_clears_up(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32")
    before = tree(target)
    code = (
        "import sys, time\n"
        "from olmozoo.checkpoint import convert_checkpoint\n"
        "def stop(done, total):\n    if done > total / 2: print('half', flush=True); time.sleep(60)\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], to='flax-msgpack', progress=stop)"
    )
    with subprocess.Popen([sys.executable, "-c", code, source, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert tree(target) == before
    assert len(list(tmp_path.iterdir())) == 3  # with what was begun
    convert_checkpoint(source, target, to="flax-msgpack", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert sorted(tree(target)) == ["config.json", "flax_model.msgpack"]


# -- broken and hostile files -----------------------------------------------------------------------------------------


def copy_of(name: str, folder: Path) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    return next(path for path in folder.iterdir() if path.suffix in (".h5", ".msgpack"))


@pytest.mark.parametrize("name", ["flax", "tf"])
def test_a_truncated_or_altered_file_raises_our_errors_alone(tmp_path, name):
    if name == "tf":
        pytest.importorskip("h5py")
    file = copy_of(name, tmp_path / "a")
    data = file.read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for number in range(120):
        spoiled = bytearray(data)
        if number % 2:
            spoiled = spoiled[: int(draw.integers(len(data)))]
        else:
            for place in draw.integers(0, 3000, 4):
                spoiled[place] = draw.integers(256)
        file.write_bytes(spoiled)
        try:
            checkpoint = Checkpoint(tmp_path / "a")
            for tensor in checkpoint.tensors:
                assert checkpoint[tensor].shape == checkpoint.tensors[tensor].shape
        except CheckpointError as error:
            refused += str(tmp_path / "a") in str(error)
    assert refused >= 60


def packed_array(shape=b"\x92\x02\x03", dtype=b"\xa7float32", values=b"\xc4\x18" + bytes(24)) -> bytes:
    content = b"\x93" + shape + dtype + values
    return b"\xc7" + bytes([len(content)]) + b"\x01" + content


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "1 bytes expected, 0 left"),
        (b"\xdf\xff\xff\xff\xff\xa1a", "1 bytes expected, 0 left"),
        (b"\x81\xdb\xff\xff\xff\xffaaa", "4294967295 bytes expected, 3 left"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "4294967295 bytes expected, 0 left"),
        (b"\x81\xa1a\xc1", "type code 0xc1"),
        (b"\x81\xa1a" * 80, "nested too deeply"),
        (b"\x81\x01\xa1a", "the key 1 is there twice or is no text"),
        (b"\x82\xa1a\x01\xa1a\x01", "the key 'a' is there twice"),
        (b"\x81\xa2\xff\xff\x01", "not UTF-8"),
        (b"\x01\x01", "something other than one map"),
        (b"\x81\xa8a/kernel" + packed_array(values=b"\xc4\x10" + bytes(16)), r"16 bytes for float32 \[2, 3\]"),
        (
            b"\x81\xa8a/kernel" + packed_array(shape=b"\x92\xce\xff\xff\xff\xff\x03"),
            r"24 bytes for .* expected 51539607540",
        ),
        (b"\x81\xa8a/kernel" + packed_array(dtype=b"\xa6object"), "dtype 'object'"),
        (b"\x81\xa8a/kernel" + packed_array(shape=b"\x92\xa1x\x03"), r"shape \('x', 3\)"),
        (b"\x81\xa8a/kernel" + packed_array(values=b"\xc4\x18" + bytes(26)), "2 bytes too many"),
        (b"\x81\xa8a/kernel\xc7\x01\x02\x00", "an extension of type 2"),
        (b"\x81\xa8a/kernel\x01", "a.kernel is no array"),
        (b"\x81\xa8a/secret" + packed_array(), "'secret' is none of"),
        (b"\x82\xa8a/kernel" + packed_array() + b"\xaba/embedding" + packed_array(), "a.weight is there twice"),
        (b"\x81\xa8a/kernel\x81\xb9__msgpack_chunked_array__\xc3", "a.kernel is no array"),
    ],
)
def test_a_broken_msgpack_is_refused_and_named(tmp_path, content, problem):
    file = copy_of("flax", tmp_path / "a")
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


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
        (h5_compressed, "bias:0 is empty, compressed or in another file"),
        (h5_bomb, "bias:0 is empty, compressed or in another file"),
        (h5_outside, "bias:0 is empty, compressed or in another file"),
        (h5_virtual, "bias:0 is empty, compressed or in another file"),
        (h5_text, "kernel:0 has dtype object"),
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


@pytest.mark.parametrize("to", ["orbax", "savedmodel"])
def test_broken_folders_raise_our_errors_alone(tmp_path, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"].replace(num_hidden_layers=1), dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to)
    inner = next(path for path in (tmp_path / "there").iterdir() if path.is_dir())
    for path in sorted(path for path in inner.rglob("*") if path.is_file()):
        data = path.read_bytes()
        places = range(0, len(data), len(data) // 9 + 1)
        flipped = [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in places]
        for spoiled in (b"", data[: len(data) // 2], bytes(len(data)), data + b"\0", *flipped):
            path.write_bytes(spoiled)
            with contextlib.suppress(CheckpointError):
                checkpoint = Checkpoint(tmp_path / "there")
                for name in checkpoint.tensors:
                    checkpoint[name]
        path.write_bytes(data)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")  # all whole again
    shutil.rmtree(inner)
    inner.mkdir()
    with pytest.raises(CheckpointError, match=inner.name):
        Checkpoint(tmp_path / "there")


@pytest.mark.parametrize("library", ["google-crc32c", "tensorflow"])
def test_an_absent_library_of_a_writer_is_named(tmp_path, monkeypatch, library):
    if library == "tensorflow":
        pytest.importorskip("google_crc32c")  # which is named first
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    monkeypatch.setitem(sys.modules, library.replace("-", "_"), None)
    with pytest.raises(CheckpointError, match=rf"needs {library}: pip install 'olmozoo\[tf\]'"):
        convert_checkpoint(source, tmp_path / "there", to="savedmodel")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("missing", "to"), [("h5py", "keras-weights"), ("tensorstore", "orbax"), ("google_crc32c", "savedmodel")]
)
def test_an_absent_library_is_named(tmp_path, monkeypatch, missing, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CheckpointError, match=r"needs (h5py|orbax-checkpoint|google-crc32c): pip install"):
        Checkpoint(tmp_path / "there")


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "olmozoo", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    done = run(source, tmp_path / "there", "--to", "flax-msgpack", "--dtype", "bfloat16", "--verify")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'there'}\n"), done.stderr
    assert Checkpoint(tmp_path / "there").dtype == dtype_of("bfloat16")
    done = run(tmp_path / "there", tmp_path / "never", "--to", "gguf")
    assert done.returncode == 2
    assert done.stderr.strip() == f"olmozoo: to is 'gguf', expected one of {', '.join(FORMATS)}"
    (tmp_path / "there" / "flax_model.msgpack").write_bytes(b"\x81")
    done = run(tmp_path / "there", tmp_path / "never", "--to", "safetensors")
    assert done.returncode == 2
    assert "flax_model.msgpack: 1 bytes expected" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


def test_importing_the_room_imports_no_framework():
    heavy = "{'torch', 'tensorflow', 'keras', 'jax', 'h5py'}"
    code = f"import sys, olmozoo.checkpoint; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
