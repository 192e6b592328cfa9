"""What a forward call returns, in every framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class ModelOutput:
    """A dataclass that also unpacks and indexes as a tuple, and reads as a dict, of its fields that are not None.

    `loss, logits = output`, `output[0]`, `output["logits"]`, `output.logits`, `dict(output)`, `f(**output)` all work.
    """

    def keys(self) -> list[str]:
        """The names of the fields that are set, in order."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are set, in order."""
        return tuple(getattr(self, key) for key in self.keys())

    def values(self) -> tuple[Any, ...]:
        """The same as `to_tuple`."""
        return self.to_tuple()

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of the fields that are set, in order."""
        return list(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """The field of that name, or `default` where it is not set."""
        return getattr(self, key) if key in self.keys() else default

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


@dataclass
class BaseModelOutput(ModelOutput):
    """Output of a base model.

    Attributes:
        last_hidden_state: (batch, seq, hidden), after the final norm.
        past_key_values: the cache, of the kind that went in; where none went in, one (key, value) pair a layer, each
            (batch, kv_heads, seq, head_dim).
        hidden_states: num_hidden_layers + 1 tensors (batch, seq, hidden): the embeddings first, the last one after the
            final norm.
        attentions: one tensor a layer, (batch, heads, queries, keys), the weights after the softmax.
        router_logits: with a mixture of experts, one tensor a layer, (batch * seq, experts), before the softmax.
    """

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of a causal language model.

    Attributes:
        loss: the mean next-token cross-entropy in nats over labels other than -100; set where labels were given. With
            `router_logits`, `config.router_aux_loss_coef * aux_loss` is added.
        aux_loss: the load-balancing loss of a mixture of experts; set with `router_logits`.
        logits: (batch, kept, vocab).
        past_key_values, hidden_states, attentions, router_logits: as in `BaseModelOutput`.
    """

    loss: Any = None
    aux_loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of a sequence classifier.

    Attributes:
        loss: of the kind that `problem_type` says; set where labels were given.
        logits: (batch, num_labels).
        past_key_values, hidden_states, attentions: as in `BaseModelOutput`.
    """

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Output of a question answerer.

    Attributes:
        loss: the mean of the cross-entropies of start and end, in nats; set where both were given.
        start_logits: (batch, seq).
        end_logits: (batch, seq).
        past_key_values, hidden_states, attentions: as in `BaseModelOutput`.
    """

    loss: Any = None
    start_logits: Any = None
    end_logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class GenerateOutput(ModelOutput):
    """Output of `generate`. Rows are those of the batch, each as often as sequences of it are returned.

    Attributes:
        sequences: (rows, prompt + new) ids; the answer alone where the prompt was embeddings.
        sequences_scores: (rows,) of beam search, with the length penalty.
        scores: for each step (rows, vocab), what tokens were chosen by: processed logits, for beam search processed
            log-probabilities, one row for each beam; set where `output_scores` asks for it.
        logprobs: (rows, new) the log-probability of each new token under the distribution it was chosen from, for beam
            search before the beam's own is added; 0 after a row's end.
        beam_indices: (rows, new) which beam, counted over the batch, each token was appended to; -1 after the end.
        past_key_values: of all tokens but the last; None for beam search.
    """

    sequences: Any = None
    sequences_scores: Any = None
    scores: Any = None
    logprobs: Any = None
    beam_indices: Any = None
    past_key_values: Any = None


OUTPUTS: tuple[type[ModelOutput], ...] = (  # wings register these as pytrees
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
    QuestionAnsweringOutput,
    GenerateOutput,
)
