"""Decoding: the prompt first, then a token at a time over a cache set aside once, in two compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.decode import advance, guess
from olmozoo.generation.prepare import prepare, written
from olmozoo.generation.state import Rules, State
from olmozoo.outputs import GenerateOutput
from olmozoo.tf.cache import KVCache, cached_length, padded_left
from olmozoo.tf.layers import Tensor, at_least_float32


class GenerationMixin:
    """Adds `generate` to a model with a language-model head.

    Attributes:
        trace_count: how often a part of the decoding loop has been traced, and so compiled: two parts for each (batch,
            prompt, answer) shape, lengths being rounded up to `olmozoo.generation.BUCKET`, for each set of rules (not
            for their numbers), and for ids and embeddings.
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
            input_ids: (batch, seq) prompts, padded on the left; default the bos token.
            attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless a pad token also ends rows.
            generation_config: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            past_key_values: a cache of the first positions of `input_ids`, in either form.
            tokenizer: an `olmozoo.Tokenizer`, which `stop_strings` need.
            streamer: shown the prompt and then each step's tokens (rows,) by `put`, and told of the end by `end`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            (rows, seq + new) ids of prompt and answer; of the answer alone for `inputs_embeds`. A row that has ended
            holds pad tokens; the call ends with its longest row. A `GenerateOutput` for `return_dict_in_generate`.

        Raises:
            InputError: a setting is unknown, wrong or clashes with another, or shapes do not fit.
        """
        held = int(cached_length(past_key_values))
        call = prepare(
            generation_config or self.generation_config,
            self.config,
            settings,
            input_ids=None if input_ids is None else np.asarray(input_ids),
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            held=held,
            tokenizer=tokenizer,
            streamer=streamer,
            compiled=True,
        )
        rules, wide = call.rules, at_least_float32(self.compute_dtype)
        knobs, state = tf.nest.map_structure(lambda x: to_tensor(x, wide), (call.knobs, call.state))
        if call.ids is None:
            left = ((0, 0), (call.shift, 0), (0, 0))
            inputs = {"inputs_embeds": tf.pad(tf.cast(inputs_embeds, self.compute_dtype), left)}
        else:
            inputs = {"input_ids": to_tensor(call.ids, wide)}
        mask = tf.constant(call.mask)
        pasts = ()
        if past_key_values is not None:
            pasts = padded_left(past_key_values, call.past, len(call.mask), self.compute_dtype)
        read_prompt, read_answer = self._compiled_decoding(rules)
        if streamer is not None:
            streamer.put(call.state.tokens[:, rules.text - call.prompt : rules.text])
        state, cache = read_prompt(inputs, mask, pasts, state, knobs)
        max_new, shown = int(call.knobs["max_new"]), 0
        while streamer is not None and shown < max_new:
            if shown == int(state.count):
                if bool(ops.all(state.done)):
                    break
                state, cache = read_answer(mask, state, cache, knobs, tf.constant(shown + 1))
            streamer.put(state.tokens.numpy()[:, rules.text + shown])
            shown += 1
        if streamer is not None:
            streamer.end()
        else:
            state, cache = read_answer(mask, state, cache, knobs, tf.constant(max_new))
        fields = written(call, tf.nest.map_structure(lambda x: x.numpy(), state))
        dtype = tf.int32 if input_ids is None else tf.as_dtype(np.asarray(input_ids).dtype)
        sequences = tf.constant(fields.pop("sequences"), dtype)
        if not call.settings.return_dict_in_generate:
            return sequences
        output = GenerateOutput(
            sequences=sequences, **{name: tf.nest.map_structure(tf.constant, x) for name, x in fields.items()}
        )
        if rules.beams == 1:  # without the places that only round the prompt up
            places = [
                *range(call.past - held, call.past),
                *range(call.past + call.shift, call.end + int(state.count) - 1),
            ]
            keys, values = (tuple(tf.gather(x, places, axis=1) for x in side) for side in (cache.keys, cache.values))
            kept = KVCache(keys, values, tf.constant(len(places)))
            output.past_key_values = kept if isinstance(past_key_values, KVCache) else kept.to_tuple(len(state.done))
        return output

    def _compiled_decoding(self, rules: Rules) -> tuple[Any, Any]:
        """`_prompt` and `_answer`, compiled for some rules.

        Variables are read when they run, so they go on serving while those are trained. They are made anew when the
        model has other variables than they were compiled with (`enable_lora`, `resize_token_embeddings`, `quantize`).
        """
        variables = [id(v) for v in self.weights]
        compiled_with, functions = self.__dict__.get("_decoding", ([], {}))
        if compiled_with != variables:
            functions = {}
            self.__dict__["_decoding"] = (variables, functions)  # past Keras, which would track what is in them
        if rules not in functions:
            functions[rules] = tuple(
                tf.function(partial(part, rules), jit_compile=True, autograph=False)
                for part in (self._prompt, self._answer)
            )
        return functions[rules]

    def _reader(self, mask: Tensor) -> Callable[..., tuple[Tensor, KVCache]]:
        """A function that reads tokens into a cache and gives logits (rows, keep, v) after the last of them."""
        positions = ops.where(mask, ops.cumsum(ops.cast(mask, "int32"), axis=1) - 1, 0)

        def read(inputs: dict[str, Tensor], cache: KVCache, keep: int = 1) -> tuple[Tensor, KVCache]:
            rows, length = next(iter(inputs.values())).shape[:2]
            output = self(
                **inputs,
                attention_mask=mask,
                position_ids=ops.slice(positions, (0, cache.length), (rows, length)),
                past_key_values=cache,
                logits_to_keep=keep,
                output_hidden_states=False,
                output_attentions=False,
                return_dict=True,
                training=False,
            )
            return ops.cast(output.logits, at_least_float32(self.compute_dtype)), output.past_key_values

        return read

    def _prompt(
        self, rules: Rules, inputs: dict[str, Tensor], mask: Tensor, pasts: Any, state: State, knobs: dict[str, Tensor]
    ) -> tuple[State, KVCache]:
        """Read the prompt after `pasts`, over a cache of `mask.shape[1]` places, and write the first token."""
        self.trace_count += 1
        read = self._reader(mask)
        cache = self.init_cache(*mask.shape)
        if pasts:
            cache = cache.begin_with(pasts)
        batch, room = next(iter(inputs.values())).shape[:2]
        chunk = rules.chunk or room
        if chunk == room:
            logits, cache = read(inputs, cache)
        else:

            def read_chunk(i: Tensor, logits: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, KVCache]:
                piece = {
                    name: ops.slice(x, (0, i * chunk, *[0] * len(x.shape[2:])), (batch, chunk, *x.shape[2:]))
                    for name, x in inputs.items()
                }
                return i + 1, *read(piece, cache)

            start = ops.zeros((batch, 1, self.config.vocab_size), at_least_float32(self.compute_dtype))
            count = tf.constant(0)
            _, logits, cache = tf.while_loop(lambda i, *_: i < room // chunk, read_chunk, (count, start, cache))
        if rules.copies > 1:
            rows = ops.repeat(ops.arange(batch), rules.copies)
            logits, cache = tf.gather(logits, rows), cache.reorder(rows, batch)
        state, order = advance(XP, rules, knobs, state, logits[:, -1])
        return state, cache if order is None else cache.reorder(order, batch * rules.copies)

    def _answer(
        self, rules: Rules, mask: Tensor, state: State, cache: KVCache, knobs: dict[str, Tensor], until: Tensor
    ) -> tuple[State, KVCache]:
        """Write tokens until there are `until` of them or every row has ended."""
        self.trace_count += 1
        read = self._reader(ops.repeat(mask, rules.copies, axis=0))
        rows = mask.shape[0] * rules.copies
        end = mask.shape[1] - (state.tokens.shape[1] - rules.text) - rules.lookup  # the answer's first place

        def unfinished(state: State, *_: Any) -> Tensor:
            return (state.count < until) & ~ops.all(state.done)

        def last(state: State) -> Tensor:
            return ops.slice(state.tokens, (0, rules.text + state.count - 1), (rows, 1))

        def step(state: State, cache: KVCache) -> tuple[State, KVCache]:
            logits, cache = read({"input_ids": last(state)}, cache)
            state, order = advance(XP, rules, knobs, state, logits[:, -1])
            return state, cache if order is None else cache.reorder(order, rows)

        def leap(state: State, cache: KVCache) -> tuple[State, KVCache]:
            guessed = guess(XP, rules, knobs, state)  # (r, lookup)
            logits, cache = read({"input_ids": ops.concatenate([last(state), guessed], 1)}, cache, keep=0)

            def accept(state: State, i: Tensor, _: Tensor) -> tuple[State, Tensor, Tensor]:
                state, _ = advance(XP, rules, knobs, state, ops.take(logits, i, axis=1))
                expected = ops.take(guessed, ops.minimum(i, rules.lookup - 1), axis=1)
                right = ops.all((last(state)[:, 0] == expected) | state.done)
                return state, i + 1, right & (i < rules.lookup) & unfinished(state)

            begin = (state, tf.constant(0), tf.constant(True))
            state, _, _ = tf.while_loop(lambda state, i, right: right, accept, begin)
            return state, cache._replace(length=end + state.count - 1)

        return tf.while_loop(unfinished, leap if rules.lookup else step, (state, cache))


class Namespace:
    """TensorFlow's functions as `olmozoo.decoding.Namespace` names them."""

    where, exp, log, reshape = (staticmethod(f) for f in (ops.where, ops.exp, ops.log, ops.reshape))
    concat, any, all = (staticmethod(f) for f in (ops.concatenate, ops.any, ops.all))

    def arange(self, size: int) -> Tensor:
        return ops.arange(size, dtype="int32")

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

    def take(self, x: Tensor, places: Tensor, axis: int) -> Tensor:
        return tf.gather(x, places, axis=axis)

    def take_along(self, x: Tensor, places: Tensor) -> Tensor:
        return tf.gather(x, places, axis=1, batch_dims=1)

    def put(self, x: Tensor, place: Tensor, value: Tensor) -> Tensor:
        start = (0, place, *[0] * len(x.shape[2:]))
        return ops.slice_update(x, start, ops.cast(value, x.dtype)[:, None])

    def mark(self, tokens: Tensor, flags: Tensor, size: int) -> Tensor:
        rows, width = tokens.shape
        places = ops.where(flags, tokens, size) + ops.arange(rows)[:, None] * (size + 1)
        marks = tf.scatter_nd(ops.reshape(places, (-1, 1)), tf.ones(rows * width, tf.int32), (rows * (size + 1),))
        return ops.reshape(marks, (rows, size + 1))[:, :size] > 0

    def full(self, shape: tuple[int, ...], value: int, like: Tensor) -> Tensor:
        return tf.fill(shape, tf.cast(value, like.dtype))

    def floating(self, x: Any, like: Tensor) -> Tensor:
        return tf.cast(x, like.dtype)

    def loop(self, times: int, body: Callable[..., tuple[Tensor, ...]], *state: Tensor) -> tuple[Tensor, ...]:
        count = tf.constant(0)
        return tf.while_loop(lambda i, *_: i < times, lambda i, *state: (i + 1, *body(*state)), (count, *state))[1:]


XP = Namespace()


def to_tensor(array: np.ndarray, wide: str) -> Tensor:
    """The array as a tensor with floating-point numbers in `wide` and large whole numbers in int32."""
    if array.dtype.kind == "f":
        return tf.constant(array, wide)
    return tf.constant(array, tf.int32 if array.dtype == np.int64 else array.dtype)
