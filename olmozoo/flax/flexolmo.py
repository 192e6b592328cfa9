"""FlexOlmo in Flax (arXiv:2507.07024): the blocks of OLMo 2 with a mixture of experts as MLP.

    x ─┬─ attention ─ norm ─ + ─┬─ experts ─ norm ─ + ─
       └─────────────────────┘  └───────────────────┘

Shapes: b batch, s positions in this call, e experts, c hidden size.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from olmozoo.families.flexolmo import FlexOlmoConfig
from olmozoo.flax.decoder import Decoder
from olmozoo.flax.experts import SparseMLP
from olmozoo.flax.heads import CausalLM
from olmozoo.flax.layers import QueryBlocks, RMSNorm
from olmozoo.flax.olmo2 import Olmo2Attention, Olmo2Module


class FlexOlmoBlock(nn.Module):
    """One decoder block, norms after the sublayers."""

    config: FlexOlmoConfig
    dtype: Any
    param_dtype: Any
    layer: int
    mesh: Mesh | None = None

    def setup(self) -> None:
        config, types = self.config, (self.dtype, self.param_dtype)
        self.self_attn = Olmo2Attention(config, *types)
        self.mlp = SparseMLP(config, *types, self.mesh)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.post_feedforward_layernorm = RMSNorm(config.rms_norm_eps, self.param_dtype)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, cos_sin: tuple[Array, Array], past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array, Array]:
        out, present, weights = self.self_attn(x, mask, cos_sin, past, deterministic)
        x = x + self.post_attention_layernorm(out)  # (b, s, c)
        out, router_logits = self.mlp(x)
        return x + self.post_feedforward_layernorm(out), present, weights, router_logits  # (b * s, e)


class FlexOlmoModule(Olmo2Module):
    """The FlexOlmo decoder without a head, as a function of its parameters."""

    block = FlexOlmoBlock


class FlaxFlexOlmoModel(Decoder):
    """The FlexOlmo decoder without a head."""

    config_class = FlexOlmoConfig
    module_class = FlexOlmoModule
    family_inputs = ("output_router_logits",)


class FlaxFlexOlmoForCausalLM(CausalLM):
    """The FlexOlmo decoder with its language-model head."""

    config_class = FlexOlmoConfig
    base_class = FlaxFlexOlmoModel
