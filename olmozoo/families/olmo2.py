"""OLMo 2 (arXiv:2501.00656): RMS norms after each sublayer, norms on queries and keys, rotary positions, gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.families.parameter import Head, Parameter
from olmozoo.families.registry import register
from olmozoo.families.rotary import RotaryConfig


def _preset(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
    }


@dataclass(kw_only=True)
class NormedAttentionConfig(RotaryConfig):
    """What families with norms on queries and keys share: the fields of `RotaryConfig` and one more.

    Attributes:
        block_norms: the norms of a block, in the order of its sublayers.
        rms_norm_eps: epsilon of every RMS norm.
    """

    block_norms: ClassVar[tuple[str, str]]

    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("rms_norm_eps")

    def backbone(self) -> Iterator[Parameter]:
        """See `ModelConfig.backbone`."""
        yield self.embedding
        for layer in range(self.num_hidden_layers):
            block = f"model.layers.{layer}"
            yield from self._attention(block)
            yield from self._mlp(block)
            for norm in self.block_norms:
                yield Parameter(f"{block}.{norm}.weight", (self.hidden_size,), ("embed",), "norm")
        yield Parameter("model.norm.weight", (self.hidden_size,), ("embed",), "norm")

    def _attention(self, block: str) -> Iterator[Parameter]:
        yield from super()._attention(block)
        q, k = self.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        yield Parameter(f"{block}.self_attn.q_norm.weight", (q,), ("heads",), "norm")
        yield Parameter(f"{block}.self_attn.k_norm.weight", (k,), ("kv_heads",), "norm")


@dataclass(kw_only=True)
class PostNormConfig(NormedAttentionConfig):
    """What OLMo 2 and the families with its blocks share: the fields of `NormedAttentionConfig`."""

    block_norms: ClassVar[tuple[str, str]] = ("post_attention_layernorm", "post_feedforward_layernorm")


@register
@dataclass(kw_only=True)
class Olmo2Config(PostNormConfig):
    """Configuration of OLMo 2 models: the fields of `PostNormConfig`."""

    model_type: ClassVar[str] = "olmo2"
    name: ClassVar[str] = "Olmo2"
    heads: ClassVar[tuple[Head, ...]] = ("causal_lm", "sequence_classification")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo2-1b": _preset(2048, 8192, 16, 16, 16),
        "olmo2-7b": _preset(4096, 11008, 32, 32, 32),
        "olmo2-13b": _preset(5120, 13824, 40, 40, 40),
        "olmo2-32b": _preset(5120, 27648, 64, 40, 8),
    }
