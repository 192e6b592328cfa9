"""Text in, text out, on any backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from olmozoo.backend import Backend, load
from olmozoo.errors import InputError
from olmozoo.tokenizer import Tokenizer


class TextGenerationPipeline:
    """Continues texts.

    Args:
        model: the loaded model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Backend, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def __call__(self, texts: str | Sequence[str], **settings: Any) -> str | list[str]:
        """The continuations of texts, without the texts themselves: a string for a string, a list for a list.

        Args:
            texts: one prompt or several; several run as one batch.
            **settings: settings of `olmozoo.generation.GenerationConfig`, such as `max_new_tokens`.
        """
        single = isinstance(texts, str)
        ids, mask = self.tokenizer.batch([texts] if isinstance(texts, str) else list(texts))
        answers = self.model.generate(ids, mask, **settings)[:, ids.shape[1] :]
        decoded = [self.tokenizer.decode(row) for row in answers]
        return decoded[0] if single else decoded


def pipeline(
    task: str,
    model: str | os.PathLike[str],
    *,
    backend: str | None = None,
    dtype: str | None = None,
    **hub: Any,
) -> TextGenerationPipeline:
    """A pipeline for a task.

    Args:
        task: "text-generation".
        model: a folder, or a repository on the hub.
        backend: "pt", "tf" or "flax"; default the first that is installed.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: there is no such task or backend.
    """
    if task != "text-generation":
        raise InputError(f"task is {task!r}, expected 'text-generation'")
    return TextGenerationPipeline(load(model, backend, dtype, **hub), Tokenizer.from_pretrained(model, **hub))
