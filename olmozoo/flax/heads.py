"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`).

A `...Module` is a Flax module, a pure function of its parameters. The class of the same name without it holds one, with
a config and parameters, and is what users call.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.flax.base import PreTrainedModel
from olmozoo.flax.decoder import Decoder, DecoderModule
from olmozoo.flax.generation import GenerationMixin
from olmozoo.flax.layers import tied_head
from olmozoo.flax.losses import classification_loss, next_token_loss, place_loss
from olmozoo.outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput


class HeadedModule(nn.Module):
    """A decoder with a head on top, as a function of its parameters; subclasses say which."""

    base: type[DecoderModule]
    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    head: ClassVar[Head]

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.model = self.base(self.config, **types, gradient_checkpointing=self.gradient_checkpointing)
        for module, parameters in self.config.head_modules(self.head).items():
            if parameters[0].tied_to is None:
                setattr(self, module, nn.Dense(parameters[0].shape[0], use_bias=len(parameters) > 1, **types))


class HeadedModel(PreTrainedModel):
    """A decoder with a head on top; subclasses name both."""

    base_class: ClassVar[type[Decoder]]
    module_class: ClassVar[type[HeadedModule]]

    def make_module(self) -> HeadedModule:
        return self.module_class(self.base_class.module_class, self.config, self.dtype, self.param_dtype)


class CausalLMModule(HeadedModule):
    """A decoder with a language-model head."""

    head = "causal_lm"

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        labels: Array | None = None,
        logits_to_keep: int | Array = 0,
        **inputs: Any,
    ) -> CausalLMOutput:
        """Run the decoder and the head; see `CausalLM.__call__`."""
        output = self.model(input_ids, attention_mask, **inputs)
        hidden = output.last_hidden_state
        places = jnp.ndim(logits_to_keep) > 0
        if places or logits_to_keep:
            if labels is not None:
                raise InputError("labels need the logits at every position: leave out logits_to_keep")
            hidden = hidden[:, jnp.asarray(logits_to_keep) if places else slice(-operator.index(logits_to_keep), None)]
        tied = self.config.tie_word_embeddings
        logits = tied_head(hidden, self.model.stack.embed_tokens.embedding) if tied else self.lm_head(hidden)
        return CausalLMOutput(
            loss=None if labels is None else next_token_loss(logits, jnp.asarray(labels)),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class CausalLM(GenerationMixin, HeadedModel):
    """A decoder with a language-model head. Subclasses name the decoder."""

    head = "causal_lm"
    module_class = CausalLMModule

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
        **family_inputs: Any,
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
            **family_inputs,
        )


class SequenceClassifierModule(HeadedModule):
    """A decoder with a classification head on the last token of each row that is not padding."""

    head = "sequence_classification"

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        labels: Array | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Run the decoder and the head; see `SequenceClassifier.__call__`."""
        output = self.model(input_ids, attention_mask, **inputs)
        hidden, pad = output.last_hidden_state, self.config.pad_token_id
        if pad is None and hidden.shape[0] > 1:
            raise InputError("config.pad_token_id is None: without it the last token of several rows is not known")
        if pad is None or input_ids is None:
            last = hidden[:, -1]
        else:
            places = jnp.arange(hidden.shape[1]) * (jnp.asarray(input_ids) != pad)
            last = hidden[jnp.arange(hidden.shape[0]), places.argmax(-1)]  # (b, e)
        logits = self.score(last)
        return SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, jnp.asarray(labels), self.config.problem_type),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class SequenceClassifier(HeadedModel):
    """A decoder with a classification head. Subclasses name the decoder."""

    head = "sequence_classification"
    module_class = SequenceClassifierModule

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
        **family_inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.__call__`, and:

        Args:
            labels: gives `loss`, of the kind that `config.problem_type` says. Where it says none: one label is
                regression, several with integer labels (batch,) are single-label and with floating-point labels
                (batch, num_labels) multi-label classification.

        Returns:
            `SequenceClassifierOutput`. The last token is the rightmost of `input_ids` that is not
            `config.pad_token_id`; with `inputs_embeds` it is the last position.

        Raises:
            InputError: several rows without a `pad_token_id`, or there are no parameters.
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
            deterministic=deterministic,
            **family_inputs,
        )


class QuestionAnswererModule(HeadedModule):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; see `QuestionAnswerer.__call__`."""
        output = self.model(input_ids, attention_mask, **inputs)
        logits = self.qa_outputs(output.last_hidden_state)
        start, end = logits[..., 0], logits[..., 1]  # (b, s) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (place_loss(start, jnp.asarray(start_positions)) + place_loss(end, jnp.asarray(end_positions))) / 2
        return QuestionAnsweringOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class QuestionAnswerer(HeadedModel):
    """A decoder with a head for the first and the last token of an answer. Subclasses name the decoder."""

    head = "question_answering"
    module_class = QuestionAnswererModule

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool = True,
        *,
        use_cache: bool | None = None,
        **family_inputs: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.__call__`, and:

        Args:
            start_positions: (batch,) the place of the answer's first token; one past the text is ignored.
            end_positions: (batch,) that of its last. Both together give `loss`.

        Returns:
            `QuestionAnsweringOutput`.

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
            start_positions=start_positions,
            end_positions=end_positions,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            deterministic=deterministic,
            **family_inputs,
        )
