"""Text to ids and back, by a repository's own tokenizer files, chat template included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
import tokenizers

from olmozoo.errors import InputError
from olmozoo.hub import resolve
from olmozoo.text.chat import Message, chat_templates, checked, compile_template, plain, render
from olmozoo.text.tokenizer_files import SPECIAL, read_files
from olmozoo.typing import Array, HubOptions, StrPath


class Tokenizer:
    """A repository's tokenizer: ids, special tokens, chat template.

    Args:
        backend: the `tokenizers.Tokenizer`.
        special_tokens: the texts of `bos_token`, `eos_token`, `pad_token` and `unk_token`, as far as there are such.
        chat_templates: Jinja templates by name; the one called `default` is used unless another is asked for.

    Attributes:
        bos_token, eos_token, pad_token, unk_token: text of the special token, or None.
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: its id, or None.
        chat_templates: see above.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.chat_templates = dict(chat_templates or {})
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (
            (special_tokens or {}).get(name) for name in SPECIAL
        )
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            None if text is None else backend.token_to_id(text)
            for text in (self.bos_token, self.eos_token, self.unk_token, self.pad_token)
        )

    @classmethod
    def from_pretrained(cls, path_or_repo: StrPath, **hub: Unpack[HubOptions]) -> Self:
        """The tokenizer of a folder or of a repository on the hub.

        It is read from tokenizer.json, or from vocab.json and merges.txt (GPT-2's byte-level BPE, which OPT uses). OPT
        begins every text with its bos token, whether or not its tokenizer.json says so; other tokenizer.json files
        keep their own rules. Special tokens are named by tokenizer_config.json and special_tokens_map.json, and where
        neither mentions one, by its id in config.json.

        Args:
            path_or_repo: the folder or the repository.
            **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`; see `olmozoo.hub.resolve`.

        Raises:
            HubError: the repository cannot be downloaded and is not in the cache.
            CheckpointError: there are no tokenizer files, or they are broken or contradict each other.
            ConfigError: one of the JSON files beside them is not readable.
        """
        folder = resolve(path_or_repo, need="tokenizer", **hub)
        backend, special, settings = read_files(folder)
        return cls(backend, special, chat_templates(folder, settings))

    # --------------------------------------------------------------------------------------------------- text and ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, by default with the special tokens that the repository's own rules add.

        Special tokens that are spelled out in the text become their ids.

        Raises:
            InputError: this is not text, or it has half of a surrogate pair in it.
        """
        if not isinstance(text, str):
            raise InputError(f"text is of type {type(text).__name__}, expected str")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # the library's, where a str is not valid Unicode
            raise InputError(f"text is not valid Unicode: {error}") from error

    def decode(self, ids: Iterable[int] | Array | int, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Spaces stay as they are.

        Ids past the tokenizer's vocabulary (a model's may be padded larger) give nothing.

        Raises:
            InputError: an id is negative.
        """
        known = self.known_ids(ids, skip_special_tokens)
        if self.byte_level:
            return b"".join(map(self.token_bytes().__getitem__, known)).decode("utf-8", "replace")
        return self.backend.decode(known, skip_special_tokens=False)

    def batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> tuple[Array, Array]:
        """Texts as input_ids and attention_mask, int64 (batch, seq), padded on the left.

        Raises:
            InputError: no texts, or a text without a token.
        """
        return pad_left([self.encode(text, add_special_tokens) for text in texts], self.padding_id)

    @property
    def padding_id(self) -> int:
        """What a batch's shorter rows hold on their left: pad, else eos, else 0. The mask hides it."""
        return next((i for i in (self.pad_token_id, self.eos_token_id) if i is not None), 0)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self._tokens)

    def check_ids(self, ids: Iterable[int] | Array, vocab_size: int) -> None:
        """Make sure that a model of `vocab_size` rows has one for each id.

        Raises:
            InputError: a tokenizer has more tokens than the model, and the ids use one of those.
        """
        for i in ids:
            if i >= vocab_size:
                token = self._tokens[i] if i < self.vocab_size else None
                raise InputError(
                    f"token {token!r} has the id {i}, and the model's vocab_size is {vocab_size}: "
                    f"the tokenizer, of {self.vocab_size} ids, is not this model's"
                )

    # ------------------------------------------------------------------------------------------------- tokens as bytes

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for, by id; b"" for an id that the vocabulary lacks.

        In a byte-level tokenizer a token may be a part of a character; an added token is its own text in UTF-8. In any
        other tokenizer, the UTF-8 of the token decoded alone. Computed once.
        """
        return self._bytes

    @cached_property
    def _bytes(self) -> list[bytes]:
        if not self.byte_level:
            texts = (self.backend.decode([i], skip_special_tokens=False) for i in range(self.vocab_size))
            return [text.encode() for text in texts]
        alphabet, added = _byte_alphabet(), self.backend.get_added_tokens_decoder()

        def convert(i: int, token: str | None) -> bytes:
            if token is None:
                return b""
            if i in added or not alphabet.keys() >= set(token):
                return token.encode()
            return bytes(map(alphabet.__getitem__, token))

        return [convert(i, token) for i, token in enumerate(self._tokens)]

    @cached_property
    def _tokens(self) -> list[str | None]:
        vocabulary = self.backend.get_vocab()
        tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            tokens[i] = token
        return tokens

    @cached_property
    def byte_level(self) -> bool:
        """Whether a token is bytes, of which characters are made only when they are joined."""
        decoder = self.backend.decoder
        return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def known_ids(self, ids: Iterable[int] | Array | int, skip_special_tokens: bool = True) -> list[int]:
        """The ids that `decode` makes text of: those of the vocabulary, without special tokens unless they are kept.

        Raises:
            InputError: an id is negative.
        """
        values = np.asarray(ids if isinstance(ids, (np.ndarray, int)) else list(ids)).reshape(-1).tolist()
        if any(i < 0 for i in values):
            raise InputError(f"id {min(values)} is negative, expected ids from 0 to {self.vocab_size - 1}")
        hidden = self._special_ids if skip_special_tokens else ()
        return [i for i in values if i < self.vocab_size and i not in hidden]

    # ----------------------------------------------------------------------------------------------------------- chats

    @overload
    def apply_chat_template(self, messages: Sequence[Message], *, tokenize: Literal[False], **options: Any) -> str: ...

    @overload
    def apply_chat_template(
        self, messages: Sequence[Message], *, tokenize: Literal[True] = True, **options: Any
    ) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int] | str:
        """A chat as the model was trained to read it, by the repository's Jinja template.

        The template is a stranger's program: it runs in Jinja's sandbox and sees plain values alone. It writes the
        special tokens itself, so none are added to what it wrote.

        Args:
            messages: the chat so far: `{"role": ..., "content": ...}` each. Keys that hold None are left out.
            add_generation_prompt: end with the words that open the assistant's answer.
            tokenize: return ids; False returns the text.
            chat_template: the name of one of the repository's templates, or a template itself. Default: `default`
                (`tool_use` where `tools` are given and there is one).
            **variables: further names for the template, such as `tools` or `documents`.

        Raises:
            InputError: a message is malformed, there is no template, or it fails or refuses the messages.
        """
        template = compile_template(self._chat_template(chat_template, bool(variables.get("tools"))))
        special = {name: getattr(self, name) for name in SPECIAL if getattr(self, name) is not None}
        names = {"tools": None, "documents": None, **special, **plain(variables, "template variable")}
        text = render(template, checked(messages), add_generation_prompt, names)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _chat_template(self, asked: str | None, tools: bool) -> str:
        if asked is not None:
            return self.chat_templates.get(asked, asked)
        if tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" not in self.chat_templates:
            named = f"; it has {', '.join(sorted(self.chat_templates))}" if self.chat_templates else ""
            raise InputError(f"the tokenizer has no default chat template{named}: give one as chat_template")
        return self.chat_templates["default"]


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


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 for itself, the others as the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
