"""Text to ids and back, by a repository's own tokenizer files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from olmozoo.errors import CheckpointError, InputError
from olmozoo.families.base import read_json
from olmozoo.hub import resolve

Array = np.ndarray[Any, np.dtype[Any]]


class Tokenizer:
    """A tokenizer.json, and the pad token that batches need.

    Args:
        backend: the `tokenizers.Tokenizer`.
        pad_token_id: what shorter rows of a batch hold on their left; default 0. The mask hides it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, pad_token_id: int | None = None) -> None:
        self.backend = backend
        self.pad_token_id = pad_token_id or 0

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The tokenizer of a folder or of a repository on the hub.

        Raises:
            HubError: the repository cannot be had.
            CheckpointError: there is no tokenizer.json, or it is broken.
        """
        folder = resolve(
            path_or_repo,
            need="tokenizer",
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; it holds {', '.join(sorted(os.listdir(folder)))}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file} is not a readable tokenizer: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        config = folder / "config.json"
        return cls(backend, read_json(config).get("pad_token_id") if config.is_file() else None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the special tokens that the file's own rules add unless told otherwise."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int] | Array, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids past the tokenizer's vocabulary (a model's may be padded larger) give nothing."""
        known = self.backend.get_vocab_size()
        return self.backend.decode([int(i) for i in ids if i < known], skip_special_tokens=skip_special_tokens)

    def batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> tuple[Array, Array]:
        """Texts as input_ids and attention_mask, int64 (batch, seq), padded on the left.

        Raises:
            InputError: no texts, or a text without a token.
        """
        return pad_left([self.encode(text, add_special_tokens) for text in texts], self.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Array, Array]:
    """Rows of ids as input_ids and attention_mask, int64 (batch, seq), padded on the left.

    Raises:
        InputError: there are no rows, or one is empty.
    """
    if not rows or not all(len(row) for row in rows):
        raise InputError("expected at least one text, each of at least one token")
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask
