"""One step of beam search."""

from __future__ import annotations

from olmozoo.generation.processors import _read_tail
from olmozoo.generation.state import NEVER, Array, Beams, Namespace, Rules, State


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
