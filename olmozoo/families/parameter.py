"""One tensor of a model, as the parameter table lists it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

Kind = Literal["linear", "embedding", "norm", "bias"]
Head = Literal["causal_lm", "sequence_classification", "question_answering"]
BASE_PREFIX = "model."  # a base model's own checkpoint drops it
HEAD_MODULES: dict[Head, str] = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "question_answering": "qa_outputs",
}
ARCHITECTURES: dict[Head | None, str] = {
    None: "Model",
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
    "question_answering": "ForQuestionAnswering",
}
EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(.+)$")  # the name of a tensor of one expert
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model, as it stands in a checkpoint.

    Attributes:
        name: the canonical (Hugging Face) key, with the leading `model.`.
        shape: the shape on disk; linear weights are (out, in).
        axes: the logical axis of each dimension: `vocab`, `embed`, `heads`, `kv_heads`, `mlp`, `positions`, `labels`,
            `experts`.
        kind: `linear`, `embedding`, `norm` (a norm's scale) or `bias`. Each framework binds by this.
        std: the standard deviation of the initial normal values of a linear or an embedding.
        tied_to: the name of the parameter that this one is, where the two are one tensor.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: Kind
    std: float = 0.0
    tied_to: str | None = None

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def stack(self) -> tuple[str, int] | None:
        """Of a tensor of one expert, the name of the stack of all experts' and its index there; None for others.

        In a checkpoint and in PyTorch each expert has tensors of its own. In Keras and Flax all experts of a layer have
        one variable, (experts, in, out), of which each is a slice.
        """
        match = EXPERT.match(self.name)
        return (f"{match[1]}.{match[3]}", int(match[2])) if match else None

    @property
    def group(self) -> str:
        """What the parameter belongs to.

        It is `embedding`, `attention`, `mlp`, `experts`, `router`, `norm`, `projection` or `head`.
        """
        module = self.name.split(".")[-2]
        if "norm" in module:
            return "norm"
        if self.kind == "embedding":
            return "embedding"
        if ".self_attn." in self.name:
            return "attention"
        if self.stack is not None:
            return "experts"
        if self.axes[0] == "experts":
            return "router"
        if ".layers." in self.name:
            return "mlp"
        return "head" if module in HEAD_MODULES.values() else "projection"

    def initial(self, seed: int, dtype: np.dtype[Any] | str = "float32") -> np.ndarray[Any, Any]:
        """The initial value, the same for the same seed whatever the framework, the order or the other parameters.

        Norm scales are ones and biases zeros. All else is normal with mean 0 and deviation `std`, drawn in float64 from
        a Philox stream keyed by (seed, name) and then rounded to `dtype`.
        """
        if self.kind == "norm":
            return np.ones(self.shape, dtype)
        values = np.zeros(self.shape, dtype)
        if self.kind != "bias":
            key = hashlib.sha256(f"{seed}/{self.name}".encode()).digest()[:16]
            stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            flat = values.reshape(-1)
            for start in range(0, flat.size, 1 << 20):
                part = flat[start : start + (1 << 20)]
                part[:] = self.std * stream.standard_normal(part.size)
        return values


def by_variable(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters in their order, those of experts that have one variable in Keras and Flax together."""
    return [list(group) for _, group in groupby(parameters, lambda p: p.name if p.stack is None else p.stack[0])]


def stack_indices(group: Iterable[Parameter]) -> np.ndarray[Any, Any]:
    """The indices of parameters of experts in the variable of their stack."""
    return np.array([parameter.stack[1] for parameter in group if parameter.stack is not None])
