"""Documents in rows: every token once, masks with their tokens, padding never learned."""

import itertools
from collections import Counter

import numpy as np
import pytest

from olmozoo.training import packing
from olmozoo.training.packing import PACKINGS
from olmozoo.training.templates import Encoded

PAD = 999


def encoded(documents, joined=False, more=False):
    """Token i of a document n is 1000 n + i + 1000, and the odd ones are learned."""
    ids = np.array([i for ids in documents for i in ids], np.uint32)
    return Encoded(ids, ids % 2 == 1, [len(ids) for ids in documents], joined, more, Counter(), 0)


def numbered(lengths):
    return [list(range(1000 * n + 1000, 1000 * n + 1000 + length)) for n, length in enumerate(lengths)]


def rows_of(name, documents, length, cuts=()):
    """Rows of documents that come in batches which begin at `cuts`, tokens of the whole."""
    packer = PACKINGS[name](length, PAD)
    blocks = []
    ends = np.cumsum([len(ids) for ids in documents]).tolist()
    marks = [0, *cuts, ends[-1]]
    for start, stop in itertools.pairwise(marks):
        part = [ids[max(0, start - e + len(ids)) : stop - e + len(ids)] for ids, e in zip(documents, ends, strict=True)
                if e > start and e - len(ids) < stop]  # fmt: skip
        blocks += packer.add(encoded(part, start not in (0, *ends), stop not in ends))
    blocks += packer.finish()
    assert all(block.ids.dtype == np.uint32 and block.mask.dtype == np.bool_ for block in blocks)
    ids, mask, lengths = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("ids", "mask", "lengths"))
    assert ids.shape == mask.shape == (len(lengths), length)
    for row, learned, size in zip(ids, mask, lengths, strict=True):
        assert (row[size:] == PAD).all()
        assert (learned == ((row % 2 == 1) & (row != PAD))).all()
        assert (row[:size] != PAD).all()
    return packer, [row[:size].tolist() for row, size in zip(ids, lengths, strict=True)]


LENGTHS = [5, 1, 8, 20, 3, 7, 4, 2, 9, 33, 6]
DOCUMENTS = numbered(LENGTHS)


def test_a_document_a_row():
    packer, rows = rows_of("none", DOCUMENTS, 8)
    assert rows == [ids[:8] for ids in DOCUMENTS if len(ids) > 1]  # the second has no odd token
    assert (packer.dropped, packer.truncated) == (1, 3)


def test_a_document_whose_only_target_is_the_first_token_is_left_out():
    packer, rows = rows_of("none", [[3, 2, 4], [2, 3, 4], [2, 4, 6, 8, 3]], 4)
    assert rows == [[2, 3, 4]]
    assert (packer.dropped, packer.truncated) == (2, 0)


def test_concatenated():
    _, rows = rows_of("concat", DOCUMENTS, 8)
    flat = [i for ids in DOCUMENTS for i in ids]
    assert rows == [flat[i : i + 8] for i in range(0, len(flat), 8)]


def test_best_fit_keeps_documents_whole_and_wastes_little():
    _, rows = rows_of("best-fit", DOCUMENTS, 10)
    assert sorted(i for row in rows for i in row) == sorted(i for ids in DOCUMENTS for i in ids)
    for ids in DOCUMENTS:
        found = [row for row in rows if set(row) & set(ids)]
        assert len(found) == -(-len(ids) // 10), "a document is cut only if it is longer than a row"
    assert len(rows) == -(-sum(LENGTHS) // 10), "these lengths fill rows"
    # 6 goes to 3, which leaves one token, and not to the empty room of the row of 5.
    _, rows = rows_of("best-fit", numbered([5, 7, 3]), 10)
    assert [[i // 1000 - 1 for i in row] for row in rows] == [[0] * 5, [1] * 7 + [2] * 3]


@pytest.mark.parametrize("name", PACKINGS)
def test_rows_do_not_depend_on_batches(name, monkeypatch):
    monkeypatch.setattr(packing, "WAITING", 25)
    expected = rows_of(name, DOCUMENTS, 8)
    stream = np.random.default_rng(0)
    for _ in range(50):
        cuts = np.sort(stream.choice(range(1, sum(LENGTHS)), 6, replace=False)).tolist()
        found = rows_of(name, DOCUMENTS, 8, cuts)
        assert found[1] == expected[1]
        assert (found[0].dropped, found[0].truncated) == (expected[0].dropped, expected[0].truncated)


def test_best_fit_is_bounded(monkeypatch):
    monkeypatch.setattr(packing, "WAITING", 100)
    packer = PACKINGS["best-fit"](5, PAD)
    emitted = 0
    for _ in range(100):
        emitted += sum(len(block.ids) for block in packer.add(encoded(numbered([3] * 10))))
        assert packer.tokens < 100
    assert emitted >= 900
