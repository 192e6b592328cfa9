"""What every decoder does around its blocks, and the heads on top. Families fill in the blocks (see `olmo2.py`).

A `...Module` is a Flax module, a pure function of its parameters. The class of the same name without it holds one, with
a config and parameters, and is what users call.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from olmozoo.errors import InputError
from olmozoo.families.base import Head, ModelConfig, infer_problem_type
from olmozoo.flax.base import PreTrainedModel
from olmozoo.flax.cache import close_cache, open_cache
from olmozoo.flax.generation import GenerationMixin
from olmozoo.flax.layers import at_least_float32, causal_mask, rotary, tied_head
from olmozoo.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput


class Layers(nn.Module):
    """The blocks of a decoder, named "0", "1", ... as they are in a checkpoint."""

    block: type[nn.Module]
    config: ModelConfig
    dtype: Any
    param_dtype: Any
    gradient_checkpointing: bool

    def setup(self) -> None:
        block = nn.remat(self.block, static_argnums=5) if self.gradient_checkpointing else self.block  # deterministic
        types = (self.config, self.dtype, self.param_dtype)
        self.blocks = [block(*types, name=str(layer)) for layer in range(self.config.num_hidden_layers)]


class DecoderModule(nn.Module):
    """A base model: embeddings, blocks, final norm. Subclasses set `embed_tokens`, `layers`, `norm` in `setup`."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_position: Array | None = None,
        deterministic: bool = True,
        **family_inputs: Any,
    ) -> BaseModelOutput:
        """Run the decoder; see `Decoder.__call__`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        given = jnp.asarray(input_ids if inputs_embeds is None else inputs_embeds)
        if given.ndim != (2 if inputs_embeds is None else 3):
            raise InputError(f"the input has shape {given.shape}, expected (batch, seq) or (batch, seq, hidden)")
        batch, length = given.shape[:2]
        pasts, past, total = open_cache(past_key_values, self.config.num_hidden_layers, length)

        hidden = (self.parts.embed_tokens(given) if inputs_embeds is None else given).astype(self.dtype)  # (b, s, c)
        mask = causal_mask(attention_mask, batch, length, past, total)
        if position_ids is None and cache_position is not None:
            position_ids = jnp.asarray(cache_position)[None]
        hidden, extras = self.place(hidden, position_ids, attention_mask, past, **family_inputs)

        layerdrop = getattr(self.config, "layerdrop", 0.0)
        states, presents, attentions = [hidden], [], []
        for layer, extra, layer_past in zip(self.parts.layers.blocks, extras, pasts, strict=True):
            before = hidden
            hidden, present, weights = layer(hidden, mask, extra, layer_past, deterministic)
            if layerdrop and not deterministic:
                hidden = jnp.where(jax.random.uniform(self.make_rng("dropout")) < layerdrop, before, hidden)
            states.append(hidden)
            presents.append(present)
            attentions.append(weights if output_attentions else None)
        states[-1] = hidden = self.finish(hidden)
        use_cache = use_cache and (deterministic or not self.gradient_checkpointing)
        return BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=close_cache(past_key_values, presents, length, use_cache),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    @property
    def parts(self) -> nn.Module:
        """The module that holds `embed_tokens` and `layers`."""
        return self

    def place(
        self, hidden: Array, position_ids: Array | None, attention_mask: Array | None, past: Any
    ) -> tuple[Array, list[Any]]:
        """Bring positions in: the embeddings, changed or not, and what each block needs (here cosines and sines)."""
        batch, length, _ = hidden.shape
        if position_ids is None:
            position_ids = past + jnp.arange(length)[None]
        position_ids = jnp.asarray(position_ids)
        if position_ids.shape not in ((batch, length), (1, length)):
            raise InputError(f"position_ids has shape {position_ids.shape}, expected ({batch} or 1, {length})")
        return hidden, [rotary(self.rope, position_ids, hidden.dtype)] * self.config.num_hidden_layers

    def finish(self, hidden: Array) -> Array:
        """What comes after the last block."""
        return self.norm(hidden)


class Decoder(PreTrainedModel):
    """A base model: embeddings, blocks, final norm. Subclasses name its module."""

    module_class: ClassVar[type[DecoderModule]]

    def build(self) -> DecoderModule:
        return self.module_class(self.config, self.dtype, self.param_dtype)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool = True,
        *,
        use_cache: bool | None = None,
        cache_position: Array | None = None,
        **family_inputs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the decoder. A pure function: jit, grad, vmap and sharding work on `params` and on the inputs.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for real tokens and 0 for padding; default all real. With a `KVCache`
                it may be as long as that.
            position_ids: (batch or 1, seq); default past, past + 1, ...
            params: the parameters, bare or as `{"params": ...}`; default the model's own.
            past_key_values: a `KVCache`, or a tuple of (key, value) pairs, each (batch, kv_heads, past, head_dim).
            inputs_embeds: (batch, seq, hidden) embeddings in place of `input_ids`.
            output_attentions: whether to return attention weights; default False.
            output_hidden_states: whether to return hidden states; default False.
            return_dict: False returns a plain tuple; default True.
            dropout_rng: a `jax.random` key; needed in training where the config has dropout.
            deterministic: False in training, which puts dropout on.
            use_cache: whether to return a cache where none went in; default `config.use_cache`, and False in training
                with gradient checkpointing.
            cache_position: (seq,) places in the sequence; they are `position_ids` where those are not given.
            **family_inputs: what the family's `place` takes besides (OPT: `head_mask`).

        Returns:
            `BaseModelOutput`.

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
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
            deterministic=deterministic,
            **family_inputs,
        )


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

    def build(self) -> HeadedModule:
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
        logits = tied_head(hidden, self.model.parts.embed_tokens.embedding) if tied else self.lm_head(hidden)
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


def cross_entropy(logits: Array, labels: Array, ignored: int) -> Array:
    """Mean cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`."""
    wide = logits.astype(at_least_float32(logits.dtype))
    learned = labels != ignored
    picked = jnp.take_along_axis(wide, jnp.where(learned, labels, 0)[:, None], axis=-1)[:, 0]
    losses = jnp.where(learned, jax.nn.logsumexp(wide, axis=-1) - picked, 0)
    return losses.sum() / jnp.maximum(learned.sum(), 1)


def next_token_loss(logits: Array, labels: Array) -> Array:
    """Cross-entropy of logits (b, s, v) against the labels (b, s) one place on, -100 ignored."""
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), -100)


def classification_loss(logits: Array, labels: Array, problem_type: str | None) -> Array:
    """The loss of logits (b, n) by `problem_type`, see `SequenceClassifier.__call__`."""
    wide = logits.astype(at_least_float32(logits.dtype))
    integers = not jnp.issubdtype(labels.dtype, jnp.floating)
    kind = problem_type or infer_problem_type(logits.shape[1], integers)
    if kind == "regression":
        return jnp.square(wide - labels.reshape(wide.shape)).mean()
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1), -100)
    return -(labels * jax.nn.log_sigmoid(wide) + (1 - labels) * jax.nn.log_sigmoid(-wide)).mean()


def place_loss(logits: Array, places: Array) -> Array:
    """Cross-entropy of logits (b, s) against places (b,), clamped to 0 .. s, where s is ignored."""
    length = logits.shape[1]
    return cross_entropy(logits, places.reshape(-1).clip(0, length), length)
