"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`).

A `...Module` is a Flax module, a pure function of its parameters. The class of the same name without it holds one, with
a config and parameters, and is what users call.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from olmozoo.errors import InputError
from olmozoo.families.base import ModelConfig
from olmozoo.flax.base import PreTrainedModel
from olmozoo.flax.cache import close_cache, open_cache
from olmozoo.flax.generation import GenerationMixin
from olmozoo.flax.layers import at_least_float32, causal_mask, rotary, tied_head
from olmozoo.outputs import BaseModelOutput, CausalLMOutput


class Layers(nn.Module):
    """The blocks of a decoder, named "0", "1", ... as they are in a checkpoint."""

    block: type[nn.Module]
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    gradient_checkpointing: bool

    def setup(self) -> None:
        block = nn.remat(self.block, static_argnums=5) if self.gradient_checkpointing else self.block  # deterministic
        types = (self.config, self.dtype, self.param_dtype)
        self.blocks = [block(*types, name=str(layer)) for layer in range(self.config.num_hidden_layers)]


class DecoderModule(nn.Module):
    """A base model: embeddings, blocks, final norm. Subclasses set `embed_tokens`, `layers`, `norm` in `setup`."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_position: Array | None = None,
        deterministic: bool = True,
    ) -> BaseModelOutput:
        """Run the decoder; see `Decoder.__call__`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        given, axes = (input_ids, "(batch, seq)") if inputs_embeds is None else (inputs_embeds, "(batch, seq, hidden)")
        given = jnp.asarray(given)
        if given.ndim != axes.count(",") + 1:
            raise InputError(f"the input has shape {given.shape}, expected {axes}")
        batch, length = given.shape[:2]
        pasts, past, total = open_cache(past_key_values, self.config.num_hidden_layers, length)

        hidden = (self.embed_tokens(given) if inputs_embeds is None else given).astype(self.dtype)  # (b, s, c)
        mask = causal_mask(attention_mask, batch, length, past, total)
        if position_ids is None and cache_position is not None:
            position_ids = jnp.asarray(cache_position)[None]
        hidden, turn = self.place(hidden, position_ids, attention_mask, past)

        states, presents, attentions = [hidden], [], []
        for layer, layer_past in zip(self.layers.blocks, pasts, strict=True):
            hidden, present, weights = layer(hidden, mask, turn, layer_past, deterministic)
            states.append(hidden)
            presents.append(present)
            attentions.append(weights if output_attentions else None)
        states[-1] = hidden = self.finish(hidden)
        use_cache = use_cache and (deterministic or not self.gradient_checkpointing)
        return BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(past_key_values, presents, length, use_cache),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def place(
        self, hidden: Array, position_ids: Array | None, attention_mask: Array | None, past: Any
    ) -> tuple[Array, Any]:
        """Bring positions in: the embeddings, changed or not, and what each attention needs (here cos and sin)."""
        batch, length, _ = hidden.shape
        if position_ids is None:
            position_ids = past + jnp.arange(length)[None]
        position_ids = jnp.asarray(position_ids)
        if position_ids.shape not in ((batch, length), (1, length)):
            raise InputError(f"position_ids has shape {position_ids.shape}, expected ({batch} or 1, {length})")
        return hidden, rotary(self.rope, position_ids, hidden.dtype)

    def finish(self, hidden: Array) -> Array:
        """What comes after the last block."""
        return self.norm(hidden)


class Decoder(PreTrainedModel):
    """A base model: embeddings, blocks, final norm. Subclasses name its module."""

    module_class: ClassVar[type[DecoderModule]]

    def build(self) -> DecoderModule:
        return self.module_class(self.config, self.dtype, self.param_dtype)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool = True,
        *,
        use_cache: bool | None = None,
        cache_position: Array | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the decoder. A pure function: jit, grad, vmap and sharding work on `params` and on the inputs.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real. With a `KVCache`
                it may be as long as that.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            params: the parameters, bare or as `{"params": ...}`; default the model's own.
            past_key_values: a `KVCache`, or a tuple of (key, value) pairs, each (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings in place of `input_ids`.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            dropout_rng: a `jax.random` key; needed in training where the config has dropout.
            deterministic: False in training, which puts dropout on.
            use_cache: whether to return a cache where none went in; default `config.use_cache`, and False in training
                with gradient checkpointing.
            cache_position: (seq,) places in the sequence; they are `position_ids` where those are not given.

        Returns:
            `BaseModelOutput`.

        Raises:
            InputError: arguments do not fit together, or there are no parameters.
        """
        return self.apply(
            params,
            dropout_rng,
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
            deterministic=deterministic,
        )


class CausalLMModule(nn.Module):
    """A decoder with a language-model head."""

    base: type[DecoderModule]
    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self) -> None:
        self.model = self.base(self.config, self.dtype, self.param_dtype, self.gradient_checkpointing)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                self.config.vocab_size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_position: Array | None = None,
        logits_to_keep: int | Array = 0,
        deterministic: bool = True,
    ) -> CausalLMOutput:
        """Run the decoder and the head; see `CausalLM.__call__`."""
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            cache_position,
            deterministic,
        )
        hidden = output.last_hidden_state
        places = jnp.ndim(logits_to_keep) > 0
        if places or logits_to_keep:
            if labels is not None:
                raise InputError("labels need the logits at every position: leave out logits_to_keep")
            hidden = hidden[:, jnp.asarray(logits_to_keep) if places else slice(-operator.index(logits_to_keep), None)]
        tied = self.config.tie_word_embeddings
        logits = tied_head(hidden, self.model.embed_tokens.embedding) if tied else self.lm_head(hidden)
        return CausalLMOutput(
            loss=None if labels is None else next_token_loss(logits, jnp.asarray(labels)),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class CausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with a language-model head. Subclasses name the decoder."""

    head = "causal_lm"
    base_class: ClassVar[type[Decoder]]

    def build(self) -> CausalLMModule:
        return CausalLMModule(self.base_class.module_class, self.config, self.dtype, self.param_dtype)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool = True,
        *,
        use_cache: bool | None = None,
        cache_position: Array | None = None,
        logits_to_keep: int | Array = 0,
        num_logits_to_keep: int | Array | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.__call__`, and:

        Args:
            labels: (batch, seq) token ids, the same as `input_ids`, -100 where there is nothing to learn; they are
                shifted here. Gives `loss`.
            logits_to_keep: the number of last positions, or the places, to compute logits at; default 0, all.
            num_logits_to_keep: another name for it.

        Returns:
            `CausalLMOutput`.

        Raises:
            InputError: arguments do not fit together, or there are no parameters.
        """
        return self.apply(
            params,
            dropout_rng,
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
            logits_to_keep=logits_to_keep if num_logits_to_keep is None else num_logits_to_keep,
            deterministic=deterministic,
        )


def next_token_loss(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy in nats of logits (b, s, v) against the labels (b, s) one place on; 0 if all are -100."""
    wide = logits[:, :-1].astype(at_least_float32(logits.dtype))
    labels = labels[:, 1:]
    learned = labels != -100
    picked = jnp.take_along_axis(wide, jnp.where(learned, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(learned, jax.nn.logsumexp(wide, axis=-1) - picked, 0)
    return losses.sum() / jnp.maximum(learned.sum(), 1)
