"""The benchmarks run, with a tiny model and little work; what they measure is not looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.wings import WINGS, needs

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


def run(part: str, *options: str, status: int = 0, **environment: str) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{part}.py"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PEER_PYTHON": "", **environment}, timeout=300
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def rows(text: str) -> list[list[str]]:
    """The rows of all tables, without their heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@needs("pt")
def test_decoding():
    text = run("decoding", "--tiny", "--only", "pt,transformers")
    assert text.startswith("## Decoding")
    assert "cores" in text
    names = [row[0] for row in rows(text)]
    assert names == ["", "olmozoo, PyTorch", "Transformers 5, PyTorch"]
    assert rows(text)[1][3].endswith("x")


@pytest.mark.parametrize("wing", WINGS)
def test_training(wing):
    if wing == "pt":
        pytest.importorskip("accelerate")
    found = rows(run("training", "--tiny", "--only", wing, "--steps", "2"))
    assert found[1][0] == f"olmozoo train, {wing}"
    assert found[2][0] == f"bare loop over its step, {wing}"
    assert all(float(row[1].split()[0].replace(",", "")) > 0 for row in found[1:])
    assert all(cell.endswith("x") for cell in found[1][2:4])


@needs("pt")
@pytest.mark.parametrize(("part", "count"), [("growth", 5), ("quantization", 4), ("loading", 1)])
def test_other_parts(part, count):
    found = rows(run(part, "--tiny", "--only", "pt"))
    assert sum(row[0].startswith("olmozoo, PyTorch") for row in found) == count


def test_conversion():
    found = rows(run("conversion", "--tiny", "--only", "safetensors"))
    assert found[1][0] == "safetensors"


@needs("pt")
def test_the_gpu_part_on_the_cpu():
    import torch

    text = run("gpu", "--tiny", "--device", "cpu", TORCHDYNAMO_DISABLE="1")  # it would compile for long
    assert [row[0] for row in rows(text)] == [
        *("decoding", "1 rows, step by step", "1 rows, one compiled step"),
        *("2 rows, step by step", "2 rows, one compiled step"),
        *("int8, 1 rows, one compiled step", "int4, 1 rows, one compiled step"),
        *("prompt", "16 tokens", "training", "2 x 16, amp_bf16"),
    ]
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in run("gpu", status=1)


def test_a_section_is_written_among_the_others(harness):
    text = ""
    for name in ("Loading", "Decoding", "Training"):
        text = harness.with_section(text, name, f"## {name}\n\nfirst\n")
    text = harness.with_section(text, "Decoding", "## Decoding\n\nsecond\n\n### of it\n")
    parts = text.split("\n## ")
    assert [part.split("\n")[0] for part in parts] == [
        *("# Results", "Decoding", "Training", "Loading"),
        "What is not reached, and why",
    ]
    assert parts[1] == "Decoding\n\nsecond\n\n### of it\n"
    assert parts[3] == "Loading\n\nfirst\n"


def test_plots(harness, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "HERE", tmp_path)
    titles = {"pt": "ours", "transformers": "theirs"}
    panels = {"a": ("s", {"pt": [1.0, 2.0], "transformers": [0.5]}), "b": ("s", {"pt": [3.0]})}
    assert harness.bars(tmp_path / "plots/a.png", panels, titles) == "![a; b](plots/a.png)"
    lines = {"time": ("tokens", "seconds", {"pt": ([1, 2], [1.0, 2.1])}, 1)}
    assert harness.curves(tmp_path / "plots/b.png", lines, titles) == "![time](plots/b.png)"
    assert all((tmp_path / "plots" / name).stat().st_size > 5000 for name in ("a.png", "b.png"))


def test_medians_and_ratios(harness):
    assert harness.spread([3.0, 1.0, 2.0]) == "2.0 (1.0-3.0)"
    assert harness.ratio([2.0, 9.0], [1.0, 3.0]) == "2.50x (2.00-3.00)"
