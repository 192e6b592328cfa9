"""Settings of text generation."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from olmozoo.errors import InputError
from olmozoo.families.config import MOST, ModelConfig, read_json

NEW_TOKENS = 20  # where neither max_length nor max_new_tokens is given
MOST_UINT64 = 2**64 - 1
UNSUPPORTED = {  # settings of Transformers that change its tokens and are not here, with the value that does nothing
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "watermarking_config", "dola_layers")),
    **dict.fromkeys(("constraints", "force_words_ids", "penalty_alpha", "top_h", "max_time")),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("guidance_scale", "encoder_repetition_penalty", "typical_p", "num_beam_groups"), 1),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), False),
}


def is_integer(value: Any, least: int = 0, most: int = MOST) -> bool:
    """Whether this is an integer in a range; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(least <= value <= most)


def is_number(value: Any) -> bool:
    """Whether this is a finite real number, other than True and False."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return False
    magnitude: Any = abs(value)
    return bool(magnitude <= sys.float_info.max)  # an int may be larger than any float


def is_flag(value: Any) -> bool:
    """Whether this is True or False."""
    return isinstance(value, bool)


def is_positive_integer(value: Any) -> bool:
    """Whether this is an integer above 0."""
    return is_integer(value, 1)


def is_positive(value: Any) -> bool:
    """Whether this is a number above 0."""
    return is_number(value) and value > 0


def is_probability(value: Any) -> bool:
    """Whether this is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_token_list(value: Any) -> bool:
    """Whether this is a list of token ids, perhaps an empty one."""
    return isinstance(value, (list, tuple)) and all(is_integer(i) for i in value)


def is_uint64(value: Any) -> bool:
    """Whether this is an integer of 64 bits."""
    return is_integer(value, most=MOST_UINT64)


def check(expected: str, fits: Callable[[Any], bool], *, off: Any = None, sampling: bool = False) -> dict[str, Any]:
    """The metadata of a field of `GenerationConfig`: how a value is checked.

    Args:
        expected: what the value has to be, for the error message.
        fits: whether a value is that. It is not called for None where None is the default.
        off: the value that an explicit None in a call stands for; None for the default.
        sampling: the setting has no effect without `do_sample=True`, and is checked with it alone.
    """
    return {"expected": expected, "fits": fits, "off": off, "sampling": sampling}


