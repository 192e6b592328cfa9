"""Processes that are killed and disks that are full: a folder is wholly the old checkpoint or wholly the new one."""

import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from olmozoo import Olmo2Config
from olmozoo.checkpoint.atomic import locked
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.writer import save_checkpoint

CONFIG = Olmo2Config(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    tie_word_embeddings=True,
)  # 3.7 MB in float32
TRIALS = 25  # kills of saves; and of conversions, a fifth of that for each format
FORMATS = {"safetensors": "numpy", "flax-msgpack": "flax.serialization", "keras-weights": "keras", "keras": "keras"}
FORMATS |= {"pt-bin": "torch", "orbax": "orbax.checkpoint"}  # and what writes them
FORMATS = {to: library for to, library in FORMATS.items() if importlib.util.find_spec(library.partition(".")[0])}


def save(folder, number, config=CONFIG) -> None:
    """A checkpoint in which every value, a field of the config and one of the generation settings are `number`."""
    save_checkpoint(
        folder,
        config.replace(extra={"number": number}),
        "causal_lm",
        read=lambda p: np.full(p.shape, number, np.float32),
        dtype=lambda p: np.float32,
        generation_config={"max_new_tokens": number},
        max_shard_size="2MB",
    )


def number_of(folder: Path) -> int:
    """The number that a whole checkpoint was saved with; fails for any other."""
    config = Olmo2Config.from_folder(folder)
    weights = load_weights(Checkpoint(folder), config, "causal_lm", dtype=np.dtype(np.float32))
    values = {value for _, array in weights for value in np.unique(array).tolist()}
    values |= {config.number, json.loads((folder / "generation_config.json").read_text())["max_new_tokens"]}
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    return int(values.pop())


