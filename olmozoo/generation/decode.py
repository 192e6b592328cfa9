"""The rules of decoding, written once for the three frameworks.

A wing runs its model and carries a `State`; here logits become tokens. Every function takes `xp`, the wing's small set
of array functions (`Namespace`), and works on that framework's arrays, in eager code as well as inside a compiled loop.

Shapes in comments: b batch, n beams, r rows (b * n, or b * num_return_sequences), v vocabulary, t slots of text (the
prompt and room for the answer), a room for the answer, k candidates.
"""

from __future__ import annotations

from olmozoo.generation.beams import beam_step
from olmozoo.generation.processors import (
    Values,
    draw,
    find_ends,
    follows_last_run,
    is_bad,
    log_softmax,
    process,
    text_so_far,
)
from olmozoo.generation.state import Array, DecodeOptions, Namespace, State


def decode_step(
    xp: Namespace, options: DecodeOptions, values: Values, state: State, logits: Array
) -> tuple[State, Array]:
    """Append the next token to every row.

    Args:
        xp: the framework's array functions.
        options: the static part of the call.
        values: its numbers, see `olmozoo.generation.prepare`.
        state: the state before.
        logits: (r, v) of the next token, in at least float32.

    Returns:
        The state after, and for beam search the row (r,) that each row continues, whose cache it needs.
    """
    bad = is_bad(xp, logits) & ~state.done & (state.bad_step < 0)
    state = state._replace(bad_step=xp.where(bad, state.count, state.bad_step))
    if options.beams > 1:
        scores = process(xp, options, values, state, log_softmax(xp, logits))
        return beam_step(xp, options, values, state, scores)
    scores = process(xp, options, values, state, logits)
    token = draw(xp, scores, values["uniforms"], state.count) if options.sample else xp.argmax(scores)
    token = xp.where(state.done | bad, values["pad"], token)
    tail, hit = find_ends(xp, options, values, state.tail, token)
    logprobs = state.logprobs
    if options.logprobs:
        chosen = xp.take_along(log_softmax(xp, scores), token[:, None])[:, 0]
        logprobs = xp.put(logprobs, state.count, xp.where(state.done, 0.0, chosen))
    return state._replace(
        tokens=xp.put(state.tokens, state.count + options.answer_start, token),
        count=state.count + 1,
        done=state.done | hit | bad,
        tail=tail,
        logprobs=logprobs,
        scores=xp.put(state.scores, state.count, scores) if options.scores else state.scores,
    ), None


def propose_draft(xp: Namespace, options: DecodeOptions, values: Values, state: State) -> Array:
    """Tokens (r, draft_tokens) that followed the latest, longest earlier run like the one that the text ends on."""
    text, size = text_so_far(xp, options, values, state), state.tokens.shape[1]
    indices = xp.arange(size)
    best = xp.full(tuple(state.tokens.shape), 0, state.tokens)
    for length in range(1, options.draft_ngram + 1):
        follows = follows_last_run(xp, text.tokens, text.real, text.end, length)
        best = xp.where(follows, indices + length * size, best)
    ahead = xp.argmax(best)[:, None] + xp.arange(options.draft_tokens)  # after the run; from the start, without any
    return xp.take_along(state.tokens, xp.where(ahead < size, ahead, 0))
