"""Heads on top of a decoder: causal language model, sequence classification, question answering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.families.config import infer_problem_type
from olmozoo.modeling import check_kept_logits, head_labels
from olmozoo.outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from olmozoo.tf.base import PreTrainedModel
from olmozoo.tf.cache import cached_length
from olmozoo.tf.decoder import Decoder
from olmozoo.tf.generation import GenerationMixin
from olmozoo.tf.layers import Tensor, linear
from olmozoo.tf.losses import (
    add_router_loss,
    answer_position_loss,
    clamped,
    classification_loss,
    counted_labels,
    next_labels,
    next_token_loss,
)
from olmozoo.tf.parallel import check_distribution


class HeadedModel(PreTrainedModel):
    """A decoder with a head on top; subclasses say which."""

    base_class: ClassVar[type[Decoder]]
    output_class: ClassVar[type[Any]]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)

    def make_layers(self) -> None:
        self.model = self.base_class(self.config, name="model", nested=True)
        for module, (weight, *bias) in self.config.head_modules(self.head).items():
            tied = weight.tied_to is not None
            setattr(self, module, None if tied else linear(weight.shape[0], bool(bias), name=module))

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
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        training: bool | None = None,
        **family_inputs: Any,
    ) -> Any:
        """Run the decoder and the head; arguments as in `Decoder.call`, and those of the head, which give `loss`.

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
            InputError: arguments do not fit together, or are those of another head.
        """
        given = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        targets = head_labels(self.label_names, given)
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
            **self.known_inputs(family_inputs),
        )
        hidden = output.last_hidden_state
        if not isinstance(keep, int) or keep:
            check_kept_logits(self.head, targets)
            is_number = isinstance(keep, int) or len(keep.shape) == 0  # Keras makes tensors of NumPy's own
            hidden = hidden[:, -keep:] if is_number else ops.take(hidden, keep, axis=1)
        result = self.output_class(
            **self.head_outputs(hidden, input_ids),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        result.loss = None if targets is None else self.head_loss(result, *targets)
        if output.router_logits is not None:
            add_router_loss(result, output, attention_mask, cached_length(past_key_values), self.config)
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        """What the head computes from the hidden states (b, s, c): the logits, by their names in the output."""
        raise NotImplementedError

    def head_loss(self, output: Any, *labels: Tensor) -> Tensor:
        """The loss of an output, for labels in the order of `label_names`."""
        raise NotImplementedError

    def metric_labels(self, output: Any, *labels: Tensor) -> tuple[Any, Any]:
        """The labels that `head_loss` compares with the predictions, and weights, 0 where it ignores a label."""
        raise NotImplementedError

    # -- `fit` and `evaluate` -------------------------------------------------------------------------------------

    def predictions(self, output: Any) -> Any:
        """The part of an output that a user's own loss and metrics get."""
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
        loss = y_pred.loss
        if loss is None:
            loss = self.head_loss(y_pred, *(labels if len(self.label_names) > 1 else [labels]))
        total = ops.sum([ops.cast(ops.sum(part), loss.dtype) for part in (loss, *self.losses)])
        return total / tf.distribute.get_strategy().num_replicas_in_sync  # replicas' gradients are added up

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **options: Any,
    ) -> None:
        """Set the optimizer, loss and metrics of `fit` and `evaluate`, as `keras.Model.compile` does.

        Without a `loss`, the model's own is used, and metrics see what it sees: labels shifted by one position for a
        language model, and none that it ignores (-100, or an answer outside of the text). With a `loss`, both get the
        labels as they are given.

        Args:
            optimizer: as in Keras.
            loss: as in Keras; default the model's own.
            loss_weights: as in Keras.
            metrics: as in Keras, such as `["accuracy"]`; a list for each output where the head has two.
            weighted_metrics: as in Keras.
            **options: as in Keras.

        Raises:
            InputError: both kinds of metrics are given without a loss, where they are the same; or
                `keras.distribution` is set, which does nothing on TensorFlow.
        """
        check_distribution()
        if loss is None and metrics:  # only weighted metrics take the weights that leave labels out
            if weighted_metrics:
                raise InputError("metrics and weighted_metrics are the same for the model's own loss: give one of them")
            metrics, weighted_metrics = None, metrics
        super().compile(optimizer, loss, loss_weights, metrics, weighted_metrics, **options)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a loaded model was: Keras alone would not, since `compile` is overridden."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The metrics given to `compile`, on labels and logits; see there."""
        labels = self.labels_of(x, y)
        if self.loss is None and labels is not None:
            several = len(self.label_names) > 1
            labels, sample_weight = self.metric_labels(y_pred, *(labels if several else [labels]))
        return super().compute_metrics(x, labels, self.predictions(y_pred), sample_weight)


