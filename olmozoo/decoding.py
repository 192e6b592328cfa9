"""The rules of decoding, written once for the three frameworks.

A wing runs its model and carries a `State`; here logits become tokens. Every function takes `xp`, the wing's small set
of array functions (`Namespace`), and works on that framework's arrays, in eager code as well as inside a compiled loop.

Shapes in comments: b batch, n beams, r rows (b * n, or b * num_return_sequences), v vocabulary, t places of text (the
prompt and room for the answer), a room for the answer, k candidates.
"""

from __future__ import annotations

import math
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


def advance(xp: Namespace, rules: Rules, knobs: dict[str, Array], state: State, logits: Array) -> tuple[State, Array]:
    """Write the next token of every row.

    Args:
        xp: the framework's array functions.
        rules: which rules there are.
        knobs: their numbers, see `olmozoo.generation.prepare`.
        state: the state before.
        logits: (r, v) of the next token, in at least float32.

    Returns:
        The state after, and for beam search the row (r,) that each row goes on from, whose cache it needs.
    """
    if rules.beams > 1:
        scores = process(xp, rules, knobs, state, log_softmax(xp, logits))
        return _advance_beams(xp, rules, knobs, state, scores)
    scores = process(xp, rules, knobs, state, logits)
    token = draw(xp, scores, knobs["uniforms"], state.count) if rules.sample else xp.argmax(scores)
    token = xp.where(state.done, knobs["pad"], token)
    tail, hit = _read_tail(xp, rules, knobs, state.tail, token)
    logprobs = state.logprobs
    if rules.logprobs:
        chosen = xp.take_along(log_softmax(xp, scores), token[:, None])[:, 0]
        logprobs = xp.put(logprobs, state.count, xp.where(state.done, 0.0, chosen))
    return State(
        tokens=xp.put(state.tokens, state.count + rules.text, token),
        count=state.count + 1,
        done=state.done | hit,
        tail=tail,
        logprobs=logprobs,
        scores=xp.put(state.scores, state.count, scores) if rules.scores else state.scores,
        beams=state.beams,
    ), None


def log_softmax(xp: Namespace, scores: Array) -> Array:
    """Log-probabilities (r, v) of scores (r, v)."""
    shifted = scores - xp.max(scores)
    return shifted - xp.log(xp.sum(xp.exp(shifted)))


# -- rules on scores --------------------------------------------------------------------------------------------------


def process(xp: Namespace, rules: Rules, knobs: dict[str, Array], state: State, scores: Array) -> Array:
    """Scores (r, v) under the rules, in Transformers' order; -inf takes a token out."""
    size = scores.shape[-1]
    end = state.count + rules.text  # the place of the next token
    before = knobs["text"] & (xp.arange(state.tokens.shape[1]) < end)  # (r, t) what counts as text
    if rules.penalty:  # arXiv:1909.05858
        seen = xp.mark(state.tokens, before, size)
        penalized = xp.where(scores < 0, scores * knobs["penalty"], scores / knobs["penalty"])
        scores = xp.where(seen, penalized, scores)
    if rules.ngram:
        runs = knobs["runs"] & (xp.arange(state.tokens.shape[1]) < end)
        repeats = _ends_run(xp, state.tokens, runs, end, rules.ngram - 1)
        scores = xp.where(xp.mark(state.tokens, repeats, size), -math.inf, scores)
    if rules.bad_words:
        scores = xp.where(_completes(xp, knobs, state.tokens, before, end, size), -math.inf, scores)
    if rules.min_new:
        scores = xp.where(knobs["is_end"] & (state.count < knobs["min_new"]), -math.inf, scores)
    if rules.temperature:
        scores = scores / knobs["temperature"]
    if rules.top_k:
        best = xp.top_k(scores, rules.top_k)[0]  # (r, k), the largest first
        least = xp.take(best, xp.arange(1) + (knobs["top_k"] - 1), 1)
        scores = xp.where(scores < least, -math.inf, scores)
        if rules.top_p:
            likely = xp.exp(xp.where(best < least, -math.inf, best) - best[:, :1])
            likely = likely / xp.sum(xp.exp(scores - best[:, :1]))
            kept = xp.cumsum(likely) - likely < knobs["top_p"]  # what is more likely makes up less
            scores = xp.where(scores < xp.min(xp.where(kept, best, best[:, :1])), -math.inf, scores)
    elif rules.top_p:  # arXiv:1904.09751
        scores = keep_likeliest(xp, scores, knobs["top_p"])
    if rules.min_p:  # arXiv:2407.01082
        scores = xp.where(scores < xp.max(scores) + xp.log(knobs["min_p"]), -math.inf, scores)
    return scores


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


