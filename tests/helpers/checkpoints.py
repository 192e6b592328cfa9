"""Small checkpoints with random weights in which every mistake shows."""

from pathlib import Path

import numpy as np
import tokenizers

from olmozoo import Olmo2Config
from olmozoo.checkpoint import save_checkpoint
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head, Parameter

TEXT_CONFIG = Olmo2Config(
    vocab_size=320,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=1,
    eos_token_id=0,
)


def random_values(parameter: Parameter, seed: int = 0) -> np.ndarray:
    """float64 values that let no mistake hide: norms away from 1, biases away from 0, weights that matter."""
    values = np.random.default_rng([seed, *parameter.name.encode()]).standard_normal(parameter.shape)
    if parameter.kind == "norm":
        return 1 + 0.3 * values
    if parameter.kind == "embedding":
        return values
    return 0.3 * values if parameter.kind == "bias" else values / np.sqrt(parameter.shape[-1])


def write_checkpoint(
    folder: Path, config: ModelConfig, head: Head | None = "causal_lm", dtype="float64", max_shard_size="5GB", seed=0
) -> Path:
    """A checkpoint folder with random weights, written by the neutral core alone."""
    save_checkpoint(
        folder,
        config,
        head,
        read=lambda parameter: random_values(parameter, seed).astype(dtype),
        dtype=lambda parameter: dtype,
        max_shard_size=max_shard_size,
    )
    return folder


def left_padded(config: ModelConfig, batch: int = 3, length: int = 11, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int64 (batch, length); row i has 2 * i pads on its left."""
    ids = np.random.default_rng(seed).integers(2, config.vocab_size, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
        ids[row, : 2 * row] = config.pad_token_id or 0
    return ids, mask


def train_tokenizer(folder: Path, text: str) -> None:
    """Put a byte-level BPE tokenizer of 300 tokens, trained on `text`, into a checkpoint folder."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_text_checkpoint(folder: Path, config: ModelConfig = TEXT_CONFIG) -> Path:
    """A checkpoint folder with a tokenizer of fewer tokens than the model has rows, as in the published models."""
    write_checkpoint(folder, config, dtype="float32")
    train_tokenizer(folder, "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語. " * 20)
    return folder
