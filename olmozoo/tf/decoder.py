"""The base model of every family: embeddings, blocks, final norm. Families fill in the blocks (see `olmo2.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.modeling import check_inputs, check_range
from olmozoo.outputs import BaseModelOutput
from olmozoo.tf.base import PreTrainedModel
from olmozoo.tf.cache import close_cache, open_cache
from olmozoo.tf.layers import Tensor, TrackedBlocks, causal_mask, concrete, query_mask, rotary, split_seed


class Decoder(TrackedBlocks, PreTrainedModel):
    """A base model. Subclasses make `embed_tokens`, `blocks` (`layers` is Keras's own word), `norm` and `rope`."""

    layerdrop = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seeds = keras.random.SeedGenerator()  # of dropout; see `keras.utils.set_random_seed`

    @property
    def stack(self) -> keras.Layer:
        """The layer with `embed_tokens` and `blocks`."""
        return self

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        training: bool | None = None,
        **family_inputs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real. Or (batch, 1 or
                heads, seq, past + seq): true where a query sees a key, or floats that are added to the scores. With a
                `KVCache` its `max_length` may be there instead of past + seq.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            past_key_values: a `KVCache`, or a tuple of (key, value) pairs, each (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings instead of `input_ids`.
            use_cache: whether to return a cache where none is given; default `config.use_cache`, and False in training.
                With gradient checkpointing there is none in training.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            cache_position: (seq,) positions, for rows that all have the same; `position_ids` go before them.
            training: whether dropout is on.
            **family_inputs: further arguments of the family: `output_router_logits` where it has a mixture of experts,
                default `config.output_router_logits`; those of its `embed_positions` (OPT: `head_mask`).

        Returns:
            `BaseModelOutput`.

        Raises:
            InputError: arguments do not fit together, or an id or position is out of range (see `check_range`).
        """
        input_ids, inputs_embeds = (None if x is None else ops.convert_to_tensor(x) for x in (input_ids, inputs_embeds))
        check_inputs(input_ids, inputs_embeds)
        if input_ids is not None:
            check_range("input_ids", concrete(input_ids), self.stack.embed_tokens.input_dim)
        output_attentions = self.setting("output_attentions", output_attentions, False)
        output_hidden_states = self.setting("output_hidden_states", output_hidden_states, False)
        inputs = self.known_inputs(family_inputs)
        output_router_logits = self.setting("output_router_logits", inputs.pop("output_router_logits", None), False)
        recompute = self.gradient_checkpointing and training and past_key_values is None and not output_attentions
        use_cache = self.wants_cache(use_cache, training) and not recompute
        blocks = self.stack.blocks

        hidden = self.stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = ops.cast(hidden, self.compute_dtype)  # (b, s, c)
        batch, length, _ = ops.shape(hidden)
        windows = self.config.windows
        pasts, past, keys, end = open_cache(past_key_values, windows, length)
        needs_weights = output_attentions or (training and getattr(self.config, "attention_dropout", 0) > 0)
        make_mask = causal_mask if needs_weights else partial(query_mask, heads=self.config.num_attention_heads)
        masks = {
            window: make_mask(attention_mask, batch, length, past, count, window, None if window is None else end)
            for window, count in dict(zip(windows, keys, strict=True)).items()
        }
        if position_ids is None and cache_position is not None:
            position_ids = cache_position[None]
        hidden, layer_inputs = self.embed_positions(hidden, position_ids, attention_mask, past, **inputs)
        seeds = split_seed(self.seeds.next() if training else None, 2 * len(blocks))

        states, presents, attentions, routers = [hidden], [], [], []
        for block, layer_input, layer_past, window in zip(blocks, layer_inputs, pasts, windows, strict=True):
            before, mask, seed, drop_seed = hidden, masks[window], seeds.pop(), seeds.pop()
            if recompute:
                hidden, *router = recomputed(block, mask, layer_input, seed)(hidden)
            else:
                # Not called `mask`, of which Keras would make metadata of the hidden states.
                hidden, present, weights, *router = block(hidden, layer_input, layer_past, seed, key_mask=mask)
                presents.append(present)
                attentions.append(weights)
            if training and self.layerdrop:
                hidden = ops.where(tf.random.stateless_uniform((), drop_seed) < self.layerdrop, before, hidden)
            states.append(hidden)
            routers += router
        states[-1] = hidden = self.final_norm(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(past_key_values, presents, length, use_cache),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(routers) if routers and output_router_logits else None,
        )
        return output if self.setting("return_dict", return_dict, True) else output.to_tuple()

    def embed_positions(
        self, hidden: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, past: Any
    ) -> tuple[Tensor, list[Any]]:
        """Add positions; return the hidden states and one input per layer, here cosines and sines."""
        if position_ids is None:
            position_ids = past + ops.arange(ops.shape(hidden)[1], dtype="int32")[None]
        position_ids = ops.convert_to_tensor(position_ids)
        if position_ids.shape.rank not in (2, None):
            raise InputError(f"position_ids has shape {tuple(position_ids.shape)}, expected (batch or 1, seq)")
        return hidden, self.rotary_tables(position_ids, hidden.dtype)

    def rotary_tables(self, position_ids: Tensor, dtype: Any) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of each layer; where layers differ in them, a family has a method of its own."""
        return [rotary(self.rope, position_ids, dtype)] * len(self.stack.blocks)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The hidden states after the last block, normed."""
        return self.norm(hidden)


def recomputed(block: keras.Layer, mask: Tensor, layer_input: Any, seed: Tensor | None) -> Any:
    """A function from the hidden states before a block to what it returns but keys, values and attention weights.

    It keeps nothing for the backward pass.
    """

    def run(hidden: Tensor) -> tuple[Tensor, ...]:
        hidden, _, _, *router = block(hidden, layer_input, None, seed, key_mask=mask)
        return hidden, *router

    return keras.remat(run)
