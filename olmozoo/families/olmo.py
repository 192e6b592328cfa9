"""OLMo (arXiv:2402.00838): norms without parameters before each sublayer, rotary positions, gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.families.parameter import Head, Parameter
from olmozoo.families.registry import register
from olmozoo.families.rotary import RotaryConfig

_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_LONG = {"max_position_embeddings": 4096}


@register
@dataclass(kw_only=True)
class OlmoConfig(RotaryConfig):
    """Configuration of OLMo models: the fields of `RotaryConfig` and one more.

    Attributes:
        clip_qkv: what queries, keys and values are clamped to, [-clip_qkv, clip_qkv], after projection; None for not.
    """

    model_type: ClassVar[str] = "olmo"
    name: ClassVar[str] = "Olmo"
    heads: ClassVar[tuple[Head, ...]] = ("causal_lm", "sequence_classification")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo-1b": _1B | {"tie_word_embeddings": True},
        "olmo-1b-0724": _1B | _LONG,
        "olmo-7b": _7B,
        "olmo-7b-twin-2t": _7B,
        "olmo-7b-0424": _7B | _LONG | {"clip_qkv": 8.0},
        "olmo-7b-0724": _7B | _LONG | {"clip_qkv": 8.0},
    }

    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_qkv is not None:
            self._check_number("clip_qkv")

    def backbone(self) -> Iterator[Parameter]:
        """See `ModelConfig.backbone`."""
        yield self.embedding
        for layer in range(self.num_hidden_layers):
            yield from self._attention(f"model.layers.{layer}")
            yield from self._mlp(f"model.layers.{layer}")
