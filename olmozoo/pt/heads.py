"""Heads on top of a decoder: causal language model, sequence classification, question answering."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from olmozoo.errors import InputError
from olmozoo.modeling import check_kept_logits, head_labels
from olmozoo.outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from olmozoo.pt.base import PreTrainedModel
from olmozoo.pt.cache import cached_length
from olmozoo.pt.decoder import Decoder
from olmozoo.pt.generation import GenerationMixin
from olmozoo.pt.layers import Linear, as_tensor
from olmozoo.pt.losses import add_router_loss, answer_position_loss, classification_loss, next_token_loss


class HeadedModel(PreTrainedModel):
    """A decoder with a head on top; subclasses say which."""

    base_class: ClassVar[type[Decoder]]
    output_class: ClassVar[type[Any]]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # the arguments of `forward` that give a loss

    def make_layers(self) -> None:
        self.model = self.base_class(self.config, seed=None)
        for module, parameters in self.config.head_modules(self.head).items():
            labels, width = parameters[0].shape
            setattr(self, module, Linear(width, labels, bias=len(parameters) > 1))

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
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **family_inputs: Any,
    ) -> Any:
        """Run the decoder and the head; arguments as in `Decoder.forward`, and those of the head, which give `loss`.

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
            num_items_in_batch: of a language model, what the summed loss is divided by, as in Transformers: the number
                of labels in all the micro-batches of a step; default those of this call.

        Returns:
            `CausalLMOutput`, `SequenceClassifierOutput` or `QuestionAnsweringOutput`.

        Raises:
            InputError: arguments do not fit together, or are those of another head.
        """
        given = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        input_ids = as_tensor(input_ids, self.device)
        targets = head_labels(self.label_names, {name: as_tensor(x, self.device) for name, x in given.items()})
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
            **self.known_inputs(family_inputs),
        )
        hidden = output.last_hidden_state
        length = hidden.shape[1]
        if isinstance(keep, Tensor) or keep:
            check_kept_logits(self.head, targets)
            hidden = hidden[:, keep] if isinstance(keep, Tensor) else hidden[:, -keep:]
        result = self.output_class(
            **self.head_outputs(hidden, input_ids),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        result.loss = None if targets is None else self.head_loss(result, *targets, num_items=num_items_in_batch)
        if output.router_logits is not None:
            past = 0 if past_key_values is None else cached_length(output.past_key_values) - length
            add_router_loss(result, output, as_tensor(attention_mask, self.device), past, self.config)
        return result if self.setting("return_dict", return_dict, True) else result.to_tuple()

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        """What the head computes from the hidden states (b, s, c): the logits, by their names in the output."""
        raise NotImplementedError

    def head_loss(self, output: Any, *labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
        """The loss of an output, for labels in the order of `label_names`; see `forward` for `num_items`."""
        raise NotImplementedError

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Remove attention heads from the decoder's weights, where its family offers that (OPT)."""
        self.model.prune_heads(heads_to_prune)
        self.config = self.model.config


class CausalLM(GenerationMixin, HeadedModel):
    """A decoder with a language-model head."""

    head = "causal_lm"
    output_class = CausalLMOutput
    loss_type = "ForCausalLM"  # by which Transformers' Trainer knows that labels are shifted here

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lm_head" and hasattr(value, "lora_A") and self.config.tie_word_embeddings:
            # Merging adds to the weight in place, and would change the embedding that is tied to it.
            linear = value.base_layer
            linear.weight = nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad)
            self.config = self.model.config = self.config.replace(tie_word_embeddings=False)
        super().__setattr__(name, value)

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        return {"logits": self.lm_head(hidden)}  # (b, s, v)

    def head_loss(self, output: CausalLMOutput, labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
        return next_token_loss(output.logits, labels, num_items)


class SequenceClassifier(HeadedModel):
    """A decoder with a classification head on the last token of each row.

    That is the rightmost of `input_ids` that is not `config.pad_token_id`; with `inputs_embeds`, the last position.
    """

    head = "sequence_classification"
    output_class = SequenceClassifierOutput

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        pad = self.config.pad_token_id
        if pad is None and hidden.shape[0] > 1:
            raise InputError("config.pad_token_id is None: without it the last token of several rows is not known")
        if pad is None or input_ids is None:
            last = hidden[:, -1]
        else:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device) * (input_ids != pad)
            last = hidden[torch.arange(hidden.shape[0], device=hidden.device), positions.argmax(-1)]  # (b, c)
        return {"logits": self.score(last)}  # (b, num_labels)

    def head_loss(
        self, output: SequenceClassifierOutput, labels: Tensor, num_items: int | Tensor | None = None
    ) -> Tensor:
        return classification_loss(output.logits, labels, self.config.problem_type)


class QuestionAnswerer(HeadedModel):
    """A decoder with a head for the first and the last token of an answer in the text."""

    head = "question_answering"
    output_class = QuestionAnsweringOutput
    label_names = ("start_positions", "end_positions")

    def head_outputs(self, hidden: Tensor, input_ids: Tensor | None) -> dict[str, Tensor]:
        start, end = self.qa_outputs(hidden).unbind(-1)
        return {"start_logits": start, "end_logits": end}  # (b, s) each

    def head_loss(
        self,
        output: QuestionAnsweringOutput,
        start_positions: Tensor,
        end_positions: Tensor,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        start = answer_position_loss(output.start_logits, start_positions)
        return (start + answer_position_loss(output.end_logits, end_positions)) / 2
