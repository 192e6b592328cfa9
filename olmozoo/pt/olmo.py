"""OLMo in PyTorch (arXiv:2402.00838).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─
       └─────────────────────┘  └───────────────┘        norms have no parameters

Shapes: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads, d head_dim,
c hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from olmozoo.families.olmo import OlmoConfig
from olmozoo.pt.decoder import Decoder
from olmozoo.pt.heads import CausalLM, SequenceClassifier
from olmozoo.pt.layers import GatedMLP, LayerNorm, Linear, attention, clip, rotate, split_heads


class OlmoAttention(nn.Module):
    """Grouped-query attention; queries, keys and values are clamped before the heads are split."""

    def __init__(self, config: OlmoConfig, layer: int) -> None:
        super().__init__()
        c, bias = config.hidden_size, config.attention_bias
        q, kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(c, q, bias=bias)
        self.k_proj = Linear(c, kv, bias=bias)
        self.v_proj = Linear(c, kv, bias=bias)
        self.o_proj = Linear(q, c, bias=bias)
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.limit = config.clip_qkv
        self.layer = layer

    def forward(
        self, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query = split_heads(clip(self.q_proj(x), self.limit), self.head_dim)  # (b, h, s, d)
        key = split_heads(clip(self.k_proj(x), self.limit), self.head_dim)  # (b, g, s, d)
        value = split_heads(clip(self.v_proj(x), self.limit), self.head_dim)
        query, key = rotate(query, *cos_sin), rotate(key, *cos_sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)  # (b, g, t, d)
        dropout = self.dropout if self.training else 0.0
        out, weights = attention(query, key, value, mask, self.head_dim**-0.5, dropout, want_weights)
        return self.o_proj(out), weights


class OlmoBlock(nn.Module):
    """One decoder block, norms before the sublayers."""

    def __init__(self, config: OlmoConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = OlmoAttention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = LayerNorm(config.hidden_size, affine=False)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, affine=False)

    def forward(
        self, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = self.self_attn(self.input_layernorm(x), mask, cos_sin, cache, want_weights)
        x = x + out  # (b, s, c)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, weights


class OlmoModel(Decoder):
    """The OLMo decoder without a head."""

    config_class = OlmoConfig

    def make_layers(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OlmoBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, affine=False)
        self.rope = config.rope()


class OlmoForCausalLM(CausalLM):
    """The OLMo decoder with its language-model head."""

    config_class = OlmoConfig
    base_class = OlmoModel


class OlmoForSequenceClassification(SequenceClassifier):
    """The OLMo decoder with a classification head."""

    config_class = OlmoConfig
    base_class = OlmoModel
