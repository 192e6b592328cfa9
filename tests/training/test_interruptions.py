"""Runs that are stopped, killed or fail: what is saved is whole, and what goes on is the run that never stopped."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("omegaconf", reason="olmozoo[training] is not installed")

from olmozoo import OPTConfig
from olmozoo.errors import CheckpointError, InputError, TrainingError
from olmozoo.training import outputs, state
from olmozoo.training.config import from_dict
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.runs import Outcome, run, run_config, same_weights, weights_of, write_tokens
from tests.helpers.wings import WINGS, needs

CONFIG = OPTConfig(
    **{"vocab_size": 61, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 3, "dropout": 0.1, "attention_dropout": 0.1},
)
KILLS, LONG = 20, 110


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A run with dropout, of 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "start", CONFIG, dtype="float32")
    data = write_tokens(folder / "data", CONFIG.vocab_size, 8 * 11)
    return {
        **{"load_path": str(folder / "start"), "data": data, "max_sequence_length": 8, "max_duration": 12},
        **{"global_train_batch_size": 4, "device_train_microbatch_size": 3, "save_interval": 4, "backend": "pt"},
        **{"optimizer": {"learning_rate": 2e-3}, "scheduler": {"t_warmup": 3}, "eval_interval": 5},
        "evaluators": [{"label": "validation", "paths": data["paths"][:1]}],
    }


def same_run(found: Outcome, expected: Outcome) -> None:
    """Bit for bit: every line, every index, every weight and every running mean."""
    assert found.exact() == expected.exact()
    assert found.indices == expected.indices
    last = expected.steps[-1]["step"]
    for folder in ("model", f"step{last}"):
        a, b = weights_of(found.folder / folder), weights_of(expected.folder / folder)
        assert all((a[name] == value).all() for name, value in b.items())
    a, b = (state.load(outcome.folder / f"step{last}") for outcome in (found, expected))
    assert a.progress == b.progress
    assert all((a.moments[name].read() == tensor.read()).all() for name, tensor in b.moments.items())


# -- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_a_run_that_stopped_goes_on_bit_for_bit(fields, wing, tmp_path):
    """In the middle of an epoch, with dropout."""
    expected = run(fields, backend=wing, save_folder=str(tmp_path / "whole"))
    assert [line["epoch"] for line in expected.steps] == [0] * 5 + [1] * 5 + [2] * 2
    found = run(fields, backend=wing, save_folder=str(tmp_path / "parts"), stop_after=7)
    assert not found.result.finished
    assert found.result.step == 7
    found = run(fields, backend=wing, save_folder=str(tmp_path / "parts"))
    assert "resumed from" in found.text
    assert "step 7, epoch 1, instance 8 of it" in found.text
    same_run(found, expected)


@needs("pt")
def test_dropout_is_drawn(fields, tmp_path):
    first = run(fields, save_folder=str(tmp_path / "a"), stop_at=2)
    other = run(fields, save_folder=str(tmp_path / "b"), stop_at=2, seed=1, data={**fields["data"], "seed": 6198})
    assert first.indices == other.indices
    assert abs(first.curve("loss") - other.curve("loss")).max() > 1e-3


@needs("pt")
def test_a_complete_run_is_not_done_again(fields, tmp_path):
    first = run(fields, save_folder=str(tmp_path), stop_at=5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = run(fields, save_folder=str(tmp_path), stop_at=5)
    assert "the run is complete at step 5" in again.text
    assert again.exact() == first.exact()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@needs("pt")
def test_a_run_that_goes_on_to_a_later_end_writes_its_model_again(fields, tmp_path):
    run(fields, save_folder=str(tmp_path), stop_at=5, scheduler={"name": "constant"})
    found = run(fields, save_folder=str(tmp_path), stop_at=8, scheduler={"name": "constant"})
    expected = run(fields, save_folder=str(tmp_path) + "-whole", stop_at=8, scheduler={"name": "constant"})
    assert found.steps[-1]["step"] == 8
    same_weights(found.weights(), expected.weights(), 0)


@needs("pt")
def test_what_follows_the_last_step_is_done_once(fields, tmp_path, monkeypatch):
    """The run is interrupted before its model is written."""
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "write_final", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(fields, save_folder=str(tmp_path / "parts"))
    found = run(fields, save_folder=str(tmp_path / "parts"))
    same_run(found, run(fields, save_folder=str(tmp_path / "whole")))


@needs("pt")
@pytest.mark.parametrize("step", [3, 12])
def test_a_signal_ends_a_run_after_its_step(fields, step, tmp_path, monkeypatch):
    from olmozoo.pt.training import TrainStep

    update, calls = TrainStep.update, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *arguments)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "update", interrupted)
        found = run(fields, save_folder=str(tmp_path / "parts"))
    assert not found.result.finished
    assert f"stopped by SIGTERM at step {step}" in found.text
    assert signal.getsignal(signal.SIGTERM) is handler
    assert list(state.steps(tmp_path / "parts"))[-1] == step
    same_run(run(fields, save_folder=str(tmp_path / "parts")), run(fields, save_folder=str(tmp_path / "whole")))


# -- two runs in one folder -------------------------------------------------------------------------------------------


@needs("pt")
def test_another_run_in_the_folder_is_named(fields, tmp_path):
    fields = {**fields, "save_folder": str(tmp_path / "run"), "stop_at": 2}
    named = (
        rf"save_folder .*run is in use by another run \(process {os.getpid()} on .+\): wait for it, or choose another"
    )
    with outputs.lock(from_dict(fields)):
        with pytest.raises(InputError, match=named):
            run(fields, save_overwrite=True)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [outputs.LOCK]
    assert run(fields).result.finished
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


# -- kills ------------------------------------------------------------------------------------------------------------


def serve(file: str) -> None:
    """Train in a forked process for each line on standard input, which names the folder; answer its number.

    Nothing is imported in the forked process. It answers "ended" by its exit code alone.
    """
    fields = json.loads(Path(file).read_text())
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # by optimizers
    import torch.utils.checkpoint

    import olmozoo.pt.training  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            result = run_config(from_dict({**fields, "save_folder": line.strip()})).result
            os._exit(0 if result.finished else 3)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


@pytest.fixture(scope="module")
def server(fields, tmp_path_factory):
    """Starts a run in a folder and returns the number of its process; and waits for its exit code."""
    root = tmp_path_factory.mktemp("kills")
    (root / "fields.json").write_text(json.dumps({**fields, "max_duration": LONG, "save_interval": 3}))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, __file__, str(root / "fields.json")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env=environment, **pipes) as process:

        def start(folder):
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield root, start, lambda: int(process.stdout.readline())
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(server):
    root, start, wait = server
    start(root / "whole")
    assert wait() == 0
    return Outcome(root / "whole")


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def interrupt(server, folder, number, steps, delay) -> int:
    """Start a run, and send it a signal when it has done some steps; returns its exit code."""
    _, start, wait = server
    process, before = start(folder), lines(folder)
    until = time.monotonic() + 60
    while lines(folder) < before + steps and time.monotonic() < until:
        before = min(before, lines(folder))  # it removes those of steps that it does again
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process, number)
    return wait()


@needs("pt")
def test_kills_leave_whole_steps_and_no_trace(server, whole):
    folder, stream, seen = server[0] / "killed", random.Random(0), []
    for _ in range(KILLS):
        code = interrupt(server, folder, signal.SIGKILL, stream.randrange(1, 7), stream.random() * 0.02)
        assert code == -signal.SIGKILL
        found = state.steps(folder)
        assert list(found) == list(range(3, 3 * len(found) + 1, 3))
        for number, path in found.items():
            if number not in seen:
                assert state.load(path).progress.step == number
                assert len(weights_of(path)) == len(weights_of(whole.folder / "model"))
        seen = list(found)
    assert seen[-1] >= 18
    _, start, wait = server
    start(folder)
    assert wait() == 0
    same_run(Outcome(folder), whole)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@needs("pt")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_the_step_that_is_under_way(server, whole, number):
    folder, stream = server[0] / number.name, random.Random(1)
    for _ in range(3):
        assert interrupt(server, folder, number, stream.randrange(2, 9), stream.random() * 0.01) == 3
        assert Outcome(folder).steps[-1]["step"] == list(state.steps(folder))[-1]
    _, start, wait = server
    start(folder)
    assert wait() == 0
    same_run(Outcome(folder), whole)


# -- failures ---------------------------------------------------------------------------------------------------------


def limited(fields, size):
    """Run where no file can be larger than `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        return run(fields)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@needs("pt")
def test_a_full_disk_leaves_the_last_step_whole(fields, tmp_path):
    fields = {**fields, "save_folder": str(tmp_path / "run")}
    run(fields, stop_after=4)
    before = weights_of(tmp_path / "run" / "step4")
    with pytest.raises(CheckpointError, match=r"step8.* was not saved and is unchanged: File too large"):
        limited(fields, 8 << 10)
    assert list(state.steps(tmp_path / "run")) == [4]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".step")]
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    with pytest.raises(TrainingError, match=r"File too large. The last checkpoint is whole: .*step4"):
        limited({**fields, "save_interval": None}, size // 2)
    same_weights(weights_of(tmp_path / "run" / "step4"), before, 0)
    same_run(run(fields), run({**fields, "save_folder": str(tmp_path / "whole")}))


@needs("pt")
def test_a_weight_that_is_not_a_number_stops_before_the_first_update(fields, tmp_path):
    import safetensors.numpy

    write_checkpoint(tmp_path / "nan", CONFIG, dtype="float32")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    next(value for name, value in tensors.items() if "fc1.weight" in name)[0, 0] = np.nan
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    order = np.arange(22)
    np.random.default_rng(6198).shuffle(order)
    with pytest.raises(TrainingError) as caught:
        run(fields, load_path=str(tmp_path / "nan"), save_folder=str(tmp_path / "run"))
    message = str(caught.value)
    assert "the loss is nan at step 1, before the update" in message
    assert f"instances {', '.join(map(str, order[:4]))} of epoch 0" in message
    assert "there is none yet" in message
    assert not state.steps(tmp_path / "run")


@needs("pt")
def test_a_run_that_explodes_stops(fields, tmp_path):
    optimizer = {"learning_rate": 1e30}
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d+, before the update") as caught:
        run(fields, optimizer=optimizer, save_interval=1, max_grad_norm=None, save_folder=str(tmp_path))
    last = list(state.steps(tmp_path))[-1]
    assert f"whole: {tmp_path}/step{last}" in str(caught.value)
    assert f"at step {last + 1}," in str(caught.value)


# -- what is kept -----------------------------------------------------------------------------------------------------


@needs("pt")
def test_so_many_steps_are_kept(fields, tmp_path):
    fields = {**fields, "save_interval": 2, "stop_at": 9}
    run(fields, save_folder=str(tmp_path / "two"), save_num_checkpoints_to_keep=2)
    assert list(state.steps(tmp_path / "two")) == [8, 9]
    run(fields, save_folder=str(tmp_path / "none"), save_num_checkpoints_to_keep=0)
    assert not state.steps(tmp_path / "none")
    assert (tmp_path / "none" / "model").is_dir()
    with pytest.raises(InputError, match="has a finished model and no step to go on from"):
        run(fields, save_folder=str(tmp_path / "none"), save_num_checkpoints_to_keep=0)
    run(fields, save_folder=str(tmp_path / "all"))
    assert list(state.steps(tmp_path / "all")) == [2, 4, 6, 8, 9]


@needs("pt")
def test_what_a_kill_leaves_of_a_step_that_was_being_removed_is_no_step(fields, tmp_path, monkeypatch):
    import shutil

    fields = {**fields, "save_interval": 2, "stop_at": 6, "save_folder": str(tmp_path)}
    rmtree = shutil.rmtree

    def killed(path, *arguments, **options):
        if Path(path).name.endswith(".removed") and Path(path).is_dir():
            rmtree(Path(path) / "training")
            raise KeyboardInterrupt
        rmtree(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(fields, save_num_checkpoints_to_keep=1)
    assert list(state.steps(tmp_path)) == [4]
    assert not (tmp_path / "step2").exists()
    run(fields, save_num_checkpoints_to_keep=1)
    assert sorted(path.name for path in tmp_path.iterdir() if "step" in path.name) == ["step6"]


@needs("pt")
def test_starting_over(fields, tmp_path):
    fields = {**fields, "save_folder": str(tmp_path / "run"), "stop_at": 5}
    first = run(fields)
    again = run(fields, save_overwrite=True, seed=1)
    assert again.indices != first.indices
    assert [line["step"] for line in again.steps] == [1, 2, 3, 4, 5]
    assert list(state.steps(tmp_path / "run")) == [4, 5]
    with pytest.raises(InputError, match=r"save_overwrite would remove .* and the run needs"):
        run(fields, save_overwrite=True, load_path=str(tmp_path / "run" / "step5"))
    assert list(state.steps(tmp_path / "run")) == [4, 5]


@needs("pt")
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"seed": 2}, "data_seed was 6198 and is 2"),
        ({"optimizer": {"name": "lionw"}}, "optimizer was 'adamw' and is 'lionw'"),
        ({"max_sequence_length": 4}, "instances was 22 and is 44; max_sequence_length was 8 and is 4"),
        ({"lora": {"rank": 2}}, "lora was False and is True"),
    ],
)
def test_a_run_of_another_kind_is_refused(fields, changed, problem, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "other-kind"
    if not folder.exists():
        run(fields, save_folder=str(folder), stop_after=2)
    with pytest.raises(InputError) as caught:
        run({**fields, **changed}, save_folder=str(folder))
    assert problem in str(caught.value)
    assert "set save_overwrite to start over" in str(caught.value)


@needs("pt")
def test_the_folder_of_a_model_is_refused(fields, tmp_path):
    write_checkpoint(tmp_path / "model", CONFIG)
    with pytest.raises(InputError, match="is the folder of a model"):
        run(fields, save_folder=str(tmp_path / "model"), save_overwrite=True)


if __name__ == "__main__":
    serve(sys.argv[1])
