"""What is trained, what decays, and how gradients are clipped: the same for every wing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from olmozoo.errors import ConfigError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter, by_variable
from olmozoo.training.config import LoraConfig, OptimizerConfig, TrainConfig
from olmozoo.typing import Array

EPS = 1e-6  # added to the norm that clipping divides by
FUSED = re.compile(r"\.(self_attn)\.[qkv]_proj\.|\.(mlp)\.(?:gate|up)_proj\.")


def stored_parameters(model: ModelConfig) -> list[Parameter]:
    """The parameters of a causal language model; a tied one is there once."""
    return [parameter for parameter in model.parameters("causal_lm") if parameter.tied_to is None]


def trained_parameters(config: TrainConfig, model: ModelConfig) -> list[Parameter]:
    """The parameters that are trained: those of the table that are not frozen, or the factors of LoRA.

    Raises:
        ConfigError: a pattern of `freeze` fits no parameter, nothing is left to train, or there is no target for LoRA.
    """
    table = stored_parameters(model)
    if config.lora is not None:
        return lora_parameters(config.lora, table)
    unknown = [pattern for pattern in config.freeze if not any(fnmatchcase(p.name, pattern) for p in table)]
    raise_problems("freeze fits no parameter of the model", unknown, ConfigError)
    found = [p for p in table if not any(fnmatchcase(p.name, pattern) for pattern in config.freeze)]
    if not found:
        raise ConfigError("freeze leaves no parameter to train")
    return found


def lora_parameters(lora: LoraConfig, table: Sequence[Parameter]) -> list[Parameter]:
    """The two factors for each linear layer of a target's name: A (rank, in) and B (out, rank).

    B starts at zero and A normal with the variance of PEFT's initial values, 1 / (3 in). Of experts that have one
    variable in Keras and Flax, all A come before all B.
    """
    names = {p.name.split(".")[-2] for p in table if p.kind == "linear" and ".layers." in p.name}
    unknown = [f"{name}; there are {', '.join(sorted(names))}" for name in lora.target_modules if name not in names]
    raise_problems("lora.target_modules has no linear layer of the blocks", unknown, ConfigError)
    found: list[Parameter] = []
    for group in by_variable(table):
        module, _, leaf = group[0].name.rpartition(".")
        if leaf == "weight" and ".layers." in module and module.split(".")[-1] in lora.target_modules:
            (rows, columns), (out, into) = group[0].shape, group[0].axes
            std = math.sqrt(1 / (3 * columns))
            modules = [parameter.name.removesuffix(".weight") for parameter in group]
            shape, axes = (lora.rank, columns), ("rank", into)
            found += [Parameter(f"{module}.lora_A.weight", shape, axes, "linear", std) for module in modules]
            shape, axes = (rows, lora.rank), (out, "rank")
            found += [Parameter(f"{module}.lora_B.weight", shape, axes, "linear") for module in modules]
    return found


def weight_decays(optimizer: OptimizerConfig, parameters: Sequence[Parameter]) -> list[float]:
    """The weight decay of each parameter, by its kind."""
    flags = {
        "linear": True,
        "norm": optimizer.decay_norm_and_bias,
        "bias": optimizer.decay_norm_and_bias,
        "embedding": optimizer.decay_embeddings,
    }
    return [optimizer.weight_decay if flags[parameter.kind] else 0.0 for parameter in parameters]


class Clipping:
    """What gradients are multiplied by, from their norms.

    Args:
        ratio: None to clip the norm of all together, as `torch.nn.utils.clip_grad_norm_` does; else each parameter's,
            at `ratio` times the running mean of its norm.
        betas: of the optimizer; the larger is the decay of that mean.
        names: of the parameters.
        fused: whether queries, keys and values of a block are one gradient, and gates and ups, as in AI2's trainer.

    Attributes:
        means: the running means, one a parameter; None before the first step.
    """

    def __init__(self, ratio: float | None, betas: Sequence[float], names: Sequence[str], fused: bool) -> None:
        self.ratio, self.decay = ratio, max(betas)
        self.means: Array | None = None
        matrices = [FUSED.sub(lambda match: f".{match[1] or match[2]}.", name) if fused else name for name in names]
        self.groups: Array = np.unique(matrices, return_inverse=True)[1]

    def scales(self, norms: Array, bound: float | None) -> Array | None:
        """The factor of each gradient; None where all are 1."""
        if self.ratio is None:
            total = total_norm(norms)
            if bound is None or total + EPS <= bound:
                return None
            return np.full(len(norms), bound / (total + EPS))
        norms = np.sqrt(np.bincount(self.groups, np.square(norms.astype(np.float64))))[self.groups]
        means = norms if self.means is None else self.means
        scales: Array = np.minimum(1.0, self.ratio * means / (norms + EPS))
        self.means = means + (norms * scales - means) * (1 - self.decay)
        return scales


def total_norm(norms: Array) -> float:
    """The norm of all gradients together."""
    return float(np.sqrt(np.square(norms.astype(np.float64)).sum()))
