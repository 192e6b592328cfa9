"""From logits to a token: generation rules, sampling, and the ends of rows.

A rule is one class: `create` says whether a call uses it and with which values, `process` changes scores. `RULES` lists
them in the order in which Transformers applies them. What decides which program is compiled is a field of the rule,
since the rules of a call are static; numbers that may change without a new program are among its values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from olmozoo.errors import InputError
from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.state import Array, DecodeOptions, Namespace, State

COARSE = 64  # numbers that decide sizes in a program are rounded up to multiples, so that one program serves many
LEAST_TEMPERATURE = 1e-30  # below, scores would overflow float32; any two that differ are infinitely apart by then
Values = dict[str, Array]


class Request(NamedTuple):
    """What a call asks for, as `Rule.create` sees it, in NumPy.

    Attributes:
        settings: the settings of the call, checked.
        vocab_size: the number of tokens.
        ends: the tokens that end a row.
        prompt: positions of the prompt.
        real: (r, t) bool, the slots of `State.tokens` for real tokens: not padding.
        given: (t,) bool, the same slots and those of pad tokens in the prompt as it was given.
    """

    settings: GenerationConfig
    vocab_size: int
    ends: tuple[int, ...]
    prompt: int
    real: np.ndarray
    given: np.ndarray


class Text(NamedTuple):
    """The text so far, in the framework's arrays.

    Attributes:
        tokens: (r, t) the tokens, and what is not written yet.
        real: (r, t) bool, which of them are written and no padding.
        end: the index of the next token.
        count: the number of tokens of the answer so far.
    """

    tokens: Array
    real: Array
    end: Array
    count: Array


class Rule(Protocol):
    """A generation rule that is on. It is hashable: equal rules share a program."""

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """The rule for a call with its values, or None where the call does not use it.

        Raises:
            InputError: a setting does not fit the model.
        """

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """Scores (r, v) under the rule; -inf excludes a token."""


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide the scores of tokens that are in the text by a penalty, or multiply negative ones (arXiv:1909.05858)."""

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        penalty = request.settings.repetition_penalty
        return None if penalty == 1 else (cls(), {"penalty": np.array(float(penalty))})

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        seen = xp.mark(text.tokens, text.real, scores.shape[-1])
        penalized = xp.where(scores < 0, scores * values["penalty"], scores / values["penalty"])
        return xp.where(seen, penalized, scores)


@dataclass(frozen=True)
class NoRepeatNgram:
    """Exclude tokens that would complete a run of `size` tokens that occurred before."""

    size: int

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        settings = request.settings
        if not settings.no_repeat_ngram_size:
            return None
        # Transformers sees runs of pad tokens too, and greedy and beam search follow it. A sampled row does not know
        # its pads, so that it comes out the same in any batch.
        counted = request.real if settings.do_sample else np.broadcast_to(request.given, request.real.shape).copy()
        return cls(settings.no_repeat_ngram_size), {"ngram_text": counted}

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        counted = values["ngram_text"] & (xp.arange(text.tokens.shape[1]) < text.end)
        repeats = follows_last_run(xp, text.tokens, counted, text.end, self.size - 1)
        return xp.where(xp.mark(text.tokens, repeats, scores.shape[-1]), -math.inf, scores)


