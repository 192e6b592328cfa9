"""Heads on top of a decoder: causal language model, sequence classification, question answering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from olmozoo.tf.base import PreTrainedModel
from olmozoo.tf.decoder import Decoder
from olmozoo.tf.generation import GenerationMixin
from olmozoo.tf.layers import Tensor, linear
from olmozoo.tf.losses import classification_loss, next_token_loss, place_loss


class HeadedModel(PreTrainedModel):
    """A decoder with a head on top; subclasses say which."""

    base_class: ClassVar[type[Decoder]]
    label_names = ("labels",)

    def make_layers(self) -> None:
        self.model = self.base_class(self.config, name="model", nested=True)
        for module, (weight, *bias) in self.config.head_modules(self.head).items():
            tied = weight.tied_to is not None
            setattr(self, module, None if tied else linear(weight.shape[0], bool(bias), name=module))

    def own_loss(self, output: Any, labels: Any) -> Tensor:
        """The loss of an output, for labels that were not among the inputs."""
        raise NotImplementedError

    def predictions(self, output: Any) -> Any:
        """What of an output a user's own loss and metrics are given."""
        return output.logits

    def labels_of(self, x: Any, y: Any) -> Any:
        """The labels: `y`, or those among the inputs; a list if they are several, None if they are not all there."""
        if y is not None and not isinstance(y, Mapping):
            return y
        named = self.as_keywords(x) if y is None else y
        labels = [named.get(name) for name in self.label_names]
        if any(part is None for part in labels):
            return None
        return labels if len(labels) > 1 else labels[0]

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """The loss of `fit` and `evaluate`: the one given to `compile`, on the logits; else the model's own.

        Labels come as `y` (several as a list or by name), or among the inputs as `labels`.

        Raises:
            InputError: there are no labels for the model's own loss, or sample weights, which it does not take.
        """
        labels = self.labels_of(x, y)
        if self.loss is not None:
            return super().compute_loss(x, labels, self.predictions(y_pred), sample_weight, training)
        if labels is None:
            raise InputError("no labels: give them as y or as inputs['labels'], or a loss to compile")
        if sample_weight is not None:
            raise InputError("the model's own loss takes no sample_weight: label -100 what not to learn from")
        loss = self.own_loss(y_pred, labels) if y_pred.loss is None else y_pred.loss
        return ops.sum([self._aggregate_additional_loss(part) for part in (loss, *self.losses)])

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The metrics given to `compile`, on labels and logits."""
        labels = self.labels_of(x, y)
        return super().compute_metrics(x, labels, self.predictions(y_pred), sample_weight)


class CausalLM(GenerationMixin, HeadedModel):
    """A decoder with a language-model head."""

    head = "causal_lm"

    def call(
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
        training: bool | None = None,
        **family_inputs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.call`, and:

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
            training=training,
            **family_inputs,
        )
        hidden = output.last_hidden_state
        if not isinstance(keep, int) or keep:
            if labels is not None:
                raise InputError("labels need the logits at every position: leave out logits_to_keep")
            is_number = isinstance(keep, int) or len(keep.shape) == 0  # Keras makes tensors of NumPy's own
            hidden = hidden[:, -keep:] if is_number else ops.take(hidden, keep, axis=1)
        logits = self.logits(hidden)
        result = CausalLMOutput(
            loss=None if labels is None else next_token_loss(logits, labels),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()

    def logits(self, hidden: Tensor) -> Tensor:
        """The head; a tied one contracts with the token embedding as it lies, with no transposed copy of it."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        rows, width = self.config.embedding.shape
        table = ops.cast(self.get_input_embeddings().embeddings, hidden.dtype)
        flat = tf.matmul(ops.reshape(hidden, (-1, width)), table, transpose_b=True)
        return ops.reshape(flat, (*ops.shape(hidden)[:-1], rows))

    def own_loss(self, output: CausalLMOutput, labels: Tensor) -> Tensor:
        return next_token_loss(output.logits, labels)


class SequenceClassifier(HeadedModel):
    """A decoder with a classification head on the last token of each row that is not padding."""

    head = "sequence_classification"

    def call(
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
        training: bool | None = None,
        **family_inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.call`, and:

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
            training=training,
            **family_inputs,
        )
        hidden = output.last_hidden_state
        pad = self.config.pad_token_id
        if pad is None and hidden.shape[0] not in (1, None):
            raise InputError("config.pad_token_id is None: without it the last token of several rows is not known")
        if pad is None or input_ids is None:
            last = hidden[:, -1]
        else:
            real = ops.cast(ops.not_equal(input_ids, pad), "int32")
            last = tf.gather(hidden, ops.argmax(ops.arange(ops.shape(real)[1]) * real, -1), batch_dims=1)  # (b, e)
        logits = self.score(last)
        result = SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()

    def own_loss(self, output: SequenceClassifierOutput, labels: Tensor) -> Tensor:
        return classification_loss(output.logits, labels, self.config.problem_type)


class QuestionAnswerer(HeadedModel):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"
    label_names = ("start_positions", "end_positions")

    def call(
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
        training: bool | None = None,
        **family_inputs: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `Decoder.call`, and:

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
            training=training,
            **family_inputs,
        )
        start, end = ops.unstack(self.qa_outputs(output.last_hidden_state), axis=-1)  # (b, s) each
        result = QuestionAnsweringOutput(
            loss=None,
            start_logits=start,
            end_logits=end,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        if start_positions is not None and end_positions is not None:
            result.loss = self.own_loss(result, (start_positions, end_positions))
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()

    def own_loss(self, output: QuestionAnsweringOutput, labels: Any) -> Tensor:
        start, end = labels
        return (place_loss(output.start_logits, start) + place_loss(output.end_logits, end)) / 2

    def predictions(self, output: QuestionAnsweringOutput) -> Any:
        return [output.start_logits, output.end_logits]
