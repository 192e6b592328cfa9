"""Text to ids and back, by a repository's own tokenizer files, chat template included."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
import tokenizers

from olmozoo.errors import InputError
from olmozoo.hub import resolve
from olmozoo.text.chat import Message, chat_templates, render_chat
from olmozoo.text.encoding import (
    COLUMNS,
    IGNORED,
    STRATEGIES,
    BatchEncoding,
    Row,
    checked_side,
    labels_of,
    pad_left,
    to_lists,
)
from olmozoo.text.tokenizer_files import EXTRA, SPECIAL, library_errors, read_files, write_files
from olmozoo.typing import Array, HubOptions, StrPath

# `model_max_length` of a tokenizer whose files give none, as Transformers writes it; any length above this is none.
UNLIMITED = int(1e30)
LIMIT = int(1e20)
Token = str | tokenizers.AddedToken


class _SpecialToken:
    """The text of a special token, as an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Tokenizer | None, owner: type | None = None) -> Any:
        return self if tokenizer is None else tokenizer.special_tokens_map.get(self.name)

    def __set__(self, tokenizer: Tokenizer, value: Token | None) -> None:
        tokenizer.set_special_token(self.name, value)


class _SpecialTokenId:
    """The id of a special token, as an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    def __get__(self, tokenizer: Tokenizer | None, owner: type | None = None) -> Any:
        if tokenizer is None:
            return self
        text = tokenizer.special_tokens_map.get(self.name)
        return None if text is None else tokenizer.backend.token_to_id(text)

    def __set__(self, tokenizer: Tokenizer, value: int | None) -> None:
        text = None if value is None else tokenizer.backend.id_to_token(value)
        if text is None and value is not None:
            raise InputError(f"{self.name}_id is {value}, and the vocabulary has no such id")
        tokenizer.set_special_token(self.name, text)


class Tokenizer:
    """A repository's tokenizer: text to ids and back, special tokens, chat template.

    Methods and attributes are those of Transformers' tokenizers, with the same results, except for three defaults:
    rows are padded on the left, as `generate` needs them, unless tokenizer_config.json gives a side; `decode` leaves
    special tokens out; and `apply_chat_template` returns ids (`return_dict=False`). A batch without a pad token is
    padded with eos, and a special token that the vocabulary lacks is refused.

    Args:
        backend: the `tokenizers.Tokenizer`.
        special_tokens: the texts of `bos_token`, `eos_token`, `unk_token`, `sep_token`, `pad_token`, `cls_token` and
            `mask_token`, as far as there are such.
        chat_templates: Jinja templates by name; the one called `default` is used unless another is asked for.
        extra_special_tokens: the texts of further special tokens.
        settings: the contents of tokenizer_config.json, of which `model_max_length`, `padding_side` and
            `truncation_side` are read and all is written by `save_pretrained`.
        name_or_path: where the tokenizer is from.

    Attributes:
        bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token: text of the special token, or
            None. One can be set to another token of the vocabulary. What is added to a text does not follow that
            until `add_bos_token` or `add_eos_token` is set.
        bos_token_id, eos_token_id, ...: its id, or None. Can be set.
        chat_templates: see above.
        padding_side: "left" or "right". Pad training batches on the right.
        truncation_side: the end of a text that truncation cuts; "right" by default.
        model_max_length: the most tokens of a text, where truncation is asked for without a length; 10**30 if the files
            give none.
        model_input_names: what a call returns by default.
    """

    bos_token, bos_token_id = _SpecialToken(), _SpecialTokenId()
    eos_token, eos_token_id = _SpecialToken(), _SpecialTokenId()
    unk_token, unk_token_id = _SpecialToken(), _SpecialTokenId()
    sep_token, sep_token_id = _SpecialToken(), _SpecialTokenId()
    pad_token, pad_token_id = _SpecialToken(), _SpecialTokenId()
    cls_token, cls_token_id = _SpecialToken(), _SpecialTokenId()
    mask_token, mask_token_id = _SpecialToken(), _SpecialTokenId()
    is_fast = True

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        *,
        extra_special_tokens: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        name_or_path: str = "",
    ) -> None:
        self.backend = backend
        self.chat_templates = dict(chat_templates or {})
        self.extra_special_tokens = list(extra_special_tokens)
        self.name_or_path = name_or_path
        self._special = dict(special_tokens or {})
        self._settings = dict(settings or {})
        longest: Any = self._settings.get("model_max_length")
        known = isinstance(longest, (int, float)) and longest > 0
        self.model_max_length = int(min(longest, UNLIMITED)) if known else UNLIMITED
        self.padding_side = self._settings.get("padding_side", "left")
        self.truncation_side = self._settings.get("truncation_side", "right")
        self.model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(cls, path_or_repo: StrPath, **hub: Unpack[HubOptions]) -> Self:
        """The tokenizer of a folder or of a repository on the hub.

        It is read from tokenizer.json, which keeps its own rules, or from vocab.json and merges.txt (GPT-2's byte-level
        BPE, which OPT uses). With the latter, and with a tokenizer.json that is alone and has no rules, OPT begins
        every text with its bos token, unless tokenizer_config.json has `"add_bos_token": false`. Special tokens are
        named by tokenizer_config.json and special_tokens_map.json, and where those name none, by the ids in
        config.json.

        Args:
            path_or_repo: the folder or the repository.
            **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`; see `olmozoo.hub.resolve`.

        Raises:
            HubError: the repository cannot be downloaded and is not in the cache.
            CheckpointError: there are no tokenizer files, or they are broken or contradict each other.
            ConfigError: one of the JSON files beside them is not readable.
        """
        folder = resolve(path_or_repo, need="tokenizer", **hub)
        backend, special, extra, settings = read_files(folder)
        templates = chat_templates(folder, settings)
        name = os.fspath(path_or_repo)
        return cls(backend, special, templates, extra_special_tokens=extra, settings=settings, name_or_path=name)

    def save_pretrained(self, folder: StrPath) -> tuple[str, ...]:
        """Write the tokenizer into a folder, such as one that a model was saved to.

        The files are tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates, which
        Transformers loads too. Files of an older tokenizer there are replaced; other files stay.

        Args:
            folder: made if need be.

        Returns:
            The paths of the files.

        Raises:
            CheckpointError: the folder could not be written and is as it was before.
        """
        settings = {name: value for name, value in self._settings.items() if name not in (*SPECIAL, *EXTRA)}
        settings |= {
            **self.special_tokens_map,
            "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }
        if self.extra_special_tokens:
            settings["additional_special_tokens"] = self.extra_special_tokens
        return write_files(folder, self.backend, settings, self.chat_templates)

    # --------------------------------------------------------------------------------------------------- text and ids

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool = False,
        return_attention_mask: bool = True,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        return_labels: bool = False,
    ) -> BatchEncoding:
        """Ids of one text, or of a list of texts, and the mask of their padding.

        For training: `tokenizer(texts, padding=True, padding_side="right", return_labels=True, return_tensors="pt")`.

        Args:
            text: a text, or a list of texts or of pairs of texts; with `is_split_into_words` lists of words instead.
            text_pair: the second text of a pair, or a list of those.
            add_special_tokens: add the special tokens that the tokenizer's rules add.
            padding: True or "longest" pads to the longest row, "max_length" to `max_length`, False not at all.
            truncation: True or "longest_first" cuts rows to `max_length`, of a pair the longer text first;
                "only_first" and "only_second" cut that text. Default: True if `max_length` is given without padding.
            max_length: in tokens, special ones included; default `model_max_length`.
            stride: with `return_overflowing_tokens`, tokens that neighboring rows of one text share.
            is_split_into_words: the texts are lists of words.
            pad_to_multiple_of: pad further, to a multiple of this.
            padding_side: "left" or "right"; default the tokenizer's.
            truncation_side: "left" or "right"; default the tokenizer's.
            return_tensors: "np", "pt", "tf" or "jax", always with a batch axis; default lists of int. int64 in NumPy
                and PyTorch, int32 in TensorFlow and JAX.
            return_token_type_ids: 0 for the first text, 1 for the second.
            return_attention_mask: 1 for tokens, 0 for padding.
            return_overflowing_tokens: give what truncation cuts as further rows, with `overflow_to_sample_mapping`.
            return_special_tokens_mask: 1 for tokens that the rules add.
            return_offsets_mapping: (start, end) of each token's characters in its text.
            return_length: the number of tokens of each row, with padding.
            return_labels: the ids as `labels`, with -100 at padding. In rows padded on the left the first token is -100
                too, because it would be predicted from a pad.

        Raises:
            InputError: a text is no text or not valid Unicode, rows of several lengths become tensors, or an option is
                out of range.
        """
        strategy, longest = self._truncation(truncation, padding, max_length)
        side = checked_side(padding_side or self.padding_side, "padding_side")
        cut = checked_side(truncation_side or self.truncation_side, "truncation_side")
        inputs, batched = _texts(text, text_pair, is_split_into_words)
        with library_errors(InputError, "the tokenizer does not encode this text"):
            encodings = self.backend.encode_batch(
                inputs, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
            )
        rows, samples = [], []
        for i, encoding in enumerate(encodings):
            several = [Row(encoding)] if strategy is None else Row(encoding).truncated(longest, strategy, cut, stride)
            rows += several if return_overflowing_tokens else several[:1]
            samples += [i] * (len(several) if return_overflowing_tokens else 1)
        width = self._width([len(row) for row in rows], padding, max_length, pad_to_multiple_of, strategy is not None)
        rows = [row.padded(width, side) for row in rows]

        asked = {
            "input_ids": True,
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        data: dict[str, list[Any]] = {}
        for key, (attribute, filler) in COLUMNS.items():
            if asked[key]:
                pad = self.padding_id if key == "input_ids" else filler
                data[key] = [row.column(attribute, pad) for row in rows]
        if return_length:
            data["length"] = [len(row) for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        if return_labels:
            masks = (row.column("attention_mask", 0) for row in rows)
            data["labels"] = [labels_of(ids, mask, side) for ids, mask in zip(data["input_ids"], masks, strict=True)]
        if not batched and return_tensors is None and not return_overflowing_tokens:
            single = {key: values[0] if isinstance(values[0], list) else values for key, values in data.items()}
            return BatchEncoding(single, rows)
        return BatchEncoding(data, rows).convert_to_tensors(return_tensors)

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ids of a text, by default with the special tokens that the tokenizer's own rules add.

        Special tokens that are spelled out in the text become their ids.

        Args:
            text: the text.
            text_pair: the second text of a pair.
            add_special_tokens: add the special tokens of the rules.
            **options: of a call, such as `truncation`, `max_length` or `return_tensors`.

        Returns:
            A list of int, or with `return_tensors` a tensor (1, seq).

        Raises:
            InputError: this is not text, or it has half of a surrogate pair in it.
        """
        if options or text_pair is not None or not isinstance(text, str):
            return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]
        _check_text(text, "text", words=False)
        with library_errors(InputError, f"the text {_shown(text)} is not encoded"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, as the vocabulary spells them (GPT-2's byte alphabet in OLMo and OPT)."""
        return self(text, pair, add_special_tokens=add_special_tokens).tokens()

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Spaces stay as they are.

        Ids past the tokenizer's vocabulary (a model's may be padded larger) give nothing.

        Args:
            token_ids: ids, or rows of ids; lists, arrays or tensors.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: no effect, as in Transformers for byte-pair tokenizers.

        Returns:
            A text; for rows of ids a list of texts.

        Raises:
            InputError: an id is negative or no integer.
        """
        ids = to_lists(token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        known = self.known_ids(ids, skip_special_tokens)
        if self.byte_level:
            return b"".join(map(self.token_bytes().__getitem__, known)).decode("utf-8", "replace")
        return self.backend.decode(known, skip_special_tokens=False)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of rows of ids; see `decode`."""
        texts = self.decode(sequences, skip_special_tokens)
        return [texts] if isinstance(texts, str) else texts

    def batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> tuple[Array, Array]:
        """Texts as input_ids and attention_mask, int64 (batch, seq), padded on the left.

        Raises:
            InputError: no texts, or a text without a token.
        """
        return pad_left([self.encode(text, add_special_tokens=add_special_tokens) for text in texts], self.padding_id)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad encoded texts, such as those that a data loader collects.

        Args:
            encoded_inputs: what a call returned, or a list of that, with `input_ids`. Besides these, `attention_mask`,
                `token_type_ids`, `special_tokens_mask` and `labels` (with -100) are padded.
            padding, max_length, pad_to_multiple_of, padding_side: as in a call.
            return_attention_mask: make an `attention_mask` where there is none.
            return_tensors: as in a call.

        Raises:
            InputError: `input_ids` are missing, or an option is out of range.
        """
        if not isinstance(encoded_inputs, Mapping):
            if not encoded_inputs:
                raise InputError("expected at least one encoded text")
            encoded_inputs = {key: [one[key] for one in encoded_inputs] for key in encoded_inputs[0]}
        data = {key: to_lists(value) for key, value in encoded_inputs.items()}
        if "input_ids" not in data:
            raise InputError(f"the encoding has {', '.join(data) or 'nothing'}, expected input_ids")
        batched = not data["input_ids"] or isinstance(data["input_ids"][0], list)
        if not batched:
            data = {key: [value] for key, value in data.items()}
        if return_attention_mask and "attention_mask" not in data:
            data["attention_mask"] = [[1] * len(row) for row in data["input_ids"]]
        side = checked_side(padding_side or self.padding_side, "padding_side")
        sizes = [len(row) for row in data["input_ids"]]
        width = self._width(sizes, padding, max_length, pad_to_multiple_of, False)
        fillers = {"input_ids": self.padding_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
        for key, filler in {**fillers, "labels": IGNORED}.items():
            if key in data and all(isinstance(row, list) for row in data[key]):
                pads = [[filler] * max(0, width - len(row)) for row in data[key]]
                both = zip(data[key], pads, strict=True)
                data[key] = [more + row if side == "left" else row + more for row, more in both]
        if not batched:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data).convert_to_tensors(return_tensors)

    def _truncation(
        self, truncation: bool | str | None, padding: bool | str, max_length: int | None
    ) -> tuple[str | None, int]:
        """The strategy, None for no truncation, and the length."""
        if truncation is None:
            truncation = max_length is not None and padding is False
        strategy = "longest_first" if truncation is True else truncation
        longest = self.model_max_length if max_length is None else max_length
        if strategy in (False, "do_not_truncate") or (max_length is None and longest > LIMIT):
            return None, 0
        if strategy not in STRATEGIES:
            raise InputError(f"truncation is {truncation!r}, expected True, False or one of {', '.join(STRATEGIES)}")
        if longest < 0:
            raise InputError(f"max_length is {longest}, expected at least 0")
        return str(strategy), longest

    def _width(
        self, sizes: list[int], padding: bool | str, max_length: int | None, multiple: int | None, truncated: bool
    ) -> int:
        """The length that rows are padded to; 0 for no padding."""
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise InputError(f"padding is {padding!r}, expected True, False, 'longest' or 'max_length'")
        if padding in (False, "do_not_pad"):
            return 0
        if multiple is not None and multiple < 1:
            raise InputError(f"pad_to_multiple_of is {multiple}, expected at least 1")
        if truncated and multiple and max_length is not None and max_length % multiple:
            raise InputError(f"max_length is {max_length}, no multiple of pad_to_multiple_of, which is {multiple}")
        width = max(sizes, default=0)
        if padding == "max_length":
            width = self.model_max_length if max_length is None else max_length
            if width > LIMIT:  # as in Transformers: without a length there is no padding
                return 0
        return -(-width // multiple) * multiple if multiple else width

    @property
    def padding_id(self) -> int:
        """What a batch's shorter rows have at padding: pad, else eos, else 0. The mask hides it."""
        return next((i for i in (self.pad_token_id, self.eos_token_id) if i is not None), 0)

    def check_ids(self, ids: Iterable[int] | Array, vocab_size: int) -> None:
        """Make sure that a model of `vocab_size` rows has one for each id.

        Raises:
            InputError: a tokenizer has more tokens than the model, and the ids use one of those.
        """
        for i in ids:
            if i >= vocab_size:
                token = self._tokens[i] if i < len(self._tokens) else None
                raise InputError(
                    f"token {token!r} has the id {i}, and the model's vocab_size is {vocab_size}: "
                    f"the tokenizer, of {len(self._tokens)} ids, is not this model's"
                )

    # ------------------------------------------------------------------------------------------------------ vocabulary

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        """True, though the vocabulary may be empty."""
        return True

    def __repr__(self) -> str:
        """Name, sizes, sides and special tokens."""
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map})"
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the base vocabulary, without added ones; `len(tokenizer)` counts all."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """See `get_vocab`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """The added tokens by id."""
        return self.backend.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens: text to id."""
        return {token.content: i for i, token in sorted(self.added_tokens_decoder.items())}

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or the ids of several; of an unknown one that of `unk_token`, or None."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of several, as the vocabulary spells them; None for an unknown id."""
        ids = to_lists(ids)
        if isinstance(ids, int):
            return self._token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._token(i) for i in ids if i not in skipped]

    def _token(self, i: int) -> str | None:
        return self._tokens[i] if 0 <= i < len(self._tokens) else None

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens as `tokenize` gives them."""
        decoder = self.backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def add_tokens(self, new_tokens: Token | Sequence[Token], special_tokens: bool = False) -> int:
        """Add tokens that the vocabulary lacks, with the ids after its last.

        The model needs as many rows: `model.resize_token_embeddings(len(tokenizer))` in PyTorch.

        Args:
            new_tokens: a text or `tokenizers.AddedToken`, or a list of those.
            special_tokens: `decode` leaves them out, and they are matched before the text is normalized.

        Returns:
            How many tokens are new.
        """
        tokens = [new_tokens] if isinstance(new_tokens, (str, tokenizers.AddedToken)) else list(new_tokens)
        if any(not isinstance(token, (str, tokenizers.AddedToken)) or not str(token) for token in tokens):
            raise InputError(f"new_tokens are {new_tokens!r}, expected texts")
        for name in ("_bytes", "_tokens", "_special_ids"):
            self.__dict__.pop(name, None)
        with library_errors(InputError, "the tokens are not added"):
            return self.backend.add_special_tokens(tokens) if special_tokens else self.backend.add_tokens(tokens)

    # -------------------------------------------------------------------------------------------------- special tokens

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Set special tokens, and add those that the vocabulary lacks; see `add_tokens`.

        Args:
            special_tokens_dict: a text or `tokenizers.AddedToken` by name, such as `{"pad_token": "<|pad|>"}`; a list
                for `extra_special_tokens` (or `additional_special_tokens`).
            replace_extra_special_tokens: the list replaces the older one; False extends it.

        Returns:
            How many tokens are new.

        Raises:
            InputError: there is no such special token.
        """
        added = 0
        for name, value in special_tokens_dict.items():
            if name not in (*SPECIAL, *EXTRA):
                raise InputError(f"{name!r} is no special token, expected {', '.join(SPECIAL)} or {EXTRA[1]}")
            listed = list(value) if name in EXTRA else [value]
            tokens = [_special(token) if isinstance(token, str) else token for token in listed]
            added += self.add_tokens(tokens, special_tokens=True)
            if name in SPECIAL:
                self.set_special_token(name, value)
            else:
                older = [] if replace_extra_special_tokens else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*older, *map(str, tokens)]))
        return added

    def set_special_token(self, name: str, value: Token | None) -> None:
        """Make a token of the vocabulary a special token; `tokenizer.pad_token = "</s>"` does that.

        Args:
            name: such as "pad_token".
            value: its text, or None for no such token.

        Raises:
            InputError: the vocabulary lacks it.
        """
        if value is not None and not isinstance(value, (str, tokenizers.AddedToken)):
            raise InputError(f"{name} is {value!r}, expected a text")
        text = None if value is None else str(value)
        if text is not None and self.backend.token_to_id(text) is None:
            raise InputError(
                f"{name} is {text!r}, which the vocabulary lacks: "
                f"add it with add_special_tokens({{{name!r}: {text!r}}}) and resize the model's embeddings"
            )
        self._special.pop(name, None)
        if text is not None:
            self._special[name] = text

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The texts of the special tokens by name, without `extra_special_tokens`."""
        return {name: self._special[name] for name in SPECIAL if self._special.get(name) is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of all special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self.convert_tokens_to_ids(token) for token in self.all_special_tokens]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens the rules add to a text, or to a pair."""
        return self.backend.num_special_tokens_to_add(pair)

    @property
    def add_bos_token(self) -> bool:
        """Whether every text begins with bos. Setting it replaces the tokenizer's rules for what is added to a text."""
        return self.backend.encode("a").special_tokens_mask[:1] == [1]

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_around(value, self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether every text ends with eos. Setting it replaces the tokenizer's rules for what is added to a text."""
        return self.backend.encode("a").special_tokens_mask[-1:] == [1]

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_around(self.add_bos_token, value)

    def _add_around(self, bos: bool, eos: bool) -> None:
        """Begin every text with bos and end it with eos, as far as asked."""
        for name, asked in (("bos_token", bos), ("eos_token", eos)):
            if asked and getattr(self, name) is None:
                raise InputError(f"the tokenizer has no {name} to add: set it first")

        def template(n: int) -> list[str]:  # a number after a token is its token_type_id
            return [*bos * [f"{self.bos_token}:{n}"], f"{'$B' if n else '$A'}:{n}", *eos * [f"{self.eos_token}:{n}"]]

        used = {*bos * [self.bos_token], *eos * [self.eos_token]}
        self.backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template(0),
            pair=template(0) + template(1),
            special_tokens=[(t, self.backend.token_to_id(t)) for t in used],
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
            texts = (self.backend.decode([i], skip_special_tokens=False) for i in range(len(self._tokens)))
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
        if wrong := [i for i in values if not isinstance(i, int)]:
            raise InputError(f"id {wrong[0]!r} is no integer")
        if any(i < 0 for i in values):
            raise InputError(f"id {min(values)} is negative, expected ids from 0 to {len(self._tokens) - 1}")
        hidden = self._special_ids if skip_special_tokens else ()
        return [i for i in values if i < len(self._tokens) and i not in hidden]

    # ----------------------------------------------------------------------------------------------------------- chats

    @overload
    def apply_chat_template(self, messages: Sequence[Message], *, tokenize: Literal[False], **options: Any) -> str: ...

    @overload
    def apply_chat_template(self, messages: Any, *, tokenize: bool = True, **options: Any) -> Any: ...

    def apply_chat_template(
        self,
        messages: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """A chat as the model was trained to read it, by the repository's Jinja template.

        The template is a stranger's program: it runs in Jinja's sandbox, sees plain values alone, and is bounded in
        time and size. It writes the special tokens itself, so none are added to what it wrote.

        Args:
            messages: the chat so far: `{"role": ..., "content": ...}` each; or a list of chats. Keys that hold None are
                left out.
            tools, documents: for the template, as JSON schemas and objects.
            chat_template: the name of one of the repository's templates, or a template itself. Default: `default`
                (`tool_use` where `tools` are given and there is one).
            add_generation_prompt: end with the words that open the assistant's answer.
            continue_final_message: end with the last words of the last message, for an answer that begins with them; a
                text names the key that has them.
            tokenize: return ids; False returns the text.
            padding, truncation, max_length, return_tensors: as in a call.
            return_dict: return a `BatchEncoding`, with `attention_mask`.
            return_assistant_tokens_mask: add `assistant_masks`, 1 at tokens in the template's generation blocks; needs
                `return_dict`.
            tokenizer_kwargs: further options of a call.
            **variables: further names for the template.

        Returns:
            Ids (a tensor with `return_tensors`), a `BatchEncoding` or a text; of a list of chats a list.

        Raises:
            InputError: a message is malformed, there is no template, or it fails or refuses the messages.
        """
        if return_assistant_tokens_mask and (continue_final_message or not (return_dict and tokenize)):
            raise InputError("return_assistant_tokens_mask needs return_dict and tokenize, and a chat that is whole")
        source = self.get_chat_template(chat_template, tools)
        several = isinstance(messages, (list, tuple)) and len(messages) > 0 and isinstance(messages[0], (list, tuple))
        chats = messages if several else [messages]
        rendered = [
            render_chat(
                source,
                chat,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={"tools": tools, "documents": documents, **self.special_tokens_map, **variables},
            )
            for chat in chats
        ]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if several else texts[0]
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        encoded = self(texts if several else texts[0], add_special_tokens=False, **options)
        if return_assistant_tokens_mask:
            masks = [encoded.mask_of_spans(i, spans) for i, (_, spans) in enumerate(rendered)]
            encoded["assistant_masks"] = masks if several else masks[0]
        if return_tensors is not None and not several:
            encoded = BatchEncoding({key: [value] for key, value in encoded.items()}, encoded.rows)
        encoded.convert_to_tensors(return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that `apply_chat_template` uses.

        Raises:
            InputError: there is none by default.
        """
        if chat_template is not None:
            return self.chat_templates.get(chat_template, chat_template)
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" not in self.chat_templates:
            named = f"; it has {', '.join(sorted(self.chat_templates))}" if self.chat_templates else ""
            raise InputError(f"the tokenizer has no default chat template{named}: give one as chat_template")
        return self.chat_templates["default"]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template, or several by name; None if there is none. Can be set."""
        return (
            self.chat_templates["default"] if list(self.chat_templates) == ["default"] else self.chat_templates or None
        )

    @chat_template.setter
    def chat_template(self, value: str | Mapping[str, str] | None) -> None:
        self.chat_templates = {"default": value} if isinstance(value, str) else dict(value or {})


def _texts(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
    """Texts and pairs as the tokenizers library takes them, and whether they are a batch.

    Raises:
        InputError: one is no text, or the lists of a pair differ in length.
    """
    if isinstance(pair, bool):
        raise InputError(f"text_pair is {pair}, expected a text: add_special_tokens is a keyword")
    batched = isinstance(text, (list, tuple)) and (not words or (len(text) > 0 and isinstance(text[0], (list, tuple))))
    if not batched:
        inputs = [(text, pair)] if pair else [text]
    elif pair is None:
        inputs = [tuple(one) if not words and isinstance(one, (list, tuple)) else one for one in text]
    elif isinstance(pair, str) or len(pair) != len(text):
        raise InputError(f"text_pair is {_shown(pair)}, expected a list of {len(text)} texts, one for each text")
    else:
        inputs = list(zip(text, pair, strict=True))
    for n, one in enumerate(inputs):
        two = isinstance(one, tuple) and (not words or not all(isinstance(part, str) for part in one))
        if two and len(one) != 2:
            raise InputError(f"text {n} is {_shown(one)}, expected a text or a pair of texts")
        for part in one if two else (one,):
            _check_text(part, f"text {n}" if batched else "text", words)
    return inputs, batched


def _check_text(text: Any, name: str, words: bool) -> None:
    kind = "a list of words" if words else "str"
    if not isinstance(text, (list, tuple) if words else str):
        raise InputError(f"{name} is of type {type(text).__name__}, expected {kind}")
    for part in text if words else (text,):
        if not isinstance(part, str):
            raise InputError(f"{name} has a word of type {type(part).__name__}, expected str")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is not valid Unicode: {error}") from error


def _shown(value: Any) -> str:
    """The beginning of a value's repr, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _special(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, normalized=False, special=True)


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 for itself, the others as the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
