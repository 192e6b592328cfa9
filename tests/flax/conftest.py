"""Fixtures of the Flax tests."""

import pytest

from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import SMALL_OLMO2


@pytest.fixture
def x64():
    """float64 in JAX, for one test."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in float32; tests do not change it."""
    from olmozoo import flax

    folder = write_checkpoint(tmp_path_factory.mktemp("m"), SMALL_OLMO2, dtype="float32")
    return flax.FlaxOlmo2ForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch():
    """Ids and a mask with left padding."""
    return left_padded(SMALL_OLMO2)
