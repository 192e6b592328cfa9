"""The commands as processes of their own."""

import subprocess
import sys

import pytest

from olmozoo import Olmo2Config
from olmozoo.text.pipeline import pipeline
from tests.helpers.checkpoints import write_text_checkpoint
from tests.helpers.wings import WINGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_checkpoint(tmp_path_factory.mktemp("text"))


def command(*words, check=True):
    done = subprocess.run([sys.executable, "-m", "olmozoo", *map(str, words)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("wing", WINGS)
def test_the_command_continues_a_prompt(folder, wing):
    done = command("generate", folder, "The quick", "--backend", wing, "--max-new-tokens", 8)
    assert done.stdout.startswith("The quick")
    expected = pipeline("text-generation", folder, backend=wing)("The quick", max_new_tokens=8)
    assert done.stdout == f"The quick{expected}\n"
    assert done.stderr == ""  # frameworks are quiet


def test_info_needs_the_config_alone(tmp_path):
    Olmo2Config.from_preset("olmo2-32b").save_pretrained(tmp_path)
    text = command("info", tmp_path).stdout
    for part in ("32,234,279,936", "rms_norm_eps", "attention", "64.47 GB", "128.94 GB", "262.14 kB"):
        assert part in text, part


def test_help_imports_no_framework():
    text = command("--help").stdout
    assert all(name in text for name in ("generate", "info", "verify"))
    program = """
import runpy, sys
sys.argv = ["olmozoo", "--help"]
try:
    runpy.run_module("olmozoo", run_name="__main__")
except SystemExit:
    print([name for name in ("torch", "tensorflow", "keras", "jax") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_errors_are_one_message_and_an_exit_code(tmp_path):
    done = command("info", tmp_path, check=False)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
