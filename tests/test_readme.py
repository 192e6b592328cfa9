"""The README's own code, run as it stands against a small hub that serves a tiny model under the published name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documents import README, blocks, published_model, run_commands
from tests.helpers.wings import WINGS, needs


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory):
    with published_model(tmp_path_factory.mktemp("readme")) as environment:
        yield environment


def test_there_is_an_example_for_each_framework():
    named = [re.search(r"olmozoo\.(pt|tf|flax) ", block) for block in blocks(README, "python")]
    assert [match and match[1] for match in named] == ["pt", "tf", "flax", None]
    assert all(len(block.strip().splitlines()) <= 13 for block in blocks(README, "python"))


@pytest.mark.parametrize("wing", WINGS)
def test_the_example_runs(hub_environment, wing, tmp_path):
    code = next(block for block in blocks(README, "python") if f"olmozoo.{wing} " in block)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:olmozoo", "-c", code],
        capture_output=True, text=True, env=hub_environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Language modeling is" in done.stdout
    assert "The sky" in done.stdout


@needs("pt", "tf", "flax")
def test_the_example_of_generation_runs(hub_environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", blocks(README, "python")[3]],
        capture_output=True,
        text=True,
        env=hub_environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1] == lines[2] != ""


@needs("pt", "tf", "flax")
def test_the_commands_run(hub_environment, tmp_path):
    pytest.importorskip("matplotlib")
    commands = [
        line.split("#")[0]
        for block in blocks(README, "sh")
        for line in block.splitlines()
        if line.startswith("olmozoo ")
    ]
    assert len(commands) == 10
    (tmp_path / "text.txt").write_text(README[:500], encoding="utf-8")
    run_commands(commands, hub_environment, tmp_path)
    assert (tmp_path / "divergence.png").exists()


def test_a_command_runs_in_a_shell(hub_environment, tmp_path):
    command = next(line for block in blocks(README, "sh") for line in block.splitlines() if "olmozoo info" in line)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=hub_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hidden_size" in done.stdout


def test_the_two_commands_are_in_the_makefile():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for line in blocks(README, "sh")[1].splitlines():
        target = line.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
