"""The base model of every family: embeddings, blocks, final norm. Families fill in the blocks (see `olmo2.py`).

A `...Module` is a Flax module, a pure function of its parameters. The class of the same name without it has one, with a
config and parameters, and is what users call.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.flax.base import PreTrainedModel
from olmozoo.flax.cache import close_cache, open_cache
from olmozoo.flax.layers import causal_mask, concrete, query_mask, rotary
from olmozoo.flax.quantization import quantized_dense
from olmozoo.flax.sharding import constrain
from olmozoo.modeling import check_inputs, check_range
from olmozoo.outputs import BaseModelOutput


class Layers(nn.Module):
    """The blocks of a decoder, named "0", "1", ... as in a checkpoint; a list alone would name them "blocks_0", ..."""

    block: type[nn.Module]
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    gradient_checkpointing: bool
    mesh: Mesh | None = None

    def setup(self) -> None:
        block = nn.remat(self.block, static_argnums=5) if self.gradient_checkpointing else self.block  # deterministic
        types = (self.config, self.dtype, self.param_dtype)
        mesh = {"mesh": self.mesh} if hasattr(self.block, "mesh") else {}  # of a block with a mixture of experts
        self.blocks = [block(*types, layer, **mesh, name=str(layer)) for layer in range(self.config.num_hidden_layers)]


class DecoderModule(nn.Module):
    """A base model. Subclasses make `embed_tokens`, `layers` (with the blocks in it), `norm` and `rope` in `setup`."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False
    mesh: Mesh | None = None

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
        output_router_logits: bool = False,
        **family_inputs: Any,
    ) -> BaseModelOutput:
        """Run the decoder; see `Decoder.__call__`."""
        input_ids, inputs_embeds = (None if x is None else jnp.asarray(x) for x in (input_ids, inputs_embeds))
        check_inputs(input_ids, inputs_embeds)
        if input_ids is not None:
            check_range("input_ids", concrete(input_ids), self.config.vocab_size)
        blocks = self.stack.layers.blocks

        hidden = self.stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden.astype(self.dtype)  # (b, s, c)
        batch, length, _ = hidden.shape
        windows = self.config.windows
        pasts, past, keys, end = open_cache(past_key_values, windows, length)
        needs_weights = output_attentions or (not deterministic and getattr(self.config, "attention_dropout", 0) > 0)
        make_mask = causal_mask if needs_weights else partial(query_mask, heads=self.config.num_attention_heads)
        masks = {
            window: make_mask(attention_mask, batch, length, past, count, window, None if window is None else end)
            for window, count in dict(zip(windows, keys, strict=True)).items()
        }
        if position_ids is None and cache_position is not None:
            position_ids = jnp.asarray(cache_position)[None]
        hidden, layer_inputs = self.embed_positions(hidden, position_ids, attention_mask, past, **family_inputs)
        hidden = constrain(hidden, self.mesh)

        layerdrop = getattr(self.config, "layerdrop", 0.0)
        states, presents, attentions, routers = [hidden], [], [], []
        for block, layer_input, layer_past, window in zip(blocks, layer_inputs, pasts, windows, strict=True):
            before = hidden
            with nn.intercept_methods(quantized_dense):
                hidden, present, weights, *router = block(hidden, masks[window], layer_input, layer_past, deterministic)
            if layerdrop and not deterministic:
                hidden = jnp.where(jax.random.uniform(self.make_rng("dropout")) < layerdrop, before, hidden)
            hidden = constrain(hidden, self.mesh)
            states.append(hidden)
            presents.append(present)
            attentions.append(weights if output_attentions else None)
            routers += router
        states[-1] = hidden = self.final_norm(hidden)
        use_cache = use_cache and (deterministic or not self.gradient_checkpointing)
        return BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(past_key_values, presents, length, use_cache),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(routers) if routers and output_router_logits else None,
        )

    @property
    def stack(self) -> nn.Module:
        """The module with `embed_tokens` and `layers`."""
        return self

    def embed_positions(
        self, hidden: Array, position_ids: Array | None, attention_mask: Array | None, past: Any
    ) -> tuple[Array, list[Any]]:
        """Add positions; return the hidden states and one input per layer, here cosines and sines."""
        batch, length, _ = hidden.shape
        if position_ids is None:
            position_ids = past + jnp.arange(length)[None]
        position_ids = jnp.asarray(position_ids)
        if position_ids.shape not in ((batch, length), (1, length)):
            raise InputError(f"position_ids has shape {position_ids.shape}, expected ({batch} or 1, {length})")
        return hidden, self.rotary_tables(position_ids, hidden.dtype)

    def rotary_tables(self, position_ids: Array, dtype: Any) -> list[tuple[Array, Array]]:
        """Cosines and sines of each layer; where layers differ in them, a family has a method of its own."""
        return [rotary(self.rope, position_ids, dtype)] * self.config.num_hidden_layers

    def final_norm(self, hidden: Array) -> Array:
        """The hidden states after the last block, normed."""
        return self.norm(hidden)


class Decoder(PreTrainedModel):
    """A base model. Subclasses name its module."""

    module_class: ClassVar[type[DecoderModule]]

    def make_module(self) -> DecoderModule:
        return self.module_class(self.config, self.dtype, self.param_dtype, mesh=self.mesh)

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
        **family_inputs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the decoder. A pure function: jit, grad, vmap and sharding work on `params` and on the inputs.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real. Or (batch, 1 or
                heads, seq, past + seq): true where a query sees a key, or floats that are added to the scores. With a
                `KVCache` it may be as wide as its `max_length`.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            params: the parameters, bare or as `{"params": ...}`; default the model's own.
            past_key_values: a `KVCache`, or a tuple of (key, value) pairs, each (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings instead of `input_ids`.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            dropout_rng: a `jax.random` key; needed in training where the config has dropout.
            deterministic: False in training, which puts dropout on.
            use_cache: whether to return a cache where none is given; default `config.use_cache`, and False in training.
                With gradient checkpointing there is none in training.
            cache_position: (seq,) positions, for rows that all have the same; `position_ids` go before them.
            **family_inputs: further arguments of the family: `output_router_logits` where it has a mixture of experts,
                default `config.output_router_logits`; those of its `embed_positions` (OPT: `head_mask`).

        Returns:
            `BaseModelOutput`.

        Raises:
            InputError: arguments do not fit together, or there are no parameters, or an id or position is out of range
                (see `check_range`; under jit, which does not check, the answer is NaN).
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
            **self.known_inputs(family_inputs),
        )
