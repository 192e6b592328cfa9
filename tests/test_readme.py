"""The README's own code, run as it stands against a small hub that serves a tiny model under the published name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from olmozoo import Olmo2Config
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.hub_server import HubServer
from tests.helpers.wings import WINGS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
REPO = "allenai/OLMo-2-0425-1B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory):
    config = Olmo2Config(
        vocab_size=300,
        hidden_size=40,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=0,
    )
    folder = write_checkpoint(tmp_path_factory.mktemp("readme"), config, dtype="float32")
    train_tokenizer(folder, README)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with HubServer() as hub:
        hub.add_repo(REPO, {"main": files})
        hub.add_repo("allenai/OLMo-2-0325-32B", {"main": {"config.json": files["config.json"]}})
        home = tmp_path_factory.mktemp("home")
        yield {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }


def test_there_is_an_example_for_each_framework():
    named = [re.search(r"olmozoo\.(pt|tf|flax) ", block) for block in blocks("python")]
    assert [match and match[1] for match in named] == ["pt", "tf", "flax", None]
    assert all(len(block.strip().splitlines()) <= 13 for block in blocks("python"))


@pytest.mark.parametrize("wing", WINGS)
def test_the_example_runs(hub_environment, wing, tmp_path):
    code = next(block for block in blocks("python") if f"olmozoo.{wing} " in block)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:olmozoo", "-c", code],
        capture_output=True, text=True, env=hub_environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Language modeling is" in done.stdout
    assert "The sky" in done.stdout


def test_the_example_of_generation_runs(hub_environment, tmp_path):
    for name in ("torch", "tensorflow", "flax"):
        pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[3]], capture_output=True, text=True, env=hub_environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1] == lines[2] != ""


def test_the_commands_run(hub_environment, tmp_path):
    for name in ("torch", "tensorflow", "flax", "matplotlib"):
        pytest.importorskip(name)
    commands = [
        line.split("#")[0] for block in blocks("sh") for line in block.splitlines() if line.startswith("olmozoo ")
    ]
    assert len(commands) == 7
    (tmp_path / "text.txt").write_text(README[:500], encoding="utf-8")
    for command in commands:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=hub_environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "divergence.png").exists()


def test_the_two_commands_are_in_the_makefile():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for line in blocks("sh")[0].splitlines():
        target = line.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