def serve(root: str) -> None:
    """Save or convert in a forked process, and kill that, for each line on standard input.

    A line is: "save" or a format, the first number, how many are to be whole first, and the seconds from then on.
    Nothing is imported in the forked process, so that they are all spent in saving.
    """
    folder = Path(root)
    for library in set(FORMATS.values()):
        importlib.import_module(library)
    if "keras" in FORMATS:
        importlib.import_module("olmozoo.tf")
    for line in sys.stdin:
        what, first, whole, delay = line.split()
        done, told = os.pipe()
        process = os.fork()
        if process == 0:
            for number in range(int(first), sys.maxsize):
                if what == "save":
                    save(folder / "saved", number)
                else:
                    source = folder / ("even", "odd")[number % 2]
                    convert_checkpoint(source, folder / "converted", to=what, max_shard_size="2MB", force=True)
                os.write(told, b".")
        os.close(told)
        alive = all(os.read(done, 1) for _ in range(int(whole)))
        time.sleep(float(delay))
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(done)
        print("killed" if alive else "died by itself", flush=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    save(root / "even", 2)
    save(root / "odd", 1)
    program = [sys.executable, __file__, str(root)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def kill(what, first, whole, delay):
            process.stdin.write(f"{what} {first} {whole} {delay}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"

        yield root, kill
        process.stdin.close()


def abandoned(root: Path) -> list[Path]:
    return list(root.glob(".*.saving-*"))


def test_saves_that_are_killed_leave_the_old_checkpoint_or_the_new_one(server):
    root, kill = server
    save(root / "saved", 1)
    started = time.perf_counter()
    save(root / "saved", 2)
    took = time.perf_counter() - started
    last, interrupted, advanced = 2, 0, 0
    stream = random.Random(0)
    for _ in range(TRIALS):
        kill("save", last + 1, 0, stream.uniform(0, 3 * took))
        interrupted += bool(abandoned(root))
        number = number_of(root / "saved")
        assert number >= last, "an older checkpoint than the last one"
        advanced += number > last
        last = number
        assert len(abandoned(root)) <= 1, "a save clears away what the killed one before it left"
    print(f"{interrupted} kills in the middle of a save, {advanced} after a whole one")
    assert interrupted > 2, "kills have to come in the middle of a save too"
    assert advanced > 2, "and after whole ones"
    save(root / "saved", last + 1)
    assert number_of(root / "saved") == last + 1
    assert abandoned(root) == []


def test_conversions_that_are_killed_leave_the_old_checkpoint_or_the_new_one(server):
    root, kill = server
    stream = random.Random(1)
    found, interrupted = [], 0
    for to in FORMATS:
        started = time.perf_counter()
        kill(to, 1, 2, 0)
        took = (time.perf_counter() - started) / 2
        for trial in range(TRIALS // 5):
            kill(to, trial, trial % 3, stream.uniform(0, 2 * took))
            interrupted += bool(abandoned(root))
            found.append(number_of(root / "converted"))
            assert len(abandoned(root)) <= 1
    print(f"{interrupted} of {len(found)} kills in the middle of a conversion")
    assert interrupted > len(found) // 10, "kills have to come in the middle too"
    assert set(found) == {1, 2}
    convert_checkpoint(root / "even", root / "converted", to="safetensors", force=True)
    assert number_of(root / "converted") == 2
    assert abandoned(root) == []


def test_a_saved_model_that_is_killed_leaves_the_old_checkpoint(tmp_path):
    """TensorFlow writes it in the same process, so that nothing is written once that is killed."""
    pytest.importorskip("tensorflow")
    save(tmp_path / "source", 2)
    save(tmp_path / "there", 1)
    command = [sys.executable, "-m", "olmozoo", "convert", tmp_path / "source", tmp_path / "there", "--force"]
    with subprocess.Popen([*command, "--to", "savedmodel"], stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".there.saving-*/config.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9
    assert number_of(tmp_path / "there") == 1
    assert len(abandoned(tmp_path)) == 1
    save(tmp_path / "there", 3)
    assert abandoned(tmp_path) == []


# -- full disks -------------------------------------------------------------------------------------------------------

LARGER = CONFIG.replace(vocab_size=20_000)  # 13 MB

FULL = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tests.checkpoint.test_atomic import LARGER, convert_checkpoint, number_of, save
from olmozoo import CheckpointError
{limit}
root = Path({root!r})
save(root / "old", 1)
for what in ("save", "convert", "new"):
    try:
        if what == "convert":
            convert_checkpoint({source!r}, root / "old", to="safetensors", force=True)
        else:
            save(root / ("old" if what == "save" else "new"), 2, LARGER)
    except CheckpointError as error:
        assert {message!r} in str(error) and str(root) in str(error), error
    else:
        raise SystemExit(what + " had enough room")
    assert number_of(root / "old") == 1
    assert [path.name for path in root.iterdir()] == ["old"], "something was left behind"
save(root / "old", 3)
assert number_of(root / "old") == 3
print("as it was")
"""


def run_full(tmp_path, limit, message, prefix=()):
    """Run `FULL` in `tmp_path`/disk, where there is room for the small checkpoint and not for the larger one."""
    save(tmp_path / "source", 2, LARGER)
    (tmp_path / "disk").mkdir()
    program = FULL.format(
        tests=str(Path(__file__).parents[2]),
        root=str(tmp_path / "disk"),
        source=str(tmp_path / "source"),
        limit=limit,
        message=message,
    )
    done = subprocess.run([*prefix, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "as it was\n", done.stderr


def can_mount() -> bool:
    try:
        done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    mount = f'mount -t tmpfs -o size=12m none "{disk}" && exec "$0" "$@"'
    run_full(tmp_path, "", "is unchanged: the disk is full", ["unshare", "-rm", "sh", "-c", mount])


def test_a_file_size_limit_is_a_clear_error_and_leaves_the_old_checkpoint(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))"
    run_full(tmp_path, limit, "is unchanged: File too large")


READ_ONLY = """
import sys
sys.path.insert(0, {tests!r})
from tests.checkpoint.test_atomic import save
for number in range(2, 5):
    save({folder!r}, number)
"""


def test_a_folder_that_is_not_writable_is_replaced_and_leaves_nothing_behind(tmp_path):
    """By a user for whom permissions count, which is not root."""
    prefix = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("there is no setpriv to drop root with")
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
        folder = Path(root, "there")
        save(folder, 1)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("stays")
        if prefix:
            for path in (Path(root), folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
        (folder / "inner").chmod(0o555)
        folder.chmod(0o555)
        code = READ_ONLY.format(tests=str(Path(__file__).parents[2]), folder=str(folder))
        done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True)
        if "Permission denied" in done.stderr and "olmozoo" not in done.stderr:
            pytest.skip("that user cannot run this Python")
        assert done.returncode == 0, done.stderr
        assert number_of(folder) == 4
        assert (folder / "inner" / "file").read_text() == "stays"
        assert folder.stat().st_mode & 0o777 == 0o555
        assert os.listdir(root) == ["there"]


if __name__ == "__main__":
    serve(sys.argv[1])


def test_a_lock_that_is_not_waited_for_says_who_holds_it(tmp_path):
    program = (
        "import sys; from pathlib import Path; from olmozoo.checkpoint.atomic import locked\n"
        "with locked(Path(sys.argv[1])):\n    print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(BlockingIOError, match=rf"^process {process.pid} on \S+$"), locked(tmp_path / "lock", False):
            pytest.fail("two have the lock")
        process.kill()
        process.wait()
    assert (tmp_path / "lock").exists()  # what a kill leaves holds nobody up
    with locked(tmp_path / "lock", wait=False):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()
