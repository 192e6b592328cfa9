"""Models for lm-eval, on any backend (`pip install olmozoo[eval]`; made for lm-eval 0.4.13).

    import lm_eval
    from olmozoo.lm_eval import OlmozooLM

    lm_eval.simple_evaluate(OlmozooLM("allenai/OLMo-2-0425-1B", backend="flax"), tasks=["arc_easy"])

Nothing else in olmozoo imports this module.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from olmozoo.errors import InputError
from olmozoo.evaluation.scoring import fit, pair, prefix, score, windows
from olmozoo.text.pipeline import cut, pipeline
from olmozoo.typing import HubOptions, StrPath

# The names that tasks use for the most tokens of an answer, the first of them first.
ANSWER_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("olmozoo")
class OlmozooLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """A checkpoint as lm-eval's `LM`.

    Args:
        pretrained: a folder, or a repository on the hub.
        backend: "pt", "tf" or "flax"; default the first that is installed.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; default an accelerator if there is one, else the CPU.
        batch_size: rows that run at once.
        max_gen_toks: the most tokens of an answer where the task does not say.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: there is no such backend or device.
    """

    def __init__(
        self,
        pretrained: StrPath,
        backend: str | None = None,
        dtype: str | None = None,
        batch_size: int = 4,
        max_gen_toks: int = 256,
        device: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        super().__init__()
        self.pipeline = pipeline("text-generation", pretrained, backend=backend, dtype=dtype, device=device, **hub)
        self.backend, self.tokenizer = self.pipeline.backend, self.pipeline.tokenizer
        self.name = os.fspath(pretrained)
        self.batch_size = int(batch_size)
        self.max_gen_toks = max_gen_toks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy decoding would write it.

        Contexts and continuations meet as in `olmozoo.evaluation.scoring.pair`; a context too long loses its beginning.
        """
        rows = [self._row(context, continuation) for context, continuation in _arguments(requests)]
        found = [(math.fsum(values), greedy) for values, greedy in self._score(rows, "scoring", disable_tqdm)]
        return self._remember("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, all of its tokens, after the bos or eos token.

        Texts longer than the model are cut into windows that share one token, so that each token is scored once.
        """
        longest = self.backend.config.max_position_embeddings
        rows, owners = [], []
        for n, (text,) in enumerate(_arguments(requests)):
            ids = np.array([prefix(self.tokenizer), *self.tokenizer.encode(text, add_special_tokens=False)], np.int64)
            self.tokenizer.check_ids(ids, self.backend.config.vocab_size)
            for start, first, end in windows(len(ids), longest + 1, longest):
                rows.append((ids[start:end], end - first))
                owners.append(n)
        totals = [0.0] * len(requests)
        for n, (values, _) in zip(owners, self._score(rows, "scoring windows", disable_tqdm), strict=True):
            totals[n] += math.fsum(values)
        return self._remember("loglikelihood_rolling", requests, totals)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first of the texts in `until`.

        A context too long for the model with its answer loses its beginning. Further settings go to `generate`.

        Raises:
            InputError: there is no room for an answer, or `generate` lacks a setting.
        """
        groups: dict[str, list[int]] = {}
        for n, (_, options) in enumerate(_arguments(requests)):
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(n)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="writing", disable=disable_tqdm) as bar:
            for options, members in groups.items():
                settings = self._settings(json.loads(options))
                longest = self.backend.config.max_position_embeddings - settings["max_new_tokens"]
                if longest < 1:
                    raise InputError(f"max_gen_toks is {settings['max_new_tokens']}: no room for a context before it")
                rows = [self._context(requests[n].args[0])[-longest:] for n in members]
                advance = _advance(bar)
                written = self.pipeline.complete(rows, batch_size=self.batch_size, report=advance, **settings)
                for n, (ids,) in zip(members, written, strict=True):
                    answers[n] = cut(self.tokenizer.decode(ids), settings.get("stop_strings"))
        return self._remember("generate_until", requests, answers)

    # lm-eval asks for these where a task is run with the chat template.

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer, for lm-eval's cache of requests."""
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that a name stands for, or `True` for the default one; None for none."""
        if chat_template is False:
            return None
        return self.tokenizer.chat_templates.get("default" if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text."""
        return self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _row(self, context: str, continuation: str) -> tuple[Any, int]:
        before, after = pair(self.tokenizer, context, continuation)
        return fit(self.backend, self.tokenizer, before, after)

    def _context(self, text: str) -> list[int]:
        return self.pipeline.encode(text) or [prefix(self.tokenizer)]

    def _score(self, rows: Sequence[tuple[Any, int]], what: str, disable_tqdm: bool) -> list[tuple[Any, bool]]:
        with tqdm(total=len(rows), desc=what, disable=disable_tqdm) as bar:
            advance = _advance(bar)
            return score(self.backend, rows, self.batch_size, lambda done, total: advance(done))

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """A task's options as settings of `generate`. As in lm-eval, a temperature above 0 samples."""
        lengths = [options.pop(name) for name in ANSWER_LENGTHS if name in options]
        until = options.pop("until", None) or []
        samples = bool(options.pop("do_sample", options.get("temperature", 0) > 0))
        if not samples:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_k", "top_p")}
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        options |= {"stop_strings": stops} if stops else {}
        return {**options, "do_sample": samples, "max_new_tokens": int(lengths[0] if lengths else self.max_gen_toks)}

    def _remember(self, kind: str, requests: list[Instance], results: list[Any]) -> list[Any]:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def _arguments(requests: Iterable[Instance]) -> list[Any]:
    return [request.args for request in requests]


def _advance(bar: Any) -> Callable[[int], object]:
    """Moves a bar to what is done of a part that begins where the bar stands."""
    start = bar.n
    return lambda done: bar.update(start + done - bar.n)
