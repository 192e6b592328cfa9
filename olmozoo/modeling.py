"""What the model classes of the three wings do alike, in no framework.

The wings import it, and it imports none of them: a rule that is the same in PyTorch, Keras and Flax is written here
once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from olmozoo.errors import ConfigError, InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import BASE_PREFIX, Head, Parameter
from olmozoo.families.registry import register_model
from olmozoo.hub import HUB_ARGUMENTS
from olmozoo.quantization import GROUP_SIZE, Quantization
from olmozoo.typing import Array, HubOptions

QUANTIZERS = ("load_in_8bit", "load_in_4bit", "quantization_config")  # keywords of Transformers
SAME_HERE = (  # keywords of Transformers whose values make no difference here
    *("attn_implementation", "device_map", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors"),
    *("from_pt", "from_tf", "from_flax"),  # every format is read
)


class ModelMixin:
    """Base of `PreTrainedModel` in each wing.

    Attributes:
        wing: the name of the wing.
        config_class: the config of the family.
        head: the head on top of the decoder; None for a base model.
        family_inputs: of a decoder, the arguments of a call that its family alone has.
        config: the config of this model.
    """

    wing: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    head: ClassVar[Head | None] = None
    family_inputs: ClassVar[tuple[str, ...]] = ()
    config: ModelConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if hasattr(cls, "wing"):
            register_model(cls.wing, cls)

    @classmethod
    def check_config(cls, config: Any) -> Any:
        """`config` as one of this class's family: itself, or made from one of Transformers.

        Raises:
            ConfigError: it is of another family.
        """
        config = own_config(config)
        if not isinstance(config, cls.config_class):
            raise ConfigError(f"{cls.__name__} takes a {cls.config_class.__name__}, not {type(config).__name__}")
        return config

    def setting(self, name: str, value: bool | None, default: bool) -> bool:
        """A call's choice, else the config's, else the default."""
        value = getattr(self.config, name, None) if value is None else value
        return default if value is None else value

    def wants_cache(self, use_cache: bool | None, training: bool) -> bool:
        """Whether a call without a cache returns one: its choice, else False in training, else the config's choice."""
        return self.setting("use_cache", use_cache, True) if use_cache is not None or not training else False

    def known_inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those of a call's further arguments that are not None.

        Raises:
            InputError: the family has no such argument.
        """
        if not given:
            return given
        known = getattr(self, "base_class", type(self)).family_inputs
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(given.keys() - set(known)):
            raise InputError(f"{type(self).__name__} has no argument {', '.join(unknown)}")
        return given

    def _parameter_table(self) -> list[Parameter]:
        """The parameter table without tied parameters, which have the values of others."""
        return [parameter for parameter in self.config.parameters(self.head) if parameter.tied_to is None]

    def _parameter_path(self, parameter: Parameter) -> list[str]:
        """The path from the model to a parameter: its canonical name, in a base model without the leading `model.`."""
        return self._steps(parameter.name)

    def _variable_path(self, parameter: Parameter) -> list[str]:
        """The path from the model to the variable that has a parameter, where experts are stacked in one variable."""
        return self._steps(parameter.name if parameter.stack is None else parameter.stack[0])

    def _steps(self, name: str) -> list[str]:
        return (name if self.head else name.removeprefix(BASE_PREFIX)).split(".")


def own_config(config: Any) -> Any:
    """A config of Transformers as one of ours; anything else as it is."""
    is_foreign = not isinstance(config, ModelConfig) and hasattr(config, "to_dict") and hasattr(config, "model_type")
    return ModelConfig.from_dict(config.to_dict()) if is_foreign else config


def split_options(options: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
    """The keywords of `from_pretrained` as options of the hub, and fields of the config with, perhaps, a `config`.

    Keywords of Transformers that say how to load are left out where every value means the same here.

    Raises:
        InputError: one asks for what is not done here; the message says what to use.
    """
    if options.get("attn_implementation") not in (None, "eager", "sdpa"):
        raise InputError(f"attn_implementation is {options['attn_implementation']!r}, expected 'eager' or 'sdpa'")
    if options.get("device_map") not in (None, "auto"):
        raise InputError(
            f"device_map is {options['device_map']!r}, expected 'auto', or device= in PyTorch; load inside of "
            "tf.device(...) in TensorFlow, of jax.default_device(...) in JAX"
        )
    hub: Any = {name: value for name, value in options.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in options.items() if name not in (*hub, *SAME_HERE, *QUANTIZERS)}


def given_quantization(
    quantization: str | None, group_size: int = GROUP_SIZE, options: dict[str, Any] | None = None
) -> Quantization | Literal["none"] | None:
    """How weights are to be quantized, by our own keywords or by those of Transformers.

    `load_in_8bit`, `load_in_4bit` and a `quantization_config` are taken out of `options`; a warning says what they mean
    here.

    Args:
        quantization: `int8`, `int4`, `none` for floats, or None for what the folder has.
        group_size: of int4.
        options: further keywords of `from_pretrained`.

    Raises:
        InputError: there is no such quantization, or two are asked for.
    """
    asked = {name: value for name in QUANTIZERS if (value := (options or {}).pop(name, None))}
    if quantization is not None and asked:
        raise InputError(f"quantization is {quantization!r}, and {', '.join(asked)} is given too: leave one out")
    for name, value in asked.items():
        quantization, group_size = _own_quantization(name, value, group_size)
    if quantization in (None, "none"):
        return None if quantization is None else "none"
    how = Quantization.of(str(quantization), group_size)
    if asked:
        warnings.warn(f"{', '.join(asked)}: olmozoo quantizes the linear weights itself ({how})", stacklevel=4)
    return how


def _own_quantization(name: str, value: Any, group_size: int) -> tuple[str, int]:
    """What a keyword of Transformers asks for, as our own `quantization` and `group_size`."""
    if name != "quantization_config":
        return ("int8" if name == "load_in_8bit" else "int4"), group_size
    settings = value if isinstance(value, Mapping) else value.to_dict() if hasattr(value, "to_dict") else {}
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return ("int8" if settings.get("load_in_8bit") else "int4"), group_size
    kind = getattr(value, "quant_type", None) or settings.get("quant_type")
    found = re.match(r"(int[48])_?weight_?only", (kind if isinstance(kind, str) else type(kind).__name__).lower())
    if found:
        return found[1], getattr(kind, "group_size", None) or group_size
    raise InputError(
        f"quantization_config is a {type(value).__name__} ({method}), expected 8 or 4 bits of bitsandbytes, or int8 or "
        "int4 weight-only of torchao; quantization='int8' or 'int4' says the same"
    )


def given_dtype(dtype: Any, options: dict[str, Any]) -> Any:
    """`dtype`, or `torch_dtype`, Transformers' older word for it, which is taken out of `options`."""
    older = options.pop("torch_dtype", None)
    return older if dtype is None else dtype


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
        InputError: both are, or none is, or it has another number of dimensions, or is empty.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("expected exactly one of input_ids and inputs_embeds")
    name = "input_ids" if inputs_embeds is None else "inputs_embeds"
    given, ndim = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    if given.ndim not in (ndim, None):  # TensorFlow may not know it
        raise InputError(f"the input has shape {tuple(given.shape)}, expected (batch, seq) or (batch, seq, hidden)")
    if given.ndim and any(isinstance(size, int) and size == 0 for size in given.shape):
        raise InputError(f"{name} has shape {tuple(given.shape)}, expected at least one row and one token")


def check_range(name: str, values: Array | None, limit: int, least: int = 0, ignored: int | None = None) -> None:
    """Check that integers are at least `least` and below `limit`, or `ignored`.

    Frameworks alone would raise errors of their own, or compute NaN and zeros. In a compiled or traced function, and on
    an accelerator, which would have to be waited for, values are not checked: there an index that is out of range is
    what the framework makes of it.

    Args:
        name: of the argument, for the message.
        values: an integer array; None where the values are not at hand.
        limit: the first integer that is too large.
        least: the smallest one allowed.
        ignored: one more that is allowed.

    Raises:
        InputError: one is out of range; the message names the first, its index and the range.
    """
    if values is None or values.size == 0 or (values.min() >= least and values.max() < limit):
        return
    wrong = np.argwhere(((values < least) | (values >= limit)) & (values != (least if ignored is None else ignored)))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        allowed = f"{least} to {limit - 1}" + (f", or {ignored}" if ignored is not None else "")
        raise InputError(f"{name} has {values[index]} at {list(index)}, expected {allowed}")


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
