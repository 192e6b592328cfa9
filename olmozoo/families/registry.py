"""Model families by `model_type`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olmozoo.errors import ConfigError

if TYPE_CHECKING:
    from olmozoo.families.config import ModelConfig

MODEL_TYPES: dict[str, type[ModelConfig]] = {}


def register(config: type[ModelConfig]) -> type[ModelConfig]:
    """Class decorator: make a family known by its `model_type`."""
    MODEL_TYPES[config.model_type] = config
    return config


def config_class(model_type: str | None) -> type[ModelConfig]:
    """The config class of a `model_type`.

    Raises:
        ConfigError: no family has that type.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(sorted(MODEL_TYPES))}")
    return MODEL_TYPES[model_type]
