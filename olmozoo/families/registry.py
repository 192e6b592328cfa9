"""Model families by `model_type`: their configs, and their model classes in each wing.

A config class registers itself by the decorator `register`, a model class when it is defined. So a family is known as
soon as its files are imported, wherever they are.
"""

from __future__ import annotations

from typing import Any, TypeVar

from olmozoo.errors import ConfigError
from olmozoo.families.parameter import Head

Config = TypeVar("Config", bound=type[Any])  # a subclass of `ModelConfig`, which imports this module

MODEL_TYPES: dict[str, type[Any]] = {}
MODEL_CLASSES: dict[tuple[str, str, Head | None], type[Any]] = {}  # by wing, model_type and head


def register(config: Config) -> Config:
    """Class decorator: make a family known by its `model_type`."""
    MODEL_TYPES[config.model_type] = config
    return config


def config_class(model_type: str | None) -> type[Any]:
    """The config class of a `model_type`.

    Raises:
        ConfigError: no family has that type.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(sorted(MODEL_TYPES))}")
    return MODEL_TYPES[model_type]


def presets() -> dict[str, type[Any]]:
    """The config classes by the names of the published configs, such as `olmo2-1b`."""
    return {name: family for family in MODEL_TYPES.values() for name in family.presets}


def register_model(wing: str, cls: type[Any]) -> None:
    """Make a model class known by its family and head; the base class of each wing calls it for every subclass.

    Only a class that sets `config_class` itself is one of a family: a user's subclass replaces none of them.
    """
    if "config_class" in vars(cls):
        MODEL_CLASSES[wing, cls.config_class.model_type, cls.head] = cls


def model_class(wing: str, config: Any, head: Head | None) -> type[Any]:
    """The class of a family with a head, in a wing that has been imported.

    Args:
        wing: "pt", "tf" or "flax".
        config: a config of the family, or its class.
        head: None for the decoder alone.

    Raises:
        ConfigError: the family has no such head, or no file with its classes of that wing has been imported.
    """
    if head is not None and head not in config.heads:
        raise ConfigError(f"{config.name} has no {head!r} head; it has {', '.join(config.heads)}")
    if (wing, config.model_type, head) not in MODEL_CLASSES:
        raise ConfigError(f"{config.name} has no such class in olmozoo.{wing}: import the file that defines it first")
    return MODEL_CLASSES[wing, config.model_type, head]
