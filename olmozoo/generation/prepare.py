"""One call of `generate`, resolved in NumPy before any framework is needed, and its results."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.generation.config import NEW_TOKENS, SAMPLING, UNSUPPORTED, GenerationConfig
from olmozoo.generation.processors import RULES, Request
from olmozoo.generation.state import MASKED_SCORE, Beams, DecodeOptions, State
from olmozoo.outputs import GenerateOutput
from olmozoo.typing import Array

BUCKET = 64  # compiled loops pad prompts and answers to multiples of this, so that one program serves many lengths
SHORT = (16, 32)  # a short prompt is padded to one of these instead: the padding is read as the prompt is


@dataclass(frozen=True)
class Layout:
    """How many slots of the cache and of `State.tokens` the parts of a call take.

    The cache has the slots of the positions that were cached before, then those of the prompt, of the answer, and of a
    draft. A compiled loop rounds each part up; the slots that a part does not need are on its left. Windows are of
    slots: where a model has some, there are none between the positions cached before and the prompt.

    Attributes:
        prompt: positions of the prompt, as it was given.
        cached: how many of them the given cache has.
        max_new: maximum number of tokens of the answer.
        past_slots: slots of the cache for the positions cached before.
        prompt_slots: slots of the cache for the rest of the prompt.
        answer_slots: slots of the cache and of `State.tokens` for the answer.
        text_slots: slots of `State.tokens` for the prompt; 0 where it is embeddings.
        draft_slots: slots of the cache for a draft.
    """

    prompt: int
    cached: int
    max_new: int
    past_slots: int
    prompt_slots: int
    answer_slots: int
    text_slots: int
    draft_slots: int

    @property
    def left_pad(self) -> int:
        """The slots of `prompt_slots`, from the left, that are there only to round it up."""
        return self.prompt_slots - (self.prompt - self.cached)

    @property
    def answer_start(self) -> int:
        """The first slot of the answer in the cache."""
        return self.past_slots + self.prompt_slots

    def used_slots(self, count: int) -> list[int]:
        """The slots of the cache that are in use after `count` tokens, of which the last is not read yet."""
        past, prompt = self.past_slots - self.cached, self.past_slots + self.left_pad
        return [*range(past, self.past_slots), *range(prompt, self.answer_start + count - 1)]


@dataclass(frozen=True)
class Call:
    """One call of `generate`, resolved, in NumPy.

    Attributes:
        settings: all of them.
        layout: the slots of its parts.
        options: what decides which program runs.
        values: the numbers that the program is run with.
        state: where decoding starts.
        ids: (batch, prompt_slots) the tokens to read, padded on the left; None where the prompt is embeddings.
        mask: (batch, slots) bool, which slots of the cache are for real tokens: those cached before, the prompt's, and
            all of the answer and the draft.
    """

    settings: GenerationConfig
    layout: Layout
    options: DecodeOptions
    values: dict[str, Array]
    state: State
    ids: Array | None
    mask: Array

    @property
    def prompt_tokens(self) -> Array:
        """(rows, prompt) the tokens of the prompt; (rows, 0) where it is embeddings."""
        start = self.options.answer_start
        tokens: Array = self.state.tokens
        return tokens[:, start - (0 if self.ids is None else self.layout.prompt) : start]


def bucket(length: int) -> int:
    """How long what is read is with its padding: one of `SHORT` if that is enough, or a multiple of `BUCKET`."""
    return next((short for short in SHORT if 0 < length <= short), -(-length // BUCKET) * BUCKET)


def prepare(
    defaults: Any,
    config: ModelConfig,
    changes: Mapping[str, Any],
    *,
    own: GenerationConfig | None = None,
    input_ids: Any,
    attention_mask: Any,
    inputs_embeds: Any = None,
    cached: int = 0,
    tokenizer: Any = None,
    streamer: Any = None,
    compiled: bool = False,
) -> Call:
    """Resolve a call of `generate`: `changes` override `defaults`, and those the model's config.

    Args:
        defaults: the model's own settings, or those given: a `GenerationConfig`, a mapping, or Transformers' object.
        config: the model's config.
        changes: settings of this call; None switches a setting off.
        own: the model's own settings, whose eos and pad are used where `defaults` has none; before those of the config.
        input_ids: (batch, seq) tokens, those that are cached included.
        attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless pad is also a token that ends a
            row.
        inputs_embeds: (batch, seq, hidden), in place of ids.
        cached: positions in the cache that was given.
        tokenizer: an `olmozoo.Tokenizer`, for stop strings.
        streamer: whether there is one.
        compiled: whether lengths are rounded up, by `bucket` and to `BUCKET`.

    Raises:
        InputError: a setting is unknown, wrong or conflicts with another; ids or shapes do not fit; or the call needs
            more memory than there is.
    """
    settings = _resolve_settings(defaults, config, changes, streamer, own)
    ends = settings.ends
    pad = settings.pad_token_id if settings.pad_token_id is not None else ends[0] if ends else 0
    ids, real = _resolve_prompt(settings, config, input_ids, attention_mask, inputs_embeds, cached)
    layout = _resolve_layout(settings, config, changes, real, cached, ids is not None, compiled)

    copies = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    _check_memory(settings, config, layout, len(real) * copies)
    tokens = np.full((len(real) * copies, layout.text_slots + layout.answer_slots), pad, np.int64)
    is_text = np.zeros(tokens.shape, bool)
    is_text[:, layout.text_slots :] = True
    if ids is not None:
        prompt = slice(layout.text_slots - layout.prompt, layout.text_slots)
        tokens[:, prompt], is_text[:, prompt] = np.repeat(ids, copies, 0), np.repeat(real, copies, 0)
    given = np.arange(tokens.shape[1]) >= layout.text_slots - layout.prompt

    request = Request(settings, config.vocab_size, ends, layout.prompt, is_text, given)
    rules = [rule for kind in RULES if (rule := kind.create(request)) is not None]
    options = _resolve_options(settings, config, layout, copies, ends, tuple(rule for rule, _ in rules))
    values: dict[str, Array] = {
        "pad": np.array(pad),
        "max_new": np.array(layout.max_new),
        "is_end": np.isin(np.arange(config.vocab_size), ends),
        "is_text": is_text,
    }
    for _, numbers in rules:
        values |= numbers
    if options.sample:
        values["uniforms"] = _resolve_draws(settings, len(real), layout.answer_slots)
    if options.beams > 1:
        values["length_penalty"] = np.array(float(settings.length_penalty))
    tail: Any = ()
    if options.stop_strings:
        stops, tail = _resolve_stops(settings, config, tokenizer, ids, real)
        values, tail = values | stops, np.repeat(tail, copies, 0)
    mask = np.ones((len(real), layout.answer_start + layout.answer_slots + layout.draft_slots), bool)
    mask[:, : layout.answer_start] = False
    mask[:, layout.past_slots - cached : layout.past_slots] = real[:, :cached]
    mask[:, layout.past_slots + layout.left_pad : layout.answer_start] = real[:, cached:]
    return Call(
        settings,
        layout,
        options,
        values,
        _initial_state(options, tokens, tail, layout.answer_slots, config.vocab_size),
        None if ids is None else np.pad(ids[:, cached:], ((0, 0), (layout.left_pad, 0))),
        mask,
    )


def _resolve_settings(
    defaults: Any, config: ModelConfig, changes: Mapping[str, Any], streamer: Any, own: GenerationConfig | None
) -> GenerationConfig:
    """The settings of a call, checked, with eos and pad of the model where none are set."""
    if not isinstance(defaults, GenerationConfig):
        defaults = GenerationConfig.from_dict(defaults if isinstance(defaults, Mapping) else defaults.to_dict())
    tokens = {}
    for name in ("eos_token_id", "pad_token_id"):
        found = (getattr(source, name, None) for source in (defaults, own, config))
        tokens[name] = next((token for token in found if token is not None), None)
    settings: GenerationConfig = defaults.replace(**tokens | dict(changes))
    settings.check()
    if settings.num_beams > 1 and streamer is not None:
        raise InputError("a streamer cannot show beam search, which chooses its tokens only at the end")
    if not settings.do_sample and (unused := [name for name in SAMPLING if changes.get(name) is not None]):
        warnings.warn(f"{', '.join(unused)} has no effect without do_sample=True", stacklevel=5)
    if ignored := [name for name, none in UNSUPPORTED.items() if settings.extra.get(name) not in (None, none, [], {})]:
        warnings.warn(f"generate ignores {', '.join(ignored)}, which the generation config sets", stacklevel=5)
    return settings


def _resolve_prompt(
    settings: GenerationConfig,
    config: ModelConfig,
    input_ids: Any,
    attention_mask: Any,
    inputs_embeds: Any,
    cached: int,
) -> tuple[Array | None, Array]:
    """The ids, or None for embeddings, and the (batch, seq) bool mask of real tokens."""
    if input_ids is not None and inputs_embeds is not None:
        raise InputError("expected one of input_ids and inputs_embeds, not both")
    if input_ids is None and inputs_embeds is None:
        if settings.bos_token_id is None:
            raise InputError("expected input_ids or inputs_embeds, or a bos_token_id to begin with")
        input_ids = np.array([[settings.bos_token_id]])
    ids = None if input_ids is None else _checked_ids(input_ids, config.vocab_size)
    if ids is None and (len(inputs_embeds.shape) != 3 or 0 in inputs_embeds.shape):
        raise InputError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (batch, seq, hidden)")
    if ids is None and cached:
        raise InputError("past_key_values goes with input_ids, which include the cached tokens, not with inputs_embeds")
    shape = tuple(inputs_embeds.shape[:2]) if ids is None else ids.shape
    if cached and shape[1] <= cached:
        raise InputError(
            f"input_ids has {shape[1]} positions and past_key_values {cached}: expected the cached tokens, and more"
        )
    if attention_mask is None:
        pad = settings.pad_token_id
        return ids, np.ones(shape, bool) if ids is None or pad is None or pad in settings.ends else ids != pad
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}, expected that of the prompt, {shape}")
    return ids, mask


def _checked_ids(input_ids: Any, vocab_size: int) -> Array:
    """The ids as an array.

    Raises:
        InputError: they are no integers (batch, seq), or not in the vocabulary.
    """
    try:
        ids = np.asarray(input_ids)
    except ValueError:  # NumPy's, of a list of lists
        raise InputError("input_ids has rows of different lengths: pad them on the left") from None
    outside = ids.dtype.kind == "O"  # integers of more than 64 bits
    if ids.ndim != 2 or 0 in ids.shape or (ids.dtype.kind not in "iu" and not outside):
        raise InputError(
            f"input_ids has shape {ids.shape} and dtype {ids.dtype}, expected integers (batch, seq), at least one row "
            "and one token"
        )
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        row, column = wrong[0]
        raise InputError(
            f"input_ids has {ids[row, column]} in row {row}, column {column}: expected ids from 0 to {vocab_size - 1}, "
            f"the vocabulary being {vocab_size} tokens"
        )
    return ids


def _resolve_layout(
    settings: GenerationConfig,
    config: ModelConfig,
    changes: Mapping[str, Any],
    real: Array,
    cached: int,
    has_ids: bool,
    compiled: bool,
) -> Layout:
    """The lengths of prompt and answer, checked, and the slots for them."""
    prompt = real.shape[1]
    max_new = settings.max_new_tokens
    if max_new is None or (changes.get("max_length") is not None and changes.get("max_new_tokens") is None):
        max_new = NEW_TOKENS if settings.max_length is None else settings.max_length - prompt
    if max_new < 1:
        raise InputError(f"max_length is {settings.max_length}: no room for a token after a prompt of {prompt}")
    if (settings.min_new_tokens or 0) > max_new:
        raise InputError(f"min_new_tokens is {settings.min_new_tokens}, more than the {max_new} tokens there may be")
    longest = int(real.sum(1).max()) + max_new
    if config.position_limit is not None and longest > config.position_limit:
        raise InputError(
            f"{longest - max_new} tokens and {max_new} new ones are {longest}, and the model has "
            f"{config.position_limit} positions"
        )
    if config.position_limit is None and longest > config.max_position_embeddings:
        warnings.warn(
            f"{longest - max_new} tokens and {max_new} new ones are {longest}, and the model was trained for "
            f"{config.max_position_embeddings} positions (max_position_embeddings): past them its text may be nonsense",
            stacklevel=5,
        )
    round_up: Callable[[int], int] = bucket if compiled else int
    answer_slots = -(-int(max_new) // BUCKET) * BUCKET if compiled else int(max_new)
    prompt_slots = prompt - cached
    if not (cached and any(config.windows)):
        prompt_slots = round_up(prompt_slots)
        if compiled and settings.prefill_chunk_size:
            prompt_slots = -(-prompt_slots // settings.prefill_chunk_size) * settings.prefill_chunk_size
    return Layout(
        prompt=prompt,
        cached=cached,
        max_new=int(max_new),
        past_slots=round_up(cached),
        prompt_slots=prompt_slots,
        answer_slots=answer_slots,
        text_slots=round_up(prompt) if has_ids else 0,
        draft_slots=min(settings.prompt_lookup_num_tokens or 0, answer_slots),  # a longer draft is no use
    )


def _check_memory(settings: GenerationConfig, config: ModelConfig, layout: Layout, rows: int) -> None:
    """Refuse a call whose cache and buffers cannot be in the memory of this machine, before any is allocated.

    Of a layer with a window, a cache that is not returned keeps no more than that for sure.
    """
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    slots = layout.answer_start + layout.answer_slots + layout.draft_slots
    is_whole = settings.return_dict_in_generate and settings.num_beams == 1
    kept = [slots] * config.num_hidden_layers if is_whole else config.cache_slots(slots, 0)
    keys = sum(config.kv_heads_in(layer) * count for layer, count in enumerate(kept))
    needed = rows * keys * config.head_dim * 2 * 2  # keys and values, of at least two bytes
    needed += rows * (layout.text_slots + layout.answer_slots) * 9  # tokens, and which of them are text
    needed += rows * layout.answer_slots * config.vocab_size * 8 * settings.output_scores
    if needed > memory:
        raise InputError(
            f"{rows} rows of {layout.prompt} tokens and {layout.max_new} new ones need {needed / 2**30:.1f} GiB for "
            f"the cache and the tokens, and this machine has {memory / 2**30:.1f} GiB: lower max_new_tokens"
        )


def _resolve_options(
    settings: GenerationConfig,
    config: ModelConfig,
    layout: Layout,
    copies: int,
    ends: tuple[int, ...],
    rules: tuple[Any, ...],
) -> DecodeOptions:
    """What decides which program runs."""
    is_search = settings.num_beams > 1
    if is_search and max(2, 1 + len(ends)) > config.vocab_size:
        raise InputError(f"num_beams is {settings.num_beams} and eos_token_id {list(ends)}: more than the vocabulary")
    return DecodeOptions(
        answer_start=layout.text_slots,
        beams=settings.num_beams,
        rows_per_prompt=copies,
        sample=settings.do_sample,
        rules=rules,
        stop_strings=settings.stop_strings is not None,
        num_ends=len(ends) if is_search else 0,
        stop_early=settings.early_stopping is True,
        expect_longest=settings.early_stopping == "never" and settings.length_penalty > 0,
        logprobs=settings.return_dict_in_generate or is_search,
        scores=settings.output_scores,
        draft_tokens=layout.draft_slots,
        draft_ngram=settings.max_matching_ngram_size if layout.draft_slots else 0,
        prefill_chunk=settings.prefill_chunk_size or 0,
    )


def _initial_state(options: DecodeOptions, tokens: Array, tail: Any, answer: int, vocab_size: int) -> State:
    """Where decoding starts."""
    rows = len(tokens)
    beams: Any = ()
    if options.beams > 1:
        shape = (rows // options.beams, options.beams)
        running = np.full(shape, MASKED_SCORE)
        running[:, 0] = 0  # all of a row's beams are alike at first, so only one of them takes part
        beams = Beams(
            running=running,
            trace=np.full((rows, answer), -1),
            ended_tokens=tokens,
            ended_trace=np.full((rows, answer), -1),
            ended_logprobs=np.zeros((rows, answer)),
            ended_scores=np.full(shape, MASKED_SCORE),
            ended=np.zeros(shape, bool),
            can_improve=np.ones((shape[0], 1), bool),
        )
    return State(
        tokens=tokens,
        count=np.array(0),
        done=np.zeros(rows, bool),
        bad_step=np.full(rows, -1),
        tail=tail,
        logprobs=np.zeros((rows, answer)) if options.logprobs else (),
        scores=np.zeros((rows, answer, vocab_size)) if options.scores else (),
        beams=beams,
    )


def uniforms(seed: int, streams: Sequence[int], count: int) -> Array:
    """The random numbers of sampling: one for each row and step, in [0, 1), float32 (rows, count).

    Row by row they are NumPy's `Generator(Philox(key=[seed, stream])).random(count, float32)`: so a row's numbers
    depend on the seed and its stream alone, whatever the batch, the framework and the answer's length.
    """
    keys = [np.array([seed, stream], np.uint64) for stream in streams]
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(count, np.float32) for key in keys])


def _resolve_draws(settings: GenerationConfig, batch: int, count: int) -> Array:
    """The random numbers (rows, count) of a call."""
    seed = settings.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    given = settings.stream_index
    first = [int(given) + i for i in range(batch)] if isinstance(given, (int, np.integer)) else [int(i) for i in given]
    if len(first) != batch:
        raise InputError(f"stream_index has {len(first)} numbers, expected one for each of {batch} rows")
    copies = settings.num_return_sequences
    return uniforms(seed, [stream * copies + i for stream in first for i in range(copies)], count)


def _resolve_stops(
    settings: GenerationConfig, config: ModelConfig, tokenizer: Any, ids: Array | None, real: Array
) -> tuple[dict[str, Array], Array]:
    """The bytes of stop strings and of tokens, and the last bytes (batch, m) of each prompt."""
    texts = [settings.stop_strings] if isinstance(settings.stop_strings, str) else list(settings.stop_strings or [])
    if not hasattr(tokenizer, "token_bytes"):
        raise InputError(
            f"stop_strings {texts} need the text of tokens: give generate tokenizer=olmozoo.Tokenizer(...)"
        )
    pieces = [*tokenizer.token_bytes(), *[b""] * config.vocab_size][: config.vocab_size]
    table = np.zeros((len(pieces), max(map(len, pieces))), np.int16)
    for i, piece in enumerate(pieces):
        table[i, : len(piece)] = list(piece)
    encoded = [text.encode() for text in texts]
    longest = max(map(len, encoded))
    stops = np.full((len(encoded), longest), -1, np.int16)
    for i, stop in enumerate(encoded):
        stops[i, longest - len(stop) :] = list(stop)
    tail = np.full((len(real), longest + table.shape[1]), -2, np.int16)
    for row in range(len(real)):  # a stop string may begin in the prompt
        prompt = [] if ids is None else ids[row][real[row]][-tail.shape[1] :]
        recent = b"".join(pieces[i] for i in prompt)[-tail.shape[1] :]
        tail[row, tail.shape[1] - len(recent) :] = list(recent)
    sizes = np.array([len(piece) for piece in pieces])
    return {"token_bytes": table, "token_sizes": sizes, "stops": stops}, tail


def run(call: Call, streamer: Any, read_prompt: Callable[..., Any], read_answer: Callable[..., Any]) -> Any:
    """Run a compiled loop: at once, or a token at a time where a streamer shows them.

    Args:
        call: the resolved call.
        streamer: gets the prompt and then each step's tokens (rows,) by `put`, then a call of `end`; or None.
        read_prompt: returns the state after the first token, and the cache.
        read_answer: of a state, a cache and a number of tokens, the state and the cache after that many, or after
            fewer where every row has ended.
    """
    if streamer is None:
        return read_answer(*read_prompt(), call.layout.max_new)
    streamer.put(call.prompt_tokens)
    state, cache = read_prompt()
    for shown in range(call.layout.max_new):
        if shown == int(state.count):
            if np.asarray(state.done).all():
                break
            state, cache = read_answer(state, cache, shown + 1)
        streamer.put(np.asarray(state.tokens)[:, call.options.answer_start + shown])
    streamer.end()
    return state, cache


def finalize(call: Call, state: State) -> GenerateOutput:
    """The output of a call in NumPy, but for its cache, from the state in which decoding ended.

    Only `sequences` and `scores` are set without `return_dict_in_generate`; with it, `logprobs` always is.

    Raises:
        InputError: logits were not finite.
    """
    if (state.bad_step >= 0).any():
        step = int(state.bad_step[state.bad_step >= 0].min())
        row = int(np.argmax(state.bad_step == step)) // call.options.rows_per_prompt
        raise InputError(
            f"logits are not finite: NaN or infinity in row {row} at step {step}; the model's weights or inputs have "
            "such values, or its dtype overflows (try dtype='float32')"
        )
    tokens, logprobs, count = state.tokens, state.logprobs, int(state.count)
    output = GenerateOutput()
    if call.options.scores:
        output.scores = tuple(state.scores[:, step] for step in range(count))
    if call.options.beams > 1:
        beams, returned = state.beams, call.settings.num_return_sequences

        def best(x: Array) -> Array:
            split = x.reshape(-1, call.options.beams, *x.shape[1:])[:, :returned]
            return split.reshape(-1, *x.shape[1:])

        tokens, logprobs, trace = best(beams.ended_tokens), best(beams.ended_logprobs), best(beams.ended_trace)
        count = int((trace >= 0).sum(1).max())
        output.beam_indices = trace[:, :count]
        output.sequences_scores = beams.ended_scores[:, :returned].reshape(-1)
    start = call.options.answer_start - call.prompt_tokens.shape[1]
    output.sequences = tokens[:, start : call.options.answer_start + count]
    if not call.settings.return_dict_in_generate:
        return GenerateOutput(sequences=output.sequences, scores=output.scores)
    output.logprobs = logprobs[:, :count]
    return output
