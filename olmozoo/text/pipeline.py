"""Text in, text out, on any backend."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from olmozoo.backends import Backend, backend_class, backend_of, load
from olmozoo.checkpoint.adapters import locate
from olmozoo.errors import InputError
from olmozoo.quantization import GROUP_SIZE
from olmozoo.text.chat import Message
from olmozoo.text.encoding import pad_left
from olmozoo.text.streaming import TextIteratorStreamer
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.typing import HubOptions, StrPath

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Chat = Sequence[Message]
Prompt = str | Chat


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    Attributes:
        prompt: the text or the chat that was asked.
        text: what the model wrote, without special tokens, up to the first stop string.
        tokens: its ids, up to the token that ended it.
        prompt_tokens: how many tokens the prompt was.
    """

    prompt: Prompt
    text: str
    tokens: list[int]
    prompt_tokens: int

    @property
    def full(self) -> str | list[Message]:
        """The prompt with the answer: one text, or the chat with one message more."""
        if isinstance(self.prompt, str):
            return self.prompt + self.text
        return [*self.prompt, {"role": "assistant", "content": self.text}]


class TextGenerationPipeline:
    """Continues texts, and answers chats.

    Args:
        backend: the loaded model.
        tokenizer: its tokenizer.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.tokenizer = tokenizer

    def __call__(
        self,
        inputs: Prompt | Iterable[Prompt],
        *,
        batch_size: int = 8,
        return_full_text: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> Any:
        """What the model writes after each prompt.

        A prompt is a text, or a chat: a list of `{"role": ..., "content": ...}`, which the chat template renders as
        text. With a seed, the answer to prompt i is the same whatever the other prompts and the batches.

        Args:
            inputs: one prompt, a list of them, or any other iterable, which is read as its answers are taken.
            batch_size: prompts that run at once. A list is batched by length.
            return_full_text: give the prompt with its answer: one text, or the chat with the answer as last message.
            progress: show a progress bar on standard error.
            **settings: settings of `olmozoo.generation.GenerationConfig`, such as `max_new_tokens`, and what else
                `generate` takes. Stop strings end an answer and are not in it.

        Returns:
            For one prompt its answer, a text; for a list a list of answers in its order; for any other iterable an
            iterator. Where `num_return_sequences` is more than 1, a list of answers in place of each.

        Raises:
            InputError: a prompt is malformed or without a token, or a setting does not fit.
        """

        def give(answers: list[Answer]) -> Any:
            given = [answer.full if return_full_text else answer.text for answer in answers]
            return given if len(given) > 1 else given[0]

        options = {"batch_size": batch_size, **settings}
        if isinstance(inputs, str) or _is_chat(inputs):
            return give(self.answers([inputs], **options)[0])
        if isinstance(inputs, (list, tuple)):
            with _bar(progress, len(inputs)) as report:
                return [give(answers) for answers in self.answers(inputs, report=report, **options)]
        return self._lazily(iter(inputs), give, progress, **options)

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int = 8,
        report: Callable[[int], object] = lambda done: None,
        stream_index: int = 0,
        **settings: Any,
    ) -> list[list[Answer]]:
        """The answers to each prompt, with their tokens: as many as `num_return_sequences`.

        Args:
            prompts: texts or chats.
            batch_size: prompts that run at once; those of a like length run together.
            report: called with the number of prompts that are done.
            stream_index: the number of the first prompt's random stream.
            **settings: of `generate`.

        Raises:
            InputError: a prompt is malformed or without a token, or a setting does not fit.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        if empty := [i for i, row in enumerate(rows) if not row]:
            raise InputError(f"prompt {empty[0]} is {prompts[empty[0]]!r}, which has no token: expected at least one")
        written = self.complete(rows, batch_size=batch_size, report=report, stream_index=stream_index, **settings)
        stops = self._setting("stop_strings", settings)
        return [
            [Answer(prompt, cut(self.tokenizer.decode(ids), stops), ids, len(row)) for ids in several]
            for prompt, row, several in zip(prompts, rows, written, strict=True)
        ]

    def stream(self, prompt: Prompt, **settings: Any) -> Generator[str, None, None]:
        """The answer to one prompt, piece by piece, as it is written.

        The model runs in a thread of its own. It stops at its next token when the iterator is closed, or when an
        exception such as KeyboardInterrupt comes between two pieces.

        Args:
            prompt: a text or a chat.
            **settings: of `generate`.

        Raises:
            InputError: as in `answers`.
        """
        streamer = _Stoppable(self.tokenizer, stop_strings=_texts(self._setting("stop_strings", settings)))
        failed: list[BaseException] = []

        def write() -> None:
            try:
                self.answers([prompt], streamer=streamer, **settings)
            except BaseException as error:
                failed.append(error)
            finally:
                streamer.close()

        thread = threading.Thread(target=write, daemon=True)

        def stop() -> None:
            streamer.stopped.set()
            thread.join()

        atexit.register(stop)  # a thread that is in a framework's code when the interpreter ends aborts the process
        thread.start()
        try:
            yield from streamer
            if failed:
                raise failed[0]
        finally:
            stop()  # where an exception interrupts it, it is done again at the end
            atexit.unregister(stop)

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the model and its tokenizer into a folder, from which `pipeline` and the commands load both.

        Raises:
            CheckpointError: the folder could not be written.
        """
        self.backend.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a text, or of a chat by the chat template, up to where the assistant's answer begins.

        Raises:
            InputError: this is neither, or the model lacks some of the tokens.
        """
        ids: list[int]
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif _is_chat(prompt):
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        else:
            raise InputError(f"prompt is {prompt!r}, expected a text or a list of messages")
        self.tokenizer.check_ids(ids, self.backend.config.vocab_size)
        return ids

    def complete(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch_size: int = 8,
        report: Callable[[int], object] = lambda done: None,
        stream_index: int = 0,
        **settings: Any,
    ) -> list[list[list[int]]]:
        """What the model writes after each row of ids; see `answers`.

        Raises:
            InputError: a setting does not fit.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        samples = self._setting("do_sample", settings)
        eos = self._setting("eos_token_id", settings)
        if eos is None and "eos_token_id" not in settings:  # an explicit None switches the ends off
            eos = self.backend.config.eos_token_id
        ends = set() if eos is None else set(np.atleast_1d(eos).tolist())
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        written: dict[int, list[list[int]]] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = pad_left([rows[i] for i in batch], self.tokenizer.padding_id)
            # Each row draws from a stream of its own, so that it is the same in any batch.
            streams = {"stream_index": [stream_index + i for i in batch]} if samples else {}
            found = self.backend.generate(ids, mask, tokenizer=self.tokenizer, **streams, **settings)
            several = found[:, ids.shape[1] :].reshape(len(batch), len(found) // len(batch), -1)
            written |= {i: [_ended(row.tolist(), ends) for row in several[n]] for n, i in enumerate(batch)}
            report(len(written))
        return [written[i] for i in range(len(rows))]

    def _setting(self, name: str, settings: Mapping[str, Any]) -> Any:
        """A setting of this call, or else the model's own."""
        defaults = settings.get("generation_config") or self.backend.generation_config
        return settings[name] if name in settings else getattr(defaults, name)

    def _lazily(
        self, prompts: Iterator[Prompt], give: Callable[[list[Answer]], Any], progress: bool, **options: Any
    ) -> Iterator[Any]:
        done = options.pop("stream_index", 0)
        with _bar(progress, None) as report:
            while some := list(islice(prompts, max(1, options["batch_size"]))):
                for answers in self.answers(some, stream_index=done, **options):
                    yield give(answers)
                done += len(some)
                report(done)


