"""What decoding carries from step to step, and the array functions that it needs of a framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Array = Any  # of the framework at hand
MASKED_SCORE = -1.0e9  # added to a beam's score to exclude the beam (as in Transformers, so that ties fall alike)


class Namespace(Protocol):
    """The array functions that decoding needs of a framework beyond its operators. Axes are numbered as in NumPy."""

    def arange(self, size: int) -> Array:
        """The integers 0, 1, ... size - 1."""

    def where(self, condition: Array, x: Any, y: Any) -> Array:
        """The values of x where the condition is true, and those of y elsewhere; one of them may be a number."""

    def exp(self, x: Array) -> Array:
        """The exponential."""

    def log(self, x: Array) -> Array:
        """The natural logarithm."""

    def cumsum(self, x: Array) -> Array:
        """The cumulative sum over the last axis."""

    def sum(self, x: Array) -> Array:
        """The sum over the last axis, which is kept with size 1."""

    def max(self, x: Array) -> Array:
        """The maximum over the last axis, which is kept with size 1."""

    def min(self, x: Array) -> Array:
        """The minimum over the last axis, which is kept with size 1."""

    def any(self, x: Array, axis: int | None = None) -> Array:
        """Whether any value is true, over one axis or all."""

    def all(self, x: Array, axis: int | None = None) -> Array:
        """Whether all values are true, over one axis or all."""

    def argmax(self, x: Array) -> Array:
        """The index of the maximum over the last axis."""

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest values of the last axis, largest first, and their indices."""

    def take(self, x: Array, indices: Array, axis: int) -> Array:
        """The slices of x at indices, a vector, along an axis."""

    def take_along(self, x: Array, indices: Array) -> Array:
        """The values (r, k) of x (r, m) at indices (r, k)."""

    def concat(self, parts: list[Array], axis: int) -> Array:
        """Arrays concatenated along an axis."""

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The array in another shape."""

    def put(self, x: Array, index: Array, value: Array) -> Array:
        """The array x (r, m, ...) with value (r, ...) at one index of axis 1; x itself may change."""

    def mark(self, tokens: Array, flags: Array, size: int) -> Array:
        """(r, size) bool: which of the numbers below size occur in tokens (r, m) where flags (r, m) are set."""

    def full(self, shape: tuple[int, ...], value: int, like: Array) -> Array:
        """An array of one value, in the dtype of another array."""

    def floating(self, x: Any, like: Array) -> Array:
        """A number, or an array of them, in the floating-point dtype of another array."""

    def loop(self, times: int, body: Callable[..., tuple[Array, ...]], *state: Array) -> tuple[Array, ...]:
        """The state after `body` was applied `times` times."""


@dataclass(frozen=True)
class DecodeOptions:
    """The static part of a call: what decides which program runs. Numbers that may change are in `values`.

    Attributes:
        answer_start: index of the answer's first token in `State.tokens`, after the slots of the prompt.
        beams: beams of a row; 1 without beam search.
        rows_per_prompt: rows decoded for each row of the batch: beams, or sequences to return.
        sample: draw tokens, rather than take the likeliest.
        rules: the generation rules that are on (see `processors.Rule`), in the order in which they process scores.
        stop_strings: whether there are any.
        num_ends: the number of tokens that end a row, for beam search; else 0.
        stop_early: beam search ends once there are as many ended beams as beams.
        expect_longest: beam search compares with the score at the maximum length, rather than the present one.
        logprobs, scores: whether those are returned.
        draft_tokens: tokens to draft from the text; 0 for none.
        draft_ngram: the longest run that a draft is looked up by.
        prefill_chunk: positions of the prompt to read at a time; 0 for all at once.
    """

    answer_start: int
    beams: int = 1
    rows_per_prompt: int = 1
    sample: bool = False
    rules: tuple[Any, ...] = ()
    stop_strings: bool = False
    num_ends: int = 0
    stop_early: bool = False
    expect_longest: bool = False
    logprobs: bool = False
    scores: bool = False
    draft_tokens: int = 0
    draft_ngram: int = 0
    prefill_chunk: int = 0

    @property
    def returns_cache(self) -> bool:
        """Whether the call returns its cache, with every position."""
        return self.logprobs and self.beams == 1


class Beams(NamedTuple):
    """The state of beam search; the running beams' tokens are in `State`.

    Attributes:
        running: (b, n) summed log-probabilities.
        trace: (r, a) which row of the batch's beams each token came from; -1 where there is none.
        ended_tokens, ended_trace, ended_logprobs: (r, t), (r, a), (r, a) of the best ended beams.
        ended_scores: (b, n) their scores, length penalty applied.
        ended: (b, n) whether there is such a beam.
        can_improve: (b, 1) whether a running beam may become better than an ended one.
    """

    running: Array
    trace: Array
    ended_tokens: Array
    ended_trace: Array
    ended_logprobs: Array
    ended_scores: Array
    ended: Array
    can_improve: Array


class State(NamedTuple):
    """The state of decoding. What a call does not need is an empty tuple.

    Attributes:
        tokens: (r, t) prompt and answer, then pad tokens.
        count: the number of tokens of the answer so far.
        done: (r,) whether a row has ended.
        bad_step: (r,) the first step whose logits were not finite, -1 for none; such a row ends.
        tail: (r, m) the last bytes of the text, to find stop strings in; -2 where there are fewer.
        logprobs: (r, a) the log-probability of each token of the answer.
        scores: (r, a, v) what each token was chosen by.
        beams: of beam search.
    """

    tokens: Array
    count: Array
    done: Array
    bad_step: Array
    tail: Array
    logprobs: Array
    scores: Array
    beams: Any
