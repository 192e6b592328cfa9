"""One call of `generate`, resolved in NumPy before any framework is needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.generation.config import FOREIGN, NEW_TOKENS, SAMPLING, GenerationConfig
from olmozoo.generation.state import NEVER, Beams, Rules, State
from olmozoo.typing import Array

BUCKET = 64  # compiled loops pad prompts and answers to multiples of this, so that one program serves many lengths


def uniforms(seed: int, streams: Sequence[int], count: int) -> Array:
    """The random numbers of sampling: one for each row and step, in [0, 1), float32 (rows, count).

    Row by row they are NumPy's `Generator(Philox(key=[seed, stream])).random(count, float32)`: so a row's numbers
    depend on the seed and its stream alone, whatever the batch, the framework and the answer's length.
    """
    keys = [np.array([seed, stream], np.uint64) for stream in streams]
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(count, np.float32) for key in keys])


@dataclass(frozen=True)
class Call:
    """One call of `generate`, resolved, in NumPy.

    Attributes:
        settings: all of them.
        rules: what decides which program runs.
        knobs: the numbers of the rules.
        state: where decoding starts.
        prompt: positions of the prompt, as it was given.
        ids: (batch, room) the tokens to read, padded on the left; None where the prompt is embeddings.
        mask: (batch, places) bool, which places of the cache hold real tokens: those held before, the prompt's, and the
            answer's, of which all are.
        held: positions that the given cache holds.
        past: places of the cache for those, padded on the left.
        room: places for the rest of the prompt, after that.
        shift: how many of `room`'s places, from the left, are there only to round it up.
    """

    settings: GenerationConfig
    rules: Rules
    knobs: dict[str, Array]
    state: State
    prompt: int
    ids: Array | None
    mask: Array
    held: int
    past: int
    room: int
    shift: int

    @property
    def end(self) -> int:
        """The first place of the answer in the cache."""
        return self.past + self.room


def bucket(length: int) -> int:
    """The next multiple of `BUCKET`."""
    return -(-length // BUCKET) * BUCKET


def prepare(
    defaults: Any,
    config: ModelConfig,
    changes: Mapping[str, Any],
    *,
    input_ids: Any,
    attention_mask: Any,
    inputs_embeds: Any = None,
    held: int = 0,
    tokenizer: Any = None,
    streamer: Any = None,
    compiled: bool = False,
) -> Call:
    """Resolve a call of `generate`: `changes` go before `defaults`, and those before the model's config.

    Args:
        defaults: the model's own settings, or those given: a `GenerationConfig`, a mapping, or Transformers' object.
        config: the model's config.
        changes: settings of this call.
        input_ids: (batch, seq) tokens; those that the cache holds already included.
        attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless pad is also a token that ends a
            row.
        inputs_embeds: (batch, seq, hidden), in place of ids.
        held: positions in the cache that was given.
        tokenizer: an `olmozoo.Tokenizer`, for stop strings.
        streamer: whether there is one.
        compiled: whether lengths are rounded up to `BUCKET`.

    Raises:
        InputError: a setting is unknown, wrong or clashes with another; shapes do not fit.
    """
    if not isinstance(defaults, GenerationConfig):
        defaults = GenerationConfig.from_dict(defaults if isinstance(defaults, Mapping) else defaults.to_dict())
    settings = defaults.replace(**changes)
    settings.check()
    if settings.num_beams > 1 and streamer is not None:
        raise InputError("a streamer cannot show beam search, which settles on its tokens at the end alone")
    if not settings.do_sample and (idle := [name for name in SAMPLING if changes.get(name) is not None]):
        warnings.warn(f"{', '.join(idle)} has no effect without do_sample=True", stacklevel=3)
    if foreign := [name for name, none in FOREIGN.items() if settings.extra.get(name) not in (None, none, [], {})]:
        warnings.warn(f"generate goes without {', '.join(foreign)}, which the generation config sets", stacklevel=3)
    ends = settings.ends if settings.eos_token_id is not None else GenerationConfig.from_model(config).ends
    pad = config.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
    pad = pad if pad is not None else ends[0] if ends else 0
    ids, real = _prompt(settings, input_ids, attention_mask, inputs_embeds, None if pad in ends else pad, held)
    batch, prompt = real.shape
    max_new = _answer_length(settings, changes, prompt)
    longest = int(real.sum(1).max()) + max_new
    if config.position_limit is not None and longest > config.position_limit:
        raise InputError(
            f"{longest - max_new} tokens and {max_new} new ones are {longest}, and the model has "
            f"{config.position_limit} positions"
        )

    min_new = max(0, settings.min_length - prompt) if settings.min_new_tokens is None else settings.min_new_tokens
    round_up = bucket if compiled else int
    past, chunk = round_up(held), settings.prefill_chunk_size or 0
    room = round_up(prompt - held)
    if compiled and chunk:
        room = -(-room // chunk) * chunk
    answer = round_up(max_new)
    lookup = settings.prompt_lookup_num_tokens or 0
    text = 0 if ids is None else round_up(prompt)
    shift = room - (prompt - held)
    rules = Rules(
        text=text,
        beams=settings.num_beams,
        copies=settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences,
        sample=settings.do_sample,
        temperature=settings.do_sample and settings.temperature != 1,
        # Rounded up, so that one program serves many numbers.
        top_k=min(bucket(settings.top_k), config.vocab_size)
        if settings.do_sample and settings.top_k < config.vocab_size
        else 0,
        top_p=settings.do_sample and settings.top_p < 1,
        min_p=settings.do_sample and bool(settings.min_p),
        penalty=settings.repetition_penalty != 1,
        ngram=settings.no_repeat_ngram_size,
        bad_words=bool(settings.bad_words_ids),
        min_new=bool(min_new and ends),
        stops=settings.stop_strings is not None,
        ends=len(ends) if settings.num_beams > 1 else 0,
        early=settings.early_stopping is True,
        longest=settings.early_stopping == "never" and settings.length_penalty > 0,
        logprobs=settings.return_dict_in_generate or settings.num_beams > 1,
        scores=settings.output_scores,
        lookup=lookup,
        matching=settings.max_matching_ngram_size if lookup else 0,
        chunk=chunk,
    )
    candidates = max(2, 1 + len(ends)) * settings.num_beams
    if settings.num_beams > 1 and candidates > settings.num_beams * config.vocab_size:
        raise InputError(f"num_beams is {settings.num_beams} and eos_token_id {list(ends)}: more than the vocabulary")

    rows = batch * rules.copies
    tokens = np.full((rows, text + answer), pad, np.int64)
    counts = np.zeros(tokens.shape, bool)
    counts[:, text:] = True
    if ids is not None:
        tokens[:, text - prompt : text] = np.repeat(ids, rules.copies, 0)
        counts[:, text - prompt : text] = np.repeat(real, rules.copies, 0)
    knobs: dict[str, Array] = {
        "pad": np.array(pad),
        "max_new": np.array(max_new),
        "is_end": np.isin(np.arange(config.vocab_size), ends),
        "text": counts,
    }
    if rules.sample:
        knobs |= {name: np.array(float(getattr(settings, name) or 0)) for name in ("temperature", "top_p", "min_p")}
        knobs["top_k"] = np.array(settings.top_k)
        knobs["uniforms"] = _draws(settings, batch, answer)
    if rules.penalty:
        knobs["penalty"] = np.array(float(settings.repetition_penalty))
    if rules.ngram:
        # Transformers sees runs of pad tokens too, and greedy and beam search follow it. A sampled row does not know
        # its pads, so that it comes out the same in any batch.
        knobs["runs"] = (
            counts if settings.do_sample else (np.arange(text + answer) >= text - prompt)[None].repeat(rows, 0)
        )
    if rules.min_new:
        knobs["min_new"] = np.array(min_new)
    if rules.bad_words:
        knobs |= _bad_words(settings, config, ends)
    if rules.beams > 1:
        knobs["length_penalty"] = np.array(float(settings.length_penalty))
    tail: Any = ()
    if rules.stops:
        more, tail = _stops(settings, config, tokenizer, ids, real)
        knobs |= more
        tail = np.repeat(tail, rules.copies, 0)

    def per_token(value: float, dtype: Any) -> Array:
        return np.full((rows, answer), value, dtype)

    state = State(
        tokens=tokens,
        count=np.array(0),
        done=np.zeros(rows, bool),
        tail=tail,
        logprobs=per_token(0, np.float64) if rules.logprobs else (),
        scores=np.zeros((rows, answer, config.vocab_size)) if rules.scores else (),
        beams=(),
    )
    if rules.beams > 1:
        shape = (batch, rules.beams)
        running = np.full(shape, NEVER)
        running[:, 0] = 0  # all of a row's beams are alike at first, so only one of them takes part
        state = state._replace(
            beams=Beams(
                running=running,
                trace=per_token(-1, np.int64),
                ended_tokens=tokens,
                ended_trace=per_token(-1, np.int64),
                ended_logprobs=per_token(0, np.float64),
                ended_scores=np.full(shape, NEVER),
                ended=np.zeros(shape, bool),
                hopeful=np.ones((batch, 1), bool),
            )
        )
    mask = np.zeros((batch, past + room + answer + lookup), bool)
    mask[:, past - held : past] = real[:, :held]
    mask[:, past + shift : past + room] = real[:, held:]
    mask[:, past + room :] = True
    new = None if ids is None else np.pad(ids[:, held:], ((0, 0), (shift, 0)))
    return Call(settings, rules, knobs, state, prompt, new, mask, held, past, room, shift)


def _prompt(
    settings: GenerationConfig, input_ids: Any, attention_mask: Any, inputs_embeds: Any, pad: int | None, held: int
) -> tuple[Array | None, Array]:
    """The ids, or None for embeddings, and the (batch, seq) bool mask of real tokens."""
    if input_ids is not None and inputs_embeds is not None:
        raise InputError("expected one of input_ids and inputs_embeds, not both")
    if input_ids is None and inputs_embeds is None:
        if settings.bos_token_id is None:
            raise InputError("expected input_ids or inputs_embeds, or a bos_token_id to begin with")
        input_ids = np.array([[settings.bos_token_id]])
    ids = None if input_ids is None else np.asarray(input_ids)
    if ids is None:
        if len(inputs_embeds.shape) != 3 or 0 in inputs_embeds.shape:
            raise InputError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (batch, seq, hidden)")
        if held:
            raise InputError("past_key_values goes with input_ids, which hold its tokens too, not with inputs_embeds")
    elif ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
        raise InputError(
            f"input_ids has shape {ids.shape} and dtype {ids.dtype}, expected whole numbers (batch, seq), at least one "
            "row and one token"
        )
    shape = tuple(inputs_embeds.shape[:2]) if ids is None else ids.shape
    if held and shape[1] <= held:
        raise InputError(
            f"input_ids has {shape[1]} positions and past_key_values {held}: expected those that it holds, and more"
        )
    if attention_mask is None:
        return ids, np.ones(shape, bool) if ids is None or pad is None else ids != pad
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}, expected that of the prompt, {shape}")
    return ids, mask


def _answer_length(settings: GenerationConfig, changes: Mapping[str, Any], prompt: int) -> int:
    max_new = settings.max_new_tokens
    if max_new is None or (changes.get("max_length") is not None and changes.get("max_new_tokens") is None):
        max_new = NEW_TOKENS if settings.max_length is None else settings.max_length - prompt
    if max_new < 1:
        raise InputError(f"max_length is {settings.max_length}: no room for a token after a prompt of {prompt}")
    if (settings.min_new_tokens or 0) > max_new:
        raise InputError(f"min_new_tokens is {settings.min_new_tokens}, more than the {max_new} tokens there may be")
    return int(max_new)


def _draws(settings: GenerationConfig, batch: int, count: int) -> Array:
    seed = settings.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    given = settings.stream_index
    first = [int(given) + i for i in range(batch)] if isinstance(given, (int, np.integer)) else [int(i) for i in given]
    if len(first) != batch:
        raise InputError(f"stream_index has {len(first)} numbers, expected one for each of {batch} rows")
    copies = settings.num_return_sequences
    return uniforms(seed, [stream * copies + i for stream in first for i in range(copies)], count)


def _bad_words(settings: GenerationConfig, config: ModelConfig, ends: tuple[int, ...]) -> dict[str, Array]:
    """Words as what they start with, (words, longest - 1) right-aligned, -1 for anything, and their last tokens."""
    words = [[int(i) for i in word] for word in settings.bad_words_ids or []]
    if outside := sorted({i for word in words for i in word if i >= config.vocab_size}):
        raise InputError(f"bad_words_ids has {outside}, and the vocabulary {config.vocab_size} tokens")
    words = [word for word in words if word not in [[end] for end in ends]]  # as in Transformers
    starts = np.full((-(-len(words) // 8) * 8, -(-max(map(len, words), default=1) // 8) * 8), -1)
    lasts = np.full(len(starts), -1)  # rounded up, so that one program serves many lists
    for i, word in enumerate(words):
        starts[i, starts.shape[1] - len(word) + 1 :] = word[:-1]
        lasts[i] = word[-1]
    return {"bad_starts": starts, "bad_lasts": lasts}


def _stops(
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


def written(call: Call, state: State) -> dict[str, Any]:
    """The fields of a `GenerateOutput`, but for its cache, in NumPy, from where decoding ended."""
    tokens, logprobs, count = state.tokens, state.logprobs, int(state.count)
    fields: dict[str, Any] = {}
    if call.rules.beams > 1:
        beams = state.beams
        returned = call.settings.num_return_sequences

        def best(x: Array) -> Array:
            split = x.reshape(-1, call.rules.beams, *x.shape[1:])[:, :returned]
            return split.reshape(-1, *x.shape[1:])

        tokens, logprobs, trace = best(beams.ended_tokens), best(beams.ended_logprobs), best(beams.ended_trace)
        count = int((trace >= 0).sum(1).max())
        fields["beam_indices"] = trace[:, :count]
        fields["sequences_scores"] = beams.ended_scores[:, :returned].reshape(-1)
    start = call.rules.text - (0 if call.ids is None else call.prompt)
    fields["sequences"] = tokens[:, start : call.rules.text + count]
    fields["logprobs"] = logprobs[:, :count] if call.rules.logprobs else None
    if call.rules.scores:
        fields["scores"] = tuple(state.scores[:, step] for step in range(int(state.count)))
    return fields
