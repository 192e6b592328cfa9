"""The state of a run in files: damaged ones are refused by name, and links are not followed."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from olmozoo import CheckpointError
from olmozoo.families.parameter import Parameter
from olmozoo.training import state
from olmozoo.world import World

TRAINED = [Parameter("a.weight", (3, 2), ("x", "y"), "linear"), Parameter("b.weight", (4,), ("x",), "norm")]
MOMENTS = {f"exp_avg.{p.name}": np.ones(p.shape, np.float32) for p in TRAINED}
SETTINGS = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": {"a.weight": 0.1}}


@pytest.fixture
def step(tmp_path):
    progress = state.Progress(step=2, examples=8, bound=float("inf"), least_loss=2.5)
    state.save(
        tmp_path / "step2", lambda _: None, progress, MOMENTS.items(), np.ones(2), SETTINGS, {"instances": 9}, World()
    )
    return tmp_path / "step2"


def test_a_state_is_read_again(step):
    saved = state.load(step)
    assert saved.progress == state.Progress(step=2, examples=8, bound=float("inf"), least_loss=2.5)
    assert saved.settings == SETTINGS
    state.check_moments(saved, TRAINED, ["exp_avg"], True)


@pytest.mark.parametrize("value", [None, True, 0.5, -1, 10**30, float("nan"), "1", [], {}], ids=repr)
@pytest.mark.parametrize("name", ["step", "epoch", "examples", "tokens", "updates", "optimizer", "run"])
def test_each_field_of_a_state(step, name, value):
    if (name, value) in (("optimizer", {}), ("run", {})):
        return
    file = step / "training" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(CheckpointError, match=rf"(?s)state\.json.*{name} is "):
        state.load(step)


@pytest.mark.parametrize(
    ("name", "value"),
    [("betas", [1, 2]), ("betas", "x"), ("eps", -1), ("weight_decay", [1]), ("weight_decay", {"a": []})],
)
def test_settings_that_cannot_be_are_named(step, name, value):
    file = step / "training" / "state.json"
    data = json.loads(file.read_text())
    data["optimizer"][name] = value
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"{name} is "):
        state.load(step)


@pytest.mark.parametrize("kind", ["pipe", "folder", "absent"])
def test_moments_that_are_no_file_are_refused(step, kind):
    file = step / "training" / "optimizer.safetensors"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        state.load(step)


def test_moments_that_do_not_fit_are_named(step):
    file = step / "training" / "optimizer.safetensors"
    save_file({"exp_avg.a.weight": np.ones((2, 3), np.float32), "grad_norm_exp_avg": np.ones(5)}, file)
    with pytest.raises(CheckpointError, match=r"(?s)a.weight is \[2, 3\].*b.weight is not there.*grad_norm_exp_avg is"):
        state.check_moments(state.load(step), TRAINED, ["exp_avg"], True)
    save_file({"exp_avg.a.weight": np.full((3, 2), np.nan, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"(?s)not finite.*exp_avg\.a\.weight"):
        state.as_arrays(state.load(step).moments)


def test_damaged_lines_of_metrics_are_removed_and_links_are_not_followed(tmp_path):
    good = b'{"step": 1, "loss": 3.0, "loss_per_target": 3.0, "lr": 0.1}\n'
    file, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    for bad in (b"\xff\n", b"[" * 100_000 + b"\n", b'{"step": Infinity}\n', b"1\n", b'{"step": 1, "loss": []}\n'):
        file.write_bytes(good + bad + good)
        state.trim_lines(file, 2, state.step_of_json)
        assert file.read_bytes() == good * 2
    file.unlink()
    file.symlink_to(other)
    state.trim_lines(file, 2, state.step_of_json)
    assert not file.is_symlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        state.trim_lines(file, 2, state.step_of_json)
