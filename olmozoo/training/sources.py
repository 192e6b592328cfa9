"""Documents to train on, read from files one batch at a time: text, JSON Lines and parquet, compressed or not."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from olmozoo.errors import InputError, MissingBackendError
from olmozoo.foreign import GIT_LFS, file_problem
from olmozoo.typing import StrPath

# The kinds of documents and their fields. A line that has the fields of several is of the first of them.
FIELDS = {"chat": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
EXPECTED = "text, or messages, or prompt and completion"
# What a file's name says of it. Dolma calls its JSON Lines .json.gz.
TEXT, LINES, TABLE = (".txt",), (".jsonl",), (".parquet",)
COMPRESSED = {".gz": (*TEXT, *LINES, ".json"), ".zst": (*TEXT, *LINES, ".json")}
NAMES = ".txt, .jsonl, .parquet, .txt.gz, .jsonl.gz, .json.gz, .txt.zst, .jsonl.zst or .json.zst"
PART = 1 << 18  # characters of a text that are tokenized at once
LONGEST_LINE = 1 << 26  # bytes
BATCH = 1 << 20  # bytes that are tokenized by one process at a time
MANY = 1000  # records in a batch
ROWS = 100  # of a table that are read at once
SMALL = 1024  # bytes that are decompressed at once; they may become 32 MB
_END_OF_WORD = re.compile(r".*[^\W_](?=\s)", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """A document as it is in its file, or a part of a long text.

    Attributes:
        where: file and line, for errors.
        value: a line of JSON, a text, or a row of a table.
        first: it begins here; False for a further part of a long text.
        last: it ends here.
    """

    where: str
    value: bytes | str | Mapping[str, Any]
    first: bool = True
    last: bool = True

    def __len__(self) -> int:
        """Its size in bytes, roughly."""
        return len(self.value) if isinstance(self.value, (bytes, str)) else len(str(self.value))


def find_files(data: Sequence[StrPath]) -> list[Path]:
    """The files that paths, folders and globs name, in their order; those of a folder or a glob sorted.

    In a folder, and in the folders in it, files of other kinds and hidden ones are left out.

    Raises:
        InputError: there is no such file, a folder has none, a file is of another kind, or one is named twice.
    """
    files: list[Path] = []
    for item in data:
        path = Path(item).expanduser()
        if path.is_dir():
            inside = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
            found = sorted(file for file in inside if _kind(file) and file.is_file())
            if not found:
                raise InputError(f"{path} has no files to read: expected {NAMES}")
        elif path.exists():
            found = [path]
        else:
            found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
            if not found:
                raise InputError(f"there is no file {path}, and none matches it")
        files += found
    if not files:
        raise InputError(f"there are no data: expected files, folders or globs of {NAMES}")
    seen: dict[Path, Path] = {}
    for file in files:
        _check_file(file)
        real = file.resolve()
        if real in seen:
            raise InputError(f"{file} is named twice, as {seen[real]} before: name each file once")
        seen[real] = file
    return files


def read_batches(files: Sequence[Path]) -> Iterator[tuple[list[Record], int]]:
    """Records of files in their order, in batches of some `BATCH` bytes, with the number of bytes read so far.

    Raises:
        InputError: a file is not readable, is not UTF-8, or has a line of more than `LONGEST_LINE` bytes.
        MissingBackendError: a library that a file needs is not installed.
    """
    batch: list[Record] = []
    size = before = 0
    for path in files:
        try:
            with path.open("rb") as raw:
                for record in _records(path, raw):
                    batch.append(record)
                    size += len(record)
                    if size >= BATCH or len(batch) >= MANY:
                        yield batch, before + raw.tell()
                        batch, size = [], 0
            before += path.stat().st_size
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if batch:
        yield batch, before


def parse(record: Record) -> tuple[str, Any]:
    """The kind of a document, a key of `FIELDS`, and its content: a text, the messages, or (prompt, completion).

    Raises:
        InputError: the record is not JSON, or lacks the fields of a document.
    """
    value, where = record.value, record.where
    if isinstance(value, str):
        return "text", value
    if isinstance(value, bytes):
        try:
            value = json.loads(value.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: a JSON {type(value).__name__}, expected an object with {EXPECTED}")
    present = {name for name in value if value[name] is not None}
    kind = next((kind for kind, names in FIELDS.items() if present.issuperset(names)), None)
    if kind is None:
        keys = ", ".join(repr(key)[:40] for key in [*value][:20])
        raise InputError(f"{where}: an object with {keys or 'nothing'}, expected {EXPECTED}")
    if kind == "chat":
        return kind, value["messages"]
    for name in FIELDS[kind]:
        if not isinstance(value[name], str):
            raise InputError(f"{where}: {name} is {repr(value[name])[:60]}, expected text")
    return kind, value["text"] if kind == "text" else (value["prompt"], value["completion"])


def parts(text: str) -> Iterator[str]:
    """A text in parts of at most `PART` characters.

    They end at the end of a word, before white space, where the tokens of byte-level BPE end too.
    """
    start = 0
    while len(text) - start > PART:
        part = text[start : start + PART]
        yield (part := part[: _end_of_word(part)])
        start += len(part)
    yield text[start:]


def _end_of_word(text: str) -> int:
    """Where the last word ends that white space follows; the text's end if there is none."""
    found = _END_OF_WORD.match(text)
    return found.end() if found else len(text)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> tuple[str, ...] | None:
    """`TEXT`, `LINES` or `TABLE`; None for a file of another kind."""
    suffix = path.suffix
    if suffix in COMPRESSED:
        inner = Path(path.stem).suffix
        return None if inner not in COMPRESSED[suffix] else TEXT if inner in TEXT else LINES
    return next((kind for kind in (TEXT, LINES, TABLE) if suffix in kind), None)


