"""Decoding: the prompt first, then a token at a time over a cache set aside once, in two compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from olmozoo.errors import InputError
from olmozoo.flax.cache import KVCache, cached_length, padded_left
from olmozoo.flax.layers import at_least_float32
from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.decode import advance, guess
from olmozoo.generation.prepare import prepare, written
from olmozoo.generation.state import Rules, State
from olmozoo.outputs import GenerateOutput


class GenerationMixin:
    """Adds `generate` to a model with a language-model head.

    Attributes:
        trace_count: how often a part of the decoding loop has been traced, and so compiled: two parts for each (batch,
            prompt, answer) shape, lengths being rounded up to `olmozoo.generation.BUCKET`, for each set of rules (not
            for their numbers), each dtype of the parameters, and for ids and embeddings.
    """

    trace_count = 0

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        params: Any = None,
        *,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        **settings: Any,
    ) -> GenerateOutput:
        """Continue each row of a batch: greedily, by sampling or by beam search.

        Args:
            input_ids: (batch, seq) prompts, padded on the left; default the bos token.
            attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless a pad token also ends rows.
            generation_config: default the model's own.
            params: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            past_key_values: a cache of the first positions of `input_ids`, in either form.
            tokenizer: an `olmozoo.Tokenizer`, which `stop_strings` need.
            streamer: shown the prompt and then each step's tokens (rows,) by `put`, and told of the end by `end`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            `GenerateOutput`, whose `sequences` are (rows, seq + new) ids of prompt and answer; of the answer alone for
            `inputs_embeds`. A row that has ended holds pad tokens; the call ends with its longest row. With
            `return_dict_in_generate` its other fields are set too.

        Raises:
            InputError: a setting is unknown, wrong or clashes with another, or shapes do not fit.
        """
        if any(isinstance(x, jax.core.Tracer) for x in (input_ids, inputs_embeds)):
            raise InputError("generate is compiled itself and gives as many tokens as it takes: call it outside of jit")
        held = int(cached_length(past_key_values))
        call = prepare(
            generation_config or self.generation_config,
            self.config,
            settings,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=None if inputs_embeds is None else np.asarray(inputs_embeds),
            held=held,
            tokenizer=tokenizer,
            streamer=streamer,
            compiled=True,
        )
        rules, wide = call.rules, at_least_float32(self.dtype)
        knobs, state = jax.tree.map(lambda x: narrowed(x, wide), (call.knobs, call.state))
        embeds = None
        if inputs_embeds is not None:
            embeds = np.pad(np.asarray(inputs_embeds).astype(self.dtype), ((0, 0), (call.shift, 0), (0, 0)))
        params = self.tree(params)
        ids = None if call.ids is None else narrowed(call.ids, wide)
        pasts = None if past_key_values is None else padded_left(past_key_values, call.past)
        if streamer is not None:
            streamer.put(call.state.tokens[:, rules.text - call.prompt : rules.text])
        state, cache = self._read_prompt(params, ids, embeds, call.mask, pasts, state, knobs, rules=rules)
        max_new, shown = int(call.knobs["max_new"]), 0
        while streamer is not None and shown < max_new:
            if shown == int(state.count):
                if np.asarray(state.done).all():
                    break
                state, cache = self._read_answer(
                    params, call.mask, state, cache, knobs, np.int32(shown + 1), rules=rules
                )
            streamer.put(np.asarray(state.tokens)[:, rules.text + shown])
            shown += 1
        if streamer is not None:
            streamer.end()
        else:
            state, cache = self._read_answer(params, call.mask, state, cache, knobs, np.int32(max_new), rules=rules)
        fields = written(call, jax.tree.map(np.asarray, state))  # in NumPy: JAX would compile for each new length
        if not call.settings.return_dict_in_generate:
            fields = {name: fields[name] for name in ("sequences", "scores") if name in fields}
        elif rules.beams == 1:  # without the places that only round the prompt up
            places = [
                *range(call.past - held, call.past),
                *range(call.past + call.shift, call.end + int(state.count) - 1),
            ]
            pairs = [
                tuple(np.asarray(x)[:, :, places] for x in pair) for pair in zip(cache.keys, cache.values, strict=True)
            ]
            is_object = isinstance(past_key_values, KVCache)
            length = np.int32(len(places))
            fields["past_key_values"] = KVCache(*zip(*pairs, strict=True), length) if is_object else tuple(pairs)
        return jax.device_put(GenerateOutput(**fields))

    @cached_property
    def _read_prompt(self) -> Any:
        return jax.jit(self._prompt, static_argnames="rules")

    @cached_property
    def _read_answer(self) -> Any:
        return jax.jit(self._answer, static_argnames="rules", donate_argnums=(2, 3))

    def _reader(self, params: Any, mask: Array) -> Callable[..., tuple[Array, KVCache]]:
        """A function that reads tokens into a cache and gives logits (rows, keep, v) after the last of them."""
        positions = jnp.where(mask, jnp.cumsum(mask, axis=-1) - 1, 0)

        def read(
            ids: Array | None, cache: KVCache, embeds: Array | None = None, keep: int = 1
        ) -> tuple[Array, KVCache]:
            length = (embeds if ids is None else ids).shape[1]
            place = lax.dynamic_slice_in_dim(positions, cache.length, length, axis=1)
            output = self(ids, mask, place, params, cache, embeds, logits_to_keep=keep, return_dict=True)
            return output.logits.astype(at_least_float32(self.dtype)), output.past_key_values

        return read

    def _prompt(
        self,
        params: Any,
        ids: Array | None,
        embeds: Array | None,
        mask: Array,
        pasts: Any,
        state: State,
        knobs: dict[str, Array],
        rules: Rules,
    ) -> tuple[State, KVCache]:
        """Read the prompt after `pasts`, over a cache of `mask.shape[1]` places, and write the first token."""
        self.trace_count += 1
        read = self._reader(params, mask)
        cache = self.init_cache(*mask.shape)
        if pasts is not None:
            cache = cache.begin_with(pasts)
        room = (embeds if ids is None else ids).shape[1]
        chunk = rules.chunk or room

        def read_chunk(i: int, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            piece = [
                None if x is None else lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (ids, embeds)
            ]
            return read(piece[0], carry[1], piece[1])

        start = jnp.zeros((mask.shape[0], 1, self.config.vocab_size), at_least_float32(self.dtype))
        several = chunk < room
        logits, cache = (
            lax.fori_loop(0, room // chunk, read_chunk, (start, cache)) if several else read(ids, cache, embeds)
        )
        if rules.copies > 1:
            rows = jnp.repeat(jnp.arange(mask.shape[0]), rules.copies)
            logits, cache = logits[rows], cache.reorder(rows)
        state, order = advance(XP, rules, knobs, state, logits[:, -1])
        return state, cache if order is None else cache.reorder(order)

    def _answer(
        self,
        params: Any,
        mask: Array,
        state: State,
        cache: KVCache,
        knobs: dict[str, Array],
        until: Array,
        rules: Rules,
    ) -> tuple[State, KVCache]:
        """Write tokens until there are `until` of them or every row has ended."""
        self.trace_count += 1
        read = self._reader(params, jnp.repeat(mask, rules.copies, axis=0))
        end = mask.shape[1] - (state.tokens.shape[1] - rules.text) - rules.lookup  # the answer's first place

        def unfinished(state: State) -> Array:
            return (state.count < until) & ~state.done.all()

        def last(state: State) -> Array:
            return lax.dynamic_slice_in_dim(state.tokens, rules.text + state.count - 1, 1, axis=1)

        def step(carry: tuple[State, KVCache]) -> tuple[State, KVCache]:
            state, cache = carry
            logits, cache = read(last(state), cache)
            state, order = advance(XP, rules, knobs, state, logits[:, -1])
            return state, cache if order is None else cache.reorder(order)

        def leap(carry: tuple[State, KVCache]) -> tuple[State, KVCache]:
            state, cache = carry
            guessed = guess(XP, rules, knobs, state)  # (r, lookup)
            logits, cache = read(jnp.concatenate([last(state), guessed], 1), cache, keep=0)

            def accept(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
                state, i, _ = carry
                state, _ = advance(XP, rules, knobs, state, lax.dynamic_index_in_dim(logits, i, 1, keepdims=False))
                expected = lax.dynamic_slice_in_dim(guessed, jnp.minimum(i, rules.lookup - 1), 1, axis=1)
                right = ((last(state) == expected)[:, 0] | state.done).all()
                return state, i + 1, right & (i < rules.lookup) & unfinished(state)

            state, _, _ = lax.while_loop(lambda carry: carry[2], accept, (state, jnp.int32(0), jnp.bool_(True)))
            return state, cache.replace(length=end + state.count - 1)

        return lax.while_loop(lambda carry: unfinished(carry[0]), leap if rules.lookup else step, (state, cache))

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled functions and their count, which belong to this object and process."""
        own = ("_read_prompt", "_read_answer", "trace_count")
        return {name: value for name, value in self.__dict__.items() if name not in own}