def cut(text: str, stop_strings: str | Sequence[str] | None) -> str:
    """A text up to the first stop string in it."""
    return text[: min((at for stop in _texts(stop_strings) if (at := text.find(stop)) >= 0), default=len(text))]


def _texts(stop_strings: str | Sequence[str] | None) -> list[str]:
    return [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    """A row up to the token that ended it: what comes after is padding."""
    return ids[: next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))]


def _is_chat(value: Any) -> TypeIs[Chat]:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(m, Mapping) for m in value)


@contextlib.contextmanager
def _bar(shown: bool, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar; it yields a function that takes the number of prompts that are done."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("writing", total=total)
        yield lambda done: bar.update(task, completed=done)


class _Stop(Exception):
    """Ends `generate` from within its streamer."""


class _Stoppable(TextIteratorStreamer):
    def __init__(self, tokenizer: Tokenizer, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.stopped = threading.Event()

    def put(self, value: Any) -> None:
        if self.stopped.is_set():
            raise _Stop
        super().put(value)


def pipeline(
    task: str,
    model: Any,
    tokenizer: Tokenizer | StrPath | None = None,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    adapter: StrPath | None = None,
    quantization: str | None = None,
    group_size: int = GROUP_SIZE,
    **hub: Unpack[HubOptions],
) -> TextGenerationPipeline:
    """A pipeline for a task.

    Args:
        task: "text-generation".
        model: a folder, a repository on the hub, or a live causal language model of any wing, used as it is.
        tokenizer: a `Tokenizer`, a folder or a repository; default the model's folder. A live model needs one.
        backend: "pt", "tf" or "flax"; default the first that is installed.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; default an accelerator if there is one, else the CPU.
        adapter: a folder or a repository with a LoRA adapter of PEFT; default one in the model's folder.
        quantization: `int8`, `int4`, or `none` for floats; default as the folder has it (see `olmozoo.quantization`).
        group_size: of int4.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: there is no such task, backend or device; or options of loading are given with a live model.
        MissingBackendError: the backend's framework is not installed.
    """
    if task != "text-generation":
        raise InputError(f"task is {task!r}, expected 'text-generation'")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    if not isinstance(model, (str, os.PathLike)):
        given = {"backend": backend, "dtype": dtype, "device": device, "adapter": adapter, **hub}
        given |= {"quantization": quantization}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{', '.join(wrong)} given with a {type(model).__name__}, which is loaded already")
        if tokenizer is None:
            raise InputError(f"a {type(model).__name__} needs a tokenizer: pipeline(task, model, tokenizer)")
        return TextGenerationPipeline(backend_of(model), tokenizer)
    backend_class(backend).module()  # before anything is downloaded
    source = locate(model, need="model" if tokenizer is None else "weights", adapter=adapter, **hub)
    tokenizer = tokenizer or Tokenizer.from_pretrained(source.tokenizer)
    loaded = load(source.folder, backend, dtype, device, source.adapter, quantization, group_size)
    return TextGenerationPipeline(loaded, tokenizer)
