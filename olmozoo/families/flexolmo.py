"""FlexOlmo (arXiv:2507.07024): the blocks of OLMo 2 with a mixture of experts, each trained apart, as MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.families.olmo2 import PostNormConfig
from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.families.parameter import Head
from olmozoo.families.registry import register


@register
@dataclass(kw_only=True)
class FlexOlmoConfig(ExpertsConfig, PostNormConfig):
    """Configuration of FlexOlmo models: the fields of `ExpertsConfig` and of `PostNormConfig`."""

    model_type: ClassVar[str] = "flex_olmo"
    name: ClassVar[str] = "FlexOlmo"
    heads: ClassVar[tuple[Head, ...]] = ("causal_lm",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "flexolmo-7x7b": {"num_experts_per_tok": 7},
        "flexolmo-2x7b": {"num_experts": 2, "num_experts_per_tok": 2},
    }

    vocab_size: int = 100352
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    pad_token_id: int | None = 100277
    eos_token_id: int | list[int] | None = 100257
    num_experts: int = 7
    num_experts_per_tok: int = 5
