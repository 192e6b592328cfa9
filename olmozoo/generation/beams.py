"""One step of beam search."""

from __future__ import annotations

from olmozoo.generation.processors import Values, find_ends
from olmozoo.generation.state import MASKED_SCORE, Array, Beams, DecodeOptions, Namespace, State


def beam_step(
    xp: Namespace, options: DecodeOptions, values: Values, state: State, scores: Array
) -> tuple[State, Array]:
    """One step of beam search, as in Transformers: of the best candidates, those that end leave the running beams.

    Args:
        xp: the framework's array functions.
        options: the static part of the call.
        values: its numbers.
        state: the state before.
        scores: (r, v) log-probabilities of the next token, after the rules.

    Returns:
        The state after, and the row (r,) that each row continues.
    """
    before: Beams = state.beams
    beams, size = options.beams, scores.shape[-1]
    batch = before.running.shape[0]
    offset = xp.arange(batch)[:, None] * beams  # (b, 1) the first row of each

    def gather_beams(x: Array, chosen: Array, count: int) -> Array:
        """The rows (b * k, ...) of x (b * count, ...) at chosen (b, k), indices among the count of each."""
        return xp.take(x, xp.reshape(chosen + xp.arange(batch)[:, None] * count, (-1,)), 0)

    flat = xp.reshape(scores, (batch, beams * size))
    total = xp.reshape(xp.reshape(scores, (batch, beams, size)) + before.running[:, :, None], (batch, beams * size))
    candidates = max(2, 1 + options.num_ends) * beams
    best, indices = xp.top_k(total, candidates)  # (b, k)
    source, token = indices // size, xp.reshape(indices % size, (-1,))  # (b, k), (b * k,)
    tail = gather_beams(state.tail, source, beams) if options.stop_strings else state.tail
    tail, hit = find_ends(xp, options, values, tail, token)
    hit = xp.reshape(hit, (batch, candidates)) | (state.count + 1 >= values["max_new"])

    tokens = xp.put(gather_beams(state.tokens, source, beams), state.count + options.answer_start, token)
    trace = xp.put(gather_beams(before.trace, source, beams), state.count, xp.reshape(source + offset, (-1,)))
    gained = xp.reshape(xp.take_along(flat, indices), (-1,))
    logprobs = xp.put(gather_beams(state.logprobs, source, beams), state.count, gained)

    running, onward = xp.top_k(best + MASKED_SCORE * xp.floating(hit, best), beams)
    order = xp.reshape(xp.take_along(source, onward) + offset, (-1,))

    length = xp.floating(state.count + 1, best)
    ended_now = hit & (xp.arange(candidates) < beams)
    score = best / length ** values["length_penalty"]
    if options.stop_early:
        score = score + MASKED_SCORE * xp.floating(xp.all(before.ended, -1)[:, None], best)
    score = score + MASKED_SCORE * xp.floating(~before.can_improve, best)
    score = score + MASKED_SCORE * xp.floating(~ended_now, best)
    merged = xp.concat([before.ended_scores, score], 1)  # (b, n + k)
    ended_scores, kept = xp.top_k(merged, beams)

    def merge(old: Array, new: Array) -> Array:
        """The rows that are kept, of the ended beams' (b * n, ...) and the candidates' (b * k, ...)."""
        width = tuple(old.shape[1:])
        parts = [xp.reshape(old, (batch, beams, *width)), xp.reshape(new, (batch, candidates, *width))]
        return gather_beams(xp.reshape(xp.concat(parts, 1), (-1, *width)), kept, beams + candidates)

    ended = xp.take_along(xp.concat([before.ended, ended_now], 1), kept)
    final_length = xp.floating(values["max_new"], best) if options.expect_longest else length
    hope = running[:, :1] / final_length ** values["length_penalty"]
    worst = xp.where(ended, xp.min(ended_scores), MASKED_SCORE)
    can_improve = before.can_improve & xp.any(hope > worst, -1)[:, None]
    over = ~xp.any(can_improve) | xp.all(hit) | xp.any(state.bad_step >= 0)
    if options.stop_early:
        over = over | xp.all(ended)
    return state._replace(
        tokens=gather_beams(tokens, onward, candidates),
        count=state.count + 1,
        done=state.done | over,
        tail=gather_beams(tail, onward, candidates) if options.stop_strings else tail,
        logprobs=gather_beams(logprobs, onward, candidates),
        scores=xp.put(state.scores, state.count, scores) if options.scores else state.scores,
        beams=Beams(
            running=running,
            trace=gather_beams(trace, onward, candidates),
            ended_tokens=merge(before.ended_tokens, tokens),
            ended_trace=merge(before.ended_trace, trace),
            ended_logprobs=merge(before.ended_logprobs, logprobs),
            ended_scores=ended_scores,
            ended=ended,
            can_improve=can_improve,
        ),
    ), order