def _ends_run(xp: Namespace, tokens: Array, before: Array, end: Array, length: int) -> Array:
    """(r, t): the places in the text so far that follow a run of `length` tokens like the one that the text ends on."""
    rows = tokens.shape[0]
    follows = before
    for gap in range(1, length + 1):
        last = xp.take(tokens, xp.arange(1) + (end - gap), 1)  # (r, 1)
        shifted = xp.concat([xp.full((rows, gap), -1, tokens), tokens[:, :-gap]], 1)
        real = xp.concat([before[:, :gap] & False, before[:, :-gap]], 1)
        follows = follows & real & (shifted == last)
    return follows


def _completes(xp: Namespace, knobs: dict[str, Array], tokens: Array, before: Array, end: Array, size: int) -> Array:
    """(r, v): the tokens that would complete a word that is not allowed, given what the text ends on."""
    starts, lasts = knobs["bad_starts"], knobs["bad_lasts"]  # (w, m) right-aligned, -1 for anything; (w,)
    width = starts.shape[1]
    places = xp.arange(width) + (end - width)
    places = xp.where(places < 0, 0, places)
    recent = xp.where(xp.take(before, places, 1), xp.take(tokens, places, 1), -2)  # (r, m); a word has no -2
    match = xp.all((starts == recent[:, None]) | (starts == -1), -1)  # (r, w)
    words = lasts[None] + xp.full((tokens.shape[0], 1), 0, tokens)
    return xp.mark(xp.where(words < 0, 0, words), match & (words >= 0), size)


def draw(xp: Namespace, scores: Array, uniforms: Array, step: Array) -> Array:
    """Tokens (r,) drawn by inverse CDF: the first whose cumulated probability exceeds the row's uniform number."""
    likely = xp.exp(scores - xp.max(scores))  # (r, v)
    reached = xp.cumsum(likely)
    goal = xp.floating(xp.take(uniforms, xp.arange(1) + step, 1), scores) * reached[:, -1:]
    size = scores.shape[-1]
    first = xp.min(xp.where((reached > goal) & (likely > 0), xp.arange(size), size))[:, 0]
    return xp.where(first < size, first, xp.argmax(scores))  # past the end by rounding alone


def _read_tail(xp: Namespace, rules: Rules, knobs: dict[str, Array], tail: Array, token: Array) -> tuple[Array, Array]:
    """The tails (r, m) with the bytes of tokens (r,), and whether each row ends: by its token, or by a stop string."""
    hit = xp.take(knobs["is_end"], token, 0)
    if not rules.stops:
        return tail, hit
    width, table = tail.shape[1], knobs["token_bytes"]
    size = xp.take(knobs["token_sizes"], token, 0)[:, None]
    tail = xp.take_along(xp.concat([tail, xp.take(table, token, 0)], 1), xp.arange(width) + size)
    stops, steps = knobs["stops"], xp.arange(table.shape[1])  # (w, m) right-aligned, -1 for anything
    longest = stops.shape[1]
    places = width - longest - steps[:, None] + xp.arange(longest)  # a stop string ends in one of the new bytes
    endings = xp.reshape(xp.take(tail, xp.reshape(places, (-1,)), 1), (tail.shape[0], -1, 1, longest))
    found = xp.any(xp.all((stops == endings) | (stops == -1), -1), -1)  # (r, bytes back from the end)
    return tail, hit | xp.any(found & (steps < size), -1)


# -- beams ------------------------------------------------------------------------------------------------------------