@dataclass(frozen=True)
class BadWords:
    """Exclude tokens that would complete one of the runs in `bad_words_ids`."""

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        words = [[int(i) for i in word] for word in request.settings.bad_words_ids or []]
        if outside := sorted({i for word in words for i in word if i >= request.vocab_size}):
            raise InputError(f"bad_words_ids has {outside}, and the vocabulary {request.vocab_size} tokens")
        words = [word for word in words if word not in [[end] for end in request.ends]]  # as in Transformers
        if not words:
            return None
        # Words as what they start with, right-aligned, -1 for any token, and their last tokens.
        starts = np.full((-(-len(words) // 8) * 8, -(-max(map(len, words)) // 8) * 8), -1)
        lasts = np.full(len(starts), -1)  # rounded up, so that one program serves many lists
        for i, word in enumerate(words):
            starts[i, starts.shape[1] - len(word) + 1 :] = word[:-1]
            lasts[i] = word[-1]
        return cls(), {"bad_starts": starts, "bad_lasts": lasts}

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        starts, lasts = values["bad_starts"], values["bad_lasts"]  # (w, m), (w,)
        recent = xp.arange(starts.shape[1]) + (text.end - starts.shape[1])
        inside, recent = recent >= 0, xp.where(recent < 0, 0, recent)
        inside = xp.take(text.real, recent, 1) & inside
        recent = xp.where(inside, xp.take(text.tokens, recent, 1), -2)  # (r, m); a word has no -2
        match = xp.all((starts == recent[:, None]) | (starts == -1), -1)  # (r, w)
        words = lasts[None] + xp.full((text.tokens.shape[0], 1), 0, text.tokens)
        excluded = xp.mark(xp.where(words < 0, 0, words), match & (words >= 0), scores.shape[-1])
        return xp.where(excluded, -math.inf, scores)


@dataclass(frozen=True)
class MinNewTokens:
    """Exclude the tokens that end a row before the answer is long enough."""

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        settings = request.settings
        least = settings.min_length - request.prompt if settings.min_new_tokens is None else settings.min_new_tokens
        return (cls(), {"min_new": np.array(least)}) if least > 0 and request.ends else None

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        return xp.where(values["is_end"] & (text.count < values["min_new"]), -math.inf, scores)


@dataclass(frozen=True)
class Temperature:
    """Divide scores by the temperature."""

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        settings = request.settings
        if not settings.do_sample or settings.temperature == 1:
            return None
        return cls(), {"temperature": np.array(max(float(settings.temperature), LEAST_TEMPERATURE))}

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        return scores / values["temperature"]


@dataclass(frozen=True)
class TopKTopP:
    """Keep the `top_k` likeliest tokens, and of those the fewest whose probabilities reach `top_p` (arXiv:1904.09751).

    One rule, since top_p after top_k looks at those few tokens alone.

    Attributes:
        most: at least the number of tokens to keep, the same for many calls; 0 for all.
        nucleus: whether there is a `top_p`.
    """

    most: int
    nucleus: bool

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        settings, size = request.settings, request.vocab_size
        most = min(-(-settings.top_k // COARSE) * COARSE, size) if settings.top_k < size else 0
        nucleus = settings.top_p < 1
        if not settings.do_sample or not (most or nucleus):
            return None
        return cls(most, nucleus), {"top_k": np.array(settings.top_k), "top_p": np.array(float(settings.top_p))}

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        if not self.most:
            return keep_likeliest(xp, scores, values["top_p"])
        best = xp.top_k(scores, self.most)[0]  # (r, k), the largest first
        least = xp.take(best, xp.arange(1) + (values["top_k"] - 1), 1)
        scores = xp.where(scores < least, -math.inf, scores)
        if not self.nucleus:
            return scores
        likely = xp.exp(xp.where(best < least, -math.inf, best) - best[:, :1])
        likely = likely / xp.sum(xp.exp(scores - best[:, :1]))
        kept = xp.cumsum(likely) - likely < values["top_p"]  # what is more likely makes up less
        return xp.where(scores < xp.min(xp.where(kept, best, best[:, :1])), -math.inf, scores)


@dataclass(frozen=True)
class MinP:
    """Keep tokens at least `min_p` times as probable as the likeliest (arXiv:2407.01082)."""

    @classmethod
    def create(cls, request: Request) -> tuple[Self, Values] | None:
        """See `Rule.create`."""
        settings = request.settings
        return (cls(), {"min_p": np.array(float(settings.min_p))}) if settings.do_sample and settings.min_p else None

    def process(self, xp: Namespace, values: Values, text: Text, scores: Array) -> Array:
        """See `Rule.process`."""
        return xp.where(scores < xp.max(scores) + xp.log(values["min_p"]), -math.inf, scores)


RULES: tuple[type[Rule], ...] = (
    RepetitionPenalty,
    NoRepeatNgram,
    BadWords,
    MinNewTokens,
    Temperature,
    TopKTopP,
    MinP,
)


def process(xp: Namespace, options: DecodeOptions, values: Values, state: State, scores: Array) -> Array:
    """Scores (r, v) under the rules of a call; -inf excludes a token."""
    text = text_so_far(xp, options, values, state)
    for rule in options.rules:
        scores = rule.process(xp, values, text, scores)
    return scores


def text_so_far(xp: Namespace, options: DecodeOptions, values: Values, state: State) -> Text:
    """The text as rules and drafts see it."""
    end = state.count + options.answer_start
    return Text(state.tokens, values["is_text"] & (xp.arange(state.tokens.shape[1]) < end), end, state.count)


def log_softmax(xp: Namespace, scores: Array) -> Array:
    """Log-probabilities (r, v) of scores (r, v)."""
    shifted = scores - xp.max(scores)
    return shifted - xp.log(xp.sum(xp.exp(shifted)))


def keep_likeliest(xp: Namespace, scores: Array, share: Array) -> Array:
    """Keep of scores (r, v) the greatest that make up `share` of the probability; the rest become -inf.

    A score is kept if those greater than it make up less. Found by bisection, since sorting a whole vocabulary costs
    more than the model's own step.
    """
    likely = xp.exp(log_softmax(xp, scores))
    high = xp.max(scores)
    low = xp.min(xp.where(scores > -math.inf, scores, high)) - 1.0

    def halve(low: Array, high: Array) -> tuple[Array, Array]:
        middle = (low + high) / 2
        enough = xp.sum(xp.where(scores > middle, likely, 0.0)) < share
        return xp.where(enough, low, middle), xp.where(enough, middle, high)

    low, _ = xp.loop(64, halve, low, high)  # then low and high are neighbours, or closer than any two scores
    return xp.where(scores > low, scores, -math.inf)


def follows_last_run(xp: Namespace, tokens: Array, counted: Array, end: Array, length: int) -> Array:
    """(r, t) bool: the indices whose `length` tokens before are the same as the last ones of the text.

    Args:
        xp: the framework's array functions.
        tokens: (r, t).
        counted: (r, t) bool, which of them make up the text.
        end: the index after the last of the text.
        length: may be more than the text has, where no index follows such a run.
    """
    rows, size = tokens.shape
    if length >= size:
        return counted & False
    follows = counted
    for gap in range(1, length + 1):
        last = xp.arange(1) + (end - gap)
        last = xp.take(tokens, xp.where(last < 0, 0, last), 1)  # (r, 1)
        shifted = xp.concat([xp.full((rows, gap), -1, tokens), tokens[:, :-gap]], 1)
        real = xp.concat([counted[:, :gap] & False, counted[:, :-gap]], 1)  # of no index, where end < gap
        follows = follows & real & (shifted == last)
    return follows


def draw(xp: Namespace, scores: Array, uniforms: Array, step: Array) -> Array:
    """Tokens (r,) drawn by inverse CDF: the first whose cumulated probability exceeds the row's uniform number."""
    likely = xp.exp(scores - xp.max(scores))  # (r, v)
    reached = xp.cumsum(likely)
    goal = xp.floating(xp.take(uniforms, xp.arange(1) + step, 1), scores) * reached[:, -1:]
    size = scores.shape[-1]
    first = xp.min(xp.where((reached > goal) & (likely > 0), xp.arange(size), size))[:, 0]
    return xp.where(first < size, first, xp.argmax(scores))  # past the end by rounding alone


def is_bad(xp: Namespace, logits: Array) -> Array:
    """(r,) bool: rows of logits (r, v) that have NaN or +inf, or nothing but -inf."""
    largest = xp.max(logits)[:, 0]
    return xp.any(logits != logits, -1) | ~((largest < math.inf) & (largest > -math.inf))


def find_ends(xp: Namespace, options: DecodeOptions, values: Values, tail: Array, token: Array) -> tuple[Array, Array]:
    """The tails (r, m) with the bytes of tokens (r,), and whether each row ends: by its token, or by a stop string."""
    hit = xp.take(values["is_end"], token, 0)
    if not options.stop_strings:
        return tail, hit
    width, table = tail.shape[1], values["token_bytes"]
    size = xp.take(values["token_sizes"], token, 0)[:, None]
    tail = xp.take_along(xp.concat([tail, xp.take(table, token, 0)], 1), xp.arange(width) + size)
    stops, steps = values["stops"], xp.arange(table.shape[1])  # (w, m) right-aligned, -1 for any byte
    longest = stops.shape[1]
    indices = width - longest - steps[:, None] + xp.arange(longest)  # a stop string ends in one of the new bytes
    endings = xp.reshape(xp.take(tail, xp.reshape(indices, (-1,)), 1), (tail.shape[0], -1, 1, longest))
    found = xp.any(xp.all((stops == endings) | (stops == -1), -1), -1)  # (r, bytes back from the end)
    return tail, hit | xp.any(found & (steps < size), -1)
