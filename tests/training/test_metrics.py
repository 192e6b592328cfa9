"""The reports of a run: lines, metrics.jsonl, TensorBoard, Weights & Biases, the plot."""

import io
import json
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from olmozoo import MissingBackendError
from olmozoo.training.config import TrainConfig, WandbConfig
from olmozoo.training.metrics import METRICS, PLOT, Metrics, draw, read

STEPS = 3


def config(folder, **fields):
    return TrainConfig(save_folder=str(folder), run_name="first", **fields)


def report(settings, start=0, width=200, terminal=False) -> str:
    """Report some steps and an evaluation; return what the console shows."""
    stream = io.StringIO()
    metrics = Metrics(settings, start, STEPS, Console(file=stream, width=width, force_terminal=terminal))
    for step in range(start + 1, STEPS + 1):
        numbers = {"step": step, "epoch": 0, "loss": 3.0 / step, "loss_per_target": 6.0 / step}
        numbers |= {"grad_norm": 1.5, "lr": 1e-3 * step}
        metrics.step(numbers, np.array([step, 7]), 64)
    metrics.evaluation(STEPS, {"eval/held-out/CrossEntropyLoss": 2.5, "eval/held-out/Perplexity": 12.18})
    metrics.close(plot=True)
    return stream.getvalue()


def test_a_step_is_a_line(tmp_path):
    lines = report(config(tmp_path)).splitlines()
    assert lines[1].startswith("step 2/3  loss 3.0000  lr 2.00e-03  norm   1.500  ")
    assert "tokens/s" in lines[1]
    assert "left" in lines[1]
    assert lines[3] == "evaluation at step 3: held-out/CrossEntropyLoss 2.5000  held-out/Perplexity 12.1800"
    assert "loss 3.0000 (AI2's 1.5000)" in report(config(tmp_path, loss_divisor="positions"))
    assert report(config(tmp_path, console_log_interval=2)).count("step ") == 3  # 2, the last, and the evaluation


def test_a_terminal_has_a_bar_that_does_not_stay(tmp_path):
    text = report(config(tmp_path), terminal=True)
    assert "3/3" in text
    assert "elapsed" in text
    assert text.endswith("\x1b[2K"), "the bar is removed at the end"


def test_a_run_that_is_resumed_goes_on_in_its_files(tmp_path):
    report(config(tmp_path))
    report(config(tmp_path), start=2)
    steps, evaluations = read(tmp_path / METRICS)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert len(evaluations) == 1
    assert [line.split("\t") for line in (tmp_path / "data-indices.tsv").read_text().splitlines()] == [
        ["1", "1", "7"], ["2", "2", "7"], ["3", "3", "7"]
    ]  # fmt: skip
    assert all(line["tokens_per_second"] > 0 for line in steps)


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report(config(tmp_path))
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none.jsonl").write_text("")
    assert not draw(tmp_path / "none.jsonl", tmp_path / "none.png")
    lines = [{"step": n, "loss": 1, "loss_per_target": 5 / n, "lr": 1 / n} for n in range(1, 60)]
    lines.append({"step": 50, "eval/held-out/CrossEntropyLoss": 0.2})
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw(tmp_path / "long.jsonl", tmp_path / "long.png")


def test_tensorboard_gets_every_number(tmp_path):
    loaders = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    from tensorboard.util import tensor_util

    report(config(tmp_path, tensorboard=True))
    found = {}
    for file in (tmp_path / "tensorboard").iterdir():
        for event in loaders.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(tensor_util.make_ndarray(value.tensor))))
    assert found["train/loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert found["train/lr"] == [(n, pytest.approx(1e-3 * n)) for n in (1, 2, 3)]
    assert found["eval/held-out/CrossEntropyLoss"] == [(3, 2.5)]
    assert {"train/loss_per_target", "train/grad_norm", "train/tokens_per_second"} <= found.keys()


def test_wandb_gets_the_config_and_every_number(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: calls.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    report(config(tmp_path, wandb=WandbConfig(project="zoo", tags=["a"])))
    settings, *steps, evaluation, end = calls
    assert (settings["project"], settings["name"], settings["tags"]) == ("zoo", "first", ["a"])
    assert settings["config"]["optimizer"]["name"] == "adamw"
    assert "entity" not in settings
    assert [(step, values["loss"], values["lr"]) for step, values in steps] == [
        (1, 3.0, 0.001), (2, 1.5, 0.002), (3, 1.0, 0.003)
    ]  # fmt: skip
    assert evaluation == (3, {"eval/held-out/CrossEntropyLoss": 2.5, "eval/held-out/Perplexity": 12.18})
    assert end == "finished"


@pytest.mark.parametrize(
    ("fields", "module"), [({"tensorboard": True}, "tensorboard"), ({"wandb": WandbConfig()}, "wandb")]
)
def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch, fields, module):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "tensorboard":
        monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(MissingBackendError, match=f"pip install {module}"):
        report(config(tmp_path, **fields))
