"""The same checkpoint in two or three backends, or two checkpoints in one or more, compared layer by layer."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import ml_dtypes
import numpy as np

from olmozoo.backends import BACKENDS, installed
from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.diff import diff_opened
from olmozoo.checkpoint.reader import Checkpoint, OpenCheckpoint
from olmozoo.checkpoint.tensors import dtype_of
from olmozoo.errors import CheckpointError, InputError
from olmozoo.families.config import ModelConfig
from olmozoo.modeling import given_quantization
from olmozoo.quantization import GROUP_SIZE
from olmozoo.text.encoding import pad_left
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.typing import Array, HubOptions, StrPath
from olmozoo.verify.html import write_html
from olmozoo.verify.plots import plot
from olmozoo.verify.report import Band, NextToken, Report, Row

__all__ = ["BOUNDS", "Band", "NextToken", "Report", "Row", "plot", "rounding", "verify", "write_html"]

PROMPTS = ("The answer to the question is", "A function that returns the length of a list may be written in many ways:")
# The largest difference allowed, as a share of the largest value compared (of 1, where that is smaller). float64 shows
# bugs; the others show rounding, of which bfloat16 and float16 bring a few units of their last place a layer.
BOUNDS = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}
TOP = 5  # likeliest tokens to show
# In bfloat16 and float16, how far a backend may be from the float32 answer: so many times what rounding gives.
BAND = 3.0
ROUNDINGS = {"embeddings": 1, "block": 12, "logits": 2}


def rounding(dtype: str, blocks: int, logits: bool = False) -> float:
    """What rounding alone is expected to make of the distance between an answer in `dtype` and in float32.

    To round to nearest moves a value by at most half the spacing of numbers there: eps / sqrt(12) of its power of two
    in the root mean square, which is 0.2 eps of the norm of values of mixed sizes. A value is taken to be rounded once
    in the embedding, 12 times in a block (queries, keys, values, attention weights, their sum, the output projection,
    the MLP's products and activation, the norms, two residual sums) and twice in the last norm and the head; errors to
    be independent, so that they add in squares; and blocks to pass them on at their size. Weights that are rounded on
    loading, and blocks that make errors grow, are what the multiple `BAND` is for.

    Args:
        dtype: name of the dtype.
        blocks: decoder blocks on the path; 0 for the embeddings.
        logits: whether the last norm and the head are on it too.

    Returns:
        The norm of the difference over the norm of the answer.
    """
    count = ROUNDINGS["embeddings"] + blocks * ROUNDINGS["block"] + (ROUNDINGS["logits"] if logits else 0)
    return 0.2 * float(ml_dtypes.finfo(dtype_of(dtype)).eps) * math.sqrt(count)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Run:
    """A checkpoint in a backend."""

    label: str
    source: OpenCheckpoint
    backend: str


def verify(
    path_or_repo: StrPath,
    *,
    against: StrPath | None = None,
    backends: Sequence[str] = tuple(BACKENDS),
    dtype: str = "float64",
    prompts: Sequence[str] | None = None,
    attentions: bool = False,
    logits: bool = False,
    device: str | None = None,
    against_revision: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    adapter: StrPath | None = None,
    quantization: str | None = None,
    group_size: int = GROUP_SIZE,
    **hub: Unpack[HubOptions],
) -> Report:
    """Run one left-padded batch through the backends, one after the other, and compare with the first of them.

    With `against`, the checkpoint is A and the other is B: A runs in the first backend and B in the others, or in the
    first too where there is no other. The report then has the differences of configs and weights as well.

    In bfloat16 and float16 each is compared also with its own checkpoint's answer in float32, computed in the first
    backend: it may be `BAND` times as far from it as `rounding` says.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        against: a second one.
        backends: "pt", "tf", "flax": two or more, or with `against` one or more; the first is the reference.
        dtype: to compute in.
        prompts: texts; default two of different lengths. A checkpoint without a tokenizer gets seeded random ids.
        attentions: compare attention weights too, and keep maps of them.
        logits: keep the likeliest next tokens, and the divergence of the distributions.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; default an accelerator if there is one, else the CPU.
        against_revision: branch, tag or commit of the second, where it is a repository.
        progress: called with a text that says what is being done.
        adapter: an adapter that is merged into the first; default one in its folder.
        quantization: `int8`, `int4`, or `none` for floats; with `against`, of the second alone, so that a checkpoint
            against itself shows what quantization does to each layer. Default as the folders have it.
        group_size: of int4.
        **hub: `revision` (of the first), `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: too few backends, an unknown one, or an unknown dtype or device.
    """
    _check(backends, against, dtype)
    found = locate(path_or_repo, need="model", adapter=adapter, **hub)
    how = given_quantization(quantization, group_size)
    sides, weights = {"A": open_merged(found, quantization=how if against is None else None)}, None
    if against is not None:
        options: HubOptions = {**hub, "revision": against_revision}
        sides["B"] = open_merged(locate(against, need="weights", **options), quantization=how)
        difference = diff_opened(sides["A"], sides["B"], progress)
        weights = replace(difference, a=os.fspath(path_or_repo), b=os.fspath(against))
    report = Report(
        f"A in {backends[0]}" if against is not None else backends[0],
        dtype,
        BOUNDS[dtype],
        model=os.fspath(path_or_repo),
        against=None if against is None else os.fspath(against),
        config=sides["A"].config.to_dict(),
        weights=weights,
    )
    progress("checking that every weight is finite")
    for side, source in sides.items():
        suffix = "" if side == "A" else f" of {side}"
        report.bad_weights.extend(name + suffix for name in _not_finite(source.checkpoint))
    if against is None:
        runs = [_Run(name, sides["A"], name) for name in dict.fromkeys(backends)]
    else:
        names = dict.fromkeys(backends[1:] or backends)
        runs = [_Run(report.reference, sides["A"], backends[0])]
        runs += [_Run(f"B in {name}", sides["B"], name) for name in names]
    tokenizer = _tokenizer(found.tokenizer, prompts)
    vocabulary = min(source.config.vocab_size for source in sides.values())
    ids, mask = _batch(tokenizer, sides["A"].config, vocabulary, prompts)
    real = mask.astype(bool)

    exact: dict[Checkpoint, dict[str, Array]] = {}
    reference: dict[str, Array] = {}
    for run in runs:
        checkpoint = run.source.checkpoint
        if dtype in ("bfloat16", "float16") and checkpoint not in exact:
            progress(f"running {backends[0]} in float32")
            exact[checkpoint] = _layers(replace(run, backend=backends[0]), "float32", device, ids, mask, False)
        progress(f"running {run.label} in {dtype}")
        output = _layers(run, dtype, device, ids, mask, attentions)
        if checkpoint in exact:
            report.band.extend(_band(run.label, dtype, exact[checkpoint], output, real))
        reference = reference or output
        _add(report, run.label, reference, output, real)
        if logits:
            _add_tokens(report, run.label, reference["logits"], output["logits"], ids, real, tokenizer)
    return report


def _check(backends: Sequence[str], against: object, dtype: str) -> None:
    least, words = (2, "at least two") if against is None else (1, "at least one")
    if len(set(backends)) < least or any(name not in BACKENDS for name in backends):
        raise InputError(f"backends are {', '.join(backends)}, expected {words} of {', '.join(BACKENDS)}")
    for name in set(backends) - set(installed()):
        BACKENDS[name].module()  # which says what to install
    if dtype not in BOUNDS:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(BOUNDS)}")


def _tokenizer(folder: Path, prompts: Sequence[str] | None) -> Tokenizer | None:
    try:
        return Tokenizer.from_pretrained(folder)
    except CheckpointError:
        if prompts is not None:
            raise
        return None


def _batch(
    tokenizer: Tokenizer | None, config: ModelConfig, vocabulary: int, prompts: Sequence[str] | None
) -> tuple[Array, Array]:
    if tokenizer is not None:
        rows = [tokenizer.encode(text) for text in prompts or PROMPTS]
    else:
        stream = np.random.Generator(np.random.Philox(key=0))
        rows = [stream.integers(0, vocabulary, length).tolist() for length in (7, 19)]
    longest = config.max_position_embeddings
    rows = [[token % vocabulary for token in row[:longest]] for row in rows]
    return pad_left(rows, min(config.pad_token_id or 0, vocabulary - 1))


def _layers(run: _Run, dtype: str, device: str | None, ids: Array, mask: Array, attentions: bool) -> dict[str, Array]:
    """What each layer gives, (batch, seq, ...)."""
    output = BACKENDS[run.backend](run.source, dtype, device).forward(
        ids, mask, output_hidden_states=True, output_attentions=attentions, use_cache=False
    )
    names = ["embeddings", *(f"layer {i}" for i in range(1, len(output["hidden_states"])))]
    found = dict(zip(names, output["hidden_states"], strict=True)) | {"logits": output["logits"]}
    if attentions:
        found |= {f"attention {i}": weights.swapaxes(1, 2) for i, weights in enumerate(output["attentions"], 1)}
    gc.collect()  # one model in memory at a time
    return found


def _add(report: Report, label: str, reference: dict[str, Array], found: dict[str, Array], real: Array) -> None:
    """Add to a report how one run differs from the reference."""
    longest = int(real.sum(1).argmax())
    prompt = np.ix_(real[longest], real[longest])
    heads = [values[longest].swapaxes(0, 1) for name, values in found.items() if name.startswith("attention")]
    if found is reference:
        if heads:
            report.maps[label] = np.stack([layer.mean(0)[prompt] for layer in heads])
        return
    alike = [name for name in found if name in reference and reference[name].shape == found[name].shape]
    for name in dict.fromkeys([*reference, *found]):
        if name not in alike:
            shapes = [str(list(side[name].shape[2:])) if name in side else "absent" for side in (reference, found)]
            report.notes.append(f"{name} is not compared: {shapes[0]} in {report.reference}, {shapes[1]} in {label}")
    for name in alike:
        report.rows.append(_compare(label, name, reference[name][real], found[name][real], report.bound))
    if "logits" in alike:
        same = reference["logits"][real].argmax(-1) == found["logits"][real].argmax(-1)
        report.agreement[label] = float(same.mean())
    names = [name for name in alike if name.startswith("attention")]
    if names and len(names) == len(report.maps[report.reference]):
        apart = [np.abs(found[name][longest] - reference[name][longest]).max(1)[prompt] for name in names]
        report.maps[label] = np.stack(apart)


def _compare(backend: str, name: str, expected: Array, found: Array, bound: float) -> Row:
    largest = float(np.max(np.abs(expected - found)))
    scale = float(np.max(np.abs(expected)))
    return Row(backend, name, largest, largest / scale if scale else largest, largest <= bound * max(1.0, scale))


def _band(label: str, dtype: str, exact: dict[str, Array], found: dict[str, Array], real: Array) -> list[Band]:
    """How far the hidden states and the logits are from the float32 answer."""
    rows = []
    for blocks, (name, values) in enumerate(exact.items()):
        is_logits = name == "logits"
        answer = values[real].astype(np.float64)
        norm = float(np.linalg.norm(answer))
        distance = float(np.linalg.norm(found[name][real] - answer)) / (norm or 1.0)
        expected = rounding(dtype, blocks - is_logits, is_logits)
        rows.append(Band(label, name, distance, expected, BAND * expected))
    return rows


def _add_tokens(
    report: Report, label: str, reference: Array, found: Array, ids: Array, real: Array, tokenizer: Tokenizer | None
) -> None:
    """Add the likeliest next tokens, and how far the distribution is from the reference's."""
    if reference.shape != found.shape:
        return
    expected, scores = _log_probabilities(reference), _log_probabilities(found)
    if found is not reference:
        apart = np.maximum((np.exp(expected) * (expected - scores)).sum(-1)[real], 0.0)  # below 0 is rounding
        report.divergence[label] = float(apart.mean()), float(apart.max())
    for row in range(len(ids)):
        top = np.argsort(-expected[row, -1], kind="stable")[:TOP]
        if found is reference:
            prompt = f"prompt {row + 1}" if tokenizer is None else tokenizer.decode(ids[row][real[row]])
            tokens = [str(i) if tokenizer is None else tokenizer.decode([i], False) for i in top.tolist()]
            report.next_tokens.append(NextToken(prompt, tokens, {}))
        report.next_tokens[row].probabilities[label] = np.exp(scores[row, -1, top]).tolist()


def _log_probabilities(logits: Array) -> Array:
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if not np.isfinite(checkpoint[name]).all()]
