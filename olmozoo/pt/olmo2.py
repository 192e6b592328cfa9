"""OLMo 2 in PyTorch (arXiv:2501.00656).

    x ─┬─ attention ─ norm ─ + ─┬─ MLP ─ norm ─ + ─
       └─────────────────────┘  └───────────────┘        norms are on the output of a sublayer, not on its input

Shapes: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads, d head_dim,
c hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from olmozoo.families.olmo2 import NormedAttentionConfig, Olmo2Config, PostNormConfig
from olmozoo.pt.decoder import Decoder
from olmozoo.pt.heads import CausalLM, SequenceClassifier
from olmozoo.pt.layers import GatedMLP, Linear, RMSNorm, attention, rotate, split_heads


class Olmo2Attention(nn.Module):
    """Grouped-query attention; queries and keys are normed over all heads together, before they are split."""

    def __init__(self, config: NormedAttentionConfig, layer: int) -> None:
        super().__init__()
        c, bias = config.hidden_size, config.attention_bias
        q, kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(c, q, bias=bias)
        self.k_proj = Linear(c, kv, bias=bias)
        self.v_proj = Linear(c, kv, bias=bias)
        self.o_proj = Linear(q, c, bias=bias)
        self.q_norm = RMSNorm(q, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv, config.rms_norm_eps)
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.layer = layer

    def forward(
        self, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (split_heads(part, self.head_dim) for part in self.project(x))  # (b, h or g, s, d)
        query, key = rotate(query, *cos_sin), rotate(key, *cos_sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)  # (b, g, t, d)
        dropout = self.dropout if self.training else 0.0
        out, weights = attention(query, key, value, mask, self.head_dim**-0.5, dropout, want_weights)
        return self.o_proj(out), weights

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, s, h * d), keys and values (b, s, g * d), before the heads are split."""
        return self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)


class Olmo2Block(nn.Module):
    """One decoder block, norms after the sublayers."""

    def __init__(self, config: PostNormConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = self.self_attn(x, mask, cos_sin, cache, want_weights)
        x = x + self.post_attention_layernorm(out)  # (b, s, c)
        x = x + self.post_feedforward_layernorm(self.mlp(x))
        return x, weights


class Olmo2Model(Decoder):
    """The OLMo 2 decoder without a head."""

    config_class: ClassVar[type[NormedAttentionConfig]] = Olmo2Config
    block: ClassVar[type[nn.Module]] = Olmo2Block

    def make_layers(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = config.rope()


class Olmo2ForCausalLM(CausalLM):
    """The OLMo 2 decoder with its language-model head."""

    config_class = Olmo2Config
    base_class = Olmo2Model


class Olmo2ForSequenceClassification(SequenceClassifier):
    """The OLMo 2 decoder with a classification head."""

    config_class = Olmo2Config
    base_class = Olmo2Model
