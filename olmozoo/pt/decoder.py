"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmozoo.errors import InputError
from olmozoo.families.base import infer_problem_type
from olmozoo.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from olmozoo.pt.base import PreTrainedModel
from olmozoo.pt.cache import close_cache, open_cache
from olmozoo.pt.generation import GenerationMixin
from olmozoo.pt.layers import at_least_float32, causal_mask, rotary


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


class HeadedModel(PreTrainedModel):
    """A decoder with a head on top; subclasses say which."""

    base_class: ClassVar[type[Decoder]]

    def make_layers(self) -> None:
        self.model = self.base_class(self.config, seed=None)
        for module, parameters in self.config.head_modules(self.head).items():
            labels, width = parameters[0].shape
            setattr(self, module, nn.Linear(width, labels, bias=len(parameters) > 1))

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Take heads out of the decoder's weights, where its family offers that (OPT)."""
        self.model.prune_heads(heads_to_prune)
        self.config = self.model.config


class CausalLM(GenerationMixin, HeadedModel):
    """A decoder with a language-model head."""

    head = "causal_lm"

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
        **family_inputs: Any,
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
            **family_inputs,
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


class SequenceClassifier(HeadedModel):
    """A decoder with a classification head on the last token of each row that is not padding."""

    head = "sequence_classification"

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
        **family_inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.forward`, and:

        Args:
            labels: gives `loss`, of the kind that `config.problem_type` says. Where it says none: one label is
                regression, several with integer labels (batch,) are single-label and with floating-point labels
                (batch, num_labels) multi-label classification.

        Returns:
            `SequenceClassifierOutput`. The last token is the rightmost of `input_ids` that is not
            `config.pad_token_id`; with `inputs_embeds` it is the last position.

        Raises:
            InputError: several rows without a `pad_token_id`.
        """
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
            **family_inputs,
        )
        hidden = output.last_hidden_state
        pad = self.config.pad_token_id
        if pad is None and hidden.shape[0] > 1:
            raise InputError("config.pad_token_id is None: without it the last token of several rows is not known")
        if pad is None or input_ids is None:
            last = hidden[:, -1]
        else:
            places = torch.arange(input_ids.shape[1], device=input_ids.device) * (input_ids != pad)
            last = hidden[torch.arange(hidden.shape[0], device=hidden.device), places.argmax(-1)]  # (b, e)
        logits = self.score(last)
        result = SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()


class QuestionAnswerer(HeadedModel):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **family_inputs: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.forward`, and:

        Args:
            start_positions: (batch,) the place of the answer's first token; one past the text is ignored.
            end_positions: (batch,) that of its last. Both together give `loss`.

        Returns:
            `QuestionAnsweringOutput`.
        """
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
            **family_inputs,
        )
        start, end = self.qa_outputs(output.last_hidden_state).unbind(-1)  # (b, s) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (place_loss(start, start_positions) + place_loss(end, end_positions)) / 2
        result = QuestionAnsweringOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Mean cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`."""
    wide = logits.to(at_least_float32(logits.dtype))
    labels = labels.long().to(logits.device)
    return F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum") / (labels != ignored).sum().clamp(min=1)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s, v) against the labels (b, s) one place on, -100 ignored."""
    return cross_entropy(logits.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten(), -100)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (b, n) by `problem_type`, see `SequenceClassifier.forward`."""
    wide = logits.to(at_least_float32(logits.dtype))
    kind = problem_type or infer_problem_type(logits.shape[1], integers=not labels.is_floating_point())
    if kind == "regression":
        return F.mse_loss(wide, labels.to(wide).view_as(wide))
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.flatten(), -100)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide))


def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s) against places (b,), clamped to 0 .. s, where s is ignored."""
    length = logits.shape[1]
    return cross_entropy(logits, places.flatten().clamp(0, length), length)
