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
from olmozoo.tf.decoder import Decoder
from olmozoo.tf.experts import SparseMLP
from olmozoo.tf.heads import CausalLM
from olmozoo.tf.layers import Layer, QueryBlocks, RMSNorm, embedding
from olmozoo.tf.olmo2 import Olmo2Attention

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
class TFFlexOlmoModel(Decoder):
    """The FlexOlmo decoder without a head."""

    config_class = FlexOlmoConfig
    family_inputs = ("output_router_logits",)

    def make_layers(self) -> None:
        config = self.config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, name="embed_tokens")
        self.blocks = [FlexOlmoBlock(config, name=f"layers.{layer}") for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, name="norm")
        self.rope = config.rope()


@keras.saving.register_keras_serializable("olmozoo")
class TFFlexOlmoForCausalLM(CausalLM):
    """The FlexOlmo decoder with its language-model head."""

    config_class = FlexOlmoConfig
    base_class = TFFlexOlmoModel
