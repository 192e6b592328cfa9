"""FlexOlmo in Keras (arXiv:2507.07024): the blocks of OLMo 2 with a mixture of experts as MLP.

    x ─┬─ attention ─ norm ─ + ─┬─ experts ─ norm ─ + ─
       └─────────────────────┘  └───────────────────┘

Shapes: b batch, s positions in this call, e experts, c hidden size.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import tensorflow as tf

from olmozoo.families.flexolmo import FlexOlmoConfig
from olmozoo.tf.experts import SparseMLP
from olmozoo.tf.heads import CausalLM
from olmozoo.tf.layers import Layer, QueryBlocks, RMSNorm
from olmozoo.tf.olmo2 import Olmo2Attention, TFOlmo2Model

Tensor: TypeAlias = tf.Tensor


class FlexOlmoBlock(Layer):
    """One decoder block, norms after the sublayers."""

    def __init__(self, config: FlexOlmoConfig, name: str) -> None:
        super().__init__(name)
        self.self_attn = Olmo2Attention(config, name="self_attn")
        self.mlp = SparseMLP(config, name="mlp")
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")
        self.post_feedforward_layernorm = RMSNorm(config.rms_norm_eps, name="post_feedforward_layernorm")

    def call(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        out, present, weights = self.self_attn(x, cos_sin, past, seed, key_mask=key_mask)
        x = x + self.post_attention_layernorm(out)  # (b, s, c)
        out, router_logits = self.mlp(x)
        return x + self.post_feedforward_layernorm(out), present, weights, router_logits  # (b * s, e)


@keras.saving.register_keras_serializable("olmozoo")
class TFFlexOlmoModel(TFOlmo2Model):
    """The FlexOlmo decoder without a head."""

    config_class = FlexOlmoConfig
    block = FlexOlmoBlock
    family_inputs = ("output_router_logits",)


@keras.saving.register_keras_serializable("olmozoo")
class TFFlexOlmoForCausalLM(CausalLM):
    """The FlexOlmo decoder with its language-model head."""

    config_class = FlexOlmoConfig
    base_class = TFFlexOlmoModel
