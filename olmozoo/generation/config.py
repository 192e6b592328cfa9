"""Settings of text generation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from olmozoo.errors import InputError
from olmozoo.families.config import MOST, ModelConfig, read_json

NEW_TOKENS = 20  # where neither max_length nor max_new_tokens is given
FOREIGN = {  # what changes the tokens of Transformers and is not here, with the value that does nothing
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "watermarking_config", "dola_layers")),
    **dict.fromkeys(("constraints", "force_words_ids", "penalty_alpha", "top_h", "max_time")),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("guidance_scale", "encoder_repetition_penalty", "typical_p", "num_beam_groups"), 1),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), False),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "stream_index")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of `generate`, as in a generation_config.json. Names and defaults are those of Transformers.

    Attributes:
        max_length: the most tokens of prompt and answer together.
        max_new_tokens: the most tokens of the answer; goes before `max_length`. Default, where neither is given: 20.
        min_length: no row ends before so many tokens of prompt and answer together.
        min_new_tokens: no row ends before so many tokens of answer; goes before `min_length`.
        do_sample: draw tokens rather than take the likeliest.
        temperature: scores are divided by it, for sampling.
        top_k: sample from so many of the likeliest tokens; 0 for all. Default 50.
        top_p: sample from the fewest tokens whose probabilities reach this.
        min_p: sample from tokens at least so probable, as a share of the likeliest's probability.
        repetition_penalty: scores of tokens that are in the text already are divided by it (multiplied if negative).
        no_repeat_ngram_size: no run of so many tokens comes twice; 0 for no such rule.
        bad_words_ids: runs of tokens that never come.
        num_beams: beams of beam search; 1 for none.
        length_penalty: a beam's score is its summed log-probability over its length to this power.
        early_stopping: whether beam search ends as soon as there are `num_beams` ended beams: True, False (ends where
            better ones are unlikely) or "never" (where they are impossible).
        num_return_sequences: answers for each row.
        eos_token_id: the token or tokens that end a row.
        pad_token_id: what rows hold after their end; default the first eos token.
        bos_token_id: the prompt where none is given.
        stop_strings: texts that end a row, with the token that completes one. They need `tokenizer`.
        seed: of sampling; None draws one. See `uniforms`.
        stream_index: the number of the first row's random stream, or each row's; default 0.
        return_dict_in_generate: return a `GenerateOutput` and not the ids alone.
        output_scores: with `scores` in it.
        prefill_chunk_size: positions of the prompt to read at a time, to bound memory; None reads all at once.
        prompt_lookup_num_tokens: tokens to guess ahead from the text itself, for greedy decoding; None guesses none.
            The answer is the same; what repeats its prompt comes faster. (Rope scaling of the kinds `dynamic` and
            `longrope` turns a position by how long the text is, guesses included: there near answers can differ.)
        max_matching_ngram_size: the longest run of tokens that a guess is made by.
        extra: keys that no field has; kept and written back. `generate` warns of those that would change its tokens.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: str | list[str] | None = None
    seed: int | None = None
    stream_index: int | Sequence[int] = 0
    return_dict_in_generate: bool = False
    output_scores: bool = False
    prefill_chunk_size: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings in the contents of a generation_config.json; null means the default."""
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {key: value for key, value in data.items() if key in names and value is not None}
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
        defaults = type(self)()
        return dataclasses.replace(self, **{k: getattr(defaults, k) if v is None else v for k, v in changes.items()})

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        eos = self.eos_token_id
        return tuple(int(i) for i in eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)

    def check(self) -> None:
        """Refuse settings that are wrong by themselves or cannot go together.

        Raises:
            InputError: one error lists every problem.
        """
        problems = [
            f"{name} is {getattr(self, name)!r}, expected {expected}"
            for name, expected, fits in CHECKS
            if not fits(getattr(self, name))
        ]
        if not problems:
            problems = [reason for clash, reason in CLASHES if clash(self)]
        if problems:
            raise InputError("; ".join(problems))


def _whole(least: int, optional: bool = False, most: int = MOST) -> Callable[[Any], bool]:
    return lambda x: (
        (optional and x is None)
        or (isinstance(x, (int, np.integer)) and not isinstance(x, bool) and bool(least <= x <= most))
    )


