"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmozoo.errors import InputError
from olmozoo.outputs import BaseModelOutput, CausalLMOutput
from olmozoo.pt.base import PreTrainedModel
from olmozoo.pt.cache import close_cache, open_cache
from olmozoo.pt.generation import GenerationMixin
from olmozoo.pt.layers import at_least_float32, causal_mask, rotary


class Decoder(PreTrainedModel):
    """A base model: embeddings, blocks, final norm. Subclasses set `embed_tokens`, `layers` and `norm`."""

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
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real.
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
        cache = open_cache(
            past_key_values, self.setting("use_cache", use_cache, True) and not recompute, len(self.layers)
        )
        past = 0 if cache is None else cache.get_seq_length()

        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (b, s, c)
        batch, length, _ = hidden.shape
        mask = causal_mask(attention_mask, batch, length, past, hidden.device)
        if position_ids is None and cache_position is not None:
            position_ids = cache_position[None]
        hidden, turn = self.place(hidden, position_ids, attention_mask, past)

        states, attentions = [hidden], []
        for layer in self.layers:
            if recompute and cache is None:
                hidden, weights = checkpoint(layer, hidden, mask, turn, None, output_attentions, use_reentrant=False)
            else:
                hidden, weights = layer(hidden, mask, turn, cache, output_attentions)
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
    ) -> tuple[Tensor, Any]:
        """Bring positions in: the embeddings, changed or not, and what each attention needs (here cos and sin)."""
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        return hidden, rotary(self.rope, position_ids, hidden.dtype)

    def finish(self, hidden: Tensor) -> Tensor:
        """What comes after the last block."""
        return self.norm(hidden)


class CausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with a language-model head."""

    head = "causal_lm"
    base_class: ClassVar[type[Decoder]]

    def build(self) -> None:
        self.model = self.base_class(self.config, seed=None)
        self.lm_head = nn.Linear(self.config.embedding.shape[1], self.config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int | Tensor | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.forward`, and:

        Args:
            labels: (batch, seq) token ids, the same as `input_ids`, -100 where there is nothing to learn; they are
                shifted here. Gives `loss`.
            logits_to_keep: the number of last positions, or the places, to compute logits at; default 0, all.
            num_logits_to_keep: another name for it.

        Returns:
            `CausalLMOutput`.

        Raises:
            InputError: arguments do not fit together.
        """
        keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
        )
        hidden = output.last_hidden_state
        if isinstance(keep, Tensor) or keep:
            if labels is not None:
                raise InputError("labels need the logits at every position: leave out logits_to_keep")
            hidden = hidden[:, keep] if isinstance(keep, Tensor) else hidden[:, -keep:]
        logits = self.lm_head(hidden)
        result = CausalLMOutput(
            loss=None if labels is None else next_token_loss(logits, labels),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (b, s, v) against the labels (b, s) one place on; 0 if all are -100."""
    wide = logits.to(at_least_float32(logits.dtype)).flatten(0, 1)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100).flatten().to(wide.device)
    return F.cross_entropy(wide, labels, ignore_index=-100, reduction="sum") / (labels != -100).sum().clamp(min=1)
