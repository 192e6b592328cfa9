"""Decoding: the prompt first, then a token at a time over a preallocated cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmozoo.errors import InputError
from olmozoo.generation.config import GenerationConfig
from olmozoo.generation.decode import decode_step, propose_draft
from olmozoo.generation.prepare import Call, finalize, prepare
from olmozoo.generation.state import State
from olmozoo.memory import SPARE
from olmozoo.outputs import GenerateOutput
from olmozoo.pt.cache import KVCache, StaticCache, TupleCache, WindowCache, cached_length, open_cache
from olmozoo.pt.layers import at_least_float32
from olmozoo.pt.parallel import Pace, root_mesh

PROGRAMS = 256  # of `torch.compile`, in a process


def without_gradients(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method in inference mode, or for a model that is split over a mesh without gradients alone.

    FSDP2 keeps the buffers of its first call, which in inference mode no training step could use.
    """

    @functools.wraps(method)
    def call(model: Any, *arguments: Any, **options: Any) -> Any:
        with torch.inference_mode() if root_mesh(model) is None else torch.no_grad():
            return method(model, *arguments, **options)

    return call


class GenerationMixin:
    """Adds `generate` to a model with a language-model head."""

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continue each row of a batch: greedily, by sampling or by beam search.

        Args:
            input_ids: (batch, seq) prompts, padded on the left, as a tensor, an array or lists; default the bos token.
            attention_mask: (batch, seq), 0 at padding; default all but pad tokens, unless a pad token also ends rows.
            generation_config: default the model's own, whose eos and pad are used where one given has none.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            past_key_values: a cache of the first positions of `input_ids`, in either form; it is not changed.
            tokenizer: an `olmozoo.Tokenizer`, which `stop_strings` need.
            streamer: gets the prompt and then each step's tokens (rows,) by `put`, then a call of `end`.
            compile: run steps after the prompt through `torch.compile`, with CUDA graphs on a GPU. The first call for a
                batch size and a length (rounded up by `olmozoo.generation.prepare.bucket`) compiles.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`; None switches a setting off.

        Returns:
            (rows, seq + new) ids of prompt and answer; of the answer alone for `inputs_embeds`. A row that has ended
            holds pad tokens; the call ends with its longest row. A `GenerateOutput` for `return_dict_in_generate`.

        Raises:
            InputError: a setting is unknown, wrong or conflicts with another; ids or shapes do not fit; the call needs
                more memory than there is; or logits are not finite.
        """
        output = self._generate(
            input_ids,
            attention_mask,
            generation_config,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            tokenizer=tokenizer,
            streamer=streamer,
            compile=compile,
            **settings,
        )
        past = output.past_key_values
        output = map_arrays(lambda x: torch.from_numpy(x).to(self.device), {**output, "past_key_values": None})
        output = GenerateOutput(**output | {"past_key_values": past})
        return output.sequences if output.logprobs is None else output

    @without_gradients
    def _generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
        **settings: Any,
    ) -> GenerateOutput:
        """`generate` with ids as NumPy arrays, in and out; the cache of the output is of tensors."""
        if inputs_embeds is not None:
            inputs_embeds = torch.as_tensor(inputs_embeds, device=self.device)
        input_ids, attention_mask, virtual = to_numpy(input_ids), to_numpy(attention_mask), 0
        if past_key_values is None and inputs_embeds is None:
            past_key_values, virtual = self._virtual_tokens(input_ids)
        if virtual:  # ids of the text itself, since the rules of decoding see them
            input_ids = np.asarray(input_ids)
            input_ids = np.concatenate([np.repeat(input_ids[:, -1:], virtual, 1), input_ids], 1)
            if attention_mask is not None:
                attention_mask = np.pad(attention_mask, ((0, 0), (virtual, 0)), constant_values=1)
        past = open_cache(past_key_values, self.config.num_hidden_layers, False)
        call = prepare(
            generation_config or self.generation_config,
            self.config,
            settings,
            own=self.generation_config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cached=cached_length(past),
            tokenizer=tokenizer,
            streamer=streamer,
            compiled=compile,
        )
        training = self.training
        self.eval()
        try:
            state, cache = self._decode(call, inputs_embeds, past, streamer, compile, virtual)
        finally:
            self.train(training)
        output = finalize(call, map_arrays(to_numpy, state))
        output.sequences = output.sequences[:, virtual:]
        if output.logprobs is not None and call.options.beams == 1:
            slots = call.layout.used_slots(int(state.count))
            pairs = cache.take(torch.tensor(slots, device=self.device))
            keys, values = zip(*pairs, strict=True)
            kept = KVCache(keys, values, len(slots))
            output.past_key_values = pairs if isinstance(past, TupleCache | None) else kept
        return output

    def _virtual_tokens(self, input_ids: Any) -> tuple[Any, int]:
        """The cache of the tokens that an adapter of PEFT puts in front of each row, and their number."""
        hook = self.__dict__.get("prepare_inputs_for_generation")  # which PEFT sets while it generates
        if hook is None:
            return None, 0
        ids = torch.as_tensor([[0]] if input_ids is None else input_ids, device=self.device)
        inputs = hook(ids, past_key_values=None)
        cache, embeds = inputs.get("past_key_values"), inputs.get("inputs_embeds")
        if embeds is not None:
            training = self.training
            cache = self.eval()(inputs_embeds=embeds[:, : -ids.shape[1]], use_cache=True).past_key_values
            self.train(training)
        if cache is not None and input_ids is None:
            raise InputError("generation after virtual tokens needs input_ids")
        return cache, cached_length(open_cache(cache, self.config.num_hidden_layers, False))

    def prepare_inputs_for_generation(self, input_ids: Tensor | None, **arguments: Any) -> dict[str, Any]:
        """The arguments of the next forward call. Libraries such as PEFT override it."""
        return {"input_ids": input_ids, **arguments}

    def _decode(
        self, call: Call, inputs_embeds: Tensor | None, past: Any, streamer: Any, compile: bool, virtual: int
    ) -> tuple[State, KVCache]:
        options, layout, device, wide = call.options, call.layout, self.device, at_least_float32(self.dtype)
        xp, start = Namespace(device), options.answer_start
        values = {name: from_numpy(value, wide, device) for name, value in call.values.items()}
        state = map_arrays(lambda x: from_numpy(x, wide, device), call.state)._replace(count=0)
        mask = torch.from_numpy(call.mask).to(device)
        padded = compile or not call.mask.all()
        positions = (mask.long().cumsum(-1) - 1).clamp(0, (self.config.position_limit or len(mask[0])) - 1)
        if options.returns_cache or not any(self.config.windows):
            cache = self.init_cache(len(mask), mask.shape[1])
        else:
            spare = max(SPARE, 1 + options.draft_tokens)
            cache = WindowCache(self.config, len(mask), mask.shape[1], spare, self.dtype)
        if past is not None:
            cache.begin_with(past, layout.past_slots, device)

        pace = Pace(root_mesh(self))
        if compile and pace.mesh is not None:
            raise InputError("compile=True is for a model on one device: this one is split over a mesh")

        def read(ids: Tensor | None, start: int, end: int, embeds: Tensor | None = None, keep: int = 1) -> Tensor:
            """Logits (rows, keep, v) after reading the tokens at slots start to end of the cache."""
            pace.step()
            hook = type(self).prepare_inputs_for_generation.__get__(self)
            inputs = (hook if virtual else self.prepare_inputs_for_generation)(
                ids,
                inputs_embeds=embeds,
                past_key_values=cache,
                attention_mask=mask[:, :end] if padded else None,
                position_ids=positions[:, start:end],
                logits_to_keep=keep,
            )
            return self(**inputs, return_dict=True).logits.to(wide)

        def show(tokens: Tensor) -> None:
            if streamer is not None:
                streamer.put(tokens.cpu())

        def finished() -> bool:
            return state.count >= layout.max_new or bool(state.done.all())

        show(state.tokens[:, start - call.prompt_tokens.shape[1] + virtual : start])
        ids, embeds = None, inputs_embeds
        if embeds is None:  # of the one copy of the ids on the device
            ids = state.tokens[:: options.rows_per_prompt, start - layout.prompt + layout.cached : start]
            ids = torch.nn.functional.pad(ids, (layout.left_pad, 0))
        else:
            embeds = torch.nn.functional.pad(embeds, (0, 0, layout.left_pad, 0))
        chunk = options.prefill_chunk or layout.prompt_slots
        for begin in range(0, layout.prompt_slots, chunk):
            end = min(begin + chunk, layout.prompt_slots)
            piece = [None if x is None else x[:, begin:end] for x in (ids, embeds)]
            logits = read(piece[0], layout.past_slots + begin, layout.past_slots + end, piece[1])
        logits = logits[:, -1].repeat_interleave(options.rows_per_prompt, dim=0)
        if options.rows_per_prompt > 1:
            cache.reorder(torch.arange(len(mask), device=device).repeat_interleave(options.rows_per_prompt))
            mask, positions = (x.repeat_interleave(options.rows_per_prompt, dim=0) for x in (mask, positions))
        state, order = decode_step(xp, options, values, state, logits)
        if compile:
            read, cache = self._compiled_read(cache, mask, positions)

        while True:
            last = state.tokens[:, start + state.count - 1, None]
            show(last[:, 0])
            if finished():
                break
            if order is not None:
                cache.reorder(order)
            slot = layout.answer_start + state.count - 1  # of the last token, which is read now
            if not options.draft_tokens:
                state, order = decode_step(xp, options, values, state, read(last, slot, slot + 1)[:, -1])
                continue
            draft = propose_draft(xp, options, values, state)  # (r, draft_tokens)
            logits = read(torch.cat([last, draft], 1), slot, slot + 1 + options.draft_tokens, keep=0)
            for step in range(options.draft_tokens + 1):
                state, order = decode_step(xp, options, values, state, logits[:, step])
                if step == options.draft_tokens or finished():
                    break
                chosen = state.tokens[:, start + state.count - 1]
                if not ((chosen == draft[:, step]) | state.done).all():
                    break
                show(chosen)
            cache.rewind(layout.answer_start + state.count - 1)
        pace.finish(lambda: self(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False))
        if streamer is not None:
            streamer.end()
        return state, cache

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled step, which belongs to this object and process."""
        return {name: value for name, value in super().__getstate__().items() if name != "_step"}

    def _compiled_read(self, cache: KVCache, mask: Tensor, positions: Tensor) -> tuple[Callable[..., Tensor], KVCache]:
        """`read` for the steps after the prompt, with shapes that never change, and the cache that it uses."""
        cache = StaticCache(cache)
        step = self.__dict__.get("_step")
        if step is None:
            mode = "reduce-overhead" if mask.is_cuda else "default"
            step = self.__dict__["_step"] = torch.compile(self.forward, fullgraph=True, mode=mode)

        def read(ids: Tensor, start: int, end: int, embeds: Tensor | None = None, keep: int = 1) -> Tensor:
            cache.positions = torch.arange(start, end, device=mask.device)
            # PyTorch counts the programs of all models of a class together, and 8 would be the most.
            with torch._dynamo.config.patch(recompile_limit=PROGRAMS):
                output = step(
                    ids,
                    attention_mask=mask,
                    position_ids=positions[:, start:end].contiguous(),
                    past_key_values=cache,
                    logits_to_keep=keep,
                )
            return output.logits.to(at_least_float32(self.dtype), copy=True)

        return read, cache


class Namespace:
    """PyTorch's functions as `olmozoo.generation.state.Namespace` names them."""

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

    def take(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, indices)

    def take_along(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.gather(1, indices)

    def put(self, x: Tensor, index: int, value: Tensor) -> Tensor:
        x[:, index] = value
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


def from_numpy(array: Any, wide: torch.dtype, device: torch.device) -> Tensor:
    """An array as a tensor of its own, floating-point numbers in `wide`."""
    tensor = torch.tensor(array, device=device)
    return tensor.to(wide) if tensor.is_floating_point() else tensor


def to_numpy(value: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return value.cpu().numpy() if isinstance(value, Tensor) else value


def map_arrays(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of each array in tuples and dicts; None stays None."""
    if isinstance(value, dict):
        return {name: map_arrays(function, part) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [map_arrays(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return None if value is None else function(value)
