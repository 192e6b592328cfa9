"""OLMo 2 in Keras (arXiv:2501.00656).

    x ─┬─ attention ─ norm ─ + ─┬─ MLP ─ norm ─ + ─
       └─────────────────────┘  └───────────────┘        norms are on the output of a sublayer, not on its input

Shapes: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads, d head_dim,
c hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import keras
import tensorflow as tf

from olmozoo.families.olmo2 import NormedAttentionConfig, Olmo2Config, PostNormConfig
from olmozoo.tf.cache import update
from olmozoo.tf.decoder import Decoder
from olmozoo.tf.heads import CausalLM, SequenceClassifier
from olmozoo.tf.layers import GatedMLP, Layer, QueryBlocks, RMSNorm, attention, embedding, linear, rotate, split_heads

Tensor: TypeAlias = tf.Tensor


class Olmo2Attention(Layer):
    """Grouped-query attention; queries and keys are normed over all heads together, before they are split."""

    def __init__(self, config: NormedAttentionConfig, name: str) -> None:
        super().__init__(name)
        c, bias = config.hidden_size, config.attention_bias
        q, kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = linear(q, bias, name="q_proj")
        self.k_proj = linear(kv, bias, name="k_proj")
        self.v_proj = linear(kv, bias, name="v_proj")
        self.o_proj = linear(c, bias, name="o_proj")
        self.q_norm = RMSNorm(config.rms_norm_eps, name="q_norm")
        self.k_norm = RMSNorm(config.rms_norm_eps, name="k_norm")
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout

    def call(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        query, key, value = (split_heads(part, self.head_dim) for part in self.project(x))  # (b, h or g, s, d)
        query, key = rotate(query, *cos_sin), rotate(key, *cos_sin)
        key, value = update(past, key, value)  # (b, g, t, d)
        out, weights = attention(query, key, value, key_mask, self.head_dim**-0.5, self.dropout, seed)
        return self.o_proj(out), (key, value), weights

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, s, h * d), keys and values (b, s, g * d), before the heads are split."""
        return self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)


class Olmo2Block(Layer):
    """One decoder block, norms after the sublayers."""

    def __init__(self, config: PostNormConfig, name: str) -> None:
        super().__init__(name)
        self.self_attn = Olmo2Attention(config, name="self_attn")
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, name="mlp")
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")
        self.post_feedforward_layernorm = RMSNorm(config.rms_norm_eps, name="post_feedforward_layernorm")

    def call(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        out, present, weights = self.self_attn(x, cos_sin, past, seed, key_mask=key_mask)
        x = x + self.post_attention_layernorm(out)  # (b, s, c)
        x = x + self.post_feedforward_layernorm(self.mlp(x))
        return x, present, weights


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmo2Model(Decoder):
    """The OLMo 2 decoder without a head."""

    config_class: ClassVar[type[NormedAttentionConfig]] = Olmo2Config
    block: ClassVar[type[Layer]] = Olmo2Block

    def make_layers(self) -> None:
        config = self.config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, name="embed_tokens")
        self.blocks = [self.block(config, name=f"layers.{layer}") for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, name="norm")
        self.rope = config.rope()


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmo2ForCausalLM(CausalLM):
    """The OLMo 2 decoder with its language-model head."""

    config_class = Olmo2Config
    base_class = TFOlmo2Model


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmo2ForSequenceClassification(SequenceClassifier):
    """The OLMo 2 decoder with a classification head."""

    config_class = Olmo2Config
    base_class = TFOlmo2Model
