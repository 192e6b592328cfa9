"""How well a model knows a text: perplexity, and multiple choice by log-likelihood, on any backend.

Log-likelihoods are computed here from the model's logits, in float64, so that backends differ by their logits alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from olmozoo.backends import Backend, backend_class, load
from olmozoo.checkpoint.adapters import locate
from olmozoo.errors import CheckpointError, InputError
from olmozoo.quantization import GROUP_SIZE
from olmozoo.text.encoding import pad_left
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.typing import Array, HubOptions, StrPath

Progress = Callable[[int, int], object]  # called with the number of rows scored and the number of all rows

WINDOW = 1024  # the default's upper end: a window's logits are window x vocabulary, 400 MB at 100k tokens
WIDTHS = 32  # batches are as wide as a multiple of this, since frameworks compile anew for each width
SLICE = 64  # positions whose logits are in float64 at a time


@dataclass(frozen=True)
class Question:
    """One line of a multiple-choice file.

    Attributes:
        context: what the model reads; may be empty.
        choices: what may follow it, each put right behind it: a choice brings its own leading space.
        answer: the index of the right choice.
        where: file and line, for errors.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = "question"


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found.

    Attributes:
        documents: the number of texts.
        tokens: the number of tokens scored: all but the first of each text.
        bytes: the length of the texts in UTF-8.
        log_likelihood: the sum over the tokens scored, in nats.
    """

    documents: int
    tokens: int
    bytes: int
    log_likelihood: float

    @property
    def perplexity(self) -> float:
        """The exponential of a scored token's mean negative log-likelihood."""
        return float(np.exp(-self.log_likelihood / self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits over `bytes`; models with different tokenizers compare by it."""
        return -self.log_likelihood / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**vars(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class MultipleChoice:
    """What `multiple_choice` found.

    Attributes:
        log_likelihoods: of each question's choices, in nats.
        picked: for each question, the choice of the highest log-likelihood; the first where several are equal.
        picked_normalized: the same by log-likelihood over the choice's length in characters.
        answers: the right choices.
    """

    log_likelihoods: list[list[float]]
    picked: list[int]
    picked_normalized: list[int]
    answers: list[int]

    @property
    def accuracy(self) -> float:
        """The share of questions where the right choice was picked (`acc` in lm-eval)."""
        return float(np.mean(np.equal(self.picked, self.answers)))

    @property
    def accuracy_normalized(self) -> float:
        """The same for `picked_normalized` (`acc_norm` in lm-eval)."""
        return float(np.mean(np.equal(self.picked_normalized, self.answers)))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"accuracy": self.accuracy, "accuracy_normalized": self.accuracy_normalized, **vars(self)}


def evaluate(
    path_or_repo: StrPath,
    file: StrPath | Sequence[str] | Sequence[Question],
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    progress: Progress = lambda done, total: None,
    adapter: StrPath | None = None,
    quantization: str | None = None,
    group_size: int = GROUP_SIZE,
    **hub: Unpack[HubOptions],
) -> Perplexity | MultipleChoice:
    """Perplexity of texts, or accuracy on multiple-choice questions; see `perplexity` and `multiple_choice`.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        file: a .txt or .jsonl, as in `read`; or texts, or questions.
        backend: "pt", "tf" or "flax"; default the first that is installed.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; default an accelerator if there is one, else the CPU.
        window, stride: of `perplexity`.
        batch_size: rows that run at once.
        progress: called with the number of rows scored and the number of all rows.
        adapter: a folder or a repository with a LoRA adapter of PEFT; default one in the model's folder.
        quantization: `int8`, `int4`, or `none` for floats; default as the folder has it (see `olmozoo.quantization`).
        group_size: of int4.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: the file or an argument does not fit.
    """
    content = read(file) if isinstance(file, (str, os.PathLike)) else file
    questions = [entry for entry in content if isinstance(entry, Question)]
    if questions and (window is not None or stride is not None):
        raise InputError("window and stride are for texts, and these are multiple-choice questions")
    backend_class(backend).module()  # before anything is downloaded
    source = locate(path_or_repo, need="model", adapter=adapter, **hub)
    tokenizer = Tokenizer.from_pretrained(source.tokenizer)
    loaded = load(source.folder, backend, dtype, device, source.adapter, quantization, group_size)
    if questions:
        return multiple_choice(loaded, tokenizer, questions, batch_size=batch_size, progress=progress)
    texts = [entry for entry in content if isinstance(entry, str)]
    return perplexity(loaded, tokenizer, texts, window=window, stride=stride, batch_size=batch_size, progress=progress)


# ----------------------------------------------------------------------------------------------------------- perplexity


def perplexity(
    backend: Backend,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """Perplexity and bits per byte of texts, by strided windows.

    Each text is on its own, encoded with the special tokens that the tokenizer adds (OPT's leading one; the OLMo
    families have none). All its tokens but the first, which nothing precedes, are scored exactly once. A text of up to
    `window` tokens is one window. In a longer one the first window has the first `window` tokens, and each further
    window ends `stride` tokens after the one before it (the last one with the text), is `window` tokens long, and
    scores those of its tokens that no earlier window has. So every token is scored with at least `window - stride`
    tokens of context before it, or with all there are.

    Args:
        backend: a loaded model.
        tokenizer: its tokenizer.
        texts: the documents.
        window: tokens a window, from 2 to the model's max_position_embeddings. Default: that, 1024 at most.
        stride: tokens from one window's end to the next one's, from 1 to `window - 1`. Default: half the window.
        batch_size: windows that run at once.
        progress: called with the number of windows scored and the number of all windows.

    Raises:
        InputError: a size does not fit, a text uses tokens that the model lacks, or there is not one token to score.
    """
    config = backend.config
    longest = config.max_position_embeddings
    window = min(longest, WINDOW) if window is None else window
    if not 2 <= window <= longest:
        raise InputError(f"window is {window}, expected 2 to the model's max_position_embeddings, {longest}")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise InputError(f"stride is {stride}, expected 1 to {window - 1}, since the window is {window}")

    rows: list[tuple[Array, int]] = []
    for text in texts:
        ids = np.array(tokenizer.encode(text), np.int64)
        tokenizer.check_ids(ids, config.vocab_size)
        rows += ((ids[start:end], end - first) for start, first, end in windows(len(ids), window, stride))
    if not rows:
        raise InputError(f"nothing to score in {len(texts)} texts: expected one of at least two tokens")
    scores = score(backend, rows, batch_size, progress)
    return Perplexity(
        documents=len(texts),
        tokens=sum(scored for _, scored in rows),
        bytes=sum(len(text.encode()) for text in texts),
        log_likelihood=math.fsum(value for values, _ in scores for value in values),
    )


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows of a text of `length` tokens, as (start, first scored, end); see `perplexity`."""
    first, end = 1, min(window, length)
    while first < end:
        yield max(0, end - window), first, end
        first, end = end, min(end + stride, length)


# ------------------------------------------------------------------------------------------------------ multiple choice


def multiple_choice(
    backend: Backend,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 4,
    progress: Progress = lambda done, total: None,
) -> MultipleChoice:
    """Let a model choose by the log-likelihood of each choice after its context, as lm-eval does: see `pair`.

    Args:
        backend: a loaded model.
        tokenizer: its tokenizer.
        questions: what to ask.
        batch_size: choices that run at once.
        progress: called with the number of choices scored and the number of all choices.

    Raises:
        InputError: there is no question, or one has a choice that is no token or is too long for the model.
    """
    if not questions:
        raise InputError("there are no questions, expected at least one")
    rows = []
    for question in questions:
        for choice in question.choices:
            context, continuation = pair(tokenizer, question.context, choice, question.where)
            rows.append(fit(backend, tokenizer, context, continuation, question.where))
    scores = iter(score(backend, rows, batch_size, progress))
    values = [[math.fsum(next(scores)[0]) for _ in question.choices] for question in questions]
    lengths = [[len(choice) for choice in question.choices] for question in questions]
    return MultipleChoice(
        log_likelihoods=values,
        picked=[int(np.argmax(row)) for row in values],
        picked_normalized=[int(np.argmax(np.divide(row, size))) for row, size in zip(values, lengths, strict=True)],
        answers=[question.answer for question in questions],
    )


def pair(tokenizer: Tokenizer, context: str, continuation: str, where: str = "pair") -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows it, cut as lm-eval cuts them.

    Spaces at the context's end go to the continuation. Both are encoded as one text, with the special tokens that the
    tokenizer adds, and the context takes as many of these tokens as it has alone. An empty context is the tokenizer's
    own leading token, else its bos token, else its eos token.

    Args:
        tokenizer: of the model.
        context: what is read.
        continuation: what is scored.
        where: names the pair in errors.

    Raises:
        InputError: the continuation is no token, or the context is empty and there is no token to stand for it.
    """
    kept = context.rstrip()
    before = tokenizer.encode(kept)
    whole = tokenizer.encode(context + continuation)
    if not before:
        before = [prefix(tokenizer, where)]
        whole = before + whole
    if len(whole) <= len(before):
        raise InputError(f"{where}: {continuation!r} after {context[-40:]!r} is not one token of its own")
    return whole[: len(before)], whole[len(before) :]


def prefix(tokenizer: Tokenizer, where: str = "text") -> int:
    """The token that stands before a text's first: bos, else eos.

    Raises:
        InputError: the tokenizer has neither.
    """
    i: int
    for i in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if i is not None:
            return i
    raise InputError(f"{where} begins without context, and the tokenizer has no bos or eos token to stand for it")


def fit(
    backend: Backend, tokenizer: Tokenizer, context: Sequence[int], continuation: Sequence[int], where: str = "pair"
) -> tuple[Array, int]:
    """A row for `score`; a context too long for the model loses its beginning.

    Raises:
        InputError: the continuation alone is too long, or the model has no rows for some of the tokens.
    """
    config = backend.config
    longest = config.max_position_embeddings
    if len(continuation) > longest:
        raise InputError(f"{where}: {len(continuation)} tokens to score, and max_position_embeddings is {longest}")
    ids = np.array([*context, *continuation][-longest - 1 :], np.int64)
    tokenizer.check_ids(ids, config.vocab_size)
    return ids, len(continuation)


# -------------------------------------------------------------------------------------------------------------- scoring


def score(
    backend: Backend,
    rows: Sequence[tuple[Array, int]],
    batch_size: int = 4,
    progress: Progress = lambda done, total: None,
) -> list[tuple[Array, bool]]:
    """Log-likelihoods of the last tokens of rows, each given all tokens before it.

    Args:
        backend: a loaded model.
        rows: ids, and how many of the last of them to score: at least 1, and fewer than all.
        batch_size: rows that run at once; rows of a like length run together.
        progress: called with the number of rows done and the number of all rows.

    Returns:
        In the order of `rows`: the float64 log-likelihoods in nats, and whether each token was the model's likeliest.

    Raises:
        InputError: `batch_size` is not a positive number.
        CheckpointError: the model gives NaN.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    results: dict[int, tuple[Array, bool]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad_left([rows[i][0][:-1].tolist() for i in batch], 0)  # nothing follows the last token
        spare = ((0, 0), (-ids.shape[1] % WIDTHS, 0))
        keep = max(rows[i][1] for i in batch)
        output = backend.forward(
            np.pad(ids, spare), np.pad(mask, spare), logits_to_keep=keep, use_cache=False, return_dict=True
        )
        for i, logits in zip(batch, output["logits"], strict=True):
            row, scored = rows[i]
            results[i] = _log_likelihoods(logits[-scored:], row[-scored:])
        progress(start + len(batch), len(order))
    return [results[i] for i in range(len(rows))]


def _log_likelihoods(logits: Array, targets: Array) -> tuple[Array, bool]:
    """Of targets (n,) under logits (n, vocab)."""
    values = np.empty(len(targets))
    likeliest = True
    for start in range(0, len(targets), SLICE):
        part, ids = logits[start : start + SLICE].astype(np.float64), targets[start : start + SLICE, None]
        likeliest &= bool((part.argmax(-1) == ids[:, 0]).all())
        part -= part.max(-1, keepdims=True)
        values[start : start + SLICE] = np.take_along_axis(part, ids, -1)[:, 0] - np.log(np.exp(part).sum(-1))
    if np.isnan(values).any():
        raise CheckpointError("the model's logits hold NaN: `olmozoo verify` names the tensor or the layer at fault")
    return values, likeliest


# ---------------------------------------------------------------------------------------------------------------- files


def read(file: StrPath) -> list[str] | list[Question]:
    """The contents of a file to evaluate on: of a .txt one text, of a .jsonl an entry a line; see `parse`.

    Raises:
        InputError: the file is absent, not UTF-8, of another kind or empty; or a line is malformed, which is named.
    """
    path = Path(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path} is not .txt or .jsonl")
    try:
        return parse(path.read_bytes(), str(path), path.suffix == ".jsonl")  # not `read_text`, which changes line ends
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def parse(data: bytes, where: str, jsonl: bool = False) -> list[str] | list[Question]:
    """Texts or questions in UTF-8.

    JSON Lines have an object in each line, blank lines apart, all of one kind: `{"text": ...}` is a text;
    `{"context": ..., "choices": [...], "answer": ...}` is a question, its answer the index of a choice or the choice
    itself. Further keys are ignored.

    Args:
        data: the bytes.
        where: names them in errors.
        jsonl: whether they are JSON Lines; otherwise they are one text.

    Raises:
        InputError: they are not UTF-8, or there are no lines; or a line is malformed, which is named.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}") from error
    if not jsonl:
        return [text]
    entries = [_entry(line, f"{where}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not entries:
        raise InputError(f"{where} has no lines")
    kinds = {type(entry) for entry, _ in entries}
    if len(kinds) > 1:
        line = next(line for entry, line in entries if type(entry) is not type(entries[0][0]))
        raise InputError(f"{line}: texts and questions in one file, expected lines of one kind")
    return [entry for entry, _ in entries]


def _entry(line: str, where: str) -> tuple[Any, str]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if isinstance(data, Mapping) and isinstance(data.get("text"), str):
        return data["text"], where
    if not isinstance(data, Mapping) or not {"context", "choices", "answer"} <= data.keys():
        raise InputError(f"{where}: expected an object with a text, or with context, choices and answer")
    context, choices, answer = data["context"], data["choices"], data["answer"]
    if not isinstance(context, str):
        raise InputError(f"{where}: context is {context!r}, expected text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"{where}: choices are {choices!r}, expected a list of two or more texts")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer is {answer!r}, expected one of the choices or 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer, where), where
