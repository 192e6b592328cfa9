"""safetensors: ours is what the library writes, and what it refuses we refuse by name."""

import json
import os
import struct

import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.formats.safetensors import read_tensors
from olmozoo.checkpoint.reader import Checkpoint
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.reading import CONFIG, rewrite


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
        tensors = read_tensors(tmp_path / "a" / shard)
        assert sum(np.prod(t.shape) * 8 for t in tensors.values()) <= max(6000, largest)
    assert index["metadata"]["total_size"] == sum(p.size * 8 for p in CONFIG.parameters("causal_lm"))


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
        (truncate, r"model\.norm\.weight ends at byte [\d,]+, the file at [\d,]+"),
        (lengthen, r"model\.norm\.weight ends at byte [\d,]+, the file at [\d,]+"),
        (empty, "header too small"),
        (huge_header, f"a header of {1 << 60:,} bytes in a file of"),
        (edit_header(lambda header: [header]), "invalid type: sequence"),
        (entry(dtype="F8_E4M3"), "invalid shape, data type"),
        (entry(shape=[37, 25]), "invalid shape"),
        (entry(shape=[-37, 24]), "invalid value: integer `-37`"),
        (entry(shape=[1 << 61, 1 << 61, 24]), "overflow"),
        (entry(data_offsets=[8, 8 + 37 * 24 * 8]), "invalid offset for tensor"),
        (entry(data_offsets="all"), "invalid type: string"),
        (entry(shape=None), "invalid type: null"),
        (edit_header(lambda h: {**h, "lm_head.weight": 3}), "invalid type: integer `3`"),
    ],
)
def test_a_broken_file_is_refused_and_named(tmp_path, spoil, named):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    spoil(folder)
    with pytest.raises(CheckpointError, match=named) as caught:
        Checkpoint(folder)
    assert "model.safetensors" in str(caught.value)
