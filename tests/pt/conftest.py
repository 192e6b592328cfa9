"""Fixtures of the PyTorch tests."""

import pytest

from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import SMALL_OLMO2


@pytest.fixture
def model(tmp_path):
    """A model in float32."""
    from olmozoo import pt

    return pt.Olmo2ForCausalLM.from_pretrained(write_checkpoint(tmp_path / "m", SMALL_OLMO2, dtype="float32"))


@pytest.fixture
def batch():
    """Ids and a mask with left padding."""
    import torch

    return tuple(torch.from_numpy(array) for array in left_padded(SMALL_OLMO2))
