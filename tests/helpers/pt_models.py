"""PyTorch models of the tests."""

import pytest

from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OLMO3, SMALL_OPT

pytest.importorskip("torch")

from olmozoo import pt

CLASSES = [getattr(pt, name) for name in pt.__all__ if hasattr(getattr(pt, name), "config_class")]


def config_of(cls):
    configs = (SMALL_OLMO2, SMALL_OLMO3, SMALL_OPT, SMALL_OLMO)
    return next(config for config in configs if isinstance(config, cls.config_class))
