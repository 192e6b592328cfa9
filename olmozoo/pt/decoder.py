"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmozoo.errors import InputError
from olmozoo.outputs import BaseModelOutput
from olmozoo.pt.base import PreTrainedModel
from olmozoo.pt.cache import close_cache, open_cache
from olmozoo.pt.layers import causal_mask, rotary


class Decoder(PreTrainedModel):
    """A base model: embeddings, blocks, final norm. Subclasses set `embed_tokens`, `layers` and `norm`."""

    layerdrop = 0.0

    @property
    def parts(self) -> nn.Module:
        """The module that holds `embed_tokens` and `layers`."""
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
                heads, seq, past + seq), what each query sees: true, or with floats what is added to its scores.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            past_key_values: a `KVCache`, any object with its two methods, or a tuple of (key, value) pairs, each
                (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings in place of `input_ids`.
            use_cache: whether to return a cache where none went in; default `config.use_cache`, and False in training
                with gradient checkpointing.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            cache_position: (seq,) places in the sequence; they are `position_ids` where those are not given.
            **family_inputs: what the family's `place` takes besides (OPT: `head_mask`).

        Returns:
            `BaseModelOutput`.

        Raises:
            InputError: arguments do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        output_attentions = self.setting("output_attentions", output_attentions, False)
        output_hidden_states = self.setting("output_hidden_states", output_hidden_states, False)
        recompute = self.gradient_checkpointing and self.training
        layers = self.parts.layers
        cache = open_cache(past_key_values, self.setting("use_cache", use_cache, True) and not recompute, len(layers))
        past = 0 if cache is None else cache.get_seq_length()

        hidden = self.parts.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (b, s, c)
        if hidden.ndim != 3:
            given = input_ids if inputs_embeds is None else inputs_embeds
            raise InputError(f"the input has shape {tuple(given.shape)}, expected (batch, seq) or (batch, seq, hidden)")
        batch, length, _ = hidden.shape
        mask = causal_mask(attention_mask, batch, length, past, hidden.device)
        if position_ids is None and cache_position is not None:
            position_ids = cache_position[None]
        hidden, extras = self.place(hidden, position_ids, attention_mask, past, **family_inputs)

        states, attentions = [hidden], []
        for layer, extra in zip(layers, extras, strict=True):
            before = hidden
            if recompute and cache is None:
                hidden, weights = checkpoint(layer, hidden, mask, extra, None, output_attentions, use_reentrant=False)
            else:
                hidden, weights = layer(hidden, mask, extra, cache, output_attentions)
            if self.training and self.layerdrop:
                hidden = torch.where(torch.rand((), device=hidden.device) < self.layerdrop, before, hidden)
            states.append(hidden)
            attentions.append(weights)
        states[-1] = hidden = self.finish(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(cache),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if self.setting("return_dict", return_dict, True) else output.to_tuple()

    def place(
        self, hidden: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> tuple[Tensor, list[Any]]:
        """Bring positions in: the embeddings, changed or not, and what each block needs (here cosines and sines)."""
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        if position_ids.ndim != 2:
            raise InputError(f"position_ids has shape {tuple(position_ids.shape)}, expected (batch or 1, seq)")
        return hidden, [rotary(self.rope, position_ids, hidden.dtype)] * len(self.parts.layers)

    def finish(self, hidden: Tensor) -> Tensor:
        """What comes after the last block."""
        return self.norm(hidden)
