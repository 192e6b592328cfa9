"""Documents as tokens, and which of these a model learns to write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmozoo.errors import InputError
from olmozoo.text.chat import checked, render_chat
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.text.tokenizer_files import library_errors
from olmozoo.training.sources import Record, parse, parts
from olmozoo.typing import Array

ASSISTANT = "assistant"
TULU = "tulu"
# The format of AI2's prepare_tulu_data.py as a chat template, for the tokenizer of a model that is trained on it.
TULU_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_NOTHING = np.zeros(0, np.uint32)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Encoded:
    """Documents as tokens, one after the other.

    Attributes:
        ids: uint32 (tokens,).
        mask: bool (tokens,); True at tokens to learn.
        lengths: the number of tokens of each document.
        joined: the first document continues the last one of what came before.
        more: the last document continues in what comes next.
        kinds: the number of documents that begin here by kind, those that are left out too.
        dropped: the number of documents left out because they have nothing to learn.
    """

    ids: Array
    mask: Array
    lengths: list[int]
    joined: bool
    more: bool
    kinds: Counter[str]
    dropped: int


class Encoder:
    """Makes tokens and masks of documents.

    - A text is its tokens, with those that the tokenizer's rules put before a text, and eos. All are learned.
    - A prompt and a completion are tokenized apart. The completion is learned, with the eos after it.
    - A chat is tokenized as the template renders it, and what the assistant writes is learned, with the token that ends
      it. With `template="tulu"` it is as in AI2's prepare_tulu_data.py: eos, then for each message `<|role|>` and the
      content, stripped, on lines of their own, each tokenized apart, with eos after the assistant's content.

    What the assistant writes is what the template marks with `{% generation %}`. With a template without that mark, the
    chat is rendered up to each of the assistant's messages, and up to its end, and both must begin the whole.

    Args:
        tokenizer: with an eos token.
        template: "tulu", or None for the tokenizer's own chat template.

    Raises:
        InputError: `template` is something else, or the tokenizer does not fit the format of Tulu.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        if template not in (None, TULU):
            raise InputError(f"template is {template!r}, expected 'tulu', or none for the tokenizer's own")
        self.tokenizer, self.template = tokenizer, template
        self.source = TULU_TEMPLATE if template == TULU else tokenizer.chat_templates.get("default")
        self.end = np.array([tokenizer.eos_token_id], np.uint32)
        rules = tokenizer.backend.encode("a")
        self.lead = np.array(rules.ids[: [*rules.special_tokens_mask, 0].index(0)], np.uint32)
        self.special = tuple(t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special)
        if template == TULU and (
            len(ids := self._encode(f"{tokenizer.eos_token}\n")) != 2 or ids[0] != tokenizer.eos_token_id
        ):
            raise InputError(
                f"template is 'tulu', and the tokenizer makes {ids.tolist()} of {tokenizer.eos_token!r} and the end of "
                f"a line, expected two tokens, of which the first is eos, {tokenizer.eos_token_id}"
            )

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Tokens and masks of documents.

        Raises:
            InputError: a document is malformed; the error names its file and line.
        """
        pieces: list[tuple[Array, Array]] = [(_NOTHING, np.zeros(0, np.bool_))]
        lengths: list[int] = []
        kinds: Counter[str] = Counter()
        dropped = 0
        for record in records:
            kind, content = parse(record)
            try:
                ids, mask = self._tokens(kind, content, record)
            except InputError as error:
                raise InputError(f"{record.where}: {error}") from error
            kinds[kind] += record.first
            if record.first and record.last and not mask.any():
                dropped += 1
                continue
            pieces.append((ids, mask))
            if record.first or not lengths:
                lengths.append(len(ids))
            else:
                lengths[-1] += len(ids)
        ids, mask = map(np.concatenate, zip(*pieces, strict=True))
        return Encoded(ids, mask, lengths, not records[0].first, not records[-1].last, kinds, dropped)

    def _tokens(self, kind: str, content: Any, record: Record) -> tuple[Array, Array]:
        if kind == "chat":
            return self._tulu(content) if self.template == TULU else self._chat(content)
        prompt, text = content if kind == "prompt" else ("", content)
        before = np.concatenate((self.lead if record.first else _NOTHING, self._encode(prompt)))
        after = self.end if record.last else _NOTHING
        learned = self._encode(text)
        if kind == "text" and record.first and record.last and not len(learned):
            return _NOTHING, np.zeros(0, np.bool_)
        return _joined([(before, kind == "text"), (learned, True), (after, True)])

    def _tulu(self, messages: Any) -> tuple[Array, Array]:
        pieces = [(self.end, False)]
        for n, message in enumerate(checked(messages)):
            role, content = message["role"], message.get("content")
            if not isinstance(content, str):
                raise InputError(f"message {n} has the content {repr(content)[:60]}, expected text")
            pieces.append((self._encode(f"<|{role}|>\n"), False))
            if role == ASSISTANT:
                ids = self._encode(f"{content.strip()}{self.tokenizer.eos_token}\n")
                pieces += [(ids[:-1], True), (ids[-1:], False)]
            else:
                pieces.append((self._encode(f"{content.strip()}\n"), False))
        return _joined(pieces)

    def _chat(self, messages: Any) -> tuple[Array, Array]:
        text, spans = self._render(messages)
        if not _GENERATION.search(self.source or ""):
            spans = self._answers(messages, text)
        with library_errors(InputError, "the chat is not encoded"):
            encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(starts), np.bool_)
        for start, end in spans:
            mask |= (starts < end) & (ends > start)
        return np.array(encoding.ids, np.uint32), mask

    def _answers(self, messages: Sequence[Any], whole: str) -> list[tuple[int, int]]:
        """The ranges of characters that the assistant writes, by rendering the chat up to them."""
        spans = []
        for n, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            problem = f"message {n} is the assistant's, and the chat template"
            advice = "mark what is learned with {% generation %} in the template, or use tulu as template"
            if n == 0:
                raise InputError(f"{problem} does not show where the first message begins: {advice}")
            before = self._render(messages[:n], add_generation_prompt=True)[0]
            after = self._render(messages[: n + 1])[0]
            if not (whole.startswith(after) and after.startswith(before)):
                raise InputError(f"{problem} renders what is around it in another way when it is there: {advice}")
            # White space after the token that ends an answer is the template's.
            written = after[len(before) :]
            if (stripped := written.rstrip()).endswith(self.special):
                written = stripped
            spans.append((len(before), len(before) + len(written)))
        return spans

    def _render(self, messages: Any, add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        if self.source is None:
            raise InputError("a chat, and the tokenizer has no chat template of its own: use tulu as template")
        variables = {"tools": None, "documents": None, **self.tokenizer.special_tokens_map}
        return render_chat(self.source, messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def _encode(self, text: str) -> Array:
        ids = [self.tokenizer.encode(part, add_special_tokens=False) for part in parts(text)]
        return np.concatenate([np.array(part, np.uint32) for part in ids])


def _joined(pieces: Sequence[tuple[Array, bool]]) -> tuple[Array, Array]:
    """Pieces of ids, each learned or not, as ids and mask."""
    mask = np.repeat([learned for _, learned in pieces], [len(ids) for ids, _ in pieces])
    return np.concatenate([ids for ids, _ in pieces]), mask