@dataclass(kw_only=True)
class GenerationConfig:
    """Settings of `generate`, as in a generation_config.json. Names and defaults are those of Transformers.

    A setting can be set, and its value is checked; what does not go together is found when `generate` is called.

    Attributes:
        max_length: maximum number of tokens of prompt and answer together.
        max_new_tokens: maximum number of tokens of the answer; overrides `max_length`. Default, where neither is given:
            20.
        min_length: minimum number of tokens of prompt and answer together.
        min_new_tokens: minimum number of tokens of the answer; overrides `min_length`.
        do_sample: draw tokens rather than take the likeliest.
        temperature: scores are divided by it, for sampling.
        top_k: sample from so many of the likeliest tokens; 0 for all. Default 50.
        top_p: sample from the fewest tokens whose probabilities reach this.
        min_p: sample from tokens at least so probable, as a share of the likeliest's probability.
        repetition_penalty: scores of tokens that are in the text already are divided by it (multiplied if negative).
        no_repeat_ngram_size: no run of so many tokens occurs twice; 0 for no such rule.
        bad_words_ids: runs of tokens that never occur.
        num_beams: beams of beam search; 1 for none.
        length_penalty: a beam's score is its summed log-probability over its length to this power.
        early_stopping: whether beam search ends as soon as there are `num_beams` ended beams: True, False (ends where
            better ones are unlikely) or "never" (where they are impossible).
        num_return_sequences: answers for each row.
        eos_token_id: the token or tokens that end a row; an empty list for none.
        pad_token_id: what rows hold after their end; default the first eos token.
        bos_token_id: the prompt where none is given.
        stop_strings: strings that end a row, with the token that completes one. They need `tokenizer`.
        seed: of sampling; None draws one. See `uniforms`.
        stream_index: the number of the first row's random stream, or each row's; default 0.
        return_dict_in_generate: return a `GenerateOutput` and not the ids alone.
        output_scores: with `scores` in it.
        prefill_chunk_size: positions of the prompt to read at a time, to bound memory; None reads all at once.
        prompt_lookup_num_tokens: tokens to draft from the text itself, for greedy decoding; None drafts none. The
            answer is the same; what repeats its prompt is generated faster. (Rope scaling of the kinds `dynamic` and
            `longrope` depends on the length of the text, drafts included: there near answers can differ.)
        max_matching_ngram_size: the longest run of tokens that a draft is looked up by.
        extra: keys that no field has; kept and written back. `generate` warns of those that would change its tokens.
    """

    max_length: int | None = field(default=None, metadata=check("an integer above 0", is_positive_integer))
    max_new_tokens: int | None = field(default=None, metadata=check("an integer above 0", is_positive_integer))
    min_length: int = field(default=0, metadata=check("an integer from 0", is_integer))
    min_new_tokens: int | None = field(default=None, metadata=check("an integer from 0", is_integer))
    do_sample: bool = field(default=False, metadata=check("True or False", is_flag))
    temperature: float = field(
        default=1.0,
        metadata=check("a number above 0 (do_sample=False takes the likeliest token)", is_positive, sampling=True),
    )
    top_k: int = field(
        default=50, metadata=check("an integer from 0; 0 for all tokens", is_integer, off=0, sampling=True)
    )
    top_p: float = field(
        default=1.0,
        metadata=check("a number above 0 and up to 1", lambda x: is_probability(x) and x > 0, sampling=True),
    )
    min_p: float | None = field(default=None, metadata=check("a number from 0 to 1", is_probability, sampling=True))
    repetition_penalty: float = field(default=1.0, metadata=check("a number above 0", is_positive))
    no_repeat_ngram_size: int = field(default=0, metadata=check("an integer from 0", is_integer))
    bad_words_ids: list[list[int]] | None = field(
        default=None,
        metadata=check(
            "lists of token ids",
            lambda x: isinstance(x, (list, tuple)) and all(is_token_list(word) and len(word) for word in x),
        ),
    )
    num_beams: int = field(default=1, metadata=check("an integer above 0", is_positive_integer))
    length_penalty: float = field(default=1.0, metadata=check("a number", is_number))
    early_stopping: bool | str = field(
        default=False, metadata=check("True, False or 'never'", lambda x: is_flag(x) or x == "never")
    )
    num_return_sequences: int = field(default=1, metadata=check("an integer above 0", is_positive_integer))
    eos_token_id: int | list[int] | None = field(
        default=None,
        metadata=check("a token id or a list of them", lambda x: is_integer(x) or is_token_list(x), off=()),
    )
    pad_token_id: int | None = field(default=None, metadata=check("a token id", is_integer))
    bos_token_id: int | None = field(default=None, metadata=check("a token id", is_integer))
    stop_strings: str | list[str] | None = field(
        default=None,
        metadata=check(
            "a string or a list of them, none of them empty",
            lambda x: isinstance(x, (str, list, tuple)) and len(x) > 0 and all(isinstance(s, str) and s for s in x),
        ),
    )
    seed: int | None = field(default=None, metadata=check("an integer below 2**64", is_uint64, sampling=True))
    stream_index: int | Sequence[int] = field(
        default=0,
        metadata=check(
            "an integer below 2**64, or one for each row",
            lambda x: is_uint64(x) or (isinstance(x, (list, tuple, np.ndarray)) and all(is_uint64(i) for i in x)),
            sampling=True,
        ),
    )
    return_dict_in_generate: bool = field(default=False, metadata=check("True or False", is_flag))
    output_scores: bool = field(default=False, metadata=check("True or False", is_flag))
    prefill_chunk_size: int | None = field(default=None, metadata=check("an integer above 0", is_positive_integer))
    prompt_lookup_num_tokens: int | None = field(
        default=None, metadata=check("an integer above 0", is_positive_integer)
    )
    max_matching_ngram_size: int = field(default=2, metadata=check("an integer above 0", is_positive_integer))
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings in the contents of a generation_config.json; null means the default."""
        names = {f.name for f in _fields()}
        fields = {key: value for key, value in data.items() if key in names and value is not None}
        return cls(**fields, extra={key: value for key, value in data.items() if key not in names})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], config: ModelConfig) -> Self:
        """The settings in a folder's generation_config.json; without one, the special tokens of `config`."""
        path = Path(folder) / "generation_config.json"
        return cls.from_contents(read_json(path) if path.exists() else None, config)

    @classmethod
    def from_contents(cls, data: Mapping[str, Any] | None, config: ModelConfig) -> Self:
        """The settings in the contents of a generation_config.json; without one, the special tokens of `config`."""
        return cls.from_model(config) if data is None else cls.from_dict(data)

    @classmethod
    def from_model(cls, config: ModelConfig) -> Self:
        """The special tokens of a model's config, and settings in it: old files have no generation_config.json."""
        tokens = {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
        names = ({f.name for f in _fields()} | UNSUPPORTED.keys()) - {"seed", "stream_index"}  # these are only ours
        found = {name: value for name, value in config.extra.items() if name in names and value is not None}
        return cls.from_dict({**found, **tokens})

    def to_dict(self) -> dict[str, Any]:
        """The contents of the generation_config.json that means these settings; defaults are left out."""
        fields = {f.name: getattr(self, f.name) for f in _fields() if getattr(self, f.name) != f.default}
        return {**self.extra, **fields}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed. None switches a setting off, whatever it was before.

        Raises:
            InputError: there is no such setting.
        """
        fields = {f.name: f for f in _fields()}
        if unknown := sorted(set(changes) - set(fields)):
            raise InputError(f"generate has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
        return dataclasses.replace(self, **{k: _off(fields[k]) if v is None else v for k, v in changes.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        made = name in self.__dict__  # else the object is being made, which checks nothing
        found = next((f for f in _fields() if f.name == name), None)
        if made and found is not None:
            value = _off(found) if value is None else value
            if problem := self._problem(found, value):
                raise InputError(problem)
        elif name not in self.__dataclass_fields__ and not name.startswith("_"):
            name, value = "extra", {**self.extra, name: value}
        object.__setattr__(self, name, value)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        eos = self.eos_token_id
        return tuple(int(i) for i in eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)

    def check(self) -> None:
        """Refuse settings that are wrong by themselves or cannot go together.

        Settings of sampling are not checked without `do_sample=True`, since they have no effect then.

        Raises:
            InputError: one error lists every problem.
        """
        problems = [problem for f in _fields() if (problem := self._problem(f, getattr(self, f.name)))]
        if problems := problems or self._conflicts():
            raise InputError("; ".join(problems))

    def _problem(self, field: dataclasses.Field[Any], value: Any) -> str | None:
        """What is wrong with a value of a setting by itself, if anything is."""
        unused = field.metadata["sampling"] and self.do_sample is False
        if unused or (value is None and field.default is None) or field.metadata["fits"](value):
            return None
        return f"{field.name} is {value!r}, expected {field.metadata['expected']}"

    def _conflicts(self) -> list[str]:
        """The settings that cannot go together; each by itself is right."""
        problems = []
        if self.do_sample and self.num_beams > 1:
            problems.append(
                "do_sample=True and num_beams > 1: beam search looks for the likeliest answer, draws nothing"
            )
        if 1 < self.num_beams < self.num_return_sequences:
            problems.append("num_return_sequences is larger than num_beams: beam search has one answer for each beam")
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            problems.append(
                "num_return_sequences > 1 with greedy decoding, which has one answer: set do_sample or num_beams"
            )
        if self.prompt_lookup_num_tokens is not None and (self.do_sample or self.num_beams > 1):
            problems.append("prompt_lookup_num_tokens is for greedy decoding: leave out do_sample and num_beams")
        return problems


def _off(field: dataclasses.Field[Any]) -> Any:
    """The value that switches a setting off."""
    return field.default if field.metadata["off"] is None else field.metadata["off"]


def _fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(GenerationConfig) if f.name != "extra"]


SAMPLING = tuple(f.name for f in _fields() if f.metadata["sampling"])
