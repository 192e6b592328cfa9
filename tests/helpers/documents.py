"""Code blocks of Markdown files, and a small hub that serves a tiny model under the names they use."""

import contextlib
import os
import re
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


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, those inside tabs included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


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
