"""Decoding: one prefill, then a token at a time over a cache set aside once, all of it in one compiled function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from olmozoo.errors import InputError
from olmozoo.flax.cache import KVCache
from olmozoo.generation import GenerationConfig, Plan, bucket, plan, prompt_mask
from olmozoo.outputs import ModelOutput

ENDS = 8  # lists of eos tokens are padded to multiples of this, so that one program serves many lists


@jax.tree_util.register_dataclass
@dataclass
class GenerateOutput(ModelOutput):
    """Output of `generate`.

    Attributes:
        sequences: (batch, prompt + new) ids; the answer alone where the prompt was embeddings.
    """

    sequences: Any = None


@struct.dataclass
class Progress:
    """How far a decoding loop has come.

    Attributes:
        tokens: (batch, room) what has been written, then pad tokens.
        count: the number of tokens written in each row.
        done: (batch,) whether a row has ended.
        cache: of the prompt and all tokens but the last.
    """

    tokens: Array
    count: Array
    done: Array
    cache: KVCache


class GenerationMixin:
    """Adds `generate` to a model with a language-model head.

    Attributes:
        trace_count: how often the decoding loop has been traced, and so compiled: once for each (batch, prompt, total)
            shape, lengths being rounded up to `olmozoo.generation.BUCKET`, once for each dtype of the parameters, and
            once each for ids and embeddings.
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
        **settings: Any,
    ) -> GenerateOutput:
        """Continue each row of a batch, greedily: at each step the likeliest token.

        Args:
            input_ids: (batch, seq) prompts, padded on the left.
            attention_mask: (batch, seq), 0 at padding; default as in `olmozoo.generation.prompt_mask`.
            generation_config: default the model's own.
            params: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            `GenerateOutput`, whose `sequences` are (batch, seq + new) ids of prompt and answer; of the answer alone for
            `inputs_embeds`. A row that has ended holds pad tokens; the call ends with its longest row.

        Raises:
            InputError: a setting is unknown or impossible, or shapes do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        if isinstance(input_ids, jax.core.Tracer) or isinstance(inputs_embeds, jax.core.Tracer):
            raise InputError("generate is compiled itself and gives as many tokens as it takes: call it outside of jit")
        ids = None if input_ids is None else np.asarray(input_ids)
        embeds = None if inputs_embeds is None else np.asarray(inputs_embeds).astype(self.dtype)
        if embeds is not None and embeds.ndim != 3:
            raise InputError(f"inputs_embeds has shape {embeds.shape}, expected (batch, seq, hidden)")
        shape = embeds.shape[:2] if ids is None else ids.shape
        rule = plan(generation_config or self.generation_config, self.config, shape[-1], settings)
        real = prompt_mask(ids, attention_mask, rule, shape)
        room = bucket(shape[1])
        left = ((0, 0), (room - shape[1], 0))
        result = self._compiled(
            self.tree(params),
            None if ids is None else np.pad(ids, left).astype(np.int32),
            None if embeds is None else np.pad(embeds, (*left, (0, 0))),
            np.pad(real, left),
            *stop_rule(rule),
            total=bucket(room + rule.max_new),
        )
        # In NumPy: JAX would compile a program for each new pair of lengths.
        answer = np.asarray(result.tokens)[:, : int(result.count)]
        return GenerateOutput(
            jax.device_put(answer if ids is None else np.concatenate([ids, answer.astype(ids.dtype)], axis=1))
        )

    @cached_property
    def _compiled(self) -> Any:
        return jax.jit(self._decode, static_argnames="total")

    def _decode(
        self,
        params: Any,
        ids: Array | None,
        embeds: Array | None,
        real: Array,
        ends: Array,
        pad: Array,
        max_new: Array,
        total: int,
    ) -> Progress:
        """Decode from ids or embeds, real (batch, prompt) at what is no padding, over a cache of `total` positions."""
        self.trace_count += 1
        batch, prompt = real.shape
        mask = jnp.pad(real, ((0, 0), (0, total - prompt)), constant_values=True)
        positions = jnp.where(mask, jnp.cumsum(mask, axis=-1) - 1, 0)

        def predict(
            ids: Array | None, positions: Array, cache: KVCache, embeds: Array | None = None
        ) -> tuple[Array, KVCache]:
            output = self(ids, mask, positions, params, cache, embeds, logits_to_keep=1, return_dict=True)
            return output.logits[:, -1], output.past_key_values

        def write(progress: Progress, logits: Array, cache: KVCache) -> Progress:
            token = jnp.where(progress.done, pad, choose(logits))
            return Progress(
                lax.dynamic_update_slice_in_dim(progress.tokens, token[:, None], progress.count, axis=1),
                progress.count + 1,
                progress.done | jnp.isin(token, ends),
                cache,
            )

        def step(progress: Progress) -> Progress:
            last = lax.dynamic_slice_in_dim(progress.tokens, progress.count - 1, 1, axis=1)
            place = lax.dynamic_slice_in_dim(positions, prompt + progress.count - 1, 1, axis=1)
            return write(progress, *predict(last, place, progress.cache))

        start = Progress(
            tokens=jnp.full((batch, total - prompt), pad),
            count=jnp.zeros((), jnp.int32),
            done=jnp.zeros(batch, bool),
            cache=self.init_cache(batch, total),
        )
        first = write(start, *predict(ids, positions[:, :prompt], start.cache, embeds))
        return lax.while_loop(lambda now: (now.count < max_new) & ~now.done.all(), step, first)

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled loop and its count, which belong to this object and process."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_compiled", "trace_count")}


def stop_rule(rule: Plan) -> tuple[np.ndarray, np.int32, np.int32]:
    """The tokens that end a row (padded with -1, which none is), the pad token and the most tokens to write."""
    ends = np.full(max(-(-len(rule.eos) // ENDS), 1) * ENDS, -1, np.int32)
    ends[: len(rule.eos)] = rule.eos
    return ends, np.int32(rule.pad), np.int32(rule.max_new)


def choose(logits: Array) -> Array:
    """The next token of each row, (batch,) int32, from logits (batch, vocab): the likeliest."""
    return logits.argmax(-1).astype(jnp.int32)
