"""A small config, and its tensors loaded or rewritten."""

from pathlib import Path

import numpy as np

from olmozoo import Olmo2Config
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import Checkpoint

CONFIG = Olmo2Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    attention_bias=True,
)


TIED = CONFIG.replace(tie_word_embeddings=True)


def load(folder, config=CONFIG, head="causal_lm", dtype="float64", **options):
    weights = load_weights(Checkpoint(folder), config, head, dtype=np.dtype(dtype), **options)
    return {parameter.name: array for parameter, array in weights}


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a single-file checkpoint through the safetensors library, an independent writer."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
