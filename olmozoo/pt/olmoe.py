"""OLMoE in PyTorch (arXiv:2409.02060).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ experts ─ + ─
       └─────────────────────┘  └───────────────────┘

Shapes: b batch, s positions in this call, e experts, c hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from olmozoo.families.olmoe import OlmoeConfig
from olmozoo.pt.experts import SparseMLP
from olmozoo.pt.heads import CausalLM
from olmozoo.pt.layers import RMSNorm, clip
from olmozoo.pt.olmo2 import Olmo2Attention, Olmo2Model


class OlmoeAttention(Olmo2Attention):
    """The attention of OLMo 2; queries and keys are clamped after their norms, and values too."""

    def __init__(self, config: OlmoeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.limit = config.clip_qkv

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return clip(query, self.limit), clip(key, self.limit), clip(value, self.limit)


class OlmoeBlock(nn.Module):
    """One decoder block, norms before the sublayers."""

    def __init__(self, config: OlmoeConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = OlmoeAttention(config, layer)
        self.mlp = SparseMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        out, weights = self.self_attn(self.input_layernorm(x), mask, cos_sin, cache, want_weights)
        x = x + out  # (b, s, c)
        out, router_logits = self.mlp(self.post_attention_layernorm(x))
        return x + out, weights, router_logits  # (b * s, e)


class OlmoeModel(Olmo2Model):
    """The OLMoE decoder without a head."""

    config_class = OlmoeConfig
    block = OlmoeBlock
    family_inputs = ("output_router_logits",)


class OlmoeForCausalLM(CausalLM):
    """The OLMoE decoder with its language-model head."""

    config_class = OlmoeConfig
    base_class = OlmoeModel
