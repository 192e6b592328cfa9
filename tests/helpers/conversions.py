"""What the tests of `conversion/` share: its programs, and how to damage a checkpoint."""

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def run_program(name: str, *arguments) -> subprocess.CompletedProcess:
    """Run a program as a user does; its output as text."""
    command = [sys.executable, "-m", f"conversion.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def assert_logits(folder: Path, wing: str, expected: Path) -> None:
    """Assert that a folder gives the logits in an expected.npz to 1e-5, computed in float32."""
    from olmozoo.backends import load

    arrays = np.load(expected / "expected.npz")
    ids = arrays["input_ids"]
    found = load(folder, wing, "float32").forward(ids, np.ones_like(ids))["logits"]
    assert np.abs(found - arrays["logits"]).max() < 1e-5


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Attack:
    """Runs code when a naive reader unpickles it: makes a file, so that a test can see it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)
