"""Saving into a folder: whole or not at all, and nothing else is touched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmozoo import CheckpointError, Tokenizer
from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.formats import FORMATS, SHARDED_WEIGHTS
from olmozoo.checkpoint.writer import save_checkpoint
from olmozoo.hub import CHAT_TEMPLATES, TOKENIZER_FILES
from tests.helpers.checkpoints import random_values, train_tokenizer, write_checkpoint
from tests.helpers.reading import CONFIG, load


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
from tests.helpers.reading import CONFIG
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
    assert all(name == "a" or name.startswith(".a.") for name in os.listdir(tmp_path))
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
    with pytest.raises(CheckpointError, match="not a folder"), atomic_folder(tmp_path / "file", SHARDED_WEIGHTS):
        pass
    with (
        pytest.raises(CheckpointError, match="was not saved"),
        atomic_folder(tmp_path / "file" / "inside", SHARDED_WEIGHTS),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder in ("", ".", "..", tmp_path / "a", "/"):
        with (
            pytest.raises(CheckpointError, match="contains the current folder"),
            atomic_folder(folder, SHARDED_WEIGHTS),
        ):
            pass
    assert (tmp_path / "a" / "file").read_text() == "mine"
    (tmp_path / "a" / "b").rmdir()
    with atomic_folder(tmp_path / "a", SHARDED_WEIGHTS):  # from a folder that is gone
        pass


def test_remains_of_another_folder_stay(tmp_path):
    for name in ("model1", "model[1]"):
        (tmp_path / f".{name}.saving-999999999-old").mkdir()
    (tmp_path / ".model[1].saving-999999998").mkdir()
    with atomic_folder(tmp_path / "model[1]", SHARDED_WEIGHTS) as staging:
        (staging / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model[1]", ".model1.saving-999999999-old"}


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


def test_no_writer_follows_a_link_in_the_target(tmp_path):
    outside, target = tmp_path / "outside", tmp_path / "there"
    source = write_checkpoint(tmp_path / "source", CONFIG, dtype="float32")
    train_tokenizer(source, "The quick brown fox. " * 10)
    (source / CHAT_TEMPLATES).mkdir()
    (source / CHAT_TEMPLATES / "tools.jinja").write_text("new")
    files = [*TOKENIZER_FILES, "config.json", "generation_config.json", "config.yaml", "model.pt"]
    files += [format.file for format in FORMATS] + [f"{format.file}.index.json" for format in FORMATS]

    def make() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(outside, ignore_errors=True)
        (outside / CHAT_TEMPLATES).mkdir(parents=True)
        target.mkdir()
        for name in files:
            (outside / name).write_text("outside")
            (target / name).symlink_to(outside / name)
        (outside / CHAT_TEMPLATES / "tools.jinja").write_text("outside")
        (target / CHAT_TEMPLATES).symlink_to(outside / CHAT_TEMPLATES)

    writers = [
        lambda to=to: convert_checkpoint(source, target, to=to, force=True) for to in ("safetensors", "flax-msgpack")
    ]
    writers += [
        lambda: write_checkpoint(target, CONFIG),
        lambda: Tokenizer.from_pretrained(source).save_pretrained(target),
    ]
    writers += [lambda: CONFIG.save_pretrained(target)]
    for write in writers:
        make()
        write()
        assert {path.read_text() for path in outside.rglob("*") if path.is_file()} == {"outside"}
        assert len(list(outside.rglob("*"))) == len(files) + 2
