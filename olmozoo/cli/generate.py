"""`olmozoo generate` and `olmozoo chat`."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from olmozoo.cli.common import (
    Backend,
    Dtype,
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Revision,
    Sample,
    Seed,
    Temperature,
    TopK,
    TopP,
    _write,
    err,
)
from olmozoo.errors import InputError, OlmozooError


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file; a .jsonl has a prompt or messages in each line.")
    ] = None,
    backend: Backend = None,
    max_new_tokens: MaxNewTokens = 64,
    stream: Annotated[bool, typer.Option(help="Write the answer while it is made.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write a line of JSON for each answer: prompt, text, tokens, prompt_tokens.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts that run at once.")] = 8,
    sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="No run of so many tokens comes twice.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of beam search.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Above 0, beam search prefers longer answers.")] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; give it several times.")] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Continue a prompt, and print the prompt and its continuation.

    Decoding is greedy unless the model's generation_config.json or an option says otherwise.
    """
    from olmozoo.text.pipeline import pipeline

    prompts = _prompts(prompt, file)
    if stream and (as_json or num_return_sequences > 1 or num_beams not in (None, 1)):
        raise InputError("--stream writes one answer as text: leave out --json, --num-return-sequences and --num-beams")
    settings = _settings(
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        num_beams=num_beams,
        length_penalty=length_penalty,
        num_return_sequences=num_return_sequences if num_return_sequences != 1 else None,
        stop_strings=stop or None,
        seed=seed,
    )
    with err.status(f"loading {model}"):
        write = pipeline("text-generation", model, backend=backend, dtype=dtype, revision=revision)
    if stream:
        for n, text in enumerate(prompts):
            _write(text if isinstance(text, str) else "")
            for piece in write.stream(text, stream_index=n, **settings):
                _write(piece)
            _write("\n")
        return
    with err.status("writing"):
        answers = write.answers(prompts, batch_size=batch_size, **settings)
    for answer in (one for several in answers for one in several):
        if as_json:
            _write(f"{json.dumps(vars(answer), ensure_ascii=False)}\n")
        else:
            _write(f"{answer.full if isinstance(answer.prompt, str) else answer.text}\n")


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before the chat.")] = None,
    backend: Backend = None,
    max_new_tokens: MaxNewTokens = 512,
    sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Talk with a model that has a chat template. Ctrl-C stops an answer, Ctrl-D leaves."""
    from olmozoo.text.pipeline import pipeline

    settings = _settings(
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with err.status(f"loading {model}"):
        write = pipeline("text-generation", model, backend=backend, dtype=dtype, revision=revision)
    if "default" not in write.tokenizer.chat_templates:
        # A made-up format would look like a chat, and the model was never trained on it.
        raise InputError(
            f"{model} has no chat template, so it is no chat model: continue texts with `olmozoo generate`"
        )
    _talk(write, [] if system is None else [{"role": "system", "content": system}], settings)


def _talk(write: Any, opening: list[dict[str, str]], settings: dict[str, Any]) -> None:
    """Read lines and answer them, until /exit or the input's end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for `input`)

    _write("/reset forgets the chat, /exit or Ctrl-D leaves, Ctrl-C stops an answer\n")
    messages = list(opening)
    for turn in itertools.count():
        try:
            line = input("> ").strip()
            if line == "/exit":
                return
            if line == "/reset":
                messages = list(opening)
                _write("the chat is forgotten\n")
            elif line.startswith("/"):
                _write(f"there is no {line.split()[0]}: /reset or /exit\n")
            elif line:
                messages = _answer(write, [*messages, {"role": "user", "content": line}], turn, settings)
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:  # wherever it comes, a second one after an answer's included
            _write("\n")


def _answer(write: Any, messages: list[dict[str, str]], turn: int, settings: dict[str, Any]) -> list[dict[str, str]]:
    """Write the answer to a chat, and return the chat with it; without the question too, if nothing was written."""
    pieces: list[str] = []
    try:
        with contextlib.closing(write.stream(messages, stream_index=turn, **settings)) as answer:
            for piece in answer:
                pieces.append(piece)
                _write(piece)
    except KeyboardInterrupt:
        _write(" [stopped]")
    except OlmozooError as error:  # such as a chat that has grown too long
        _write(f"olmozoo: {error}")
    _write("\n")
    return [*messages, {"role": "assistant", "content": "".join(pieces)}] if pieces else messages[:-1]


def _prompts(prompt: str | None, file: Path | None) -> list[Any]:
    """What `generate` is to continue: texts and chats."""
    if prompt is not None and file is not None:
        raise InputError("a prompt and --file: expected one of them")
    if file is None and prompt not in (None, "-"):
        return [prompt]
    if file is None and prompt is None and sys.stdin.isatty():
        raise InputError("no prompt: give one, or --file, or pipe a text in")
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file or 'standard input'} is not UTF-8 at byte {error.start}") from error
    if file is None or file.suffix != ".jsonl":
        return [text.removesuffix("\n")]  # editors end a file so, and the model would read it
    return [_prompt(line, f"{file}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _prompt(line: str, where: str) -> Any:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("prompt"), str):
        return data["prompt"]
    if isinstance(data, dict) and isinstance(data.get("messages"), list):
        return data["messages"]
    raise InputError(f"{where}: expected an object with a prompt, or with messages")


def _settings(**given: Any) -> dict[str, Any]:
    """The options that were given. One of sampling turns sampling on."""
    settings = {name: value for name, value in given.items() if value is not None}
    if "do_sample" not in settings and settings.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        settings["do_sample"] = True
    return settings
