"""The config that families with rotary positions share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ACTIVATIONS, Parameter
from olmozoo.families.rope import FROM_ORIGINAL, Rope, make_rope, rope_kind


@dataclass(kw_only=True)
class RotaryConfig(ModelConfig):
    """What configs of decoders with rotary positions, grouped-query attention and a gated MLP share.

    Attributes:
        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of decoder blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; default `num_attention_heads`.
        hidden_act: the MLP's activation.
        max_position_embeddings: the trained length, in tokens.
        initializer_range: standard deviation of initial weights.
        use_cache: whether a call returns keys and values by default.
        pad_token_id, bos_token_id, eos_token_id: special tokens; eos may be a list.
        tie_word_embeddings: whether the head is the token embedding.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or an object with `rope_type` and the fields of that kind; see `make_rope`.
        attention_bias: whether q, k, v and o have biases.
        attention_dropout: dropout of attention weights in training.
    """

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    eos_token_id: int | list[int] | None = 50279
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        super().__post_init__()
        self._check_int("intermediate_size", "num_key_value_heads")
        self._check_number("initializer_range")
        self._check_number("attention_dropout", below=1.0)
        self._check_number("rope_theta", least=1.0)
        self._check_bool("attention_bias")
        self._check_choice("hidden_act", ACTIVATIONS)
        if self.num_attention_heads % self.kv_heads:
            self._wrong("num_key_value_heads", f"a divisor of num_attention_heads = {self.num_attention_heads}")
        original = self.extra.get("original_max_position_embeddings")
        if original is not None and rope_kind(self.rope_scaling) in FROM_ORIGINAL:  # where Transformers looks first
            self._set("rope_scaling", dict(self.rope_scaling or {}, original_max_position_embeddings=original))
        self.rope()

    @classmethod
    def _normalize(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Read `rope_parameters`, where newer files keep both theta and scaling."""
        if "rope_parameters" in data:
            parameters = data.pop("rope_parameters")
            data["rope_scaling"] = data.get("rope_scaling") or parameters
        scaling = data.get("rope_scaling")
        if isinstance(scaling, dict):
            scaling = dict(scaling)
            theta = scaling.pop("rope_theta", None)
            if theta is not None:
                data["rope_theta"] = theta
            data["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling
        return data

    def rope(self) -> Rope:
        """The rotary frequencies of these settings."""
        return make_rope(self.rope_theta, self.head_dim, self.max_position_embeddings, self.rope_scaling)

    @property
    def init_deviation(self) -> float:
        """`initializer_range`."""
        return self.initializer_range

    @property
    def embedding(self) -> Parameter:
        """The token embedding."""
        shape = (self.vocab_size, self.hidden_size)
        return Parameter("model.embed_tokens.weight", shape, ("vocab", "embed"), "embedding", self.initializer_range)

    def _attention(self, block: str) -> Iterator[Parameter]:
        hidden, heads, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        for letter, shape, axes in (
            ("q", (heads, hidden), ("heads", "embed")),
            ("k", (kv, hidden), ("kv_heads", "embed")),
            ("v", (kv, hidden), ("kv_heads", "embed")),
            ("o", (hidden, heads), ("embed", "heads")),
        ):
            name = f"{block}.self_attn.{letter}_proj"
            yield Parameter(f"{name}.weight", shape, axes, "linear", self.initializer_range)
            if self.attention_bias:
                yield Parameter(f"{name}.bias", shape[:1], axes[:1], "bias")

    def _mlp(self, block: str) -> Iterator[Parameter]:
        inner, hidden = self.intermediate_size, self.hidden_size
        for name, shape, axes in (
            ("gate_proj", (inner, hidden), ("mlp", "embed")),
            ("up_proj", (inner, hidden), ("mlp", "embed")),
            ("down_proj", (hidden, inner), ("embed", "mlp")),
        ):
            yield Parameter(f"{block}.mlp.{name}.weight", shape, axes, "linear", self.initializer_range)
