"""OLMoE in Flax (arXiv:2409.02060).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ experts ─ + ─
       └─────────────────────┘  └───────────────────┘

Shapes: b batch, s positions in this call, e experts, c hidden size.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from olmozoo.families.olmoe import OlmoeConfig
from olmozoo.flax.decoder import Decoder
from olmozoo.flax.experts import SparseMLP
from olmozoo.flax.heads import CausalLM
from olmozoo.flax.layers import QueryBlocks, RMSNorm, clip
from olmozoo.flax.olmo2 import Olmo2Attention, Olmo2Module


class OlmoeAttention(Olmo2Attention):
    """The attention of OLMo 2; queries and keys are clamped after their norms, and values too."""

    config: OlmoeConfig

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        limit = self.config.clip_qkv
        query, key, value = super().project(x)
        return clip(query, limit), clip(key, limit), clip(value, limit)


class OlmoeBlock(nn.Module):
    """One decoder block, norms before the sublayers."""

    config: OlmoeConfig
    dtype: Any
    param_dtype: Any
    layer: int
    mesh: Mesh | None = None

    def setup(self) -> None:
        config, types = self.config, (self.dtype, self.param_dtype)
        self.self_attn = OlmoeAttention(config, *types)
        self.mlp = SparseMLP(config, *types, self.mesh)
        self.input_layernorm = RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, self.param_dtype)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, cos_sin: tuple[Array, Array], past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array, Array]:
        out, present, weights = self.self_attn(self.input_layernorm(x), mask, cos_sin, past, deterministic)
        x = x + out  # (b, s, c)
        out, router_logits = self.mlp(self.post_attention_layernorm(x))
        return x + out, present, weights, router_logits  # (b * s, e)


class OlmoeModule(Olmo2Module):
    """The OLMoE decoder without a head, as a function of its parameters."""

    block = OlmoeBlock


class FlaxOlmoeModel(Decoder):
    """The OLMoE decoder without a head."""

    config_class = OlmoeConfig
    module_class = OlmoeModule
    family_inputs = ("output_router_logits",)


class FlaxOlmoeForCausalLM(CausalLM):
    """The OLMoE decoder with its language-model head."""

    config_class = OlmoeConfig
    base_class = FlaxOlmoeModel
