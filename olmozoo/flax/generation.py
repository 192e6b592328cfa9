"""Decoding: the prompt first, then a token at a time over a preallocated cache, in two compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from olmozoo.errors import InputError
from olmozoo.flax.cache import KVCache, WindowCache, cached_length, padded_left
from olmozoo.flax.layers import at_least_float32
from olmozoo.flax.sharding import replicated, to_host
from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.decode import decode_step, propose_draft
from olmozoo.generation.prepare import finalize, prepare, run
from olmozoo.generation.state import DecodeOptions, State
from olmozoo.outputs import GenerateOutput


class GenerationMixin:
    """Adds `generate` to a model with a language-model head.

    Attributes:
        trace_count: how often a part of the decoding loop has been traced, and so compiled: two parts for each (batch,
            prompt, answer) shape, lengths being padded as `olmozoo.generation.prepare.bucket` says, for each set of
            rules (not for their numbers), each dtype of the parameters, and for ids and embeddings.
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
            input_ids: (batch, seq) prompts, padded on the left, as an array or lists; default the bos token.
            attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless a pad token also ends rows.
            generation_config: default the model's own, whose eos and pad are used where one given has none.
            params: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            past_key_values: a cache of the first positions of `input_ids`, in either form.
            tokenizer: an `olmozoo.Tokenizer`, which `stop_strings` need.
            streamer: gets the prompt and then each step's tokens (rows,) by `put`, then a call of `end`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`; None switches a setting off.

        Returns:
            `GenerateOutput`, whose `sequences` are (rows, seq + new) ids of prompt and answer; of the answer alone for
            `inputs_embeds`. A row that has ended holds pad tokens; the call ends with its longest row. With
            `return_dict_in_generate` its other fields are set too.

        Raises:
            InputError: a setting is unknown, wrong or conflicts with another; ids or shapes do not fit; the call needs
                more memory than there is; or logits are not finite.
        """
        output = self._generate(
            input_ids,
            attention_mask,
            generation_config,
            params,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            tokenizer=tokenizer,
            streamer=streamer,
            **settings,
        )
        return jax.device_put(output)

    def _generate(
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
        """`generate` with NumPy arrays, in and out."""
        if any(isinstance(x, jax.core.Tracer) for x in (input_ids, inputs_embeds)):
            raise InputError("generate is compiled itself and its length depends on the tokens: call it outside of jit")
        cached = int(cached_length(past_key_values))
        call = prepare(
            generation_config or self.generation_config,
            self.config,
            settings,
            own=self.generation_config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=None if inputs_embeds is None else np.asarray(inputs_embeds),
            cached=cached,
            tokenizer=tokenizer,
            streamer=streamer,
            compiled=True,
        )
        layout, wide, params = call.layout, at_least_float32(self.dtype), self.tree(params)
        values, start = jax.tree.map(lambda x: narrowed(x, wide), (call.values, call.state))
        ids = None if call.ids is None else narrowed(call.ids, wide)
        embeds = None
        if inputs_embeds is not None:
            embeds = np.pad(np.asarray(inputs_embeds).astype(self.dtype), ((0, 0), (layout.left_pad, 0), (0, 0)))
        pasts = None if past_key_values is None else padded_left(past_key_values, layout.past_slots)
        options = call.options
        state, cache = run(
            call,
            streamer,
            lambda: self._read_prompt(params, ids, embeds, call.mask, pasts, start, values, options=options),
            lambda state, cache, until: self._read_answer(
                params, call.mask, state, cache, values, np.int32(until), options=options
            ),
        )
        output = finalize(call, jax.tree.map(np.asarray, state))  # in NumPy: JAX would compile for each new length
        if output.logprobs is not None and options.beams == 1:
            slots = layout.used_slots(int(state.count))
            keys, values = (tuple(to_host(x)[:, :, slots] for x in side) for side in (cache.keys, cache.values))
            is_object = isinstance(past_key_values, KVCache)
            kept = KVCache(keys, values, np.int32(len(slots))) if is_object else tuple(zip(keys, values, strict=True))
            output.past_key_values = kept
        return output

    @cached_property
    def _read_prompt(self) -> Any:
        return jax.jit(self._prompt, static_argnames="options")

    @cached_property
    def _read_answer(self) -> Any:
        return jax.jit(self._answer, static_argnames="options", donate_argnums=(2, 3))

    def _reader(self, params: Any, mask: Array) -> Callable[..., tuple[Array, Any]]:
        """A function that reads tokens into a cache of either form and gives logits (rows, keep, v) after the last."""
        last = (self.config.position_limit or mask.shape[1]) - 1  # a draft may go past it
        positions = jnp.clip(jnp.cumsum(mask, axis=-1) - 1, 0, last)

        def read(ids: Array | None, cache: Any, embeds: Array | None = None, keep: int = 1) -> tuple[Array, Any]:
            past, length = cached_length(cache), (embeds if ids is None else ids).shape[1]
            position_ids = lax.dynamic_slice_in_dim(positions, past, length, axis=1)
            seen = mask if isinstance(cache, KVCache) else mask[:, : past + length]
            settings = {"logits_to_keep": keep, "use_cache": True, "return_dict": True}
            output = self(ids, seen, position_ids, params, cache, embeds, **settings)
            return output.logits.astype(at_least_float32(self.dtype)), output.past_key_values

        return read

    def _empty_cache(self, batch: int, slots: int, options: DecodeOptions, most: int) -> KVCache:
        """A cache that keeps what windows see where all that is read into it is at most `most` positions at once."""
        if options.returns_cache or not any(self.config.windows):
            return self.init_cache(batch, slots)
        spare = max(most - 1, options.draft_tokens)
        return self._on_mesh(WindowCache.create(self.config, batch, slots, self.dtype, spare))

    def _prompt(
        self,
        params: Any,
        ids: Array | None,
        embeds: Array | None,
        mask: Array,
        pasts: Any,
        state: State,
        values: dict[str, Array],
        options: DecodeOptions,
    ) -> tuple[State, KVCache]:
        """Read the prompt after `pasts` into a cache of `mask.shape[1]` slots, and append the first token."""
        self.trace_count += 1
        read = self._reader(params, mask)
        slots = (embeds if ids is None else ids).shape[1]
        chunk = min(options.prefill_chunk or slots, slots)
        cache = self._empty_cache(mask.shape[0], mask.shape[1], options, chunk if chunk < slots else 1)
        if chunk == slots:
            logits, pairs = read(ids, pasts, embeds)
            cache = cache.begin_with(pairs)
        else:
            if pasts is not None:
                cache = cache.begin_with(pasts)

            def read_piece(start: Any, size: int, cache: KVCache) -> tuple[Array, KVCache]:
                piece = [None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (ids, embeds)]
                return read(piece[0], cache, piece[1])

            logits = jnp.zeros((mask.shape[0], 1, self.config.vocab_size), at_least_float32(self.dtype))
            first = slots % chunk
            if first:
                logits, cache = read_piece(0, first, cache)
            logits, cache = lax.fori_loop(
                0,
                slots // chunk,
                lambda i, carry: read_piece(first + i * chunk, chunk, carry[1]),
                (logits, cache),
            )
        if options.rows_per_prompt > 1:
            rows = jnp.repeat(jnp.arange(mask.shape[0]), options.rows_per_prompt)
            logits, cache = logits[rows], cache.reorder(rows)
        state, order = decode_step(XP, options, values, state, logits[:, -1])
        return replicated(state, self.mesh), cache if order is None else cache.reorder(order)

    def _answer(
        self,
        params: Any,
        mask: Array,
        state: State,
        cache: KVCache,
        values: dict[str, Array],
        until: Array,
        options: DecodeOptions,
    ) -> tuple[State, KVCache]:
        """Append tokens until there are `until` of them or every row has ended."""
        self.trace_count += 1
        read = self._reader(params, jnp.repeat(mask, options.rows_per_prompt, axis=0))
        end = (
            mask.shape[1] - (state.tokens.shape[1] - options.answer_start) - options.draft_tokens
        )  # the answer's first slot

        def unfinished(state: State) -> Array:
            return (state.count < until) & ~state.done.all()

        def last(state: State) -> Array:
            return lax.dynamic_slice_in_dim(state.tokens, options.answer_start + state.count - 1, 1, axis=1)

        def step(carry: tuple[State, KVCache]) -> tuple[State, KVCache]:
            state, cache = carry
            logits, cache = read(last(state), cache)
            state, order = decode_step(XP, options, values, state, logits[:, -1])
            return state, cache if order is None else cache.reorder(order)

        def speculative_step(carry: tuple[State, KVCache]) -> tuple[State, KVCache]:
            state, cache = carry
            draft = propose_draft(XP, options, values, state)  # (r, draft_tokens)
            logits, cache = read(jnp.concatenate([last(state), draft], 1), cache, keep=0)

            def accept(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
                state, i, _ = carry
                state, _ = decode_step(
                    XP, options, values, state, lax.dynamic_index_in_dim(logits, i, 1, keepdims=False)
                )
                expected = lax.dynamic_slice_in_dim(draft, jnp.minimum(i, options.draft_tokens - 1), 1, axis=1)
                right = ((last(state) == expected)[:, 0] | state.done).all()
                return state, i + 1, right & (i < options.draft_tokens) & unfinished(state)

            state, _, _ = lax.while_loop(lambda carry: carry[2], accept, (state, jnp.int32(0), jnp.bool_(True)))
            return state, cache.replace(length=end + state.count - 1)

        state, cache = lax.while_loop(
            lambda carry: unfinished(carry[0]), speculative_step if options.draft_tokens else step, (state, cache)
        )
        return replicated(state, self.mesh), cache


class Namespace:
    """JAX's functions as `olmozoo.generation.state.Namespace` names them."""

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

    def take_along(self, x: Array, indices: Array) -> Array:
        return jnp.take_along_axis(x, indices, 1)

    def put(self, x: Array, index: Array, value: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, value[:, None].astype(x.dtype), index, axis=1)

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
    """The array with floating-point numbers in `wide` and int64 in int32, as JAX's own are."""
    if array.dtype.kind == "f":
        return array.astype(wide)
    return array.astype(np.int32) if array.dtype == np.int64 else array
