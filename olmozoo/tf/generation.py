"""Decoding: the prompt first, then a token at a time over a preallocated cache, in two compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.decode import decode_step, propose_draft
from olmozoo.generation.prepare import finalize, prepare, run
from olmozoo.generation.state import DecodeOptions, State
from olmozoo.outputs import GenerateOutput
from olmozoo.tf.cache import KVCache, WindowCache, cached_length, padded_left
from olmozoo.tf.layers import Tensor, at_least_float32


class GenerationMixin:
    """Adds `generate` to a model with a language-model head.

    Attributes:
        trace_count: how often a part of the decoding loop has been traced, and so compiled: two parts for each (batch,
            prompt, answer) shape, lengths being padded as `olmozoo.generation.prepare.bucket` says, for each set of
            rules (not for their numbers), and for ids and embeddings.
    """

    trace_count = 0

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continue each row of a batch: greedily, by sampling or by beam search.

        Args:
            input_ids: (batch, seq) prompts, padded on the left, as a tensor, an array or lists; default the bos token.
            attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless a pad token also ends rows.
            generation_config: default the model's own, whose eos and pad are used where one given has none.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            past_key_values: a cache of the first positions of `input_ids`, in either form.
            tokenizer: an `olmozoo.Tokenizer`, which `stop_strings` need.
            streamer: gets the prompt and then each step's tokens (rows,) by `put`, then a call of `end`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`; None switches a setting off.

        Returns:
            (rows, seq + new) ids of prompt and answer; of the answer alone for `inputs_embeds`. A row that has ended
            holds pad tokens; the call ends with its longest row. A `GenerateOutput` for `return_dict_in_generate`.

        Raises:
            InputError: a setting is unknown, wrong or conflicts with another; ids or shapes do not fit; the call needs
                more memory than there is; or logits are not finite.
        """
        output = self._generate(
            input_ids,
            attention_mask,
            generation_config,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            tokenizer=tokenizer,
            streamer=streamer,
            **settings,
        )
        dtype = tf.int32 if input_ids is None else tf.as_dtype(getattr(input_ids, "dtype", tf.int64))
        fields = {name: tf.nest.map_structure(tf.constant, value) for name, value in output.items()}
        output = GenerateOutput(**fields | {"sequences": tf.constant(output.sequences, dtype)})
        return output.sequences if output.logprobs is None else output

    def _generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        **settings: Any,
    ) -> GenerateOutput:
        """`generate` with ids as NumPy arrays, in and out; the cache of the output is of tensors."""
        cached = int(cached_length(past_key_values))
        call = prepare(
            generation_config or self.generation_config,
            self.config,
            settings,
            own=self.generation_config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cached=cached,
            tokenizer=tokenizer,
            streamer=streamer,
            compiled=True,
        )
        layout, wide = call.layout, at_least_float32(self.compute_dtype)
        values, start = tf.nest.map_structure(lambda x: from_numpy(x, wide), (call.values, call.state))
        if call.ids is None:
            left = ((0, 0), (layout.left_pad, 0), (0, 0))
            inputs = {"inputs_embeds": tf.pad(tf.cast(inputs_embeds, self.compute_dtype), left)}
        else:
            inputs = {"input_ids": from_numpy(call.ids, wide)}
        mask = tf.constant(call.mask)
        pasts: tuple[Any, ...] = ()
        if past_key_values is not None:
            pasts = padded_left(past_key_values, layout.past_slots, len(call.mask), self.compute_dtype)
        read_prompt, read_answer = self._compiled_decoding(call.options)
        state, cache = run(
            call,
            streamer,
            lambda: read_prompt(inputs, mask, pasts, start, values),
            lambda state, cache, until: read_answer(mask, state, cache, values, tf.constant(until)),
        )
        output = finalize(call, tf.nest.map_structure(lambda x: x.numpy(), state))
        if output.logprobs is not None and call.options.beams == 1:
            slots = layout.used_slots(int(state.count))
            keys, values = (tuple(tf.gather(x, slots, axis=1) for x in side) for side in (cache.keys, cache.values))
            kept = KVCache(keys, values, tf.constant(len(slots)))
            output.past_key_values = kept if isinstance(past_key_values, KVCache) else kept.to_tuple(len(call.mask))
        return output

    def _compiled_decoding(self, options: DecodeOptions) -> tuple[Any, Any]:
        """`_prompt` and `_answer`, compiled for some options.

        Variables are read when they run, so they go on serving while those are trained. They are made anew when the
        model has other variables than they were compiled with (`enable_lora`, `resize_token_embeddings`, `quantize`).
        """
        variables = [id(v) for v in self.weights]
        compiled_with, functions = self.__dict__.get("_decoding", ([], {}))
        if compiled_with != variables:
            functions = {}
            self.__dict__["_decoding"] = (variables, functions)  # past Keras, which would track what is in them
        if options not in functions:
            functions[options] = tuple(
                tf.function(partial(part, options), jit_compile=True, autograph=False)
                for part in (self._prompt, self._answer)
            )
        return functions[options]

    def _reader(self, mask: Tensor) -> Callable[..., tuple[Tensor, Any]]:
        """A function that reads tokens into a cache of either form and gives logits (rows, keep, v) after the last."""
        last = (self.config.position_limit or mask.shape[1]) - 1  # a draft may go past it
        positions = tf.clip_by_value(tf.cumsum(tf.cast(mask, tf.int32), axis=1) - 1, 0, last)

        def read(inputs: dict[str, Tensor], cache: Any, keep: int = 1) -> tuple[Tensor, Any]:
            past, (rows, length) = cached_length(cache), next(iter(inputs.values())).shape[:2]
            output = self(
                **inputs,
                attention_mask=mask if isinstance(cache, KVCache) else mask[:, : past + length],
                position_ids=tf.slice(positions, (0, past), (rows, length)),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
                output_hidden_states=False,
                output_attentions=False,
                return_dict=True,
                training=False,
            )
            return ops.cast(output.logits, at_least_float32(self.compute_dtype)), output.past_key_values

        return read

    def _empty_cache(self, batch: int, slots: int, options: DecodeOptions, most: int) -> KVCache:
        """A cache that keeps what windows see where all that is read into it is at most `most` positions at once."""
        if options.returns_cache or not any(self.config.windows):
            return self.init_cache(batch, slots)
        spare = max(most - 1, options.draft_tokens)
        return WindowCache.create(self.config, batch, slots, self.compute_dtype, spare)

    def _prompt(
        self,
        options: DecodeOptions,
        inputs: dict[str, Tensor],
        mask: Tensor,
        pasts: Any,
        state: State,
        values: dict[str, Tensor],
    ) -> tuple[State, KVCache]:
        """Read the prompt after `pasts` into a cache of `mask.shape[1]` slots, and append the first token."""
        self.trace_count += 1
        read = self._reader(mask)
        batch, slots = next(iter(inputs.values())).shape[:2]
        chunk = min(options.prefill_chunk or slots, slots)
        cache = self._empty_cache(mask.shape[0], mask.shape[1], options, chunk if chunk < slots else 1)
        if chunk == slots:
            logits, pairs = read(inputs, pasts or None)
            cache = cache.begin_with(pairs)
        else:
            if pasts:
                cache = cache.begin_with(pasts)

            def read_piece(start: Any, size: int, cache: KVCache) -> tuple[Tensor, KVCache]:
                piece = {
                    name: ops.slice(x, (0, start, *[0] * len(x.shape[2:])), (batch, size, *x.shape[2:]))
                    for name, x in inputs.items()
                }
                return read(piece, cache)

            logits = ops.zeros((batch, 1, self.config.vocab_size), at_least_float32(self.compute_dtype))
            first = slots % chunk
            if first:
                logits, cache = read_piece(0, first, cache)
            _, logits, cache = tf.while_loop(
                lambda i, *_: i < slots // chunk,
                lambda i, logits, cache: (i + 1, *read_piece(first + i * chunk, chunk, cache)),
                (tf.constant(0), logits, cache),
            )
        if options.rows_per_prompt > 1:
            rows = tf.repeat(tf.range(batch), options.rows_per_prompt)
            logits, cache = tf.gather(logits, rows), cache.reorder(rows, batch)
        state, order = decode_step(XP, options, values, state, logits[:, -1])
        return state, cache if order is None else cache.reorder(order, batch * options.rows_per_prompt)

    def _answer(
        self,
        options: DecodeOptions,
        mask: Tensor,
        state: State,
        cache: KVCache,
        values: dict[str, Tensor],
        until: Tensor,
    ) -> tuple[State, KVCache]:
        """Append tokens until there are `until` of them or every row has ended."""
        self.trace_count += 1
        read = self._reader(ops.repeat(mask, options.rows_per_prompt, axis=0))
        rows = mask.shape[0] * options.rows_per_prompt
        end = (
            mask.shape[1] - (state.tokens.shape[1] - options.answer_start) - options.draft_tokens
        )  # the answer's first slot

        def unfinished(state: State, *_: Any) -> Tensor:
            return (state.count < until) & ~ops.all(state.done)

        def last(state: State) -> Tensor:
            return ops.slice(state.tokens, (0, options.answer_start + state.count - 1), (rows, 1))

        def step(state: State, cache: KVCache) -> tuple[State, KVCache]:
            logits, cache = read({"input_ids": last(state)}, cache)
            state, order = decode_step(XP, options, values, state, logits[:, -1])
            return state, cache if order is None else cache.reorder(order, rows)

        def speculative_step(state: State, cache: KVCache) -> tuple[State, KVCache]:
            draft = propose_draft(XP, options, values, state)  # (r, draft_tokens)
            logits, cache = read({"input_ids": ops.concatenate([last(state), draft], 1)}, cache, keep=0)

            def accept(state: State, i: Tensor, _: Tensor) -> tuple[State, Tensor, Tensor]:
                state, _ = decode_step(XP, options, values, state, tf.gather(logits, i, axis=1))
                expected = tf.gather(draft, tf.minimum(i, options.draft_tokens - 1), axis=1)
                right = ops.all((last(state)[:, 0] == expected) | state.done)
                return state, i + 1, right & (i < options.draft_tokens) & unfinished(state)

            begin = (state, tf.constant(0), tf.constant(True))
            state, _, _ = tf.while_loop(lambda state, i, right: right, accept, begin)
            return state, cache._replace(length=end + state.count - 1)

        return tf.while_loop(unfinished, speculative_step if options.draft_tokens else step, (state, cache))


