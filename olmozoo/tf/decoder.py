"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.families.base import infer_problem_type
from olmozoo.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from olmozoo.tf.base import PreTrainedModel
from olmozoo.tf.cache import cache_lengths, close_cache, open_cache
from olmozoo.tf.generation import GenerationMixin
from olmozoo.tf.layers import Stack, Tensor, at_least_float32, causal_mask, linear, rotary, split_seed


class Decoder(Stack, PreTrainedModel):
    """A base model: embeddings, blocks, final norm. Subclasses set `embed_tokens`, `blocks` and `norm`."""

    layerdrop = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seeds = keras.random.SeedGenerator()  # of dropout; see `keras.utils.set_random_seed`

    @property
    def parts(self) -> keras.Layer:
        """The layer that holds `embed_tokens` and `blocks`."""
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
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real. With a
                `KVCache` it may be (batch, max_length) too.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            past_key_values: a `KVCache`, or a tuple of (key, value) pairs, each (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings in place of `input_ids`.
            use_cache: whether to return a cache where none went in; default `config.use_cache`, and False in training
                with gradient checkpointing.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            cache_position: (seq,) places in the sequence; they are `position_ids` where those are not given.
            training: whether dropout is on.
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
        recompute = self.gradient_checkpointing and training and past_key_values is None and not output_attentions
        use_cache = self.setting("use_cache", use_cache, True) and not recompute
        blocks = self.parts.blocks

        hidden = self.parts.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = ops.cast(hidden, self.compute_dtype)  # (b, s, c)
        if hidden.shape.rank not in (3, None):
            given = tf.convert_to_tensor(input_ids if inputs_embeds is None else inputs_embeds)
            raise InputError(f"the input has shape {tuple(given.shape)}, expected (batch, seq) or (batch, seq, hidden)")
        batch, length, _ = ops.shape(hidden)
        pasts = open_cache(past_key_values, len(blocks), length)
        past, keys = cache_lengths(past_key_values, length)
        mask = causal_mask(attention_mask, batch, length, past, keys)
        if position_ids is None and cache_position is not None:
            position_ids = cache_position[None]
        hidden, extras = self.place(hidden, position_ids, attention_mask, past, **family_inputs)
        seeds = split_seed(self.seeds.next() if training else None, 2 * len(blocks))

        states, presents, attentions = [hidden], [], []
        for block, extra, held in zip(blocks, extras, pasts, strict=True):
            before, seed, drop_seed = hidden, seeds.pop(), seeds.pop()
            with keras.name_scope("layers"):
                if recompute:
                    hidden = recomputed(block, mask, extra, seed)(hidden)
                else:
                    hidden, present, weights = block(hidden, mask, extra, held, seed)
                    presents.append(present)
                    attentions.append(weights)
            if training and self.layerdrop:
                hidden = ops.where(tf.random.stateless_uniform((), drop_seed) < self.layerdrop, before, hidden)
            states.append(hidden)
        states[-1] = hidden = self.finish(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(past_key_values, presents, use_cache, length),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if self.setting("return_dict", return_dict, True) else output.to_tuple()

    def place(
        self, hidden: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, past: Any
    ) -> tuple[Tensor, list[Any]]:
        """Bring positions in: the embeddings, changed or not, and what each block needs (here cosines and sines)."""
        if position_ids is None:
            position_ids = past + ops.arange(ops.shape(hidden)[1])[None]
        position_ids = ops.convert_to_tensor(position_ids)
        if position_ids.shape.rank not in (2, None):
            raise InputError(f"position_ids has shape {tuple(position_ids.shape)}, expected (batch or 1, seq)")
        return hidden, [rotary(self.rope, position_ids, hidden.dtype)] * len(self.parts.blocks)

    def finish(self, hidden: Tensor) -> Tensor:
        """What comes after the last block."""
        return self.norm(hidden)


def recomputed(block: keras.Layer, mask: Tensor, extra: Any, seed: Tensor | None) -> Any:
    """A function from the hidden states before a block to those after it that keeps nothing for the backward pass."""
    return keras.remat(lambda hidden: block(hidden, mask, extra, None, seed)[0])


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


def cross_entropy(logits: Tensor, labels: Tensor, ignored: Any) -> Tensor:
    """Mean cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`."""
    wide = ops.cast(logits, at_least_float32(logits.dtype))
    counted = ops.not_equal(labels, ignored)
    losses = ops.sparse_categorical_crossentropy(ops.where(counted, labels, 0), wide, from_logits=True)
    total = ops.sum(ops.where(counted, losses, ops.zeros_like(losses)))
    return total / ops.cast(ops.maximum(ops.count_nonzero(counted), 1), wide.dtype)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s, v) against the labels (b, s) one place on, -100 ignored."""
    labels = tf.pad(labels[:, 1:], [[0, 0], [0, 1]], constant_values=-100)
    return cross_entropy(ops.reshape(logits, (-1, logits.shape[-1])), ops.reshape(labels, (-1,)), -100)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (b, n) by `problem_type`, see `SequenceClassifier.call`."""
    wide = ops.cast(logits, at_least_float32(logits.dtype))
    labels = ops.convert_to_tensor(labels)
    kind = problem_type or infer_problem_type(logits.shape[1], integers=labels.dtype.is_integer)
    if kind == "single_label_classification":
        return cross_entropy(logits, ops.reshape(labels, (-1,)), -100)
    labels = ops.reshape(ops.cast(labels, wide.dtype), ops.shape(wide))
    if kind == "regression":
        return ops.mean(ops.square(wide - labels))
    return ops.mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, wide))


def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s) against places (b,), clamped to 0 .. s, where s is ignored."""
    length = ops.shape(logits)[1]
    return cross_entropy(logits, ops.clip(ops.reshape(places, (-1,)), 0, length), length)