def _advance_beams(
    xp: Namespace, rules: Rules, knobs: dict[str, Array], state: State, scores: Array
) -> tuple[State, Array]:
    """One step of beam search, as Transformers takes it: of the best candidates those that end are set aside."""
    held: Beams = state.beams
    beams, size = rules.beams, scores.shape[-1]
    batch = held.running.shape[0]
    offset = xp.arange(batch)[:, None] * beams  # (b, 1) the first row of each

    def lanes(x: Array, chosen: Array, count: int) -> Array:
        """The rows of x (b * count, ...) that are chosen, (b, k) places among the count of each: (b * k, ...)."""
        return xp.take(x, xp.reshape(chosen + xp.arange(batch)[:, None] * count, (-1,)), 0)

    flat = xp.reshape(scores, (batch, beams * size))
    total = xp.reshape(xp.reshape(scores, (batch, beams, size)) + held.running[:, :, None], (batch, beams * size))
    candidates = max(2, 1 + rules.ends) * beams
    best, places = xp.top_k(total, candidates)  # (b, k)
    source, token = places // size, xp.reshape(places % size, (-1,))  # (b, k), (b * k,)
    tail = lanes(state.tail, source, beams) if rules.stops else state.tail
    tail, hit = _read_tail(xp, rules, knobs, tail, token)
    hit = xp.reshape(hit, (batch, candidates)) | (state.count + 1 >= knobs["max_new"])

    tokens = xp.put(lanes(state.tokens, source, beams), state.count + rules.text, token)
    trace = xp.put(lanes(held.trace, source, beams), state.count, xp.reshape(source + offset, (-1,)))
    gained = xp.reshape(xp.take_along(flat, places), (-1,))
    logprobs = xp.put(lanes(state.logprobs, source, beams), state.count, gained)

    running, onward = xp.top_k(best + NEVER * xp.floating(hit, best), beams)
    order = xp.reshape(xp.take_along(source, onward) + offset, (-1,))

    written = xp.floating(state.count + 1, best)
    ended_now = hit & (xp.arange(candidates) < beams)
    score = best / written ** knobs["length_penalty"]
    if rules.early:
        score = score + NEVER * xp.floating(xp.all(held.ended, -1)[:, None], best)
    score = score + NEVER * xp.floating(~held.hopeful, best)
    score = score + NEVER * xp.floating(~ended_now, best)
    merged = xp.concat([held.ended_scores, score], 1)  # (b, n + k)
    ended_scores, kept = xp.top_k(merged, beams)

    def merge(old: Array, new: Array) -> Array:
        """Of the ended beams' rows (b * n, ...) and the candidates' (b * k, ...) those that are kept."""
        width = tuple(old.shape[1:])
        parts = [xp.reshape(old, (batch, beams, *width)), xp.reshape(new, (batch, candidates, *width))]
        return lanes(xp.reshape(xp.concat(parts, 1), (-1, *width)), kept, beams + candidates)

    ended = xp.take_along(xp.concat([held.ended, ended_now], 1), kept)
    length = xp.floating(knobs["max_new"] if rules.longest else state.count + 1, best)
    hope = running[:, :1] / length ** knobs["length_penalty"]
    worst = xp.where(ended, xp.min(ended_scores), NEVER)
    hopeful = held.hopeful & xp.any(hope > worst, -1)[:, None]
    over = ~xp.any(hopeful) | xp.all(hit)
    if rules.early:
        over = over | xp.all(ended)
    return State(
        tokens=lanes(tokens, onward, candidates),
        count=state.count + 1,
        done=state.done | over,
        tail=lanes(tail, onward, candidates) if rules.stops else tail,
        logprobs=lanes(logprobs, onward, candidates),
        scores=xp.put(state.scores, state.count, scores) if rules.scores else state.scores,
        beams=Beams(
            running=running,
            trace=lanes(trace, onward, candidates),
            ended_tokens=merge(held.ended_tokens, tokens),
            ended_trace=merge(held.ended_trace, trace),
            ended_logprobs=merge(held.ended_logprobs, logprobs),
            ended_scores=ended_scores,
            ended=ended,
            hopeful=hopeful,
        ),
    ), order


# -- guessing ahead ---------------------------------------------------------------------------------------------------


def guess(xp: Namespace, rules: Rules, knobs: dict[str, Array], state: State) -> Array:
    """Tokens (r, lookup) that followed the latest, longest earlier run like the one that the text ends on."""
    end, size = state.count + rules.text, state.tokens.shape[1]
    places = xp.arange(size)
    before = knobs["text"] & (places < end)
    best = xp.full(tuple(state.tokens.shape), 0, state.tokens)
    for length in range(1, rules.matching + 1):
        best = xp.where(_ends_run(xp, state.tokens, before, end, length), places + length * size, best)
    ahead = xp.argmax(best)[:, None] + xp.arange(rules.lookup)  # from where a run ended; from the start, without any
    return xp.take_along(state.tokens, xp.where(ahead < size, ahead, 0))