class Namespace:
    """JAX's functions as `olmozoo.decoding.Namespace` names them."""

    arange, where, exp, log = (
        staticmethod(jnp.arange),
        staticmethod(jnp.where),
        staticmethod(jnp.exp),
        staticmethod(jnp.log),
    )
    concat, reshape, any, all = (staticmethod(f) for f in (jnp.concatenate, jnp.reshape, jnp.any, jnp.all))
    top_k, take = staticmethod(lax.top_k), staticmethod(jnp.take)

    def cumsum(self, x: Array) -> Array:
        return x.cumsum(-1)

    def sum(self, x: Array) -> Array:
        return x.sum(-1, keepdims=True)

    def max(self, x: Array) -> Array:
        return x.max(-1, keepdims=True)

    def min(self, x: Array) -> Array:
        return x.min(-1, keepdims=True)

    def argmax(self, x: Array) -> Array:
        return x.argmax(-1).astype(jnp.int32)

    def take_along(self, x: Array, places: Array) -> Array:
        return jnp.take_along_axis(x, places, 1)

    def put(self, x: Array, place: Array, value: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, value[:, None].astype(x.dtype), place, axis=1)

    def mark(self, tokens: Array, flags: Array, size: int) -> Array:
        marks = jnp.zeros((len(tokens), size + 1), bool)
        return marks.at[jnp.arange(len(tokens))[:, None], jnp.where(flags, tokens, size)].set(True)[:, :size]

    def full(self, shape: tuple[int, ...], value: int, like: Array) -> Array:
        return jnp.full(shape, value, like.dtype)

    def floating(self, x: Any, like: Array) -> Array:
        return jnp.asarray(x).astype(like.dtype)

    def loop(self, times: int, body: Callable[..., tuple[Array, ...]], *state: Array) -> tuple[Array, ...]:
        return lax.fori_loop(0, times, lambda _, state: tuple(body(*state)), state)


XP = Namespace()


def narrowed(array: np.ndarray, wide: Any) -> np.ndarray:
    """The array with floating-point numbers in `wide` and large whole numbers in int32, as JAX's own are."""
    if array.dtype.kind == "f":
        return array.astype(wide)
    return array.astype(np.int32) if array.dtype == np.int64 else array
