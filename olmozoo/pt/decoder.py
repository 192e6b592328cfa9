"""The base model of every family: embeddings, blocks, final norm. Families fill in the blocks (see `olmo2.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmozoo.errors import InputError
from olmozoo.modeling import check_inputs, check_range
from olmozoo.outputs import BaseModelOutput
from olmozoo.pt.base import PreTrainedModel
from olmozoo.pt.cache import cached_length, close_cache, key_slots, open_cache
from olmozoo.pt.layers import as_tensor, causal_mask, concrete, query_mask, rotary


class Decoder(PreTrainedModel):
    """A base model. Subclasses make `embed_tokens`, `layers` (the blocks), `norm` and `rope`."""

    layerdrop = 0.0

    @property
    def stack(self) -> nn.Module:
        """The module with `embed_tokens` and `layers`."""
        return self

    def forward(
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
        **family_inputs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real. Or (batch, 1 or
                heads, seq, past + seq): true where a query sees a key, or floats that are added to the scores.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            past_key_values: a `KVCache`, any object with its `update` and `get_seq_length`, or a tuple of (key, value)
                pairs, each (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings instead of `input_ids`.
            use_cache: whether to return a cache where none is given; default `config.use_cache`, and False in training.
                With gradient checkpointing there is none in training.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            cache_position: (seq,) positions, for rows that all have the same; `position_ids` go before them.
            **family_inputs: further arguments of the family: `output_router_logits` where it has a mixture of experts,
                default `config.output_router_logits`; those of its `embed_positions` (OPT: `head_mask`).

        Returns:
            `BaseModelOutput`.

        Raises:
            InputError: arguments do not fit together, or an id or position is out of range (see `check_range`).
        """
        device = self.device
        input_ids, attention_mask, position_ids, inputs_embeds, cache_position = (
            as_tensor(x, device) for x in (input_ids, attention_mask, position_ids, inputs_embeds, cache_position)
        )
        check_inputs(input_ids, inputs_embeds)
        if input_ids is not None:
            check_range("input_ids", concrete(input_ids), self.stack.embed_tokens.weight.shape[0])
        inputs = self.known_inputs(family_inputs)
        output_attentions = self.setting("output_attentions", output_attentions, False)
        output_hidden_states = self.setting("output_hidden_states", output_hidden_states, False)
        output_router_logits = self.setting("output_router_logits", inputs.pop("output_router_logits", None), False)
        recompute = self.gradient_checkpointing and self.training
        layers = self.stack.layers
        cache = open_cache(past_key_values, len(layers), self.wants_cache(use_cache, self.training) and not recompute)
        past = cached_length(cache)

        hidden = self.stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (b, s, c)
        batch, length, _ = hidden.shape
        make_mask, masks = causal_mask if output_attentions else query_mask, {}
        for layer, window in enumerate(self.config.windows):
            if window not in masks:
                keys, end = key_slots(cache, length, layer, window)
                masks[window] = make_mask(attention_mask, batch, length, past, keys, hidden.device, window, end)
        if position_ids is None and cache_position is not None:
            position_ids = cache_position[None]
        hidden, layer_inputs = self.embed_positions(hidden, position_ids, attention_mask, past, **inputs)

        states, attentions, routers = [hidden], [], []
        for layer, layer_input, window in zip(layers, layer_inputs, self.config.windows, strict=True):
            before, arguments = hidden, (masks[window], layer_input, cache, output_attentions)
            if recompute and cache is None:
                hidden, weights, *router = checkpoint(layer, hidden, *arguments, use_reentrant=False)
            else:
                hidden, weights, *router = layer(hidden, *arguments)
            if self.training and self.layerdrop:
                hidden = torch.where(torch.rand((), device=hidden.device) < self.layerdrop, before, hidden)
            states.append(hidden)
            attentions.append(weights)
            routers += router
        states[-1] = hidden = self.final_norm(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(cache),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(routers) if routers and output_router_logits else None,
        )
        return output if self.setting("return_dict", return_dict, True) else output.to_tuple()

    def embed_positions(
        self, hidden: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> tuple[Tensor, list[Any]]:
        """Add positions; return the hidden states and one input per layer, here cosines and sines."""
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        if position_ids.ndim != 2:
            raise InputError(f"position_ids has shape {tuple(position_ids.shape)}, expected (batch or 1, seq)")
        return hidden, self.rotary_tables(position_ids, hidden.dtype)

    def rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of each layer; where layers differ in them, a family has a method of its own."""
        return [rotary(self.rope, position_ids, dtype)] * len(self.stack.layers)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The hidden states after the last block, normed."""
        return self.norm(hidden)
