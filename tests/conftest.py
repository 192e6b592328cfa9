"""Small models for every test: checkpoints with random weights in which every mistake shows."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and tests run side by side

import gc
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from olmozoo import InputError, convert
from olmozoo.backend import BACKENDS, installed
from olmozoo.checkpoint import save_checkpoint
from olmozoo.families.base import Head, ModelConfig, Parameter

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process of all: the others get it from that one
    PROGRAMS = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

WINGS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in installed(), reason=f"olmozoo[{name}] is not installed"))
    for name in BACKENDS
]


@pytest.fixture(autouse=True, scope="module")
def memory_given_back():
    """After each file, let go of what frameworks have compiled: programs pile up to gigabytes otherwise."""
    yield
    let_programs_go()


def let_programs_go() -> None:
    """Free what frameworks have compiled and nothing uses any more."""
    gc.collect()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


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


def refusal(model, keep: str, folder: Path) -> str:
    """What a model says that must not be saved (`keep` is "save"), or converted to that wing; nothing is written."""
    with pytest.raises(InputError) as caught:
        model.save_pretrained(folder / "new") if keep == "save" else convert(model, to=keep)
    assert not (folder / "new").exists()
    return str(caught.value)


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
