"""What decoding carries from step to step, and the array functions that it needs of a framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Array = Any  # of the framework at hand
NEVER = -1.0e9  # added to a beam's score, it takes the beam out (as in Transformers, so that ties fall alike)


class Namespace(Protocol):
    """What the rules need of a framework beyond its operators. Axes are as NumPy counts them."""

    def arange(self, size: int) -> Array:
        """0, 1, ... size - 1."""

    def where(self, condition: Array, x: Any, y: Any) -> Array:
        """One where the condition holds, else the other."""

    def exp(self, x: Array) -> Array:
        """The exponential."""

    def log(self, x: Array) -> Array:
        """The natural logarithm."""

    def cumsum(self, x: Array) -> Array:
        """Sums up to each place of the last axis."""

    def sum(self, x: Array) -> Array:
        """The sum over the last axis, which stays as one."""

    def max(self, x: Array) -> Array:
        """The largest of the last axis, which stays as one."""

    def min(self, x: Array) -> Array:
        """The smallest of the last axis, which stays as one."""

    def any(self, x: Array, axis: int | None = None) -> Array:
        """Whether any is true, over one axis or all."""

    def all(self, x: Array, axis: int | None = None) -> Array:
        """Whether all are true, over one axis or all."""

    def argmax(self, x: Array) -> Array:
        """The place of the largest of the last axis."""

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest of the last axis, largest first, and their places."""

    def take(self, x: Array, places: Array, axis: int) -> Array:
        """The slices of x at places, a vector, along an axis."""

    def take_along(self, x: Array, places: Array) -> Array:
        """Of x (r, m) what is at places (r, k): (r, k)."""

    def concat(self, parts: list[Array], axis: int) -> Array:
        """Arrays one after another."""

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The same in another shape."""

    def put(self, x: Array, place: Array, value: Array) -> Array:
        """The array x (r, m, ...) with value (r, ...) at one place of axis 1; x itself may change."""

    def mark(self, tokens: Array, flags: Array, size: int) -> Array:
        """(r, size) bool: which of the numbers below size stand in tokens (r, m) where flags (r, m) are set."""

    def full(self, shape: tuple[int, ...], value: int, like: Array) -> Array:
        """One value everywhere, in the dtype of an array."""

    def floating(self, x: Any, like: Array) -> Array:
        """A number, or an array of them, in the floating-point dtype of an array."""

    def loop(self, times: int, body: Callable[..., tuple[Array, ...]], *state: Array) -> tuple[Array, ...]:
        """The state after `body` was applied so often."""


@dataclass(frozen=True)
class Rules:
    """What of a call's settings decides which program runs. Numbers are not in it: they are in `knobs` and may change.

    Attributes:
        text: places of the prompt in `State.tokens`.
        beams: beams of a row; 1 without beam search.
        copies: rows made of each row of the batch: beams, or sequences to return.
        sample: draw tokens, rather than take the likeliest.
        temperature, top_p, min_p, penalty, bad_words, min_new, stops: whether there is that rule.
        top_k: at least the number of tokens to sample from; 0 for all.
        ngram: no run of so many tokens comes twice; 0 for no such rule.
        ends: how many tokens end a row.
        early: beam search ends once there are as many ended beams as beams.
        longest: beam search hopes for the score of the longest answer, rather than of the present one.
        logprobs, scores: whether those are wanted.
        lookup: tokens to guess ahead from the text; 0 for none.
        matching: the longest run that a guess is made by.
        chunk: positions to read a prompt by; 0 for all at once.
    """

    text: int
    beams: int = 1
    copies: int = 1
    sample: bool = False
    temperature: bool = False
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False
    ngram: int = 0
    bad_words: bool = False
    min_new: bool = False
    stops: bool = False
    ends: int = 0
    early: bool = False
    longest: bool = False
    logprobs: bool = False
    scores: bool = False
    lookup: int = 0
    matching: int = 0
    chunk: int = 0


class Beams(NamedTuple):
    """Where beam search is; the running beams' tokens are in `State`.

    Attributes:
        running: (b, n) summed log-probabilities.
        trace: (r, a) which row of the batch's beams each token came from; -1 where there is none.
        ended_tokens, ended_trace, ended_logprobs: (r, t), (r, a), (r, a) of the best ended beams.
        ended_scores: (b, n) their scores, length penalty applied.
        ended: (b, n) whether there is such a beam.
        hopeful: (b, 1) whether a running beam may yet do better.
    """

    running: Array
    trace: Array
    ended_tokens: Array
    ended_trace: Array
    ended_logprobs: Array
    ended_scores: Array
    ended: Array
    hopeful: Array


class State(NamedTuple):
    """How far decoding has come. What a call does not need is an empty tuple.

    Attributes:
        tokens: (r, t) prompt and answer, then pad tokens.
        count: how many tokens of the answer are written.
        done: (r,) whether a row has ended.
        tail: (r, m) the last bytes of the text, to find stop strings in; 0 where there are fewer.
        logprobs: (r, a) the log-probability of each token of the answer.
        scores: (r, a, v) what each token was chosen by.
        beams: of beam search.
    """

    tokens: Array
    count: Array
    done: Array
    tail: Array
    logprobs: Array
    scores: Array
    beams: Any
