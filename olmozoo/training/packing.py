"""Documents in rows of one length."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from olmozoo.training.templates import Encoded
from olmozoo.typing import Array

WAITING = 1 << 22  # tokens that best-fit packing sorts at once


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, padded on the right.

    Attributes:
        ids: uint32 (rows, length).
        mask: bool (rows, length); True at tokens to learn, never at padding.
        lengths: int (rows,), without padding.
    """

    ids: Array
    mask: Array
    lengths: Array


class Packer:
    """Collects documents and gives rows.

    Args:
        length: tokens of a row.
        pad: the id of padding.

    Attributes:
        dropped: documents without a token to learn in their row.
        truncated: documents that were cut.
    """

    def __init__(self, length: int, pad: int) -> None:
        self.length, self.pad = length, pad
        self.dropped = self.truncated = 0
        self.ids, self.mask = np.zeros(0, np.uint32), np.zeros(0, np.bool_)  # what waits for more

    def add(self, encoded: Encoded) -> Iterator[Rows]:
        """Take documents; give the rows that are full."""
        raise NotImplementedError

    def finish(self) -> Iterator[Rows]:
        """Give the rows that are left."""
        raise NotImplementedError

    def _documents(self, encoded: Encoded) -> Iterator[tuple[Array, Array, bool]]:
        """The documents one by one, and whether each ends here; one that began before is joined."""
        start = 0
        for n, size in enumerate(encoded.lengths):
            ids, mask = encoded.ids[start : start + size], encoded.mask[start : start + size]
            start += size
            if n == 0 and encoded.joined:
                ids, mask = np.concatenate((self.ids, ids)), np.concatenate((self.mask, mask))
            yield ids, mask, n + 1 < len(encoded.lengths) or not encoded.more

    def _rows(self, groups: list[list[tuple[Array, Array]]]) -> Rows:
        """A row for each group of documents."""
        ids = np.full((len(groups), self.length), self.pad, np.uint32)
        mask = np.zeros(ids.shape, np.bool_)
        lengths = np.zeros(len(groups), np.int64)
        for row, group in enumerate(groups):
            for tokens, learned in group:
                slots = slice(lengths[row], lengths[row] + len(tokens))
                ids[row, slots], mask[row, slots] = tokens, learned
                lengths[row] = slots.stop
        return Rows(ids, mask, lengths)


class Separate(Packer):
    """A document a row. A longer one is cut on the right, and left out if it then has nothing to learn."""

    def add(self, encoded: Encoded) -> Iterator[Rows]:
        """Take documents; give a row for each that ends."""
        groups = []
        for ids, mask, ends in self._documents(encoded):
            if not ends:  # one token more than fits shows that it is cut
                self.ids, self.mask = ids[: self.length + 1], mask[: self.length + 1]
            elif not mask[1 : self.length].any():
                self.dropped += 1
            else:
                self.truncated += len(ids) > self.length
                groups.append([(ids[: self.length], mask[: self.length])])
        if groups:
            yield self._rows(groups)

    def finish(self) -> Iterator[Rows]:
        """Nothing is left."""
        return iter(())


class Concatenated(Packer):
    """All documents one after the other, cut into rows; the last row is padded."""

    def add(self, encoded: Encoded) -> Iterator[Rows]:
        """Take documents; give the rows that are full."""
        ids, mask = np.concatenate((self.ids, encoded.ids)), np.concatenate((self.mask, encoded.mask))
        full = len(ids) // self.length
        end = full * self.length
        self.ids, self.mask = ids[end:], mask[end:]
        if full:
            shape = (full, self.length)
            yield Rows(ids[:end].reshape(shape), mask[:end].reshape(shape), np.full(full, self.length))

    def finish(self) -> Iterator[Rows]:
        """Give the last row."""
        if len(self.ids):
            yield self._rows([[(self.ids, self.mask)]])


class BestFit(Packer):
    """Documents whole in rows, each where it leaves the least room, the longest first.

    A document longer than a row is cut into rows, and what remains of it is packed. Documents are sorted by length
    among some millions of tokens at a time, so that memory is bounded.
    """

    def __init__(self, length: int, pad: int) -> None:
        super().__init__(length, pad)
        self.waiting: list[tuple[Array, Array]] = []
        self.tokens = 0

    def add(self, encoded: Encoded) -> Iterator[Rows]:
        """Take documents; give rows where enough have come together."""
        for ids, mask, ends in self._documents(encoded):
            stop = len(ids) if ends else len(ids) // self.length * self.length
            for start in range(0, stop, self.length):
                piece = slice(start, min(start + self.length, stop))
                self.waiting.append((ids[piece], mask[piece]))
            self.tokens += stop
            self.ids, self.mask = ids[stop:], mask[stop:]
            if self.tokens >= max(WAITING, 16 * self.length):
                yield from self.finish()

    def finish(self) -> Iterator[Rows]:
        """Give the rows of what waits."""
        sizes = [len(ids) for ids, _ in self.waiting]
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # sorted: what is free in a row, and the row
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            at = bisect.bisect_left(room, (sizes[i], 0))
            if at < len(room):
                free, row = room.pop(at)
            else:
                free, row = self.length, len(rows)
                rows.append([])
            rows[row].append(i)
            if free > sizes[i]:
                bisect.insort(room, (free - sizes[i], row))
        if rows:
            yield self._rows([[self.waiting[i] for i in sorted(row)] for row in sorted(rows, key=min)])
        self.waiting, self.tokens = [], 0


PACKINGS: dict[str, type[Packer]] = {"none": Separate, "concat": Concatenated, "best-fit": BestFit}
