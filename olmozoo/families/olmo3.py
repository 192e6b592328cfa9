"""OLMo 3 (arXiv:2512.13961): the blocks of OLMo 2, most of them with attention in a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.errors import ConfigError
from olmozoo.families.olmo2 import PostNormConfig
from olmozoo.families.parameter import Head
from olmozoo.families.registry import register
from olmozoo.families.rope import Rope, make_rope, rope_kind

FULL, SLIDING = "full_attention", "sliding_attention"
THETA = 500000.0


def _preset(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 100278,
        "max_position_embeddings": 65536,
        "rope_theta": THETA,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "rms_norm_eps": 1e-6,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
        "use_cache": False,
    }


@register
@dataclass(kw_only=True)
class Olmo3Config(PostNormConfig):
    """Configuration of OLMo 3 models: the fields of `PostNormConfig` and those of the two kinds of layers.

    `rope_theta` and `rope_scaling` are of the layers with full attention. A config.json may have them so, or by type of
    layer in `rope_parameters`; it is written with both.

    Attributes:
        layer_types: `sliding_attention` or `full_attention` for each layer; default every fourth is full.
        sliding_window: how many keys a query of a sliding layer sees, its own and those right before it; None where no
            layer slides.
        sliding_rope_theta: base of the rotary frequencies of sliding layers; default `rope_theta`.
        sliding_rope_scaling: `rope_scaling` of sliding layers; default None.
    """

    model_type: ClassVar[str] = "olmo3"
    name: ClassVar[str] = "Olmo3"
    heads: ClassVar[tuple[Head, ...]] = ("causal_lm", "sequence_classification")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo3-7b": _preset(4096, 11008, 32, 32, 32),
        "olmo3-7b-8k": _preset(4096, 11008, 32, 32, 32) | {"max_position_embeddings": 8192, "rope_scaling": None},
        "olmo3-32b": _preset(5120, 27648, 64, 40, 8),
    }

    rope_theta: float = THETA
    layer_types: list[str] | None = None
    sliding_window: int | None = 4096
    sliding_rope_theta: float | None = None
    sliding_rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_rope_theta == self.rope_theta:
            self._set("sliding_rope_theta", None)
        if self.layer_types is None:
            types = [SLIDING if (layer + 1) % 4 else FULL for layer in range(self.num_hidden_layers)]
            self._set("layer_types", types)
        if not isinstance(self.layer_types, list) or any(kind not in (FULL, SLIDING) for kind in self.layer_types):
            self._wrong("layer_types", f"a list of {FULL!r} and {SLIDING!r}")
        if len(self.layer_types or ()) != self.num_hidden_layers:
            found, expected = len(self.layer_types or ()), self.num_hidden_layers
            raise ConfigError(f"Olmo3Config.layer_types has {found} entries, expected num_hidden_layers = {expected}")
        if self.sliding_window is not None or SLIDING in (self.layer_types or ()):
            self._check_int("sliding_window")
        if self.sliding_rope_theta is not None:
            self._check_number("sliding_rope_theta", least=1.0)
        self.rope(SLIDING)

    @classmethod
    def _normalize(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Read `rope_parameters` by the type of layer.

        Where they are not by type, and in `rope_theta` with `rope_scaling`, scaling is that of full layers alone and
        theta that of all. So meant the files of Transformers before 5.13, and so the models were trained.
        """
        parameters = data.get("rope_parameters")
        if "rope_parameters" in data:
            data |= {"sliding_rope_theta": None, "sliding_rope_scaling": None}
        if not isinstance(parameters, Mapping) or not parameters.keys() & {FULL, SLIDING} or "rope_type" in parameters:
            # A kind beside the types is of a file without them, to which Transformers has added unscaled ones.
            if isinstance(parameters, Mapping):
                data["rope_parameters"] = {k: v for k, v in parameters.items() if k not in (FULL, SLIDING)}
            return super()._normalize(data)
        full, sliding = (parameters.get(kind) or {} for kind in (FULL, SLIDING))
        for kind, found in ((FULL, full), (SLIDING, sliding)):
            if not isinstance(found, Mapping):
                raise ConfigError(f"Olmo3Config.rope_parameters.{kind} is {found!r}, expected an object or null")
        theta = data.get("rope_theta")
        other = super()._normalize({"rope_theta": THETA if theta is None else theta, "rope_scaling": dict(sliding)})
        if full.get("rope_theta") is not None:
            data["rope_theta"] = full["rope_theta"]
        data = super()._normalize(data | {"rope_parameters": dict(full)})
        same = other["rope_theta"] == data.get("rope_theta", THETA)  # then an override of rope_theta is of both
        return data | {
            "sliding_rope_theta": None if same else other["rope_theta"],
            "sliding_rope_scaling": other["rope_scaling"],
        }

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig.to_dict`."""
        data = super().to_dict()
        del data["sliding_rope_theta"], data["sliding_rope_scaling"]
        data["rope_parameters"] = {
            kind: {**(scaling or {}), "rope_type": rope_kind(scaling), "rope_theta": theta}
            for kind, theta, scaling in (
                (FULL, self.rope_theta, self.rope_scaling),
                (SLIDING, self._sliding_theta, self.sliding_rope_scaling),
            )
        }
        return data

    @property
    def windows(self) -> tuple[int | None, ...]:
        """See `ModelConfig.windows`."""
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types or ())

    def rope(self, layer_type: str = FULL) -> Rope:
        """The rotary frequencies of a type of layer."""
        if layer_type == FULL:
            return super().rope()
        scaling = self.sliding_rope_scaling
        return make_rope(self._sliding_theta, self.head_dim, self.max_position_embeddings, scaling)

    @property
    def _sliding_theta(self) -> float:
        return self.rope_theta if self.sliding_rope_theta is None else self.sliding_rope_theta
