"""Decoding: the prompt first, then a token at a time over a cache set aside once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.decode import advance, guess
from olmozoo.generation.prepare import Call, prepare, written
from olmozoo.generation.state import State
from olmozoo.outputs import GenerateOutput
from olmozoo.pt.cache import KVCache, StaticCache, TupleCache, cached_length, open_cache
from olmozoo.pt.layers import at_least_float32


class GenerationMixin:
    """Adds `generate` to a model with a language-model head."""

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continue each row of a batch: greedily, by sampling or by beam search.

        Args:
            input_ids: (batch, seq) prompts, padded on the left; default the bos token.
            attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless a pad token also ends rows.
            generation_config: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            past_key_values: a cache of the first positions of `input_ids`, in either form; it is not changed.
            tokenizer: an `olmozoo.Tokenizer`, which `stop_strings` need.
            streamer: shown the prompt and then each step's tokens (rows,) by `put`, and told of the end by `end`.
            compile: run steps after the prompt through `torch.compile`, with CUDA graphs on a GPU. The first call for a
                batch size and a length (rounded up to `olmozoo.generation.BUCKET`) compiles.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            (rows, seq + new) ids of prompt and answer; of the answer alone for `inputs_embeds`. A row that has ended
            holds pad tokens; the call ends with its longest row. A `GenerateOutput` for `return_dict_in_generate`.

        Raises:
            InputError: a setting is unknown, wrong or clashes with another, or shapes do not fit.
        """
        held = open_cache(past_key_values, self.config.num_hidden_layers, False)
        call = prepare(
            generation_config or self.generation_config,
            self.config,
            settings,
            input_ids=None if input_ids is None else input_ids.cpu().numpy(),
            attention_mask=None if attention_mask is None else attention_mask.cpu().numpy(),
            inputs_embeds=inputs_embeds,
            held=cached_length(held),
            tokenizer=tokenizer,
            streamer=streamer,
            compiled=compile,
        )
        training = self.training
        self.eval()
        try:
            state, cache = self._decode(call, inputs_embeds, held, streamer, compile)
        finally:
            self.train(training)
        device = self.device
        fields = written(call, map_arrays(lambda x: x.cpu().numpy() if isinstance(x, Tensor) else x, state))
        sequences = torch.from_numpy(fields.pop("sequences")).to(device)
        if not call.settings.return_dict_in_generate:
            return sequences
        output = GenerateOutput(sequences=sequences, **map_arrays(lambda x: torch.from_numpy(x).to(device), fields))
        if call.rules.beams == 1:  # without the places that only round the prompt up
            places = [
                *range(call.past - call.held, call.past),
                *range(call.past + call.shift, call.end + state.count - 1),
            ]
            pairs = cache.take(torch.tensor(places, device=device))
            kept = KVCache(*zip(*pairs, strict=True), len(places))
            output.past_key_values = pairs if isinstance(held, TupleCache | None) else kept
        return output

    def prepare_inputs_for_generation(self, input_ids: Tensor | None, **arguments: Any) -> dict[str, Any]:
        """The arguments of the next forward call. Libraries such as PEFT put their own in its place."""
        return {"input_ids": input_ids, **arguments}

    def _decode(
        self, call: Call, inputs_embeds: Tensor | None, held: Any, streamer: Any, compile: bool
    ) -> tuple[State, KVCache]:
        rules, device, wide = call.rules, self.device, at_least_float32(self.dtype)
        xp = Namespace(device)
        knobs = {name: to_tensor(knob, wide, device) for name, knob in call.knobs.items()}
        state = map_arrays(lambda x: to_tensor(x, wide, device), call.state)._replace(count=0)
        max_new = int(call.knobs["max_new"])
        mask = torch.from_numpy(call.mask).to(device)
        padded = compile or not bool(mask.all())
        positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)
        cache = self.init_cache(len(mask), mask.shape[1])
        if held is not None:
            cache.begin_with(held, call.past)

        def read(ids: Tensor | None, start: int, end: int, embeds: Tensor | None = None, keep: int = 1) -> Tensor:
            """Logits (rows, keep, v) after reading the tokens at places start to end of the cache."""
            inputs = self.prepare_inputs_for_generation(
                ids,
                inputs_embeds=embeds,
                past_key_values=cache,
                attention_mask=mask[:, :end] if padded else None,
                position_ids=positions[:, start:end],
                logits_to_keep=keep,
            )
            return self(**inputs, return_dict=True).logits.to(wide)

        if streamer is not None:
            streamer.put(state.tokens[:, rules.text - call.prompt : rules.text].cpu())
        begin, end = call.past, call.end
        ids = None if call.ids is None else to_tensor(call.ids, wide, device)
        embeds = None if inputs_embeds is None else torch.nn.functional.pad(inputs_embeds, (0, 0, call.shift, 0))
        chunk = rules.chunk or call.room
        for start in range(begin, end, chunk):
            part = slice(start - begin, min(start + chunk, end) - begin)
            piece = None if ids is None else ids[:, part]
            logits = read(piece, start, begin + part.stop, None if embeds is None else embeds[:, part])
        logits = logits[:, -1].repeat_interleave(rules.copies, dim=0)
        if rules.copies > 1:
            cache.reorder(torch.arange(len(mask), device=device).repeat_interleave(rules.copies))
            mask, positions = (x.repeat_interleave(rules.copies, dim=0) for x in (mask, positions))
        state, order = advance(xp, rules, knobs, state, logits)
        if compile:
            read, cache = self._compiled_read(cache, mask, positions)

        while True:
            if streamer is not None:
                streamer.put(state.tokens[:, rules.text + state.count - 1].cpu())
            if state.count >= max_new or state.done.all():
                break
            if order is not None:
                cache.reorder(order)
            place = end + state.count - 1  # of the token written last, which is read now
            last = state.tokens[:, rules.text + state.count - 1, None]
            if not rules.lookup:
                state, order = advance(xp, rules, knobs, state, read(last, place, place + 1)[:, -1])
                continue
            guessed = guess(xp, rules, knobs, state)  # (r, lookup)
            logits = read(torch.cat([last, guessed], 1), place, place + 1 + rules.lookup, keep=0)
            for step in range(rules.lookup + 1):
                state, order = advance(xp, rules, knobs, state, logits[:, step])
                if state.count >= max_new or state.done.all() or step == rules.lookup:
                    break
                chosen = state.tokens[:, rules.text + state.count - 1]
                if not ((chosen == guessed[:, step]) | state.done).all():
                    break
                if streamer is not None:
                    streamer.put(chosen.cpu())
            cache.rewind(end + state.count - 1)
        if streamer is not None:
            streamer.end()
        return state, cache

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled step, which belongs to this object and process."""
        return {name: value for name, value in super().__getstate__().items() if name != "_step"}

    def _compiled_read(self, cache: KVCache, mask: Tensor, positions: Tensor) -> tuple[Callable[..., Tensor], KVCache]:
        """`read` for the steps after the prompt, with shapes that never change, and the cache that it uses."""
        cache = StaticCache(cache)
        key = torch.arange(mask.shape[1], device=mask.device)
        step = self.__dict__.get("_step")
        if step is None:
            mode = "reduce-overhead" if mask.is_cuda else "default"
            step = self.__dict__["_step"] = torch.compile(self.forward, fullgraph=True, mode=mode)

        def read(ids: Tensor, start: int, end: int, embeds: Tensor | None = None, keep: int = 1) -> Tensor:
            places = torch.arange(start, end, device=mask.device)
            cache.positions = places
            seen = mask[:, None, None, :] & (key <= places[:, None])
            output = step(
                ids,
                attention_mask=seen,
                position_ids=positions[:, start:end].contiguous(),
                past_key_values=cache,
                logits_to_keep=keep,
            )
            return output.logits.to(at_least_float32(self.dtype), copy=True)

        return read, cache


class Namespace:
    """PyTorch's functions as `olmozoo.decoding.Namespace` names them."""

    where, exp, log = staticmethod(torch.where), staticmethod(torch.exp), staticmethod(torch.log)
    concat, reshape = staticmethod(torch.cat), staticmethod(torch.reshape)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def arange(self, size: int) -> Tensor:
        return torch.arange(size, device=self.device)

    def cumsum(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    def max(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)

    def min(self, x: Tensor) -> Tensor:
        return x.amin(-1, keepdim=True)

    def any(self, x: Tensor, axis: int | None = None) -> Tensor:
        return x.any() if axis is None else x.any(axis)

    def all(self, x: Tensor, axis: int | None = None) -> Tensor:
        return x.all() if axis is None else x.all(axis)

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return tuple(x.topk(k))

    def take(self, x: Tensor, places: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, places)

    def take_along(self, x: Tensor, places: Tensor) -> Tensor:
        return x.gather(1, places)

    def put(self, x: Tensor, place: int, value: Tensor) -> Tensor:
        x[:, place] = value
        return x

    def mark(self, tokens: Tensor, flags: Tensor, size: int) -> Tensor:
        marks = torch.zeros(len(tokens), size + 1, dtype=torch.bool, device=self.device)
        return marks.scatter_(1, torch.where(flags, tokens, size), True)[:, :size]

    def full(self, shape: tuple[int, ...], value: int, like: Tensor) -> Tensor:
        return like.new_full(shape, value)

    def floating(self, x: Any, like: Tensor) -> Tensor:
        return torch.as_tensor(x, device=self.device).to(like.dtype)

    def loop(self, times: int, body: Callable[..., tuple[Tensor, ...]], *state: Tensor) -> tuple[Tensor, ...]:
        for _ in range(times):
            state = body(*state)
        return state


def to_tensor(array: Any, wide: torch.dtype, device: torch.device) -> Tensor:
    """An array as a tensor, floating-point numbers in `wide`."""
    tensor = torch.tensor(array, device=device)
    return tensor.to(wide) if tensor.is_floating_point() else tensor


def map_arrays(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of each array in tuples and dicts; of what is not there nothing."""
    if isinstance(value, dict):
        return {name: map_arrays(function, part) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [map_arrays(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return None if value is None else function(value)
