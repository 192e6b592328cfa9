"""What `verify` finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from olmozoo.checkpoint.diff import Diff
from olmozoo.typing import Array


@dataclass(frozen=True)
class Row:
    """How one tensor of one backend differs from the reference's, at real tokens.

    Attributes:
        backend: compared with the reference.
        name: `embeddings`, `layer 1`, ..., `logits`, and where asked for `attention 1`, ...
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
class Band:
    """How far one tensor of one backend is from the float32 answer, beside what rounding explains.

    Distances are norms of the difference over the norm of the float32 answer, at real tokens.

    Attributes:
        backend, name: as in `Row`; the reference is here too.
        distance: found.
        expected: see `olmozoo.verify.rounding`.
        allowed: the multiple of `expected` that is the bound.
    """

    backend: str
    name: str
    distance: float
    expected: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains the distance."""
        return self.distance <= self.allowed


@dataclass(frozen=True)
class NextToken:
    """The likeliest tokens after one prompt.

    Attributes:
        prompt: its text, or its number where there is no tokenizer.
        tokens: the reference's likeliest tokens, first the likeliest: their texts, or their ids.
        probabilities: of those tokens, by backend.
    """

    prompt: str
    tokens: list[str]
    probabilities: dict[str, list[float]]


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        reference: what the others are compared with: a backend, or `A in pt`.
        dtype: that all computed in.
        bound: see `olmozoo.verify.BOUNDS`.
        rows: by backend and layer.
        agreement: for each backend, the share of real positions where its likeliest next token is the reference's.
        bad_weights: tensors of the checkpoint that hold NaN or infinity.
        model: what was verified, and `against` what, as given.
        against: see `model`; None where one checkpoint was compared with itself.
        config: the fields of the config.json.
        weights: how the two checkpoints differ; None without `against`.
        band: in bfloat16 and float16, how far each backend is from the float32 answer.
        notes: what could not be compared, since the two checkpoints have it in different shapes.
        next_tokens: where logits were asked for, the likeliest tokens after each prompt.
        divergence: where logits were asked for, the mean and the largest Kullback-Leibler divergence of each backend's
            next-token distribution from the reference's, in nats, over the real positions.
        maps: where attention was asked for, of the longest prompt, (layers, query, key): the reference's weights,
            averaged over heads, and for each other backend the largest difference among the heads.
    """

    reference: str
    dtype: str
    bound: float
    rows: list[Row] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    bad_weights: list[str] = field(default_factory=list)
    model: str = ""
    against: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: Diff | None = None
    band: list[Band] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    next_tokens: list[NextToken] = field(default_factory=list)
    divergence: dict[str, tuple[float, float]] = field(default_factory=dict)
    maps: dict[str, Array] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every bound holds, every weight is finite and everything could be compared."""
        bounds = [row.ok for row in self.rows] + [entry.ok for entry in self.band]
        return all(bounds) and not self.bad_weights and not self.notes

    @property
    def verdict(self) -> str:
        """`ok` in words."""
        if self.against is None:
            return "all backends agree" if self.ok else "the backends do not agree"
        return "the two checkpoints agree" if self.ok else "the two checkpoints do not agree"

    @property
    def compared(self) -> list[str]:
        """What was compared with the reference."""
        return list(dict.fromkeys(row.backend for row in self.rows))
