"""Rules on scores: penalties, truncation, stop strings, sampling."""

from __future__ import annotations

import math

from olmozoo.generation.state import Array, Namespace, Rules, State


def log_softmax(xp: Namespace, scores: Array) -> Array:
    """Log-probabilities (r, v) of scores (r, v)."""
    shifted = scores - xp.max(scores)
    return shifted - xp.log(xp.sum(xp.exp(shifted)))


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
