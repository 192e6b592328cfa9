"""Code blocks of Markdown files, and a small hub that serves a tiny model under the names they use."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from olmozoo import Olmo2Config
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPO = "allenai/OLMo-2-0425-1B"
# Runs commands one after the other, so that each framework is imported once.
RUN_COMMANDS = """
import json, sys
from olmozoo.cli import main
for sys.argv in json.load(sys.stdin):
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise SystemExit(f"{sys.argv}: {ended.code}")
"""


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, those inside tabs included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def run_commands(commands: list[str], environment: dict[str, str], folder: Path) -> str:
    """Run `olmozoo` commands as a shell splits them, in `folder`, and return what they print."""
    words = [shlex.split(command, comments=True) for command in commands]
    assert all(program == "olmozoo" for program, *_ in words)
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS],
        input=json.dumps(words), capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def published_model(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a process for which the hub is a server on this machine, with a tiny OLMo 2 as `REPO`."""
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
    model = write_checkpoint(folder / "model", config, dtype="float32")
    train_tokenizer(model, README)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with HubServer() as hub:
        hub.add_repo(REPO, {"main": files})
        hub.add_repo("allenai/OLMo-2-0325-32B", {"main": {"config.json": files["config.json"]}})
        yield {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
