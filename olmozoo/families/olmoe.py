"""OLMoE (arXiv:2409.02060): RMS norms before each sublayer, norms on queries and keys, a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.families.olmo2 import NormedAttentionConfig
from olmozoo.families.parameter import Head, Parameter
from olmozoo.families.registry import register
from olmozoo.families.rotary import RotaryConfig

MOST_EXPERTS = 100_000  # in all layers together


@dataclass(kw_only=True)
class ExpertsConfig(RotaryConfig):
    """What families with a mixture of experts as MLP share: the fields of `RotaryConfig` and those of the router.

    `intermediate_size` is the width of one expert.

    Attributes:
        num_experts: gated MLPs in each layer.
        num_experts_per_tok: how many of them a token is sent to.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        output_router_logits: whether a call returns the router's logits by default; then the load-balancing loss is
            added to the loss.
        router_aux_loss_coef: the weight of the load-balancing loss.
    """

    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("num_experts", most=MOST_EXPERTS // self.num_hidden_layers)
        self._check_int("num_experts_per_tok", most=self.num_experts)
        self._check_bool("norm_topk_prob", "output_router_logits")
        self._check_number("router_aux_loss_coef")

    @classmethod
    def _normalize(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Read `num_local_experts`, another name of `num_experts`."""
        if "num_local_experts" in data:
            data.setdefault("num_experts", data.pop("num_local_experts"))
        return super()._normalize(data)

    def _mlp(self, block: str) -> Iterator[Parameter]:
        shape, std = (self.num_experts, self.hidden_size), self.initializer_range
        yield Parameter(f"{block}.mlp.gate.weight", shape, ("experts", "embed"), "linear", std)
        inner, hidden = self.intermediate_size, self.hidden_size
        for name, shape, axes in (
            ("gate_proj", (inner, hidden), ("mlp", "embed")),
            ("up_proj", (inner, hidden), ("mlp", "embed")),
            ("down_proj", (hidden, inner), ("embed", "mlp")),
        ):
            for expert in range(self.num_experts):
                yield Parameter(f"{block}.mlp.experts.{expert}.{name}.weight", shape, axes, "linear", std)

    def count_active(self, head: Head | None = "causal_lm") -> int:
        """See `ModelConfig.count_active`."""
        counts = self.count_parameters(head)
        idle = self.num_experts - self.num_experts_per_tok
        return sum(counts.values()) - counts["experts"] // self.num_experts * idle


@register
@dataclass(kw_only=True)
class OlmoeConfig(ExpertsConfig, NormedAttentionConfig):
    """Configuration of OLMoE models: the fields of `ExpertsConfig` and of `NormedAttentionConfig`, and one more.

    Attributes:
        clip_qkv: what queries and keys, after their norms, and values are clamped to, [-clip_qkv, clip_qkv]; None for
            not.
    """

    model_type: ClassVar[str] = "olmoe"
    name: ClassVar[str] = "Olmoe"
    block_norms: ClassVar[tuple[str, str]] = ("input_layernorm", "post_attention_layernorm")
    heads: ClassVar[tuple[Head, ...]] = ("causal_lm",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"olmoe-1b-7b": {"intermediate_size": 1024}}

    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_qkv is not None:
            self._check_number("clip_qkv")
