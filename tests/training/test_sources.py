"""Files of documents: what is found, what is read, and how what cannot be read is refused."""

import gzip
import json
import os
import sys

import numpy as np
import pytest
import tokenizers
import zstandard
from tokenizers import Regex, models, pre_tokenizers

from olmozoo import InputError, MissingBackendError
from olmozoo.training import sources
from olmozoo.training.sources import find_files, parse, parts, read_batches
from tests.helpers.training import write_bytes, write_lines

DOCUMENTS = [
    {"text": "The quick\nGröße 日本"},
    {"prompt": "a", "completion": "b", "id": 3},
    {"messages": [], "text": "c"},
]
PARSED = [("text", "The quick\nGröße 日本"), ("prompt", ("a", "b")), ("chat", [])]


def records(*files):
    return [record for batch, _ in read_batches(find_files(files)) for record in batch]


def test_folders_and_globs_are_sorted_and_leave_other_files_out(tmp_path):
    for name in ("b/2.jsonl", "b/10.txt", "a.txt.gz", "c.json.zst", "d.parquet", "notes.md", "info.json", ".x/e.txt"):
        write_bytes(tmp_path / name, b"x")
    names = ["a.txt.gz", "b/10.txt", "b/2.jsonl", "c.json.zst", "d.parquet"]
    assert find_files([tmp_path]) == [tmp_path / name for name in names]
    assert find_files([tmp_path / "b/2.jsonl", tmp_path / "**/1*.txt"]) == [
        tmp_path / "b/2.jsonl",
        tmp_path / "b/10.txt",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_every_kind_and_compression(tmp_path, suffix):
    lines = write_lines(tmp_path / "b", DOCUMENTS).read_bytes().replace(b"\n", b"\n \n")
    file = write_bytes(tmp_path / f"a.jsonl{suffix}", b"\xef\xbb\xbf" + lines)
    found = records(file)
    assert [parse(record) for record in found] == PARSED
    assert [record.where for record in found] == [f"{file}:{n}" for n in (1, 3, 5)]


def test_several_frames_and_members_are_one_file(tmp_path):
    lines = [json.dumps(row).encode() + b"\n" for row in DOCUMENTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert [parse(record) for record in records(tmp_path / name)] == PARSED


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chat = [{"role": "user", "content": "Größe"}]
    rows = [{"text": "a", "messages": None, "id": 1}, {"text": None, "messages": chat, "id": 2}] * 700
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    found = records(tmp_path / "a.parquet")
    assert [parse(record) for record in found] == [("text", "a"), ("chat", chat)] * 700
    assert found[1233].where == f"{tmp_path / 'a.parquet'}: row 1234"
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet has the columns content, expected text, or messages"):
        records(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"c.parquet is not a readable parquet file"):
        records(tmp_path / "c.parquet")


def test_a_text_is_one_document_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART", 100)
    text = "".join(np.random.default_rng(0).choice(["Größe ", "日本 ", "word\n", "\r\n", "x. "], 500).tolist())
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        found = records(write_bytes(tmp_path / name, b"\xef\xbb\xbf" + text.encode()))
        assert "".join(record.value for record in found) == text
        assert all(len(record.value) <= 100 for record in found)
        assert [(r.first, r.last) for r in found] == [
            (True, False),
            *[(False, False)] * (len(found) - 2),
            (False, True),
        ]
    assert records(write_bytes(tmp_path / "empty.txt", b""))[0].value == ""


OLMO2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("splits", ["gpt2", "olmo2"])
def test_the_tokens_of_parts_are_those_of_the_whole(monkeypatch, splits):
    monkeypatch.setattr(sources, "PART", 150)
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits == "gpt2")
    split = pre_tokenizers.Split(Regex(OLMO2), "isolated")
    backend.pre_tokenizer = byte_level if splits == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
    words = [
        "the",
        "quick",
        "Größe",
        "日本語",
        "12345",
        " ",
        "  ",
        "\n",
        "\n\n",
        ".\n",
        "...",
        "don't",
        "\r\n",
        "\t",
        "\u3000",
    ]
    stream = np.random.default_rng(1)
    texts = ["".join(stream.choice(words, 500).tolist()) for _ in range(40)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    for text in texts:
        pieces = list(parts(text))
        assert len(pieces) > 5
        assert [i for piece in pieces for i in backend.encode(piece).ids] == backend.encode(text).ids


def test_a_text_without_words_is_cut_where_it_is_full(monkeypatch):
    monkeypatch.setattr(sources, "PART", 10)
    assert list(parts("x" * 25)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(parts("ab cdefghijkl")) == ["ab", " cdefghijk", "l"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', ":2: not JSON: Expecting ',' delimiter"),
        (b'{"text": "\xff"}', ":2: not JSON: 'utf-8' codec"),
        (b"[" * 10**6, ":2: not JSON: "),
        (b"[1]", ":2: a JSON list, expected an object with text, or messages, or prompt and completion"),
        (b'{"content": "a"}', ":2: an object with 'content', expected text, or messages, or prompt and completion"),
        (b'{"text": null}', ":2: an object with 'text', expected text, or messages"),
        (b'{"prompt": "a"}', ":2: an object with 'prompt', expected text"),
        (b'{"text": 3}', ":2: text is 3, expected text"),
        (b'{"prompt": "a", "completion": ["b"]}', ":2: completion is ['b'], expected text"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(InputError) as caught:
        list(map(parse, records(file)))
    assert f"{file}{message}" in str(caught.value)


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    for suffix in ("", ".gz", ".zst"):
        file = write_lines(tmp_path / f"a.jsonl{suffix}", [{"text": "a"}, {"text": "b" * 10**7}])
        with pytest.raises(InputError, match=r":2: more than 1,000 bytes, expected JSON Lines"):
            records(file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_files_that_break_off_or_are_something_else(tmp_path, name):
    whole = write_lines(tmp_path / name, [{"text": os.urandom(2000).hex()}]).read_bytes()
    (tmp_path / name).write_bytes(whole[:-9])
    with pytest.raises(InputError, match=f"{name} cannot be read: .*(end|break)"):
        records(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing compressed")
    with pytest.raises(InputError, match=f"{name} cannot be read: "):
        records(tmp_path / name)


def test_texts_that_are_not_utf8(tmp_path):
    with pytest.raises(InputError, match=r"a.txt is not UTF-8 at byte 4"):
        records(write_bytes(tmp_path / "a.txt", "Grö".encode() + b"\xff"))
    with pytest.raises(InputError, match=r"b.txt is not UTF-8 at byte 2"):
        records(write_bytes(tmp_path / "b.txt", "Grö".encode()[:-1]))


def test_what_is_not_there_or_not_read(tmp_path):
    write_bytes(tmp_path / "a.txt", b"x")
    write_bytes(tmp_path / "a.csv", b"x")
    write_bytes(tmp_path / "lfs.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    write_bytes(tmp_path / "page.jsonl", b"<!DOCTYPE html>")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    os.symlink(tmp_path / "a.txt", tmp_path / "b.txt")
    for data, message in (
        (["no.txt"], "there is no file no.txt"),
        ([tmp_path / "*.jsonl.gz"], "none matches it"),
        ([tmp_path / "empty"], "empty has no files to read: expected .txt, .jsonl, .parquet"),
        ([tmp_path / "a.csv"], "a.csv is of a kind that is not read: expected .txt"),
        ([tmp_path / "pipe.txt"], "pipe.txt is not a regular file"),
        ([tmp_path / "lfs.txt"], "Git LFS pointer"),
        ([tmp_path / "page.jsonl"], "web page"),
        ([tmp_path / "a.txt", tmp_path / "b.txt"], "b.txt is named twice, as .*a.txt before"),
        ([], "there are no data"),
    ):
        with pytest.raises(InputError, match=message):
            find_files(data)


@pytest.mark.parametrize(("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_library_that_is_absent_is_named(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingBackendError, match=rf"{name} needs {library}: pip install 'olmozoo\[training\]'"):
        records(tmp_path / name)
