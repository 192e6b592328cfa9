"""Check an installed olmozoo with one wing: make, save, load, generate, convert. `make dist-check` runs it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import numpy as np

import olmozoo
from olmozoo.backends import installed, load


def main(wing: str) -> None:
    """Run every check in a temporary folder."""
    assert "site-packages" in olmozoo.__file__, f"olmozoo is not the installed one: {olmozoo.__file__}"
    assert installed() == [wing], f"installed frameworks: {installed()}, expected {wing} alone"
    assert files("olmozoo").joinpath("py.typed").is_file()
    config = olmozoo.Olmo2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=1
    )
    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[wing]
    model_class = getattr(import_module(f"olmozoo.{wing}"), f"{prefix}Olmo2ForCausalLM")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        model_class(config, seed=0).save_pretrained(folder)
        ids = np.array([[5, 9, 12]])
        answer = load(folder, wing, "float32").generate(ids, np.ones_like(ids), max_new_tokens=4)
        assert answer.shape == (1, 7)
        for arguments in (
            ["info", folder],
            ["convert", folder, Path(temporary, "msgpack"), "--to", "flax-msgpack", "--verify"],
            ["diff", folder, Path(temporary, "msgpack")],
        ):
            subprocess.run([sys.executable, "-P", "-m", "olmozoo", *map(str, arguments)], check=True)
    print(f"olmozoo {olmozoo.__version__} with {wing}: passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
