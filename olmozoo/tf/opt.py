"""OPT in Keras (arXiv:2205.01068).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─       do_layer_norm_before
       └─────────────────────┘  └───────────────┘
    x ─┬─ attention ─ + ─ norm ─┬─ MLP ─ + ─ norm ─       otherwise (350m)
       └──────────────┘         └────────┘

Shapes: b batch, s positions in this call, t positions with the cache, h heads, d head_dim, c hidden size, e width of
the token embedding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import tensorflow as tf
from keras import ops

from olmozoo.families.opt import POSITION_OFFSET, OPTConfig
from olmozoo.modeling import check_range
from olmozoo.tf.cache import update
from olmozoo.tf.decoder import Decoder
from olmozoo.tf.heads import CausalLM, QuestionAnswerer, SequenceClassifier
from olmozoo.tf.layers import (
    ACTIVATIONS,
    Layer,
    LayerNorm,
    QueryBlocks,
    TrackedBlocks,
    attention,
    concrete,
    dropout,
    embedding,
    linear,
    split_heads,
    split_seed,
)

Tensor: TypeAlias = tf.Tensor


class OPTAttention(Layer):
    """Multi-head attention; queries are scaled before the heads are split, their bias included."""

    def __init__(self, config: OPTConfig, layer: int, name: str) -> None:
        super().__init__(name)
        c, bias = config.hidden_size, config.enable_bias
        heads = config.kv_heads_in(layer) * config.head_dim
        self.q_proj = linear(heads, bias, name="q_proj")
        self.k_proj = linear(heads, bias, name="k_proj")
        self.v_proj = linear(heads, bias, name="v_proj")
        self.out_proj = linear(c, bias, name="out_proj")
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout

    def call(
        self, x: Tensor, head_mask: Tensor | None, past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        query = split_heads(self.q_proj(x) * self.head_dim**-0.5, self.head_dim)  # (b, h, s, d)
        key = split_heads(self.k_proj(x), self.head_dim)
        value = split_heads(self.v_proj(x), self.head_dim)
        key, value = update(past, key, value)  # (b, h, t, d)
        out, weights = attention(query, key, value, key_mask, 1.0, self.dropout, seed, head_mask)
        return self.out_proj(out), (key, value), weights


class OPTBlock(Layer):
    """One decoder block."""

    def __init__(self, config: OPTConfig, layer: int, name: str) -> None:
        super().__init__(name)
        bias, affine = config.enable_bias, config.layer_norm_elementwise_affine
        self.self_attn = OPTAttention(config, layer, name="self_attn")
        self.self_attn_layer_norm = LayerNorm(affine, name="self_attn_layer_norm")
        self.fc1 = linear(config.ffn_dim, bias, name="fc1")
        self.fc2 = linear(config.hidden_size, bias, name="fc2")
        self.final_layer_norm = LayerNorm(affine, name="final_layer_norm")
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = config.dropout
        self.norm_first = config.do_layer_norm_before

    def call(
        self, x: Tensor, head_mask: Tensor | None, past: Any, seed: Tensor | None, key_mask: Tensor | QueryBlocks
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        seeds = split_seed(seed, 3)
        out = self.self_attn_layer_norm(x) if self.norm_first else x
        out, present, weights = self.self_attn(out, head_mask, past, seeds[0], key_mask=key_mask)
        x = x + dropout(out, self.dropout, seeds[1])  # (b, s, c)
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)
        out = self.final_layer_norm(x) if self.norm_first else x
        out = self.fc2(self.act(self.fc1(out)))
        x = x + dropout(out, self.dropout, seeds[2])
        if not self.norm_first:
            x = self.final_layer_norm(x)
        return x, present, weights


class OPTDecoder(TrackedBlocks, Layer):
    """The layers of the decoder, `decoder` in a checkpoint."""

    def __init__(self, config: OPTConfig, name: str) -> None:
        super().__init__(name)
        c, e = config.hidden_size, config.embedding.shape[1]
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.embed_tokens = embedding(config.vocab_size, e, name="embed_tokens")
        self.embed_positions = embedding(rows, c, name="embed_positions")
        self.project_in = linear(c, False, name="project_in") if config.projects else None
        self.project_out = linear(e, False, name="project_out") if config.projects else None
        self.blocks = [OPTBlock(config, layer, name=f"layers.{layer}") for layer in range(config.num_hidden_layers)]
        affine = config.layer_norm_elementwise_affine
        self.final_layer_norm = LayerNorm(affine, name="final_layer_norm") if config.has_final_norm else None


@keras.saving.register_keras_serializable("olmozoo")
class TFOPTModel(Decoder):
    """The OPT decoder without a head."""

    config_class = OPTConfig
    family_inputs = ("head_mask",)

    def make_layers(self) -> None:
        self.decoder = OPTDecoder(self.config, name="decoder")
        self.layerdrop = self.config.layerdrop

    @property
    def stack(self) -> keras.Layer:
        return self.decoder

    def embed_positions(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past: Any,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Add the learned positions; a head_mask (layers, heads) or (heads,) goes to the attentions."""
        length, layers = ops.shape(hidden)[1], self.config.num_hidden_layers
        if position_ids is None and attention_mask is not None and len(attention_mask.shape) == 2:
            real = ops.cast(attention_mask, "int32")  # padding has position -1
            position_ids = (ops.cumsum(real, -1) * real - 1)[:, past : past + length]
        elif position_ids is None:
            position_ids = past + ops.arange(length, dtype="int32")[None]
        if self.decoder.project_in is not None:
            hidden = self.decoder.project_in(hidden)  # (b, s, c)
        check_range("position_ids", concrete(position_ids), self.config.max_position_embeddings, -POSITION_OFFSET)
        positions = self.decoder.embed_positions(ops.cast(position_ids, "int32") + POSITION_OFFSET)
        hidden = hidden + ops.cast(positions, hidden.dtype)
        if head_mask is None:
            return hidden, [None] * layers
        return hidden, ops.unstack(ops.broadcast_to(head_mask, (layers, self.config.num_attention_heads)))

    def final_norm(self, hidden: Tensor) -> Tensor:
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        return hidden if self.decoder.project_out is None else self.decoder.project_out(hidden)  # (b, s, e)


@keras.saving.register_keras_serializable("olmozoo")
class TFOPTForCausalLM(CausalLM):
    """The OPT decoder with its language-model head."""

    config_class = OPTConfig
    base_class = TFOPTModel


@keras.saving.register_keras_serializable("olmozoo")
class TFOPTForSequenceClassification(SequenceClassifier):
    """The OPT decoder with a classification head."""

    config_class = OPTConfig
    base_class = TFOPTModel


@keras.saving.register_keras_serializable("olmozoo")
class TFOPTForQuestionAnswering(QuestionAnswerer):
    """The OPT decoder with a head for the start and the end of an answer."""

    config_class = OPTConfig
    base_class = TFOPTModel
