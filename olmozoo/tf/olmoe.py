"""OLMoE in Keras (arXiv:2409.02060).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ experts ─ + ─
       └─────────────────────┘  └───────────────────┘

Shapes: b batch, s positions in this call, e experts, c hidden size.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import tensorflow as tf

from olmozoo.families.olmoe import OlmoeConfig
from olmozoo.tf.experts import SparseMLP
from olmozoo.tf.heads import CausalLM
from olmozoo.tf.layers import Layer, QueryBlocks, RMSNorm, clip
from olmozoo.tf.olmo2 import Olmo2Attention, TFOlmo2Model

Tensor: TypeAlias = tf.Tensor


class OlmoeAttention(Olmo2Attention):
    """The attention of OLMo 2; queries and keys are clamped after their norms, and values too."""

    def __init__(self, config: OlmoeConfig, name: str) -> None:
        super().__init__(config, name)
        self.limit = config.clip_qkv

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return clip(query, self.limit), clip(key, self.limit), clip(value, self.limit)


class OlmoeBlock(Layer):
    """One decoder block, norms before the sublayers."""

    def __init__(self, config: OlmoeConfig, name: str) -> None:
        super().__init__(name)
        self.self_attn = OlmoeAttention(config, name="self_attn")
        self.mlp = SparseMLP(config, name="mlp")
        self.input_layernorm = RMSNorm(config.rms_norm_eps, name="input_layernorm")
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")

    def call(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        out, present, weights = self.self_attn(self.input_layernorm(x), cos_sin, past, seed, key_mask=key_mask)
        x = x + out  # (b, s, c)
        out, router_logits = self.mlp(self.post_attention_layernorm(x))
        return x + out, present, weights, router_logits  # (b * s, e)


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmoeModel(TFOlmo2Model):
    """The OLMoE decoder without a head."""

    config_class = OlmoeConfig
    block = OlmoeBlock
    family_inputs = ("output_router_logits",)


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmoeForCausalLM(CausalLM):
    """The OLMoE decoder with its language-model head."""

    config_class = OlmoeConfig
    base_class = TFOlmoeModel
