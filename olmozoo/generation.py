"""Settings and rules of text generation that no framework is needed for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from olmozoo.errors import InputError
from olmozoo.families.base import ModelConfig, read_json

NEW_TOKENS = 20  # where neither max_length nor max_new_tokens is given
BUCKET = 64  # compiled loops pad prompts and caches to multiples of this, so that one program serves many lengths


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of `generate`, as in a generation_config.json.

    Attributes:
        max_length: the most tokens of prompt and answer together.
        max_new_tokens: the most tokens of the answer; goes before `max_length`. Default, where neither is given: 20.
        do_sample: False; decoding is greedy.
        num_beams: 1; decoding is greedy.
        eos_token_id: the token or tokens that end a row.
        pad_token_id: what rows hold after their end; default the first eos token.
        bos_token_id: kept for other programs.
        extra: keys that no field has; kept and written back.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool = False
    num_beams: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings in the contents of a generation_config.json."""
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {key: value for key, value in data.items() if key in names}
        return cls(**fields, extra={key: value for key, value in data.items() if key not in names})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], config: ModelConfig) -> Self:
        """The settings in a folder's generation_config.json; without one, the special tokens of `config`."""
        path = Path(folder) / "generation_config.json"
        return cls.from_dict(read_json(path)) if path.is_file() else cls.from_model(config)

    @classmethod
    def from_model(cls, config: ModelConfig) -> Self:
        """The special tokens of a model's config and defaults for all else."""
        return cls(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The contents of the generation_config.json that means these settings; defaults are left out."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        defaults = type(self)()
        return {**self.extra, **{k: v for k, v in fields.items() if v != getattr(defaults, k)}}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed.

        Raises:
            InputError: there is no such setting.
        """
        names = {f.name for f in dataclasses.fields(self)} - {"extra"}
        unknown = sorted(set(changes) - names)
        if unknown:
            raise InputError(f"generate has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Plan:
    """One call of `generate`, resolved.

    Attributes:
        max_new: the number of tokens to write at most.
        eos: the tokens that end a row; may be empty.
        pad: what a row holds after its end.
    """

    max_new: int
    eos: tuple[int, ...]
    pad: int


def plan(settings: GenerationConfig, config: ModelConfig, prompt_length: int, changes: Mapping[str, Any]) -> Plan:
    """Resolve a call's settings: `changes` go before `settings`, and those before the model's config.

    Raises:
        InputError: a setting is unknown, impossible, or leaves no room for a token.
    """
    settings = settings.replace(**changes)
    if settings.do_sample or settings.num_beams != 1:
        name = "do_sample" if settings.do_sample else "num_beams"
        raise InputError(
            f"{name} is {getattr(settings, name)}, expected {GenerationConfig.__dict__[name]}: greedy only"
        )
    max_new = settings.max_new_tokens
    if max_new is None or ("max_length" in changes and "max_new_tokens" not in changes):
        max_new = NEW_TOKENS if settings.max_length is None else settings.max_length - prompt_length
    if not isinstance(max_new, int) or max_new < 1:
        raise InputError(
            f"max_new_tokens is {settings.max_new_tokens} and max_length {settings.max_length}: no room for a token "
            f"after a prompt of {prompt_length}"
        )
    eos = config.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
    ends = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
    pad = config.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
    return Plan(max_new, ends, pad if pad is not None else ends[0] if ends else 0)


def prompt_mask(
    input_ids: Any, attention_mask: Any, rule: Plan, shape: tuple[int, int] | None = None
) -> np.ndarray[Any, Any]:
    """The (batch, seq) bool mask of a prompt's real tokens.

    Where no mask is given, pad tokens in the prompt are taken for padding, unless pad is also a token that ends a row.

    Args:
        input_ids: (batch, seq) ids; None for a prompt of embeddings.
        attention_mask: (batch, seq), 0 at padding, or None.
        rule: says what pad is.
        shape: (batch, seq), where there are no ids.

    Raises:
        InputError: the shapes differ or are not those of a batch.
    """
    ids = None if input_ids is None else np.asarray(input_ids)
    shape = shape if ids is None else ids.shape
    if shape is None or len(shape) != 2 or 0 in shape:
        raise InputError(f"input_ids has shape {shape}, expected (batch, seq) with at least one row and one token")
    if attention_mask is None:
        return np.ones(shape, bool) if ids is None or rule.pad in rule.eos else ids != rule.pad
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}, expected that of input_ids, {shape}")
    return mask


def bucket(length: int) -> int:
    """The next multiple of `BUCKET`."""
    return -(-length // BUCKET) * BUCKET
