"""Heads on top of a decoder: causal language model, sequence classification, question answering.

A `...Module` is a Flax module, a pure function of its parameters. The class of the same name without it has one, with a
config and parameters, and is what users call.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.flax.base import PreTrainedModel
from olmozoo.flax.cache import cached_length
from olmozoo.flax.decoder import Decoder, DecoderModule
from olmozoo.flax.generation import GenerationMixin
from olmozoo.flax.layers import Dense, tied_head
from olmozoo.flax.losses import add_router_loss, answer_position_loss, classification_loss, next_token_loss
from olmozoo.modeling import check_kept_logits, head_labels
from olmozoo.outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput


class HeadedModule(nn.Module):
    """A decoder with a head on top, as a function of its parameters; subclasses say which."""

    base: type[DecoderModule]
    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False
    mesh: Mesh | None = None

    head: ClassVar[Head]
    output_class: ClassVar[type[Any]]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # the arguments of a call that give a loss

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.model = self.base(self.config, **types, gradient_checkpointing=self.gradient_checkpointing, mesh=self.mesh)
        for module, parameters in self.config.head_modules(self.head).items():
            if parameters[0].tied_to is None:
                setattr(self, module, Dense(parameters[0].shape[0], use_bias=len(parameters) > 1, **types))

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        labels: Array | None = None,
        logits_to_keep: int | Array = 0,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the decoder and the head; see `HeadedModel.__call__`."""
        given = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        targets = head_labels(self.label_names, given)
        output = self.model(input_ids, attention_mask, **inputs)
        hidden = output.last_hidden_state
        if jnp.ndim(logits_to_keep) > 0:
            check_kept_logits(self.head, targets)
            hidden = hidden[:, jnp.asarray(logits_to_keep)]
        elif logits_to_keep:
            check_kept_logits(self.head, targets)
            hidden = hidden[:, -operator.index(logits_to_keep) :]
        result = self.output_class(
            **self.head_outputs(hidden, input_ids),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        result.loss = None if targets is None else self.head_loss(result, *map(jnp.asarray, targets))
        if output.router_logits is not None:
            add_router_loss(result, output, attention_mask, cached_length(inputs.get("past_key_values")), self.config)
        return result

    def head_outputs(self, hidden: Array, input_ids: Array | None) -> dict[str, Array]:
        """What the head computes from the hidden states (b, s, c): the logits, by their names in the output."""
        raise NotImplementedError

    def head_loss(self, output: Any, *labels: Array) -> Array:
        """The loss of an output, for labels in the order of `label_names`."""
        raise NotImplementedError


class HeadedModel(PreTrainedModel):
    """A decoder with a head on top; subclasses name both."""

    base_class: ClassVar[type[Decoder]]
    module_class: ClassVar[type[HeadedModule]]

    def make_module(self) -> HeadedModule:
        return self.module_class(
            self.base_class.module_class, self.config, self.dtype, self.param_dtype, mesh=self.mesh
        )

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
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        **family_inputs: Any,
    ) -> Any:
        """Run the decoder and the head; arguments as in `Decoder.__call__`, and those of the head, which give `loss`.

        Args:
            labels: of a language model (batch, seq) token ids, the same as `input_ids`, -100 where there is nothing to
                learn; they are shifted here. Of a classifier what `config.problem_type` says; where it says nothing,
                one label is regression, several with integer labels (batch,) are single-label and with floating-point
                labels (batch, num_labels) multi-label classification.
            logits_to_keep: of a language model, the number of last positions, or the positions, to compute logits at;
                default 0, all.
            num_logits_to_keep: another name for it.
            start_positions: of question answering (batch,), the position of the answer's first token; one past the
                sequence is ignored.
            end_positions: that of its last.

        Returns:
            `CausalLMOutput`, `SequenceClassifierOutput` or `QuestionAnsweringOutput`.

        Raises:
            InputError: arguments do not fit together, or are those of another head, or there are no parameters.
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
            start_positions=start_positions,
            end_positions=end_positions,
            deterministic=deterministic,
            **self.known_inputs(family_inputs),
        )


class CausalLMModule(HeadedModule):
    """A decoder with a language-model head."""

    head = "causal_lm"
    output_class = CausalLMOutput

    def head_outputs(self, hidden: Array, input_ids: Array | None) -> dict[str, Array]:
        tied = self.config.tie_word_embeddings
        logits = tied_head(hidden, self.model.stack.embed_tokens.embedding) if tied else self.lm_head(hidden)
        return {"logits": logits}  # (b, s, v)

    def head_loss(self, output: CausalLMOutput, labels: Array) -> Array:
        return next_token_loss(output.logits, labels)


class CausalLM(GenerationMixin, HeadedModel):
    """A decoder with a language-model head."""

    head = "causal_lm"
    module_class = CausalLMModule


class SequenceClassifierModule(HeadedModule):
    """A decoder with a classification head on the last token of each row; see `SequenceClassifier`."""

    head = "sequence_classification"
    output_class = SequenceClassifierOutput

    def head_outputs(self, hidden: Array, input_ids: Array | None) -> dict[str, Array]:
        pad = self.config.pad_token_id
        if pad is None and hidden.shape[0] > 1:
            raise InputError("config.pad_token_id is None: without it the last token of several rows is not known")
        if pad is None or input_ids is None:
            last = hidden[:, -1]
        else:
            positions = jnp.arange(hidden.shape[1]) * (jnp.asarray(input_ids) != pad)
            last = hidden[jnp.arange(hidden.shape[0]), positions.argmax(-1)]  # (b, c)
        return {"logits": self.score(last)}  # (b, num_labels)

    def head_loss(self, output: SequenceClassifierOutput, labels: Array) -> Array:
        return classification_loss(output.logits, labels, self.config.problem_type)


class SequenceClassifier(HeadedModel):
    """A decoder with a classification head on the last token of each row.

    That is the rightmost of `input_ids` that is not `config.pad_token_id`; with `inputs_embeds`, the last position.
    """

    head = "sequence_classification"
    module_class = SequenceClassifierModule


class QuestionAnswererModule(HeadedModule):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"
    output_class = QuestionAnsweringOutput
    label_names = ("start_positions", "end_positions")

    def head_outputs(self, hidden: Array, input_ids: Array | None) -> dict[str, Array]:
        logits = self.qa_outputs(hidden)
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}  # (b, s) each

    def head_loss(self, output: QuestionAnsweringOutput, start_positions: Array, end_positions: Array) -> Array:
        start = answer_position_loss(output.start_logits, start_positions)
        return (start + answer_position_loss(output.end_logits, end_positions)) / 2


class QuestionAnswerer(HeadedModel):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"
    module_class = QuestionAnswererModule
