"""OLMo in Keras (arXiv:2402.00838).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─
       └─────────────────────┘  └───────────────┘        norms have no parameters

Shapes: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads, d head_dim,
c hidden size.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import tensorflow as tf

from olmozoo.families.olmo import OlmoConfig
from olmozoo.tf.cache import update
from olmozoo.tf.decoder import Decoder
from olmozoo.tf.heads import CausalLM, SequenceClassifier
from olmozoo.tf.layers import (
    GatedMLP,
    Layer,
    LayerNorm,
    QueryBlocks,
    attention,
    clip,
    embedding,
    linear,
    rotate,
    split_heads,
)

Tensor: TypeAlias = tf.Tensor


class OlmoAttention(Layer):
    """Grouped-query attention; queries, keys and values are clamped before the heads are split."""

    def __init__(self, config: OlmoConfig, name: str) -> None:
        super().__init__(name)
        c, bias = config.hidden_size, config.attention_bias
        q, kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = linear(q, bias, name="q_proj")
        self.k_proj = linear(kv, bias, name="k_proj")
        self.v_proj = linear(kv, bias, name="v_proj")
        self.o_proj = linear(c, bias, name="o_proj")
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.limit = config.clip_qkv

    def call(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        query = split_heads(clip(self.q_proj(x), self.limit), self.head_dim)  # (b, h, s, d)
        key = split_heads(clip(self.k_proj(x), self.limit), self.head_dim)  # (b, g, s, d)
        value = split_heads(clip(self.v_proj(x), self.limit), self.head_dim)
        query, key = rotate(query, *cos_sin), rotate(key, *cos_sin)
        key, value = update(past, key, value)  # (b, g, t, d)
        out, weights = attention(query, key, value, key_mask, self.head_dim**-0.5, self.dropout, seed)
        return self.o_proj(out), (key, value), weights


class OlmoBlock(Layer):
    """One decoder block, norms before the sublayers."""

    def __init__(self, config: OlmoConfig, name: str) -> None:
        super().__init__(name)
        self.self_attn = OlmoAttention(config, name="self_attn")
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, name="mlp")
        self.input_layernorm = LayerNorm(False, name="input_layernorm")
        self.post_attention_layernorm = LayerNorm(False, name="post_attention_layernorm")

    def call(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        out, present, weights = self.self_attn(self.input_layernorm(x), cos_sin, past, seed, key_mask=key_mask)
        x = x + out  # (b, s, c)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, present, weights


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmoModel(Decoder):
    """The OLMo decoder without a head."""

    config_class = OlmoConfig

    def make_layers(self) -> None:
        config = self.config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, name="embed_tokens")
        self.blocks = [OlmoBlock(config, name=f"layers.{layer}") for layer in range(config.num_hidden_layers)]
        self.norm = LayerNorm(False, name="norm")
        self.rope = config.rope()


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmoForCausalLM(CausalLM):
    """The OLMo decoder with its language-model head."""

    config_class = OlmoConfig
    base_class = TFOlmoModel


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmoForSequenceClassification(SequenceClassifier):
    """The OLMo decoder with a classification head."""

    config_class = OlmoConfig
    base_class = TFOlmoModel
