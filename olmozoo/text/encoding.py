"""What a tokenizer's call returns: rows of ids and what belongs to them, truncated, padded, as lists or tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import tokenizers

from olmozoo.errors import InputError, MissingBackendError
from olmozoo.typing import Array

Side = Literal["left", "right"]
SIDES = ("left", "right")
TENSORS = ("np", "pt", "tf", "jax")
STRATEGIES = ("longest_first", "only_first", "only_second")
IGNORED = -100  # a label without a loss
# The columns of a row: key -> (attribute of `tokenizers.Encoding`, its value at padding). Ids are padded by the pad id.
COLUMNS: dict[str, tuple[str, Any]] = {
    "input_ids": ("ids", None),
    "token_type_ids": ("type_ids", 0),
    "attention_mask": ("attention_mask", 0),
    "special_tokens_mask": ("special_tokens_mask", 1),
    "offset_mapping": ("offsets", (0, 0)),
}


@dataclass(frozen=True)
class Row:
    """The tokens of one text or pair of texts.

    Attributes:
        encoding: all of its tokens.
        kept: indices of the tokens that are left after truncation; None for all.
        padding: numbers of pads on the left and on the right.
    """

    encoding: tokenizers.Encoding
    kept: Sequence[int] | None = None
    padding: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        """Number of tokens with the pads."""
        return sum(self.padding) + len(self.encoding if self.kept is None else self.kept)

    def column(self, attribute: str, filler: Any) -> list[Any]:
        """An attribute of `tokenizers.Encoding`, by token."""
        values = getattr(self.encoding, attribute)
        if self.kept is not None:
            values = [values[i] for i in self.kept]
        left, right = self.padding
        return [filler] * left + list(values) + [filler] * right

    def truncated(self, max_length: int, strategy: str, side: Side, stride: int = 0) -> list[Row]:
        """The row cut to a length, and after it the rows of what was cut off.

        Tokens that the tokenizer's rules add are kept. "longest_first" cuts the longer text of a pair, then both to
        equal lengths.

        Args:
            max_length: the most tokens of a row.
            strategy: "longest_first", "only_first" or "only_second".
            side: the end that is cut.
            stride: number of tokens that two neighboring rows share.

        Raises:
            InputError: there is no room, or the text to cut is too short or not there.
        """
        if len(self) <= max_length:
            return [self]
        added = self.encoding.special_tokens_mask
        texts: list[list[int]] = [[], []]
        for i, sequence in enumerate(self.encoding.sequence_ids):
            if not added[i]:
                texts[sequence or 0].append(i)
        room = max_length - sum(added)
        if room < 0:
            raise InputError(f"max_length is {max_length}, and the tokenizer adds {sum(added)} tokens to each text")
        sizes = _sizes(len(texts[0]), len(texts[1]), room, strategy)
        parts = [_chunks(text, size, side, stride) for text, size in zip(texts, sizes, strict=True)]
        specials = [i for i, one in enumerate(added) if one]
        several = [(first, parts[1][0]) for first in parts[0]] + [(parts[0][0], second) for second in parts[1][1:]]
        return [replace(self, kept=sorted([*specials, *first, *second])) for first, second in several]

    def padded(self, length: int, side: Side) -> Row:
        """The row with pads up to a length; a longer one as it is."""
        pads = max(0, length - len(self))
        return replace(self, padding=(pads, 0) if side == "left" else (0, pads))


def _sizes(first: int, second: int, room: int, strategy: str) -> tuple[int, int]:
    """How many tokens of each text of a pair remain."""
    if strategy == "longest_first":
        if not second:
            return room, 0
        short = min(first, second)
        if 2 * short > room:  # both are cut; the longer one has the odd token
            short = room // 2
        return (short, room - short) if first <= second else (room - short, short)
    if strategy == "only_second" and not second:
        raise InputError("truncation is 'only_second', and there is no second text")
    kept, cut = (second, first) if strategy == "only_first" else (first, second)
    if room - kept <= 0:
        raise InputError(f"truncation is {strategy!r}, and the text to cut, of {cut} tokens, is too short for that")
    return (room - kept, kept) if strategy == "only_first" else (kept, room - kept)


def _chunks(text: Sequence[int], size: int, side: Side, stride: int) -> list[Sequence[int]]:
    """A text in pieces of `size` tokens, of which neighbors share `stride`; the piece that truncation keeps first."""
    if len(text) <= size or size == 0:
        return [text[:size]]
    if stride >= size:
        raise InputError(f"stride is {stride}, expected less than the {size} tokens of the text that remain")
    step = size - stride
    last = -(-(len(text) - size) // step)
    if side == "right":
        return [text[n * step : n * step + size] for n in range(last + 1)]
    ends = [len(text) - n * step for n in range(last + 1)]
    return [text[max(0, end - size) : end] for end in ends]


class BatchEncoding(dict[str, Any]):
    """Ids of texts and what belongs to them: a dict, whose keys are attributes too.

    The keys are `input_ids` and `attention_mask`, and as asked for `token_type_ids`, `special_tokens_mask`,
    `offset_mapping`, `length`, `overflow_to_sample_mapping`, `labels` and `assistant_masks`. `model(**encoding)` works.

    Args:
        data: the values by key.
        rows: the tokens of each row, for `tokens`, `word_ids`, `sequence_ids` and `char_to_token`; empty for ids that
            are not made from text.
    """

    def __init__(self, data: Mapping[str, Any], rows: Sequence[Row] = ()) -> None:
        super().__init__(data)
        self.rows = list(rows)

    def __getattr__(self, name: str) -> Any:
        """The value of a key."""
        if name in self:
            return self[name]
        raise AttributeError(f"the encoding has no {name}; it has {', '.join(self)}")

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move PyTorch tensors to a device; returns the encoding itself.

        Raises:
            InputError: the values are not PyTorch tensors.
        """
        for key, value in self.items():
            if not hasattr(value, "to"):
                raise InputError(f"{key} is of type {type(value).__name__}: use return_tensors='pt' to move it")
            self[key] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None) -> BatchEncoding:
        """Convert the values to arrays or tensors; returns the encoding itself. See `to_tensor`."""
        if tensor_type is not None:
            for key, value in self.items():
                self[key] = to_tensor(value, tensor_type, key)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as the vocabulary spells them; "" at padding."""
        return self._row(batch_index).column("tokens", "")

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The index of the word that each token of a row is from; None for added tokens and padding."""
        return self._row(batch_index).column("word_ids", None)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 or 1, the text of a pair that each token of a row is from; None for added tokens and padding."""
        return self._row(batch_index).column("sequence_ids", None)

    def char_to_token(self, batch_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        """The index of the token that a character is in; None where no token is.

        Args:
            batch_or_char: the row, or with one argument the character of row 0.
            char: the character of the text.
            sequence_index: the text of a pair.
        """
        index, char = (0, batch_or_char) if char is None else (batch_or_char, char)
        row = self._row(index)
        sequences, offsets = row.column("sequence_ids", None), row.column("offsets", (0, 0))
        found = (i for i, (start, end) in enumerate(offsets) if sequences[i] == sequence_index and start <= char < end)
        return next(found, None)

    def mask_of_spans(self, batch_index: int, spans: Sequence[tuple[int, int]]) -> list[int]:
        """1 at each token of a row from the first to the last one of a range of characters, else 0.

        Args:
            batch_index: the row.
            spans: ranges of characters, (start, end).
        """
        mask = [0] * len(self._row(batch_index))
        for start, end in spans:
            first, last = (self.char_to_token(batch_index, char) for char in (start, end - 1))
            if first is None:  # cut off
                break
            stop = len(mask) if last is None else last + 1
            mask[first:stop] = [1] * (stop - first)
        return mask

    def _row(self, index: int) -> Row:
        if not -len(self.rows) <= index < len(self.rows):
            raise InputError(f"row {index} has no tokens: the encoding has {len(self.rows)} rows made from text")
        return self.rows[index]


def to_tensor(value: Any, kind: str, name: str = "value") -> Any:
    """Lists of integers as an array or tensor: int64 in NumPy and PyTorch, int32 in TensorFlow and JAX.

    Args:
        value: a list of integers or of rows of one length; or an array or tensor.
        kind: "np", "pt", "tf" or "jax".
        name: of the value, for errors.

    Raises:
        InputError: the rows have several lengths, or there is no such kind.
        MissingBackendError: the framework is not installed.
    """
    if kind not in TENSORS:
        raise InputError(f"return_tensors is {kind!r}, expected one of {', '.join(map(repr, TENSORS))}")
    try:
        array = np.asarray(value, np.int64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} has rows of several lengths, no tensor: use padding=True, or truncation") from error
    try:
        if kind == "pt":
            import torch

            return torch.from_numpy(array)
        if kind == "tf":
            import tensorflow as tf

            return tf.constant(array, tf.int32)
        if kind == "jax":
            import jax.numpy as jnp

            return jnp.asarray(array, jnp.int32)
    except ImportError as error:
        raise MissingBackendError(f"return_tensors is {kind!r}, and {error.name} is not installed") from error
    return array


def labels_of(ids: Sequence[int], mask: Sequence[int], side: Side) -> list[int]:
    """The ids as labels: -100 at padding, and for the first token of a left-padded row, predicted from a pad."""
    labels = [i if real else IGNORED for i, real in zip(ids, mask, strict=True)]
    if side == "left" and mask and not mask[0] and any(mask):
        labels[mask.index(1)] = IGNORED
    return labels


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


def to_lists(value: Any) -> Any:
    """Arrays and tensors as lists of Python's numbers; lists stay as they are."""
    if hasattr(value, "tolist"):  # NumPy, PyTorch, JAX
        return value.tolist()
    if hasattr(value, "numpy"):  # TensorFlow
        return value.numpy().tolist()
    if isinstance(value, (list, tuple)):
        return [to_lists(item) for item in value]
    if isinstance(value, Iterator):
        return [to_lists(item) for item in value]
    return value


def checked_side(value: Any, name: str) -> Side:
    """A side.

    Raises:
        InputError: it is neither "left" nor "right".
    """
    if value not in SIDES:
        raise InputError(f"{name} is {value!r}, expected 'left' or 'right'")
    return cast("Side", value)
