"""The rules of decoding, written once for the three frameworks.

A wing runs its model and carries a `State`; here logits become tokens. Every function takes `xp`, the wing's small set
of array functions (`Namespace`), and works on that framework's arrays, in eager code as well as inside a compiled loop.

Shapes in comments: b batch, n beams, r rows (b * n, or b * num_return_sequences), v vocabulary, t places of text (the
prompt and room for the answer), a room for the answer, k candidates.
"""

from __future__ import annotations

from olmozoo.generation.beams import _advance_beams
from olmozoo.generation.processors import _ends_run, _read_tail, draw, log_softmax, process
from olmozoo.generation.state import Array, Namespace, Rules, State


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
