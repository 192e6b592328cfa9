"""The reader and the writer of checkpoint folders: what is right loads exactly, what is wrong is named."""

import contextlib
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from olmozoo import CheckpointError, Olmo2Config, OPTConfig
from olmozoo import backends as backend
from olmozoo.checkpoint.atomic import replacing_folder
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.files import PASSING, WRITE, Behind, new_file, parse_size
from olmozoo.checkpoint.formats.safetensors import read_safetensors
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import BAND, Output, dtype_of, widest
from olmozoo.checkpoint.writer import save_checkpoint
from tests.helpers.checkpoints import random_values, write_checkpoint

CONFIG = Olmo2Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    attention_bias=True,
)
TIED = CONFIG.replace(tie_word_embeddings=True)


def load(folder, config=CONFIG, head="causal_lm", dtype="float64", **options):
    weights = load_weights(Checkpoint(folder), config, head, dtype=np.dtype(dtype), **options)
    return {parameter.name: array for parameter, array in weights}


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a single-file checkpoint through the safetensors library, an independent writer."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")


def test_the_largest_weights_come_first(tmp_path):
    config = CONFIG.replace(num_hidden_layers=3)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, config))
    sizes = [
        parameter.size for parameter, _ in load_weights(checkpoint, config, "causal_lm", dtype=np.dtype("float32"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3


PEAK = """
import resource, sys
from olmozoo import backend
peaks = []
for folder in sys.argv[2:]:
    model = backend.load(folder, sys.argv[1])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""


# PyTorch's weights stay in the mapped file. A `.bin` is mapped in parts, of which one is in memory.
@pytest.mark.parametrize(
    ("wing", "to", "share"),
    [("pt", "safetensors", 0.15), ("tf", "safetensors", 1.05), ("flax", "safetensors", 1.05), ("flax", "pt-bin", 1.18)],
)
def test_a_model_that_loads_is_in_memory_once(tmp_path, wing, to, share):
    if to == "pt-bin":
        pytest.importorskip("torch")
    if wing not in backend.installed():
        pytest.skip(f"the {wing} wing is not installed")
    large = CONFIG.replace(hidden_size=1536, intermediate_size=1500, num_hidden_layers=12)
    for name, config in (("small", CONFIG), ("large", large)):
        save_checkpoint(
            tmp_path / name, config, "causal_lm", lambda p: np.ones(p.shape, "float32"), lambda p: "float32"
        )
        if to != "safetensors":
            convert_checkpoint(tmp_path / name, tmp_path / name, to=to)
    command = [sys.executable, "-c", PEAK, wing, tmp_path / "small", tmp_path / "large"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = sum(file.stat().st_size for file in (tmp_path / "large").iterdir())
    assert size > 4e8
    assert grown / size < share


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype, shard):
    write_checkpoint(tmp_path / "a", CONFIG, dtype=dtype, max_shard_size=shard)
    found = load(tmp_path / "a", dtype=dtype_of(dtype))
    assert sorted(found) == sorted(p.name for p in CONFIG.parameters("causal_lm"))
    assert next(iter(found)) in ("model.embed_tokens.weight", "lm_head.weight")  # the largest first
    for parameter in CONFIG.parameters("causal_lm"):
        expected = random_values(parameter).astype(dtype_of(dtype))
        assert found[parameter.name].dtype == dtype_of(dtype)
        assert found[parameter.name].tobytes() == expected.tobytes()
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == (shard == "3KB")


def test_the_safetensors_library_reads_what_we_write_and_the_reverse(tmp_path):
    from safetensors.numpy import load_file

    write_checkpoint(tmp_path / "a", CONFIG, dtype="bfloat16")
    theirs = load_file(tmp_path / "a" / "model.safetensors")
    ours = Checkpoint(tmp_path / "a")
    assert theirs.keys() == ours.tensors.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)
    before = {name: ours[name].copy() for name in ours.tensors}
    rewrite(tmp_path / "a", lambda tensors: None)
    again = Checkpoint(tmp_path / "a")
    assert all(np.array_equal(again[name], before[name]) for name in before)


def test_shards_keep_to_their_size_and_bytes_are_deterministic(tmp_path):
    for name in "ab":
        write_checkpoint(tmp_path / name, CONFIG, max_shard_size="6KB")
    files = sorted(os.listdir(tmp_path / "a"))
    assert files == sorted(os.listdir(tmp_path / "b"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    largest = max(p.size * 8 for p in CONFIG.parameters("causal_lm"))
    for shard in set(index["weight_map"].values()):
        tensors = read_safetensors(tmp_path / "a" / shard)
        assert sum(np.prod(t.shape) * 8 for t in tensors.values()) <= max(6000, largest)
    assert index["metadata"]["total_size"] == sum(p.size * 8 for p in CONFIG.parameters("causal_lm"))


def test_a_tied_head_is_not_written_and_may_be_there_if_equal(tmp_path):
    folder = write_checkpoint(tmp_path / "a", TIED)
    assert "lm_head.weight" not in Checkpoint(folder).tensors
    assert "lm_head.weight" not in load(folder, TIED)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head.weight" not in load(folder, TIED)
    rewrite(folder, lambda t: t["lm_head.weight"].__setitem__((3, 4), 9.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(folder, TIED)


def test_base_and_head_checkpoints_serve_each_other(tmp_path):
    base = write_checkpoint(tmp_path / "base", CONFIG, None)
    causal = write_checkpoint(tmp_path / "causal", CONFIG)
    assert not any(name.startswith("model.") for name in Checkpoint(base).tensors)
    assert all(np.array_equal(array, load(causal)[name]) for name, array in load(base, head=None).items())
    assert load(causal, head=None).keys() == load(base, head=None).keys()
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        found = load(base)
    table = {p.name: p for p in CONFIG.parameters("causal_lm")}
    assert np.array_equal(found["lm_head.weight"], table["lm_head.weight"].initial(0, "float64"))
    assert np.array_equal(
        load(write_checkpoint(tmp_path / "t", TIED, None), TIED)["model.norm.weight"], found["model.norm.weight"]
    )


def test_a_new_classification_head_is_announced(tmp_path):
    causal = write_checkpoint(tmp_path / "causal", CONFIG)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        assert load(causal, head="sequence_classification")["score.weight"].shape == (2, 24)
    classifier = write_checkpoint(tmp_path / "classifier", CONFIG, "sequence_classification")
    assert np.array_equal(load(classifier, head=None)["model.norm.weight"], load(causal)["model.norm.weight"])


def test_a_causal_checkpoint_without_its_head_is_broken(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight \[37, 24\]"):
        load(folder)


def test_one_error_lists_every_problem(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)

    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 3))
        tensors["model.norm.weight"] = np.zeros(25)
        tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "4 problem(s)" in text
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight [20, 24]",
        "unexpected: model.layers.7.mlp.up_proj.weight [2, 3]",
        "wrong shape: model.norm.weight is [25], expected [24]",
        "duplicate: ",
    ):
        assert part in text


def test_a_saved_rotary_table_is_passed_over_and_has_no_say_in_the_dtype(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG, dtype="float16")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}))
    assert Checkpoint(folder).dtype == np.float16
    assert len(load(folder, dtype="float16")) == len(CONFIG.parameters("causal_lm"))


@pytest.mark.parametrize("head_on_disk", [False, True])
def test_opt_loads_with_either_prefix_and_with_its_tied_head_or_without(tmp_path, head_on_disk):
    config = OPTConfig(vocab_size=37, hidden_size=24, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4)
    folder = write_checkpoint(tmp_path / "a", config)
    expected = load(folder, config)

    def respell(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        if head_on_disk:
            tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"].copy()

    rewrite(folder, respell)
    assert all(name.startswith(("decoder.", "lm_head.")) for name in Checkpoint(folder).tensors)
    found = load(folder, config)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_square_matrix_is_not_transposed_and_a_transposed_one_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    q = next(p for p in CONFIG.parameters() if p.name.endswith("q_proj.weight"))
    assert q.shape == (24, 24)
    assert np.array_equal(load(folder)[q.name], random_values(q))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[24, 37\], expected \[37, 24\]"):
        load(folder)


def test_mismatched_sizes_start_anew_only_if_asked(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    larger = CONFIG.replace(vocab_size=41)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is \[37, 24\], expected \[41, 24\]"):
        load(folder, larger)
    with pytest.warns(UserWarning, match=r"lm_head\.weight is \[37, 24\]"):
        assert load(folder, larger, ignore_mismatched_sizes=True)["lm_head.weight"].shape == (41, 24)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def lengthen(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def huge_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def edit_header(change):
    def edit(folder):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header)).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def entry(**values):
    return edit_header(lambda h: {**h, "lm_head.weight": {**h["lm_head.weight"], **values}})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncate, r"lm_head\.weight ends at byte \d+, the file at \d+"),
        (lengthen, r"the tensors end at byte \d+, the file at \d+"),
        (empty, "0 bytes"),
        (huge_header, str(1 << 60)),
        (edit_header(lambda header: [header]), "list"),
        (entry(dtype="F8_E4M3"), r"lm_head\.weight.*F8_E4M3"),
        (entry(shape=[37, 25]), r"lm_head\.weight.*expected \d+ bytes"),
        (entry(shape=[-37, 24]), r"lm_head\.weight"),
        (entry(shape=[1 << 61, 1 << 61, 24]), r"lm_head\.weight"),
        (entry(data_offsets=[0, 37 * 24 * 8]), r"begins at byte 0"),
        (entry(data_offsets="all"), r"lm_head\.weight"),
        (entry(shape=None), r"lm_head\.weight"),
        (edit_header(lambda h: {**h, "lm_head.weight": 3}), r"lm_head\.weight"),
    ],
)
def test_a_broken_file_is_refused_and_named(tmp_path, spoil, named):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    spoil(folder)
    with pytest.raises(CheckpointError, match=named) as caught:
        Checkpoint(folder)
    assert "model.safetensors" in str(caught.value)


def first(weight_map):
    return min(weight_map.values())


def edit_index(change):
    def edit(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (edit_index(lambda m: m.update(x="absent.safetensors")), r"names the shard absent\.safetensors"),
        (edit_index(lambda m: m.update({"lm_head.weight": first(m)})), r"lm_head\.weight is not in"),
        (edit_index(lambda m: m.pop("model.norm.weight")), r"model\.norm\.weight is in .* has no such tensor"),
        (edit_index(lambda m: m.update({"lm_head.weight": "../other.safetensors"})), r"'\.\./other\.safetensors'"),
        (edit_index(lambda m: m.update({"lm_head.weight": "/etc/passwd"})), "/etc/passwd"),
        (edit_index(lambda m: m.update({"lm_head.weight": 7})), "7"),
        (edit_index(lambda m: m.clear()), "weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("not json"), "JSON"),
        (lambda f: shutil.copy(*sorted(f.glob("model-*"))[:2]), "is in both"),
    ],
)  # fmt: skip
def test_a_broken_index_is_refused_and_named(tmp_path, spoil, named):
    folder = write_checkpoint(tmp_path / "a", CONFIG, max_shard_size="20KB")
    assert len(list(folder.glob("model-*"))) > 2
    spoil(folder)
    with pytest.raises(CheckpointError, match=named):
        Checkpoint(folder)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("old_format", [False, True])
def test_bin_files_load_and_execute_nothing(tmp_path, old_format):
    torch = pytest.importorskip("torch")
    tensors = {p.name: torch.from_numpy(random_values(p)).bfloat16() for p in CONFIG.parameters("causal_lm")}
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=not old_format)
    for parameter in CONFIG.parameters("causal_lm"):
        expected = random_values(parameter).astype(ml_dtypes.bfloat16)
        assert np.array_equal(load(tmp_path, dtype=ml_dtypes.bfloat16)[parameter.name], expected)

    torch.save({"a": Evil(tmp_path / "owned")}, file)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bin_files_whose_records_do_not_lie_where_they_should_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({p.name: torch.from_numpy(random_values(p)) for p in CONFIG.parameters("causal_lm")}, file)
    good = file.read_bytes()
    Checkpoint(tmp_path)
    with zipfile.ZipFile(file) as archive:
        first, second = (entry for entry in archive.infolist() if entry.filename.endswith(("/data/1", "/data/2")))
    entry = good.rindex(second.filename.encode()) - 46  # of the archive's directory, at its end
    for place, value, message in (
        (entry + 42, first.header_offset.to_bytes(4, "little"), "data/1"),
        (entry + 10, b"\x08\0", "is compressed, expected it stored"),
    ):
        file.write_bytes(good[:place] + value + good[place + len(value) :])
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin is not a readable state dict: .*{message}"):
            Checkpoint(tmp_path)


def test_bin_files_of_parameters_and_negated_views_load(tmp_path):
    torch = pytest.importorskip("torch")
    CONFIG.save_pretrained(tmp_path)
    values = {p.name: random_values(p).astype(np.float32) for p in CONFIG.parameters("causal_lm")}
    for made in (torch.nn.Parameter, lambda tensor: torch._neg_view(-tensor)):
        tensors = {name: made(torch.from_numpy(array)) for name, array in values.items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        for name, array in load(tmp_path, dtype=np.float32).items():
            assert np.array_equal(array, values[name])


def test_bin_files_of_what_is_no_plain_tensor_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    for spoiled in (torch.eye(3).to_sparse(), torch.ones(3, device="meta")):
        torch.save({"a": spoiled}, file)
        with pytest.raises(CheckpointError, match=r"no plain tensor: 1 problem\(s\)\n  - a: torch\."):
            Checkpoint(tmp_path)
    torch.save({1: torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="mapping from names to tensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "tf_model.h5", "model.keras"])
def test_what_cannot_be_opened_is_named(tmp_path, name):
    if name == "tf_model.h5":
        pytest.importorskip("h5py")
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"is broken: 1 problem\(s\)\n.*{name}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float16", "bfloat16"], "float32"),
        (["bfloat16"], "bfloat16"),
        (["float16", "float32", "bfloat16"], "float32"),
        (["float64", "bfloat16"], "float64"),
        ([], "float32"),
    ],
)
def test_the_widest_dtype_holds_the_values_of_all(dtypes, expected):
    assert widest(map(dtype_of, dtypes)) == expected


def test_sharded_bin_files_load(tmp_path):
    torch = pytest.importorskip("torch")
    names = [p.name for p in CONFIG.parameters("causal_lm")]
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        table = {p.name: p for p in CONFIG.parameters("causal_lm")}
        torch.save({name: torch.from_numpy(random_values(table[name])) for name in part}, tmp_path / file)
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for parameter in CONFIG.parameters("causal_lm"):
        assert np.array_equal(load(tmp_path)[parameter.name], random_values(parameter))


# -- writing is atomic ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_save_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    before = contents(folder)
    calls = []

    def read(parameter):
        calls.append(parameter)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        return random_values(parameter, seed=1)

    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(folder, CONFIG, "causal_lm", read, lambda p: "float64")
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["a"]
    calls.clear()
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(tmp_path / "new", CONFIG, "causal_lm", read, lambda p: "float64")
    assert os.listdir(tmp_path) == ["a"]


def test_a_save_that_is_killed_leaves_the_old_folder_and_the_next_one_clears_up(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    before = contents(folder)
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.helpers.checkpoints import random_values
from tests.checkpoint.test_checkpoint import CONFIG
from olmozoo.checkpoint import save_checkpoint
calls = []
def read(parameter):
    calls.append(parameter)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return random_values(parameter, seed=1)
save_checkpoint({str(folder)!r}, CONFIG, "causal_lm", read, lambda p: "float64")
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert contents(folder) == before
    assert len(os.listdir(tmp_path)) == 2
    write_checkpoint(folder, CONFIG, seed=2)
    assert os.listdir(tmp_path) == ["a"]
    assert contents(folder) != before


def test_a_save_replaces_old_weights_and_keeps_other_files(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG, max_shard_size="6KB")
    (folder / "tokenizer.json").write_text("kept")
    (folder / "assets").mkdir()
    (folder / "assets" / "pytorch_model.bin").write_text("kept too")
    write_checkpoint(folder, CONFIG, seed=1)
    assert sorted(contents(folder)) == [
        "assets/pytorch_model.bin",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "tokenizer.json").read_text() == "kept"


def test_a_save_over_a_mapped_checkpoint_changes_nothing_that_is_mapped(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    mapped = load(folder)
    write_checkpoint(folder, CONFIG, seed=1)
    for parameter in CONFIG.parameters("causal_lm"):
        assert np.array_equal(mapped[parameter.name], random_values(parameter))
        mapped[parameter.name][...] = 0  # and writing into the mapping leaves the file alone
        assert np.array_equal(load(folder)[parameter.name], random_values(parameter, seed=1))


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path):
    write_checkpoint(tmp_path / "real", CONFIG)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_checkpoint(tmp_path / "link", CONFIG, seed=1)
    assert (tmp_path / "link").is_symlink()
    assert np.array_equal(load(tmp_path / "real")["model.norm.weight"], load(tmp_path / "link")["model.norm.weight"])


def test_saving_onto_a_file_or_where_nothing_may_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not a folder"), replacing_folder(tmp_path / "file"):
        pass
    with pytest.raises(CheckpointError, match="was not saved"), replacing_folder(tmp_path / "file" / "inside"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder in ("", ".", "..", tmp_path / "a", "/"):
        with pytest.raises(CheckpointError, match="holds the current folder"), replacing_folder(folder):
            pass
    assert (tmp_path / "a" / "file").read_text() == "mine"
    (tmp_path / "a" / "b").rmdir()
    with replacing_folder(tmp_path / "a"):  # from a folder that is gone
        pass


def test_remains_of_another_folder_stay(tmp_path):
    for name in ("model1", "model[1]"):
        (tmp_path / f".{name}.saving-999999999-old").mkdir()
    (tmp_path / ".model[1].saving-999999998").mkdir()
    with replacing_folder(tmp_path / "model[1]") as staging:
        (staging / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model[1]", ".model1.saving-999999999-old"}


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1GiB", 2**30), ("1.5kb", 1500), (77, 77), ("12", 12), ("2 MB", 2 * 10**6)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 bananas", "", "-3", "0", "GB"])
def test_bad_sizes(text):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        parse_size(text)


def test_an_old_folder_put_aside_by_a_killed_save_comes_back(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", CONFIG)
    expected = load(folder)
    folder.rename(tmp_path / ".model.saving-999999999-old")  # where a kill between the two renames leaves it

    def full(parameter):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(folder, CONFIG, "causal_lm", read=full, dtype=lambda parameter: "float64")
    for name, array in load(folder).items():
        assert np.array_equal(array, expected[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_written_behind_comes_in_order_and_fails_aloud():
    class Slow(io.BytesIO):
        def write(self, data):
            time.sleep(0.005)
            return super().write(data)

    array = np.random.default_rng(0).standard_normal((90, 50)).astype(np.float32)
    stream, output = Slow(), Output("x", array.dtype, array.shape, lambda: array)
    with contextlib.closing(Behind(stream)) as behind:
        assert behind.write(b"head") == 4
        for band in output.bands(1000):
            behind.write(band.reshape(-1).view(np.uint8).data)
        assert behind.tell() == 4 + array.nbytes
        behind.seek(0)
        behind.write(b"tail")
    assert stream.getvalue() == b"tail" + array.tobytes()

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "no space left")

    for call in (lambda behind: behind.write(b"more"), Behind.tell, lambda behind: behind.seek(0), Behind.close):
        behind = Behind(Full())
        behind.write(b"some")
        with pytest.raises(OSError, match="no space left"):
            call(behind)
        behind.close()


@pytest.mark.parametrize(("kept", "most"), [(True, WRITE), (False, BAND)])
def test_a_new_file_takes_little_at_a_time_loses_nothing_and_is_never_an_old_one(tmp_path, kept, most):
    data = np.random.default_rng(0).bytes(PASSING + 5 * BAND + 7)
    with new_file(tmp_path / "new", kept) as stream:
        stream.write(data[:3])
        stream.write(data[3:])
    assert (tmp_path / "new").read_bytes() == data
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "new", kept)
    assert (tmp_path / "new").read_bytes() == data
    with new_file(tmp_path / "other", kept) as stream:
        assert stream.raw.write(data) == most


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked to let go of a file")
def test_what_is_converted_passes_through_memory_and_what_is_saved_stays(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: asked.append((os.fstat(call[0]).st_size, *call[1:])))
    monkeypatch.setattr("olmozoo.checkpoint.PASSING", 10_000)
    monkeypatch.setattr("olmozoo.checkpoint.BAND", 1000)
    folder = write_checkpoint(tmp_path / "saved", CONFIG)
    assert asked == []
    convert_checkpoint(folder, tmp_path / "converted", to="safetensors")
    size = (tmp_path / "converted" / "model.safetensors").stat().st_size
    assert {call[1:] for call in asked} == {(0, 0, os.POSIX_FADV_DONTNEED)}
    steps = np.diff([0, *(call[0] for call in asked), size])
    assert len(steps) > 4
    assert all(steps[:-1] >= 10_000)
    assert all(steps < 11_000)
    assert (tmp_path / "converted" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shape", [(300, 400), (128, 129), (256, 257), (1, 700), (700, 1)])
def test_a_tensor_goes_to_disk_in_pieces(monkeypatch, shape):
    monkeypatch.setattr("olmozoo.checkpoint.BAND", 1000)
    monkeypatch.setattr("olmozoo.checkpoint.TURNED_BAND", 2000)
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    plain = Output("x", array.dtype, shape, lambda: array)
    turned = Output("x", array.dtype, shape[::-1], lambda: array, transposed=True)
    for output, expected, limit in ((plain, array, 1000), (turned, array.T, 2000)):
        assert b"".join(map(bytes, output.pieces())) == expected.tobytes()
        sizes = [len(piece) for piece in output.pieces()]
        row = array.nbytes // len(expected)
        assert max(sizes) <= max(limit, row)
        assert len(sizes) == -(-len(expected) // max(1, limit // row))
        assert np.array_equal(np.concatenate([band.copy() for band in output.bands(3000)]), expected)
    rows, columns = shape
    found = rf"x is float32 \[{rows}, {columns}\], expected"
    with pytest.raises(CheckpointError, match=rf"{found} float16 \[{rows}, {columns}\]"):
        next(Output("x", np.dtype(np.float16), shape, lambda: array).pieces())
    with pytest.raises(CheckpointError, match=rf"{found} float32 \[{columns}, {rows}\]"):  # of the same size
        next(Output("x", array.dtype, shape[::-1], lambda: array).pieces())
