"""What the model classes of the three wings do alike, in no framework.

The wings import it, and it imports none of them: a rule that is the same in PyTorch, Keras and Flax is written here
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from olmozoo.errors import ConfigError, InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import BASE_PREFIX, Head, Parameter
from olmozoo.families.registry import register_model
from olmozoo.hub import HUB_ARGUMENTS
from olmozoo.typing import HubOptions


class ModelMixin:
    """Base of `PreTrainedModel` in each wing.

    Attributes:
        wing: the name of the wing.
        config_class: the config of the family.
        head: the head on top of the decoder; None for a base model.
        config: the config of this model.
    """

    wing: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    head: ClassVar[Head | None] = None
    config: ModelConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if hasattr(cls, "wing"):
            register_model(cls.wing, cls)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Check that `config` is of this class's family.

        Raises:
            ConfigError: it is not.
        """
        if not isinstance(config, cls.config_class):
            raise ConfigError(f"{cls.__name__} takes a {cls.config_class.__name__}, not {type(config).__name__}")

    def setting(self, name: str, value: bool | None, default: bool) -> bool:
        """A call's choice, else the config's, else the default."""
        value = getattr(self.config, name, None) if value is None else value
        return default if value is None else value

    def _parameter_table(self) -> list[Parameter]:
        """The parameter table without tied parameters, which have the values of others."""
        return [parameter for parameter in self.config.parameters(self.head) if parameter.tied_to is None]

    def _parameter_path(self, parameter: Parameter) -> list[str]:
        """The path from the model to a parameter: its canonical name, in a base model without the leading `model.`."""
        name = parameter.name if self.head else parameter.name.removeprefix(BASE_PREFIX)
        return name.split(".")


def split_options(options: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
    """The keywords of `from_pretrained` as options of the hub and fields of the config."""
    hub: Any = {name: value for name, value in options.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in options.items() if name not in hub}


def resized_config(config: ModelConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> ModelConfig:
    """The config for another number of tokens, rounded up to a multiple.

    Raises:
        ConfigError: no vocabulary has that size.
    """
    rows = config.vocab_size if new_num_tokens is None else new_num_tokens
    multiple = pad_to_multiple_of or 1
    return config.replace(vocab_size=-(-rows // multiple) * multiple)


def check_inputs(input_ids: Any, inputs_embeds: Any) -> None:
    """Check that exactly one of the two is given, ids (batch, seq) or embeddings (batch, seq, hidden).

    Raises:
        InputError: both are, or none is, or it has another number of dimensions.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("expected exactly one of input_ids and inputs_embeds")
    given, ndim = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    if given.ndim not in (ndim, None):  # TensorFlow may not know it
        raise InputError(f"the input has shape {tuple(given.shape)}, expected (batch, seq) or (batch, seq, hidden)")


def head_labels(names: tuple[str, ...], given: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The labels of a head, in the order of `names`; None unless all are given.

    Raises:
        InputError: labels of another head are given.
    """
    foreign = [name for name, value in given.items() if value is not None and name not in names]
    if foreign:
        raise InputError(f"this head takes {' and '.join(names)}, not {', '.join(foreign)}")
    labels = tuple(given[name] for name in names)
    return None if any(label is None for label in labels) else labels


def check_kept_logits(head: Head, labels: Any) -> None:
    """Check that a call may ask for the logits at some positions alone.

    Raises:
        InputError: the head is no language model, or there are labels.
    """
    if head != "causal_lm":
        raise InputError("logits_to_keep is an argument of causal language models")
    if labels is not None:
        raise InputError("labels need the logits at every position: leave out logits_to_keep")
