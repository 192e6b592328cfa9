"""Toy: attention and MLP side by side on one LayerNorm, a LayerNorm with bias at the end, rotary positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.families.olmo import OlmoConfig
from olmozoo.families.parameter import Parameter
from olmozoo.families.registry import register


@register
@dataclass(kw_only=True)
class ToyConfig(OlmoConfig):
    """Configuration of Toy models: the fields of `OlmoConfig`."""

    model_type: ClassVar[str] = "toy"
    name: ClassVar[str] = "Toy"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def backbone(self) -> Iterator[Parameter]:
        """See `ModelConfig.backbone`."""
        yield self.embedding
        for layer in range(self.num_hidden_layers):
            yield from self._norm(f"model.layers.{layer}.input_norm")
            yield from self._attention(f"model.layers.{layer}")
            yield from self._mlp(f"model.layers.{layer}")
        yield from self._norm("model.norm")

    def _norm(self, name: str) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (self.hidden_size,), ("embed",), "norm")
        yield Parameter(f"{name}.bias", (self.hidden_size,), ("embed",), "bias")
