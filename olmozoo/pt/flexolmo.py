"""FlexOlmo in PyTorch (arXiv:2507.07024): the blocks of OLMo 2 with a mixture of experts as MLP.

    x ─┬─ attention ─ norm ─ + ─┬─ experts ─ norm ─ + ─
       └─────────────────────┘  └───────────────────┘

Shapes: b batch, s positions in this call, e experts, c hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from olmozoo.families.flexolmo import FlexOlmoConfig
from olmozoo.pt.experts import SparseMLP
from olmozoo.pt.heads import CausalLM
from olmozoo.pt.layers import RMSNorm
from olmozoo.pt.olmo2 import Olmo2Attention, Olmo2Model


class FlexOlmoBlock(nn.Module):
    """One decoder block, norms after the sublayers."""

    def __init__(self, config: FlexOlmoConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(config, layer)
        self.mlp = SparseMLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        out, weights = self.self_attn(x, mask, cos_sin, cache, want_weights)
        x = x + self.post_attention_layernorm(out)  # (b, s, c)
        out, router_logits = self.mlp(x)
        return x + self.post_feedforward_layernorm(out), weights, router_logits  # (b * s, e)


class FlexOlmoModel(Olmo2Model):
    """The FlexOlmo decoder without a head."""

    config_class = FlexOlmoConfig
    block = FlexOlmoBlock
    family_inputs = ("output_router_logits",)


class FlexOlmoForCausalLM(CausalLM):
    """The FlexOlmo decoder with its language-model head."""

    config_class = FlexOlmoConfig
    base_class = FlexOlmoModel
