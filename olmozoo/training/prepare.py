"""Text and chats as arrays of tokens to train on, which AI2's trainers read too."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.errors import InputError, OlmozooError
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.training import sources
from olmozoo.training.manifest import FORMAT, IDS, ITEM_SIZES, MANIFEST, MASK, TOKENIZER, Manifest, tokenizer_hash
from olmozoo.training.packing import PACKINGS, Packer, Rows
from olmozoo.training.sources import Record, find_files, read_batches
from olmozoo.training.templates import TULU, TULU_TEMPLATE, Encoded, Encoder
from olmozoo.typing import Array, HubOptions, StrPath

Progress = Callable[[int, int], object]  # called with the number of bytes read and the number of all bytes


@dataclass(frozen=True)
class Instance:
    """A row of prepared data.

    Attributes:
        ids: uint32 (length,).
        mask: bool (length,); True at tokens to learn.
        tokens: the number of tokens before the padding.
    """

    ids: Array
    mask: Array
    tokens: int


def prepare(
    data: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    tokenizer: StrPath | Tokenizer,
    length: int,
    template: str | None = None,
    packing: str | None = None,
    processes: int = 1,
    eos: int | None = None,
    pad: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    **hub: Unpack[HubOptions],
) -> Manifest:
    """Write documents as tokens to train on, in the arrays that AI2's trainers read.

    The folder gets:

    - input_ids.npy: tokens (instances, length), uint16 if every id of the tokenizer fits, else uint32. Raw values: read
      them with `numpy.memmap`, not with `numpy.load`.
    - label_mask.npy: bool (instances, length), raw too; True at tokens that are learned. Padding never is.
    - manifest.json: see `olmozoo.training.manifest.Manifest`.
    - tokenizer/: the tokenizer, with eos and pad as used, and with the chat template of the data.

    Documents are lines of .jsonl (or rows of .parquet): `{"text": ...}`, `{"prompt": ..., "completion": ...}` or
    `{"messages": [{"role": ..., "content": ...}, ...]}`; further fields are ignored. A .txt is one document.
    `olmozoo.training.templates.Encoder` says how each becomes tokens, and what is learned of it. Documents without a
    token to learn are left out.

    The files are streamed: memory is bounded by the longest line, a few batches of 1 MB a process, and in best-fit
    packing some millions of tokens. The folder is renamed into place when it is complete. It is the same for any number
    of processes.

    Args:
        data: files (.txt, .jsonl, both as .gz or .zst too; .parquet), folders with such, and globs.
        out: the folder to write.
        tokenizer: a folder or a repository, or a `Tokenizer`.
        length: tokens of an instance: the model's max_sequence_length in AI2's configs. At least 2.
        template: of chats: "tulu" for AI2's format; default the tokenizer's own chat template.
        packing: "none": a document an instance, cut on the right if it is longer, else padded. "concat": documents one
            after the other, cut at each `length` tokens; only the last instance is padded. "best-fit": documents whole,
            as many in an instance as fit well, and padded; longer ones are cut into several instances. Nothing is lost
            with the last two. Default: "concat" if the first document is a text, else "none".
        processes: that tokenize. More than 1 start anew with Python's "spawn", so that a script that calls this needs
            `if __name__ == "__main__":`.
        eos: id that ends a document; default the tokenizer's.
        pad: id that fills instances up; default the tokenizer's.
        force: replace what is in `out`, if it holds something.
        progress: called with the number of bytes read and the number of all bytes.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, for the tokenizer.

    Returns:
        What was written.

    Raises:
        InputError: an argument does not fit; a file is absent, unreadable or malformed, which is named with its line;
            there is nothing to learn; `out` holds something and `force` is not given.
        CheckpointError: the folder could not be written and is as it was before.
        MissingBackendError: .zst without zstandard, or .parquet without pyarrow.
    """
    job = _Job.create(data, tokenizer, length, template, packing, eos, pad, **hub)
    if processes < 1:
        raise InputError(f"processes is {processes}, expected at least 1")
    folder = Path(os.path.expanduser(out))
    ours = re.compile("|".join(map(re.escape, (IDS, MASK, MANIFEST, TOKENIZER))))
    with atomic_folder(folder, ours) as staging:
        if not force and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds something already: choose another folder, or replace it with force=True")
        with (
            (staging / IDS).open("wb") as ids,
            (staging / MASK).open("wb") as mask,
            closing(job.rows(processes, progress)) as blocks,
        ):
            for rows in blocks:
                ids.write(rows.ids.astype(job.dtype).tobytes())
                mask.write(rows.mask.tobytes())
        manifest = job.manifest()
        if not manifest.targets:
            raise InputError(job.nothing())
        job.tokenizer.save_pretrained(staging / TOKENIZER)
        manifest.save(staging)
    return manifest


def preview(
    data: StrPath | Sequence[StrPath],
    *,
    tokenizer: StrPath | Tokenizer,
    length: int,
    template: str | None = None,
    packing: str | None = None,
    eos: int | None = None,
    pad: int | None = None,
    count: int = 3,
    **hub: Unpack[HubOptions],
) -> list[Instance]:
    """The first instances that `prepare` would write, with its arguments; nothing is written.

    Args:
        count: the number of instances.

    Raises:
        InputError: as in `prepare`, for the documents that are read for these instances.
    """
    job = _Job.create(data, tokenizer, length, template, packing, eos, pad, **hub)
    if count < 1:
        raise InputError(f"preview is {count}, expected at least 1")
    found: list[Instance] = []
    with closing(job.rows(1, lambda done, total: None)) as blocks:
        for rows in blocks:
            found += map(Instance, rows.ids, rows.mask, rows.lengths.tolist())
            if len(found) >= count:
                break
    if not found:
        raise InputError(job.nothing())
    return found[:count]


@dataclass
class _Job:
    """One call, checked, and what it has counted so far."""

    files: list[Path]
    tokenizer: Tokenizer
    vocab_size: int
    encoder: Encoder
    length: int
    packing: str | None
    packer: Packer | None = None
    kinds: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    instances: int = 0
    tokens: int = 0
    targets: int = 0

    @classmethod
    def create(
        cls,
        data: StrPath | Sequence[StrPath],
        tokenizer: StrPath | Tokenizer,
        length: int,
        template: str | None,
        packing: str | None,
        eos: int | None,
        pad: int | None,
        **hub: Unpack[HubOptions],
    ) -> _Job:
        if packing is not None and packing not in PACKINGS:
            raise InputError(f"packing is {packing!r}, expected one of {', '.join(PACKINGS)}")
        if length < 2:
            raise InputError(f"length is {length}, expected at least 2: a token, and one before it that predicts it")
        files = find_files([data] if isinstance(data, (str, os.PathLike)) else data)
        if isinstance(tokenizer, Tokenizer):
            tokenizer = copy.deepcopy(tokenizer)
        else:
            tokenizer = Tokenizer.from_pretrained(tokenizer, **hub)
        _set_ends(tokenizer, eos, pad)
        if template == TULU:
            tokenizer.chat_template = TULU_TEMPLATE
        vocab_size = max(tokenizer.backend.get_vocab().values()) + 1
        return cls(files, tokenizer, vocab_size, Encoder(tokenizer, template), length, packing)

    @property
    def dtype(self) -> str:
        return next(name for name, size in ITEM_SIZES.items() if self.vocab_size <= 1 << 8 * size)

    def rows(self, processes: int, progress: Progress) -> Generator[Rows, None, None]:
        total = sum(path.stat().st_size for path in self.files)
        processes = min(processes, 1 + total // sources.BATCH)  # to start one takes longer than a batch
        packer = None
        for encoded, done in _encode(read_batches(self.files), self.encoder, processes):
            self.kinds += encoded.kinds
            self.dropped += encoded.dropped
            if packer is None:
                self.packing = self.packing or ("concat" if next(iter(self.kinds)) == "text" else "none")
                packer = self.packer = PACKINGS[self.packing](self.length, self.tokenizer.pad_token_id)
            yield from map(self._counted, packer.add(encoded))
            progress(done, total)
        if packer is not None:
            yield from map(self._counted, packer.finish())

    def _counted(self, rows: Rows) -> Rows:
        self.instances += len(rows.ids)
        self.tokens += int(rows.lengths.sum())
        self.targets += int(rows.mask[:, 1:].sum())
        return rows

    def nothing(self) -> str:
        """Why there is nothing to learn."""
        where = f"{self.files[0]}" if len(self.files) == 1 else f"the {len(self.files)} files from {self.files[0]} on"
        if not self.kinds:
            return f"there are no documents in {where}"
        kinds = ", ".join(f"{count:,} of kind {kind}" for kind, count in self.kinds.items())
        reason = f"a text of two tokens, a completion, or an assistant's message among the first {self.length} tokens"
        return f"there is nothing to learn in {where} ({kinds}): expected {reason}"

    def manifest(self) -> Manifest:
        chats = self.kinds["chat"] > 0
        source = self.encoder.source or ""
        return Manifest(
            format=FORMAT,
            length=self.length,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            tokenizer=self.tokenizer.name_or_path,
            tokenizer_sha256=tokenizer_hash(self.tokenizer),
            template=(self.encoder.template or "tokenizer") if chats else None,
            template_sha256=hashlib.sha256(source.encode()).hexdigest() if chats else None,
            packing=self.packing or "none",
            documents=dict(self.kinds),
            dropped=self.dropped + (self.packer.dropped if self.packer else 0),
            truncated=self.packer.truncated if self.packer else 0,
            instances=self.instances,
            tokens=self.tokens,
            targets=self.targets,
            sources=[{"path": str(path), "bytes": path.stat().st_size} for path in self.files],
        )


def _set_ends(tokenizer: Tokenizer, eos: int | None, pad: int | None) -> None:
    """Give a tokenizer the tokens that end and fill, if they are given, and check that it has both.

    Raises:
        InputError: it lacks one, or its own are the same.
    """
    own = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, value in (("eos", eos), ("pad", pad)):
        if value is not None:
            if not 0 <= value < 1 << 32 or tokenizer.backend.id_to_token(value) is None:
                raise InputError(f"{name} is {value}, and the tokenizer has no such id")
            setattr(tokenizer, f"{name}_token_id", value)
        elif own[name] is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no {name} token: give an id as {name}")
    if pad is None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(
            f"the tokenizer's pad is its eos, {tokenizer.eos_token_id} ({tokenizer.eos_token!r}): a trainer that "
            "removes padding by its id would remove every end of a document. Give another id as pad, or this one "
            "to accept it"
        )


# ------------------------------------------------------------------------------------------------------------ processes


def _encode(
    batches: Iterable[tuple[list[Record], int]], encoder: Encoder, processes: int
) -> Iterator[tuple[Encoded, int]]:
    """What an encoder makes of batches, in their order; a few of them are in work at a time."""
    if processes == 1:
        for records, done in batches:
            yield encoder(records), done
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(encoder,))
    working: deque[tuple[Future[Encoded], int]] = deque()
    try:
        for records, done in batches:
            working.append((pool.submit(_work, records), done))
            if len(working) > 2 * processes:
                future, position = working.popleft()
                yield future.result(), position
        for future, position in working:
            yield future.result(), position
    except BrokenProcessPool as error:
        raise OlmozooError(
            "a process that tokenizes ended: use fewer processes if memory is short, and in a script of your own call "
            "`prepare` under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a process that tokenizes


def _start(encoder: Encoder) -> None:
    """Set up a process: one thread for tokens, no answer to Ctrl-C, and an end when its parent ends."""
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(records: list[Record]) -> Encoded:
    return _encoder(records)
