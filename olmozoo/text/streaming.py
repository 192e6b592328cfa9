"""Text of an answer while it is being written."""

from __future__ import annotations

import codecs
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from olmozoo.errors import InputError
from olmozoo.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of ids that come one at a time, cut at whole characters. All of it together is `decode` of all ids.

    Args:
        tokenizer: of the ids.
        skip_special_tokens: as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._written = 0

    def put(self, token_id: int) -> str:
        """The text that is whole now; "" while a character still lacks some of its bytes."""
        known = self._tokenizer.known_ids(token_id, self._skip)
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(self._tokenizer.token_bytes()[i] for i in known))
        # Elsewhere a token's text may depend on the tokens before it, so that all are decoded again.
        self._ids += known
        return self._new(self._tokenizer.decode(self._ids, skip_special_tokens=False).rstrip("\ufffd"))

    def end(self) -> str:
        """What is left, with U+FFFD for a character that stayed incomplete. The next `put` begins a new text."""
        rest = self._utf8.decode(b"", final=True)
        if self._ids:
            rest = self._new(self._tokenizer.decode(self._ids, skip_special_tokens=False))
        self._ids, self._written = [], 0
        return rest

    def _new(self, text: str) -> str:
        new = text[self._written :]
        self._written += len(new)
        return new


class TextStreamer:
    """Writes an answer while `generate(..., streamer=...)` makes it; for one row.

    Args:
        tokenizer: of the model.
        write: gets each piece of text; default standard output, flushed.
        skip_prompt: do not write the prompt, which is what comes first.
        skip_special_tokens: as in `Tokenizer.decode`.
        stop_strings: nothing is written from the first of these on, so that text which may be the beginning of one
            waits for what comes next. (`generate` ends after the token that completes one.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        write: Callable[[str], object] | None = None,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.write = write or (lambda text: print(text, end="", flush=True))
        self.skip_prompt = skip_prompt
        self.stop_strings = tuple(stop_strings)
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        self._at_prompt = True
        self._waiting = ""
        self._stopped = False

    def put(self, value: Any) -> None:
        """Take the prompt's ids, and from then on each new token: an int, or an array of shape (n,) or (1, n).

        Raises:
            InputError: the ids are of several rows.
        """
        ids = np.asarray(value)
        if ids.ndim > 1 and ids.shape[0] != 1:
            raise InputError(f"a streamer got ids of shape {ids.shape}, expected those of one row")
        prompt, self._at_prompt = self._at_prompt, False
        if prompt and self.skip_prompt:
            return
        text = "".join(self._decoder.put(i) for i in ids.reshape(-1).tolist())
        if prompt:
            self._write(text)
        else:
            self._emit(text)

    def end(self) -> None:
        """Write what is left of the answer. What comes next is a new prompt."""
        self._emit(self._decoder.end())
        if not self._stopped:
            self._write(self._waiting)
        self._at_prompt, self._waiting, self._stopped = True, "", False

    def _emit(self, text: str) -> None:
        self._waiting += text
        found = [at for stop in self.stop_strings if (at := self._waiting.find(stop)) >= 0]
        if self._stopped or not text:
            return
        self._stopped = bool(found)
        sure = min(found, default=len(self._waiting) - self._doubtful())
        self._write(self._waiting[:sure])
        self._waiting = self._waiting[sure:]

    def _doubtful(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        sizes = (n for stop in self.stop_strings for n in range(1, len(stop)) if self._waiting.endswith(stop[:n]))
        return max(sizes, default=0)

    def _write(self, text: str) -> None:
        if text:
            self.write(text)


class TextIteratorStreamer(TextStreamer):
    """A `TextStreamer` to iterate over, while `generate` runs in another thread.

    Args:
        tokenizer: of the model.
        timeout: seconds to wait for the next piece before `queue.Empty`; default forever.
        **options: of `TextStreamer`.
    """

    def __init__(self, tokenizer: Tokenizer, timeout: float | None = None, **options: Any) -> None:
        self._pieces: queue.Queue[str | None] = queue.Queue()
        self._timeout = timeout
        super().__init__(tokenizer, self._pieces.put, **options)

    def end(self) -> None:
        """See `TextStreamer.end`; ends the iteration too."""
        super().end()
        self.close()

    def close(self) -> None:
        """End the iteration, whether or not `generate` came to its end."""
        self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        """The pieces of text, as they come."""
        while (piece := self._pieces.get(timeout=self._timeout)) is not None:
            yield piece