def _check_file(path: Path) -> None:
    if not _kind(path):
        raise InputError(f"{path} is of a kind that is not read: expected {NAMES}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path} is not a regular file")
    try:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(GIT_LFS)) == GIT_LFS
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    problem = file_problem(path)
    if problem and (is_pointer or _kind(path) is not TEXT):  # a text may be HTML
        raise InputError(problem)


def _records(path: Path, raw: IO[bytes]) -> Iterator[Record]:
    kind = _kind(path)
    if kind is TABLE:
        return _rows(path, raw)
    stream = cast("io.BufferedIOBase", raw)
    if path.suffix == ".gz":
        stream = io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)))
    elif path.suffix == ".zst":
        stream = io.BufferedReader(_Zstandard(path, raw))
    return _texts(path, stream) if kind is TEXT else _lines(path, stream)


def _lines(path: Path, stream: io.BufferedIOBase) -> Iterator[Record]:
    for number in itertools.count(1):
        line = stream.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{path}:{number}: more than {LONGEST_LINE:,} bytes, expected JSON Lines: one object a line"
            )
        if line.strip():
            yield Record(f"{path}:{number}", line)


def _texts(path: Path, stream: io.BufferedIOBase) -> Iterator[Record]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, position, first = "", 0, True
    while True:
        block = stream.read(PART)
        begun = len(decoder.getstate()[0])
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 at byte {position - begun + error.start}") from error
        if not block:
            yield Record(str(path), text, first)
            return
        position += len(block)
        *whole, text = parts(text)
        for part in whole:
            yield Record(str(path), part, first, last=False)
            first = False


def _rows(path: Path, raw: IO[bytes]) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingBackendError(f"{path} needs pyarrow: pip install 'olmozoo[training]'") from error
    names = {name for fields in FIELDS.values() for name in fields}
    try:
        table = parquet.ParquetFile(raw)
        present = table.schema_arrow.names
        columns = [name for name in present if name in names]
        if not columns:
            raise InputError(f"{path} has the columns {', '.join(present)[:200]}, expected {EXPECTED}")
        numbers = itertools.count(1)
        for rows in table.iter_batches(ROWS, columns=columns):
            for row in rows.to_pylist():
                yield Record(f"{path}: row {next(numbers)}", row)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a text that is not UTF-8 is a ValueError
        raise InputError(f"{path} is not a readable parquet file: {error}") from error


class _Zstandard(io.RawIOBase):
    """The content of a Zstandard file; one that breaks off is an error, which the library's own reader ends at."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise MissingBackendError(f"{path} needs zstandard: pip install 'olmozoo[training]'") from error
        self.library, self.raw = zstandard, raw
        self.frame: Any = None
        self.compressed, self.content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            self.compressed = self.compressed or self.raw.read(SMALL)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("the compressed data break off")
                return 0
            if self.frame is None:
                self.frame = self.library.ZstdDecompressor().decompressobj()
            try:
                self.content = memoryview(self.frame.decompress(self.compressed))
            except self.library.ZstdError as error:
                raise OSError(str(error)) from error
            self.compressed = b""
            if self.frame.eof:
                self.compressed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.content))
        buffer[:count] = self.content[:count]
        self.content = self.content[count:]
        return count
