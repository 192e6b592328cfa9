"""PyTorch models of the tests."""

import pytest

pytest.importorskip("torch")

from olmozoo import pt

CLASSES = [getattr(pt, name) for name in pt.__all__ if hasattr(getattr(pt, name), "config_class")]
