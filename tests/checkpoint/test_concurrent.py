"""Threads and processes that save to one folder and load from it at the same time: never a mixture."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import open_checkpoint, read_unchanged
from tests.checkpoint.test_atomic import CONFIG, number_of, save
from tests.helpers.wings import WINGS, scope

SMALL = CONFIG.replace(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
LOADS = 60  # of the neutral reader; of each wing, a tenth of that

SAVER = """
import sys
sys.path.insert(0, {tests!r})
from tests.checkpoint.test_concurrent import SMALL, save
for number in range({first}, {stop}):
    save({folder!r}, number, SMALL)
    if number == {first}:
        print("saving", flush=True)
"""


def saver(folder: Path, first: int, stop: int = sys.maxsize) -> subprocess.Popen:
    """A process that saves the numbers from `first` on, after its first save."""
    code = SAVER.format(tests=str(Path(__file__).parents[2]), folder=str(folder), first=first, stop=stop)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    return process


@pytest.fixture
def folder(tmp_path):
    """A folder that another process keeps replacing."""
    save(tmp_path / "there", 1, SMALL)
    with saver(tmp_path / "there", 2) as process:
        yield tmp_path / "there"
        assert process.poll() is None
        process.kill()


def numbers(source) -> set[float]:
    weights = load_weights(source.checkpoint, source.config, "causal_lm", dtype=np.dtype(np.float32))
    values = {value for _, array in weights for value in np.unique(array).tolist()}
    return values | {source.config.number, source.generation["max_new_tokens"]}


def test_a_folder_that_is_replaced_meanwhile_is_read_from_one_save(folder):
    found: set[float] = set()
    for trial in itertools.count():
        values = numbers(open_checkpoint(folder))
        assert len(values) == 1, f"a mixture of {sorted(values)}"
        found |= values
        if trial >= LOADS and len(found) > 10:  # saves have to come in between
            break


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_loads_from_one_save(folder, wing):
    from olmozoo.backends import BACKENDS

    cls = BACKENDS[wing].model_class(SMALL, "causal_lm")
    for _ in range(LOADS // 10):
        with scope(wing):
            model = cls.from_pretrained(folder)
        values = {value for _, array in model.read_parameters() for value in np.unique(np.asarray(array)).tolist()}
        assert len(values | {model.config.number, model.generation_config.max_new_tokens}) == 1


def test_a_conversion_reads_one_save(folder, tmp_path):
    for _ in range(LOADS // 5):
        convert_checkpoint(folder, tmp_path / "converted", to="flax-msgpack", force=True)
        number_of(tmp_path / "converted")


@pytest.mark.parametrize("to", ["orbax", "savedmodel"])
def test_formats_that_open_files_late_see_that_the_folder_was_replaced(tmp_path, to):
    pytest.importorskip({"orbax": "orbax.checkpoint", "savedmodel": "tensorflow"}[to])
    save(tmp_path / "source", 1, SMALL)
    convert_checkpoint(tmp_path / "source", tmp_path / "there", to=to)
    source = open_checkpoint(tmp_path / "there")
    save(tmp_path / "source", 2, SMALL)
    convert_checkpoint(tmp_path / "source", tmp_path / "there", to=to, force=True)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*there"):
        numbers(source)
    assert numbers(open_checkpoint(tmp_path / "there")) == {2}


def test_a_folder_that_never_stays_is_a_clear_error(tmp_path):
    save(tmp_path / "there", 1, SMALL)
    with pytest.raises(CheckpointError, match="was replaced 20 times"):
        read_unchanged(tmp_path / "there", lambda: save(tmp_path / "there", 2, SMALL))


def test_saves_at_once_are_all_whole_and_the_last_one_stays(tmp_path):
    folder = tmp_path / "there"
    with saver(folder, 100, 110) as first, saver(folder, 200, 210) as second, ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda number: save(folder, number, SMALL), range(300, 312)))) == 12
        assert [first.wait(), second.wait()] == [0, 0]
    assert number_of(folder) in (109, 209, *range(300, 312))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
