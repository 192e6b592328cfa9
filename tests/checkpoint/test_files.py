"""Index files and sizes."""

import json
import re
import shutil

import pytest

from olmozoo import CheckpointError, HubError
from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.checkpoint.files import parse_size
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.hub import resolve
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.reading import CONFIG


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
        (edit_index(lambda m: m.pop("model.norm.weight")), r"model\.norm\.weight is in .* but not in the index"),
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


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1GiB", 2**30), ("1.5kb", 1500), (77, 77), ("12", 12), ("2 MB", 2 * 10**6)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 bananas", "", "-3", "0", "GB"])
def test_bad_sizes(text):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        parse_size(text)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_system_takes_are_errors_of_ours(tmp_path, name):
    with (
        pytest.raises(CheckpointError, match=r"too long|null character"),
        atomic_folder(tmp_path / name, re.compile("")),
    ):
        pass
    with pytest.raises(HubError):
        resolve(str(tmp_path / name), need="config", local_files_only=True)
    with pytest.raises(HubError, match="has no subfolder"):
        resolve(tmp_path, need="config", subfolder=name)


@pytest.mark.parametrize("size", [10**5000, "9" * 400], ids=["integer", "text"])
def test_sizes_of_many_digits_are_refused(size):
    with pytest.raises(CheckpointError, match="max_shard_size is"):
        parse_size(size)
