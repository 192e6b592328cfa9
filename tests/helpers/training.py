"""Tokenizers and files for tests of training data."""

import gzip
import json
from pathlib import Path

import tokenizers
import zstandard
from tokenizers import models, pre_tokenizers

from olmozoo import Tokenizer
from tests.helpers.checkpoints import TEXT_CONFIG, train_tokenizer

CORPUS = "The quick brown fox jumps over the lazy dog. user assistant system Größe, naïve, 日本語. 42\n" * 20
EOS, PAD = "<|endoftext|>", "<|padding|>"  # ids 0 and 1


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of 300 tokens whose eos is 0 and whose pad is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    TEXT_CONFIG.save_pretrained(folder)
    train_tokenizer(folder, CORPUS)
    return folder


def word_tokenizer(size: int = 300, **special: str | None) -> Tokenizer:
    """A tokenizer of whole words: <eos>, <pad>, <unk> and w3, w4, ... up to `size`."""
    words = {"<eos>": 0, "<pad>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, size)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<eos>", "<pad>"])
    named = {"eos_token": "<eos>", "pad_token": "<pad>", **special}
    return Tokenizer(backend, {name: text for name, text in named.items() if text is not None})


def write_lines(path: Path, rows: list) -> Path:
    """JSON Lines, compressed as the file's name says."""
    return write_bytes(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())


def write_bytes(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
