"""OLMo 2 in Flax (arXiv:2501.00656).

    x ─┬─ attention ─ norm ─ + ─┬─ MLP ─ norm ─ + ─
       └─────────────────────┘  └───────────────┘        norms are on the output of a sublayer, not on its input

Shapes: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads, d head_dim,
c hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from flax import linen as nn
from jax import Array

from olmozoo.families.olmo2 import NormedAttentionConfig, Olmo2Config, PostNormConfig
from olmozoo.flax.cache import update
from olmozoo.flax.decoder import Decoder, DecoderModule, Layers
from olmozoo.flax.heads import CausalLM, SequenceClassifier
from olmozoo.flax.layers import Dense, GatedMLP, QueryBlocks, RMSNorm, attention, rotate, split_heads


class Olmo2Attention(nn.Module):
    """Grouped-query attention; queries and keys are normed over all heads together, before they are split."""

    config: NormedAttentionConfig
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
        self.q_norm = RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.k_norm = RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.dropout = nn.Dropout(config.attention_dropout)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, cos_sin: tuple[Array, Array], past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array]:
        head_dim = self.config.head_dim
        query, key, value = (split_heads(part, head_dim) for part in self.project(x))  # (b, h or g, s, d)
        query, key = rotate(query, *cos_sin), rotate(key, *cos_sin)
        key, value = update(past, key, value)  # (b, g, t, d)
        dropout = partial(self.dropout, deterministic=deterministic)
        out, weights = attention(query, key, value, mask, head_dim**-0.5, dropout)
        return self.o_proj(out), (key, value), weights

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries (b, s, h * d), keys and values (b, s, g * d), before the heads are split."""
        return self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)


class Olmo2Block(nn.Module):
    """One decoder block, norms after the sublayers."""

    config: PostNormConfig
    dtype: Any
    param_dtype: Any
    layer: int

    def setup(self) -> None:
        config, types = self.config, (self.dtype, self.param_dtype)
        self.self_attn = Olmo2Attention(config, *types)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, *types)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.post_feedforward_layernorm = RMSNorm(config.rms_norm_eps, self.param_dtype)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, cos_sin: tuple[Array, Array], past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array]:
        out, present, weights = self.self_attn(x, mask, cos_sin, past, deterministic)
        x = x + self.post_attention_layernorm(out)  # (b, s, c)
        x = x + self.post_feedforward_layernorm(self.mlp(x))
        return x, present, weights


class Olmo2Module(DecoderModule):
    """The OLMo 2 decoder without a head, as a function of its parameters."""

    block: ClassVar[type[nn.Module]] = Olmo2Block

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=self.param_dtype)
        types = (self.dtype, self.param_dtype)
        self.layers = Layers(self.block, config, *types, self.gradient_checkpointing, self.mesh)
        self.norm = RMSNorm(config.rms_norm_eps, self.param_dtype)
        self.rope = config.rope()


class FlaxOlmo2Model(Decoder):
    """The OLMo 2 decoder without a head."""

    config_class = Olmo2Config
    module_class = Olmo2Module


class FlaxOlmo2ForCausalLM(CausalLM):
    """The OLMo 2 decoder with its language-model head."""

    config_class = Olmo2Config
    base_class = FlaxOlmo2Model


class FlaxOlmo2ForSequenceClassification(SequenceClassifier):
    """The OLMo 2 decoder with a classification head."""

    config_class = Olmo2Config
    base_class = FlaxOlmo2Model
