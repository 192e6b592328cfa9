"""The same checkpoint in two or three backends, compared layer by layer."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.backend import BACKENDS, load
from olmozoo.checkpoint import Checkpoint
from olmozoo.errors import CheckpointError, HubError, InputError
from olmozoo.families.base import ModelConfig
from olmozoo.hub import resolve
from olmozoo.tokenizer import Tokenizer, pad_left

Array = np.ndarray[Any, np.dtype[Any]]

PROMPTS = ("The answer to the question is", "A function that returns the length of a list may be written in many ways:")
# The largest difference allowed, as a share of the largest value compared (of 1, where that is smaller). float64 shows
# bugs; the others show rounding, of which bfloat16 and float16 bring a few units of their last place a layer.
BOUNDS = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Row:
    """How one tensor of one backend differs from the reference's, at real tokens.

    Attributes:
        backend: compared with the reference.
        name: `embeddings`, `layer 1`, ..., `logits`.
        largest: the largest absolute difference; NaN where either side has one.
        relative: `largest` over the largest absolute value of the reference.
        ok: whether the bound holds.
    """

    backend: str
    name: str
    largest: float
    relative: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        reference: the backend that the others are compared with.
        dtype: that all computed in.
        bound: see `BOUNDS`.
        rows: by backend and layer.
        agreement: for each backend, the share of real positions where its likeliest next token is the reference's.
        bad_weights: tensors of the checkpoint that hold NaN or infinity.
    """

    reference: str
    dtype: str
    bound: float
    rows: list[Row] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    bad_weights: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every bound holds and every weight is finite."""
        return all(row.ok for row in self.rows) and not self.bad_weights


def verify(
    path_or_repo: str | os.PathLike[str],
    *,
    backends: Sequence[str] = tuple(BACKENDS),
    dtype: str = "float64",
    prompts: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **hub: Any,
) -> Report:
    """Run one left-padded batch through the backends, one after the other, and compare with the first of them.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        backends: two or more of "pt", "tf", "flax"; the first is the reference.
        dtype: to compute in.
        prompts: texts; default two of different lengths. A checkpoint without a tokenizer gets seeded random ids.
        progress: told what is being done.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: fewer than two backends, an unknown one, or an unknown dtype.
    """
    unknown = [name for name in backends if name not in BACKENDS]
    if len(set(backends)) < 2 or unknown:
        raise InputError(f"backends are {', '.join(backends)}, expected at least two of {', '.join(BACKENDS)}")
    if dtype not in BOUNDS:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(BOUNDS)}")
    folder = resolve(path_or_repo, need="weights", **hub)
    config = ModelConfig.from_folder(folder)
    ids, mask = _batch(path_or_repo, config, prompts, hub)
    real = mask.astype(bool)

    progress("checking that every weight is finite")
    report = Report(backends[0], dtype, BOUNDS[dtype], bad_weights=_not_finite(Checkpoint(folder)))
    reference: dict[str, Array] = {}
    for backend in dict.fromkeys(backends):
        progress(f"running {backend} in {dtype}")
        found = _layers(backend, folder, dtype, ids, mask)
        if not reference:
            reference = found
            continue
        report.rows.extend(
            _compare(backend, name, reference[name][real], found[name][real], report.bound) for name in found
        )
        same = reference["logits"][real].argmax(-1) == found["logits"][real].argmax(-1)
        report.agreement[backend] = float(same.mean())
    return report


def _batch(
    path_or_repo: str | os.PathLike[str], config: ModelConfig, prompts: Sequence[str] | None, hub: dict[str, Any]
) -> tuple[Array, Array]:
    try:
        rows = [Tokenizer.from_pretrained(path_or_repo, **hub).encode(text) for text in prompts or PROMPTS]
    except (CheckpointError, HubError):
        if prompts is not None:
            raise
        stream = np.random.Generator(np.random.Philox(key=0))
        rows = [stream.integers(0, config.vocab_size, length).tolist() for length in (7, 19)]
    room = config.max_position_embeddings
    rows = [[token % config.vocab_size for token in row[:room]] for row in rows]
    return pad_left(rows, min(config.pad_token_id or 0, config.vocab_size - 1))


def _layers(backend: str, folder: Path, dtype: str, ids: Array, mask: Array) -> dict[str, Array]:
    output = load(folder, backend, dtype).forward(ids, mask, output_hidden_states=True, use_cache=False)
    names = ["embeddings", *(f"layer {i}" for i in range(1, len(output["hidden_states"])))]
    gc.collect()  # one model in memory at a time
    return dict(zip(names, output["hidden_states"], strict=True)) | {"logits": output["logits"]}


def _compare(backend: str, name: str, expected: Array, found: Array, bound: float) -> Row:
    largest = float(np.max(np.abs(expected - found)))
    scale = float(np.max(np.abs(expected)))
    return Row(backend, name, largest, largest / scale if scale else largest, largest <= bound * max(1.0, scale))


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if not np.isfinite(checkpoint[name]).all()]


def plot(report: Report, file: str | os.PathLike[str]) -> None:
    """Draw the divergence by layer, one line a backend, and the bound.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'olmozoo[plot]'`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for backend in report.agreement:
        rows = [row for row in report.rows if row.backend == backend]
        names = [row.name for row in rows]
        axes.plot(
            names, [max(row.relative, 1e-18) for row in rows], marker="o", label=f"{backend} and {report.reference}"
        )
    axes.axhline(report.bound, color="tab:red", linestyle="--", label=f"bound, {report.bound:g}")
    axes.set_yscale("log")
    axes.set_ylabel("largest difference / largest value")
    axes.set_title(f"Divergence by layer in {report.dtype}")
    step = max(1, len(report.rows) // max(1, len(report.agreement)) // 20)
    axes.set_xticks(axes.get_xticks()[::step])
    axes.tick_params(axis="x", rotation=45)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
