"""OPT in PyTorch (arXiv:2205.01068).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─       do_layer_norm_before
       └─────────────────────┘  └───────────────┘
    x ─┬─ attention ─ + ─ norm ─┬─ MLP ─ + ─ norm ─       otherwise (350m)
       └──────────────┘         └────────┘

Shapes: b batch, s positions in this call, t positions with the cache, h heads, d head_dim, c hidden size, e width of
the token embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmozoo.errors import InputError
from olmozoo.families.opt import POSITION_OFFSET, OPTConfig
from olmozoo.modeling import check_range
from olmozoo.pt.decoder import Decoder
from olmozoo.pt.heads import CausalLM, QuestionAnswerer, SequenceClassifier
from olmozoo.pt.layers import ACTIVATIONS, LayerNorm, Linear, attention, concrete, split_heads
from olmozoo.pt.quantization import QuantizedLinear


class OPTAttention(nn.Module):
    """Multi-head attention; queries are scaled before the heads are split, their bias included."""

    def __init__(self, config: OPTConfig, layer: int) -> None:
        super().__init__()
        c, bias = config.hidden_size, config.enable_bias
        heads = config.kv_heads_in(layer) * config.head_dim
        self.q_proj = Linear(c, heads, bias=bias)
        self.k_proj = Linear(c, heads, bias=bias)
        self.v_proj = Linear(c, heads, bias=bias)
        self.out_proj = Linear(heads, c, bias=bias)
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.layer = layer

    def forward(
        self, x: Tensor, mask: Tensor | None, head_mask: Tensor | None, cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query = split_heads(self.q_proj(x) * self.head_dim**-0.5, self.head_dim)  # (b, h, s, d)
        key = split_heads(self.k_proj(x), self.head_dim)
        value = split_heads(self.v_proj(x), self.head_dim)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)  # (b, h, t, d)
        dropout = self.dropout if self.training else 0.0
        out, weights = attention(query, key, value, mask, 1.0, dropout, want_weights, head_mask)
        return self.out_proj(out), weights


class OPTBlock(nn.Module):
    """One decoder block."""

    def __init__(self, config: OPTConfig, layer: int) -> None:
        super().__init__()
        c, bias, affine = config.hidden_size, config.enable_bias, config.layer_norm_elementwise_affine
        self.self_attn = OPTAttention(config, layer)
        self.self_attn_layer_norm = LayerNorm(c, affine)
        self.fc1 = Linear(c, config.ffn_dim, bias=bias)
        self.fc2 = Linear(config.ffn_dim, c, bias=bias)
        self.final_layer_norm = LayerNorm(c, affine)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = config.dropout
        self.norm_first = config.do_layer_norm_before

    def forward(
        self, x: Tensor, mask: Tensor | None, head_mask: Tensor | None, cache: Any, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = self.self_attn_layer_norm(x) if self.norm_first else x
        out, weights = self.self_attn(out, mask, head_mask, cache, want_weights)
        x = x + F.dropout(out, self.dropout, self.training)  # (b, s, c)
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)
        out = self.final_layer_norm(x) if self.norm_first else x
        out = self.fc2(self.act(self.fc1(out)))
        x = x + F.dropout(out, self.dropout, self.training)
        if not self.norm_first:
            x = self.final_layer_norm(x)
        return x, weights


class OPTDecoder(nn.Module):
    """The layers of the decoder, `decoder` in a checkpoint."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        c, e = config.hidden_size, config.embedding.shape[1]
        self.embed_tokens = nn.Embedding(config.vocab_size, e)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, c)
        self.project_in = Linear(e, c, bias=False) if config.projects else None
        self.project_out = Linear(c, e, bias=False) if config.projects else None
        self.layers = nn.ModuleList(OPTBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layer_norm = LayerNorm(c, config.layer_norm_elementwise_affine) if config.has_final_norm else None


class OPTModel(Decoder):
    """The OPT decoder without a head."""

    config_class = OPTConfig
    family_inputs = ("head_mask",)

    def make_layers(self) -> None:
        self.decoder = OPTDecoder(self.config)
        self.layerdrop = self.config.layerdrop

    @property
    def stack(self) -> nn.Module:
        return self.decoder

    def embed_positions(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past: int,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Add the learned positions; a head_mask (layers, heads) or (heads,) goes to the attentions."""
        length = hidden.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask.long()  # padding has position -1
            position_ids = (real.cumsum(-1) * real - 1)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden.device)[None]
        if self.decoder.project_in is not None:
            hidden = self.decoder.project_in(hidden)  # (b, s, c)
        check_range("position_ids", concrete(position_ids), self.config.max_position_embeddings, -POSITION_OFFSET)
        hidden = hidden + self.decoder.embed_positions(position_ids + POSITION_OFFSET)
        layers = self.config.num_hidden_layers
        if head_mask is None:
            return hidden, [None] * layers
        return hidden, list(head_mask.expand(layers, -1))

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Remove heads by layer, numbered as before any was removed, from the weights; the config follows.

        Raises:
            ConfigError: there is no such layer or head, or a layer would have none left.
            InputError: the weights are quantized.
        """
        if any(isinstance(module, QuantizedLinear) for module in self.modules()):
            raise InputError("heads of a quantized model cannot be pruned: prune the float model first")
        before = self.config.pruned_heads
        pruned = {layer: sorted({*before.get(layer, ()), *heads}) for layer, heads in (before | heads_to_prune).items()}
        self.config = self.config.replace(extra={**self.config.extra, "pruned_heads": pruned})
        for layer, gone in pruned.items():
            old = [head for head in range(self.config.num_attention_heads) if head not in before.get(layer, ())]
            kept = torch.tensor([index for index, head in enumerate(old) if head not in gone], device=self.device)
            attention = self.decoder.layers[layer].self_attn
            rows = (kept[:, None] * attention.head_dim + torch.arange(attention.head_dim, device=self.device)).flatten()
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight = nn.Parameter(linear.weight.detach()[rows])
                linear.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach()[rows])
                linear.out_features = len(rows)
            attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.detach()[:, rows])
            attention.out_proj.in_features = len(rows)

    def final_norm(self, hidden: Tensor) -> Tensor:
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        return hidden if self.decoder.project_out is None else self.decoder.project_out(hidden)  # (b, s, e)


class OPTForCausalLM(CausalLM):
    """The OPT decoder with its language-model head."""

    config_class = OPTConfig
    base_class = OPTModel


class OPTForSequenceClassification(SequenceClassifier):
    """The OPT decoder with a classification head."""

    config_class = OPTConfig
    base_class = OPTModel


class OPTForQuestionAnswering(QuestionAnswerer):
    """The OPT decoder with a head for the start and the end of an answer."""

    config_class = OPTConfig
    base_class = OPTModel
