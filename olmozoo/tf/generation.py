"""Decoding: one prefill, then a token at a time over a cache set aside once, all in one compiled function."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.generation import GenerationConfig, bucket, plan, prompt_mask
from olmozoo.tf.layers import Tensor

ENDS = 8  # ends of a row are padded to a multiple of this, so that one program serves many lists of them


class GenerationMixin:
    """Adds `generate` to a model with a language-model head."""

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Any = None,
        **settings: Any,
    ) -> Tensor:
        """Continue each row of a batch, greedily: at each step the likeliest token.

        The first call for a batch size and a length (rounded up to `olmozoo.generation.BUCKET`) compiles; later ones
        do not, whatever the prompt, its length in the bucket, the end tokens or the weights are then.

        Args:
            input_ids: (batch, seq) prompts, padded on the left.
            attention_mask: (batch, seq), 0 at padding; default as in `olmozoo.generation.prompt_mask`.
            generation_config: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            (batch, seq + new) ids of prompt and answer; of the answer alone for `inputs_embeds`. A row that has ended
            holds pad tokens; the call ends with its longest row.

        Raises:
            InputError: a setting is unknown or impossible, or shapes do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        ids = None if input_ids is None else np.asarray(input_ids)
        batch, prompt = (inputs_embeds if ids is None else ids).shape[:2]
        rule = plan(generation_config or self.generation_config, self.config, prompt, settings)
        real = prompt_mask(ids, attention_mask, rule, (batch, prompt))
        left = ((0, 0), (bucket(prompt) - prompt, 0))
        if ids is None:
            inputs = {"inputs_embeds": tf.pad(tf.cast(inputs_embeds, self.compute_dtype), (*left, (0, 0)))}
        else:
            inputs = {"input_ids": tf.constant(np.pad(ids, left), tf.int32)}
        ends = np.full(max(-(-len(rule.eos) // ENDS), 1) * ENDS, -1)
        ends[: len(rule.eos)] = rule.eos
        answer, steps = self.compiled_decoding()(
            inputs,
            tf.constant(np.pad(real, left)),
            tf.constant(rule.max_new),
            tf.constant(ends, tf.int32),
            tf.constant(rule.pad, tf.int32),
            places=bucket(bucket(prompt) + rule.max_new),
        )
        answer = answer[:, : int(steps)]
        return answer if ids is None else tf.concat([ids, tf.cast(answer, ids.dtype)], axis=1)

    def compiled_decoding(self) -> Any:
        """`decode`, compiled; `compiled_decoding().experimental_get_tracing_count()` says how often.

        Variables are read when it runs, so it goes on serving while they are trained. It is made anew when the model
        has other variables than it was compiled with (`enable_lora`, `resize_token_embeddings`, `quantize`).
        """
        variables = self.weights
        compiled_with, function = self.__dict__.get("_decoding", ([], None))
        if function is None or [id(v) for v in variables] != [id(v) for v in compiled_with]:
            function = tf.function(self.decode, jit_compile=True, autograph=False)
            self.__dict__["_decoding"] = (variables, function)  # past Keras, which would count these variables in
        return function

    def decode(
        self, inputs: dict[str, Tensor], real: Tensor, max_new: Tensor, ends: Tensor, pad: Tensor, places: int
    ) -> tuple[Tensor, Tensor]:
        """Prefill, then decode until every row has ended.

        Args:
            inputs: `input_ids` (batch, prompt) or `inputs_embeds` (batch, prompt, hidden), padded on the left.
            real: (batch, prompt) bool, False at padding.
            max_new: scalar, the most tokens to write.
            ends: tokens that end a row; -1 stands for none.
            pad: scalar, what a row holds after its end.
            places: of the cache, in positions.

        Returns:
            (batch, places - prompt) ids of the answers, and the number of tokens written.
        """
        batch, prompt = real.shape
        mask = ops.concatenate([real, ops.ones((batch, places - prompt), "bool")], axis=1)
        count = ops.cumsum(ops.cast(real, "int32"), axis=1)  # real tokens up to each place

        def read(inputs: dict[str, Tensor], positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
            """The logits (batch, vocab) after the last of the inputs, and the cache with all of them."""
            output = self(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
                output_hidden_states=False,
                output_attentions=False,
                return_dict=True,
                training=False,
            )
            return output.logits[:, -1], output.past_key_values

        def choose(logits: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
            """The next token of each row, and whether the row has ended."""
            token = ops.where(done, pad, ops.argmax(logits, -1))
            return token, done | ops.any(token[:, None] == ends, -1)

        def unfinished(step: Tensor, token: Tensor, done: Tensor, answer: Tensor, cache: Any) -> Tensor:
            return (step < max_new) & ~ops.all(done)

        def write(step: Tensor, token: Tensor, done: Tensor, answer: Tensor, cache: Any) -> tuple[Any, ...]:
            logits, cache = read({"input_ids": token[:, None]}, count[:, -1:] + step - 1, cache)
            token, done = choose(logits, done)
            return step + 1, token, done, ops.slice_update(answer, (0, step), token[:, None]), cache

        logits, cache = read(inputs, ops.where(real, count - 1, 0), self.init_cache(batch, places))
        token, done = choose(logits, ops.zeros((batch,), "bool"))
        answer = ops.pad(token[:, None], ((0, 0), (0, places - prompt - 1)))
        step, _, _, answer, _ = tf.while_loop(unfinished, write, (tf.constant(1), token, done, answer, cache))
        return answer, step