class CausalLM(GenerationMixin, HeadedModel):
    """A decoder with a language-model head."""

    head = "causal_lm"
    output_class = CausalLMOutput

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        if self.lm_head is not None:
            return {"logits": self.lm_head(hidden)}  # (b, s, v)
        # A tied head: a product with the token embedding, of which no transposed copy is made.
        rows, width = self.config.embedding.shape
        table = ops.cast(self.get_input_embeddings().embeddings, hidden.dtype)
        flat = tf.matmul(ops.reshape(hidden, (-1, width)), table, transpose_b=True)
        return {"logits": ops.reshape(flat, (*ops.shape(hidden)[:-1], rows))}

    def head_loss(self, output: CausalLMOutput, labels: Tensor) -> Tensor:
        return next_token_loss(output.logits, labels)

    def metric_labels(self, output: CausalLMOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        return counted_labels(next_labels(ops.convert_to_tensor(labels)), -100)


class SequenceClassifier(HeadedModel):
    """A decoder with a classification head on the last token of each row.

    That is the rightmost of `input_ids` that is not `config.pad_token_id`; with `inputs_embeds`, the last position.
    """

    head = "sequence_classification"
    output_class = SequenceClassifierOutput

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        pad = self.config.pad_token_id
        if pad is None and hidden.shape[0] not in (1, None):
            raise InputError("config.pad_token_id is None: without it the last token of several rows is not known")
        if pad is None or input_ids is None:
            last = hidden[:, -1]
        else:
            real = ops.cast(ops.not_equal(input_ids, pad), "int32")
            last = tf.gather(hidden, ops.argmax(ops.arange(ops.shape(real)[1]) * real, -1), batch_dims=1)  # (b, c)
        return {"logits": self.score(last)}  # (b, num_labels)

    def head_loss(self, output: SequenceClassifierOutput, labels: Tensor) -> Tensor:
        return classification_loss(output.logits, labels, self.config.problem_type)

    def metric_labels(self, output: SequenceClassifierOutput, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = ops.convert_to_tensor(labels)
        width, is_integer = output.logits.shape[1], labels.dtype.is_integer
        if (self.config.problem_type or infer_problem_type(width, is_integer)) == "single_label_classification":
            return counted_labels(ops.reshape(labels, (-1,)), -100)
        return ops.reshape(labels, ops.shape(output.logits)), None


class QuestionAnswerer(HeadedModel):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"
    output_class = QuestionAnsweringOutput
    label_names = ("start_positions", "end_positions")

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        start, end = ops.unstack(self.qa_outputs(hidden), axis=-1)
        return {"start_logits": start, "end_logits": end}  # (b, s) each

    def head_loss(self, output: QuestionAnsweringOutput, start_positions: Tensor, end_positions: Tensor) -> Tensor:
        start = answer_position_loss(output.start_logits, start_positions)
        return (start + answer_position_loss(output.end_logits, end_positions)) / 2

    def metric_labels(self, output: QuestionAnsweringOutput, *positions: Tensor) -> tuple[Any, Any]:
        length = ops.shape(output.start_logits)[1]
        pairs = [counted_labels(clamped(ops.convert_to_tensor(p), length), length) for p in positions]
        return [labels for labels, _ in pairs], [weights for _, weights in pairs]

    def predictions(self, output: QuestionAnsweringOutput) -> Any:
        return [output.start_logits, output.end_logits]
