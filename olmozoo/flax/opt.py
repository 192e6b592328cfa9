"""OPT in Flax (arXiv:2205.01068).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─       do_layer_norm_before
       └─────────────────────┘  └───────────────┘
    x ─┬─ attention ─ + ─ norm ─┬─ MLP ─ + ─ norm ─       otherwise (350m)
       └──────────────┘         └────────┘

Shapes: b batch, s positions in this call, t positions with the cache, h heads, d head_dim, c hidden size, e width of
the token embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from olmozoo.families.opt import POSITION_OFFSET, OPTConfig
from olmozoo.flax.cache import update
from olmozoo.flax.decoder import Decoder, DecoderModule, Layers
from olmozoo.flax.heads import CausalLM, QuestionAnswerer, SequenceClassifier
from olmozoo.flax.layers import ACTIVATIONS, Dense, LayerNorm, QueryBlocks, attention, concrete, split_heads
from olmozoo.modeling import check_range


class OPTAttention(nn.Module):
    """Multi-head attention; queries are scaled before the heads are split, their bias included."""

    config: OPTConfig
    dtype: Any
    param_dtype: Any
    layer: int

    def setup(self) -> None:
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = config.kv_heads_in(self.layer) * config.head_dim
        dense = partial(Dense, use_bias=config.enable_bias, **types)
        self.q_proj = dense(heads)
        self.k_proj = dense(heads)
        self.v_proj = dense(heads)
        self.out_proj = dense(config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, head_mask: Array | None, past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array]:
        head_dim = self.config.head_dim
        query = split_heads(self.q_proj(x) * head_dim**-0.5, head_dim)  # (b, h, s, d)
        key = split_heads(self.k_proj(x), head_dim)
        value = split_heads(self.v_proj(x), head_dim)
        key, value = update(past, key, value)  # (b, h, t, d)
        dropout = partial(self.dropout, deterministic=deterministic)
        out, weights = attention(query, key, value, mask, 1.0, dropout, head_mask)
        return self.out_proj(out), (key, value), weights


class OPTBlock(nn.Module):
    """One decoder block."""

    config: OPTConfig
    dtype: Any
    param_dtype: Any
    layer: int

    def setup(self) -> None:
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, use_bias=config.enable_bias, **types)
        self.self_attn = OPTAttention(config, **types, layer=self.layer)
        self.self_attn_layer_norm = LayerNorm(config.layer_norm_elementwise_affine, self.param_dtype)
        self.fc1 = dense(config.ffn_dim)
        self.fc2 = dense(config.hidden_size)
        self.final_layer_norm = LayerNorm(config.layer_norm_elementwise_affine, self.param_dtype)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self, x: Array, mask: Array | QueryBlocks, head_mask: Array | None, past: Any, deterministic: bool
    ) -> tuple[Array, tuple[Array, Array], Array]:
        norm_first = self.config.do_layer_norm_before
        out = self.self_attn_layer_norm(x) if norm_first else x
        out, present, weights = self.self_attn(out, mask, head_mask, past, deterministic)
        x = x + self.dropout(out, deterministic=deterministic)  # (b, s, c)
        if not norm_first:
            x = self.self_attn_layer_norm(x)
        out = self.final_layer_norm(x) if norm_first else x
        out = self.fc2(self.act(self.fc1(out)))
        x = x + self.dropout(out, deterministic=deterministic)
        if not norm_first:
            x = self.final_layer_norm(x)
        return x, present, weights


class OPTDecoder(nn.Module):
    """The layers of the decoder, `decoder` in a checkpoint."""

    config: OPTConfig
    dtype: Any
    param_dtype: Any
    gradient_checkpointing: bool

    def setup(self) -> None:
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        c, e = config.hidden_size, config.embedding.shape[1]
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.embed_tokens = nn.Embed(config.vocab_size, e, param_dtype=self.param_dtype)
        self.embed_positions = nn.Embed(rows, c, **types)
        self.project_in = Dense(c, use_bias=False, **types) if config.projects else None
        self.project_out = Dense(e, use_bias=False, **types) if config.projects else None
        self.layers = Layers(OPTBlock, config, self.dtype, self.param_dtype, self.gradient_checkpointing)
        affine = config.layer_norm_elementwise_affine
        self.final_layer_norm = LayerNorm(affine, self.param_dtype) if config.has_final_norm else None


class OPTModule(DecoderModule):
    """The OPT decoder without a head, as a function of its parameters."""

    def setup(self) -> None:
        self.decoder = OPTDecoder(self.config, self.dtype, self.param_dtype, self.gradient_checkpointing)

    @property
    def stack(self) -> nn.Module:
        return self.decoder

    def embed_positions(
        self,
        hidden: Array,
        position_ids: Array | None,
        attention_mask: Array | None,
        past: Any,
        head_mask: Array | None = None,
    ) -> tuple[Array, list[Array | None]]:
        """Add the learned positions; a head_mask (layers, heads) or (heads,) goes to the attentions."""
        length, layers = hidden.shape[1], self.config.num_hidden_layers
        if position_ids is None and attention_mask is not None and jnp.ndim(attention_mask) == 2:
            real = jnp.asarray(attention_mask).astype(jnp.int32)  # padding has position -1
            position_ids = lax.dynamic_slice_in_dim(real.cumsum(-1) * real - 1, past, length, axis=1)
        elif position_ids is None:
            position_ids = past + jnp.arange(length)[None]
        if self.decoder.project_in is not None:
            hidden = self.decoder.project_in(hidden)  # (b, s, c)
        check_range("position_ids", concrete(position_ids), self.config.max_position_embeddings, -POSITION_OFFSET)
        hidden = hidden + self.decoder.embed_positions(jnp.asarray(position_ids) + POSITION_OFFSET)
        if head_mask is None:
            return hidden, [None] * layers
        return hidden, list(jnp.broadcast_to(head_mask, (layers, self.config.num_attention_heads)))

    def final_norm(self, hidden: Array) -> Array:
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        return hidden if self.decoder.project_out is None else self.decoder.project_out(hidden)  # (b, s, e)


class FlaxOPTModel(Decoder):
    """The OPT decoder without a head."""

    config_class = OPTConfig
    family_inputs = ("head_mask",)
    module_class = OPTModule


class FlaxOPTForCausalLM(CausalLM):
    """The OPT decoder with its language-model head."""

    config_class = OPTConfig
    base_class = FlaxOPTModel


class FlaxOPTForSequenceClassification(SequenceClassifier):
    """The OPT decoder with a classification head."""

    config_class = OPTConfig
    base_class = FlaxOPTModel


class FlaxOPTForQuestionAnswering(QuestionAnswerer):
    """The OPT decoder with a head for the start and the end of an answer."""

    config_class = OPTConfig
    base_class = FlaxOPTModel