def _real(fits: Callable[[Any], bool], optional: bool = False) -> Callable[[Any], bool]:
    def check(x: Any) -> bool:
        if x is None:
            return optional
        if not isinstance(x, (int, float, np.integer, np.floating)) or isinstance(x, bool):
            return False
        try:
            return bool(fits(float(x)))
        except OverflowError:  # an int beyond any float
            return False

    return check


def _tokens(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) and len(ids) > 0 and all(_whole(0)(i) for i in ids)


def _texts(texts: Any) -> bool:
    return isinstance(texts, (list, tuple)) and len(texts) > 0 and all(isinstance(t, str) and t for t in texts)


CHECKS: list[tuple[str, str, Callable[[Any], bool]]] = [
    ("max_length", "a whole number above 0", _whole(1, optional=True)),
    ("max_new_tokens", "a whole number above 0", _whole(1, optional=True)),
    ("min_length", "a whole number", _whole(0)),
    ("min_new_tokens", "a whole number", _whole(0, optional=True)),
    ("do_sample", "True or False", lambda x: isinstance(x, bool)),
    ("temperature", "a number above 0 (do_sample=False takes the likeliest token)", _real(lambda x: 0 < x < np.inf)),
    ("top_k", "a whole number; 0 for all tokens", _whole(0)),
    ("top_p", "a number above 0 and up to 1", _real(lambda x: 0 < x <= 1)),
    ("min_p", "a number from 0 to 1", _real(lambda x: 0 <= x <= 1, optional=True)),
    ("repetition_penalty", "a number above 0", _real(lambda x: 0 < x < np.inf)),
    ("no_repeat_ngram_size", "a whole number", _whole(0)),
    (
        "bad_words_ids",
        "lists of token ids",
        lambda x: x is None or (isinstance(x, (list, tuple)) and all(_tokens(word) for word in x)),
    ),
    ("num_beams", "a whole number above 0", _whole(1)),
    ("length_penalty", "a number", _real(np.isfinite)),
    ("early_stopping", "True, False or 'never'", lambda x: isinstance(x, bool) or x == "never"),
    ("num_return_sequences", "a whole number above 0", _whole(1)),
    (
        "eos_token_id",
        "a token id or a list of them",
        lambda x: _whole(0, optional=True)(x) or _tokens(x) or x in ([], ()),
    ),
    ("pad_token_id", "a token id", _whole(0, optional=True)),
    ("stop_strings", "a text or a list of them", lambda x: x is None or (isinstance(x, str) and x != "") or _texts(x)),
    ("seed", "a whole number below 2**64", _whole(0, optional=True, most=2**64 - 1)),
    (
        "stream_index",
        "a whole number, or one for each row",
        lambda x: (
            _whole(0, most=2**64 - 1)(x)
            or (isinstance(x, (list, tuple, np.ndarray)) and all(_whole(0, most=2**64 - 1)(i) for i in x))
        ),
    ),
    ("prefill_chunk_size", "a whole number above 0", _whole(1, optional=True)),
    ("prompt_lookup_num_tokens", "a whole number above 0", _whole(1, optional=True)),
    ("max_matching_ngram_size", "a whole number above 0", _whole(1)),
]
CLASHES: list[tuple[Callable[[GenerationConfig], bool], str]] = [
    (
        lambda c: c.do_sample and c.num_beams > 1,
        "do_sample=True and num_beams > 1: beam search looks for the likeliest answer and draws nothing",
    ),
    (
        lambda c: 1 < c.num_beams < c.num_return_sequences,
        "num_return_sequences is larger than num_beams: beam search has no more answers than beams",
    ),
    (
        lambda c: c.num_return_sequences > 1 and c.num_beams == 1 and not c.do_sample,
        "num_return_sequences > 1 with greedy decoding, which has one answer: set do_sample or num_beams",
    ),
    (
        lambda c: c.prompt_lookup_num_tokens is not None and (c.do_sample or c.num_beams > 1),
        "prompt_lookup_num_tokens is for greedy decoding: leave out do_sample and num_beams",
    ),
]
