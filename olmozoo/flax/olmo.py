"""OLMo in Flax (arXiv:2402.00838).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─
       └─────────────────────┘  └───────────────┘        norms have no parameters

Shapes: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads, d head_dim,
c hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flax import linen as nn
from jax import Array

from olmozoo.families.olmo import OlmoConfig
from olmozoo.flax.cache import update
from olmozoo.flax.decoder import Decoder, DecoderModule, Layers
from olmozoo.flax.heads import CausalLM, SequenceClassifier
from olmozoo.flax.layers import Dense, GatedMLP, LayerNorm, QueryBlocks, attention, clip, rotate, split_heads


class OlmoAttention(nn.Module):
    """Grouped-query attention; queries, keys and values are clamped before the heads are split."""

    config: OlmoConfig
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        config = self.config
        q, kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        dense = partial(Dense, use_bias=config.attention_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        self.q_proj = dense(q)
        self.k_proj = dense(kv)
        self.v_proj = dense(kv)
        self.o_proj = dense(config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, cos_sin: tuple[Array, Array], past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array]:
        head_dim, limit = self.config.head_dim, self.config.clip_qkv
        query = split_heads(clip(self.q_proj(x), limit), head_dim)  # (b, h, s, d)
        key = split_heads(clip(self.k_proj(x), limit), head_dim)  # (b, g, s, d)
        value = split_heads(clip(self.v_proj(x), limit), head_dim)
        query, key = rotate(query, *cos_sin), rotate(key, *cos_sin)
        key, value = update(past, key, value)  # (b, g, t, d)
        dropout = partial(self.dropout, deterministic=deterministic)
        out, weights = attention(query, key, value, mask, head_dim**-0.5, dropout)
        return self.o_proj(out), (key, value), weights


class OlmoBlock(nn.Module):
    """One decoder block, norms before the sublayers."""

    config: OlmoConfig
    dtype: Any
    param_dtype: Any
    layer: int

    def setup(self) -> None:
        config, types = self.config, (self.dtype, self.param_dtype)
        self.self_attn = OlmoAttention(config, *types)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, *types)
        self.input_layernorm = LayerNorm(False, self.param_dtype)
        self.post_attention_layernorm = LayerNorm(False, self.param_dtype)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, cos_sin: tuple[Array, Array], past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array]:
        out, present, weights = self.self_attn(self.input_layernorm(x), mask, cos_sin, past, deterministic)
        x = x + out  # (b, s, c)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, present, weights


class OlmoModule(DecoderModule):
    """The OLMo decoder without a head, as a function of its parameters."""

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=self.param_dtype)
        self.layers = Layers(OlmoBlock, config, self.dtype, self.param_dtype, self.gradient_checkpointing)
        self.norm = LayerNorm(False, self.param_dtype)
        self.rope = config.rope()


class FlaxOlmoModel(Decoder):
    """The OLMo decoder without a head."""

    config_class = OlmoConfig
    module_class = OlmoModule


class FlaxOlmoForCausalLM(CausalLM):
    """The OLMo decoder with its language-model head."""

    config_class = OlmoConfig
    base_class = FlaxOlmoModel


class FlaxOlmoForSequenceClassification(SequenceClassifier):
    """The OLMo decoder with a classification head."""

    config_class = OlmoConfig
    base_class = FlaxOlmoModel