class Namespace:
    """TensorFlow's functions as `olmozoo.generation.state.Namespace` names them."""

    exp, log, reshape = (staticmethod(f) for f in (ops.exp, ops.log, ops.reshape))
    concat, any, all = (staticmethod(f) for f in (ops.concatenate, ops.any, ops.all))

    def arange(self, size: int) -> Tensor:
        return tf.range(size)

    def where(self, condition: Tensor, x: Any, y: Any) -> Tensor:
        dtype = x.dtype if tf.is_tensor(x) else y.dtype  # Keras would make int64 of a number where floatx is float64
        return tf.where(condition, tf.cast(x, dtype), tf.cast(y, dtype))

    def cumsum(self, x: Tensor) -> Tensor:
        return ops.cumsum(x, -1)

    def sum(self, x: Tensor) -> Tensor:
        return ops.sum(x, -1, keepdims=True)

    def max(self, x: Tensor) -> Tensor:
        return ops.max(x, -1, keepdims=True)

    def min(self, x: Tensor) -> Tensor:
        return ops.min(x, -1, keepdims=True)

    def argmax(self, x: Tensor) -> Tensor:
        return ops.argmax(x, -1)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return tuple(ops.top_k(x, k))

    def take(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        return tf.gather(x, indices, axis=axis)

    def take_along(self, x: Tensor, indices: Tensor) -> Tensor:
        return tf.gather(x, indices, axis=1, batch_dims=1)

    def put(self, x: Tensor, index: Tensor, value: Tensor) -> Tensor:
        start = (0, index, *[0] * len(x.shape[2:]))
        return ops.slice_update(x, start, ops.cast(value, x.dtype)[:, None])

    def mark(self, tokens: Tensor, flags: Tensor, size: int) -> Tensor:
        rows, width = tokens.shape
        indices = self.where(flags, tokens, size) + tf.range(rows)[:, None] * (size + 1)
        marks = tf.scatter_nd(ops.reshape(indices, (-1, 1)), tf.ones(rows * width, tf.int32), (rows * (size + 1),))
        return ops.reshape(marks, (rows, size + 1))[:, :size] > 0

    def full(self, shape: tuple[int, ...], value: int, like: Tensor) -> Tensor:
        return tf.fill(shape, tf.cast(value, like.dtype))

    def floating(self, x: Any, like: Tensor) -> Tensor:
        return tf.cast(x, like.dtype)

    def loop(self, times: int, body: Callable[..., tuple[Tensor, ...]], *state: Tensor) -> tuple[Tensor, ...]:
        count = tf.constant(0)
        return tf.while_loop(lambda i, *_: i < times, lambda i, *state: (i + 1, *body(*state)), (count, *state))[1:]


XP = Namespace()


def from_numpy(array: np.ndarray, wide: str) -> Tensor:
    """The array as a tensor with floating-point numbers in `wide` and int64 in int32."""
    if array.dtype.kind == "f":
        return tf.constant(array, wide)
    return tf.constant(array, tf.int32 if array.dtype == np.int64 else array.dtype)
