"""`olmozoo generate` and `olmozoo chat`."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from olmozoo.cli.common import (
    BEAMS,
    OUTPUT,
    Adapter,
    AllowLong,
    Backend,
    Device,
    Dtype,
    GroupSize,
    MaxAnswerTokens,
    MaxNewTokens,
    MinP,
    Model,
    Quantization,
    RepetitionPenalty,
    Revision,
    Sample,
    Seed,
    Temperature,
    TopK,
    TopP,
    err,
    import_backend,
    progress_bar,
    write,
)
from olmozoo.errors import InputError, OlmozooError
from olmozoo.quantization import GROUP_SIZE

if TYPE_CHECKING:
    from olmozoo.text.pipeline import TextGenerationPipeline

THINK = "<think>"  # which the templates of reasoning models may put in front of an answer
ANSWER = 512  # the most tokens of an answer in a chat, where no option says otherwise


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Read the prompt from a file; - is standard input; a .jsonl has a prompt or messages in each line."
        ),
    ] = None,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="The file or standard input has JSON lines, whatever its name.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts that run at once.")] = 8,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    group_size: GroupSize = GROUP_SIZE,
    max_new_tokens: MaxNewTokens = 64,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer; give it several times.", rich_help_panel=OUTPUT),
    ] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Answers to each prompt.", rich_help_panel=OUTPUT)] = 1,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No run of so many tokens comes twice.", rich_help_panel=OUTPUT)
    ] = None,
    allow_long: AllowLong = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write the answer while it is made.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Write a line of JSON for each answer: prompt, text, tokens, prompt_tokens.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of beam search.", rich_help_panel=BEAMS)] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Above 0, beam search prefers longer answers.", rich_help_panel=BEAMS)
    ] = None,
) -> None:
    """Continue a prompt, and print the prompt and its continuation.

    Decoding is greedy unless the model's generation_config.json or an option says otherwise.
    """
    prompts = _prompts(prompt, file, jsonl)
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
    pipe = _load(
        model,
        backend=backend,
        dtype=dtype,
        device=device,
        revision=revision,
        adapter=adapter,
        quantization=quantization,
        group_size=group_size,
    )
    tokens = _count_tokens(pipe, prompts, max_new_tokens, allow_long)
    if stream:
        for n, text in enumerate(prompts):
            write(text if isinstance(text, str) else "")
            for piece in pipe.stream(text, stream_index=n, **settings):
                write(piece)
            write("\n")
        return
    with progress_bar() as bar:
        task = bar.add_task(f"generating from {tokens:,} tokens", total=len(prompts))
        answers = pipe.answers(
            prompts, batch_size=batch_size, report=lambda done: bar.update(task, completed=done), **settings
        )
    for answer in (one for several in answers for one in several):
        if as_json:
            write(f"{json.dumps(vars(answer), ensure_ascii=False)}\n")
        else:
            write(f"{answer.full if isinstance(answer.prompt, str) else answer.text}\n")


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message, before the chat.")] = None,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    group_size: GroupSize = GROUP_SIZE,
    max_new_tokens: MaxAnswerTokens = None,
    sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    allow_long: AllowLong = False,
) -> None:
    """Talk with a model that has a chat template. Ctrl-C stops an answer, Ctrl-D leaves."""
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
    pipe = _load(
        model,
        backend=backend,
        dtype=dtype,
        device=device,
        revision=revision,
        adapter=adapter,
        quantization=quantization,
        group_size=group_size,
    )
    if "default" not in pipe.tokenizer.chat_templates:
        # A made-up format would look like a chat, and the model was never trained on it.
        raise InputError(
            f"{model} has no chat template, so it is no chat model: continue texts with `olmozoo generate`"
        )
    _talk(pipe, [] if system is None else [{"role": "system", "content": system}], settings, allow_long)


def _talk(
    pipe: TextGenerationPipeline, opening: list[dict[str, str]], settings: dict[str, Any], allow_long: bool
) -> None:
    """Read lines and answer them, until /exit or the input's end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for `input`)

    write("/reset forgets the chat, /exit or Ctrl-D leaves, Ctrl-C stops an answer\n")
    messages = list(opening)
    for number in itertools.count():
        try:
            line = input("> ").strip()
            if line == "/exit":
                return
            if line == "/reset":
                messages = list(opening)
                write("the chat is forgotten\n")
            elif line.startswith("/"):
                write(f"there is no {line.split()[0]}: /reset or /exit\n")
            elif line:
                messages = _answer(pipe, [*messages, {"role": "user", "content": line}], number, settings, allow_long)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:  # wherever it comes, a second one after an answer's included
            write("\n")


def _load(model: str, *, backend: str | None, **options: Any) -> TextGenerationPipeline:
    """The pipeline of a model; arguments as of `pipeline`."""
    from olmozoo.text.pipeline import pipeline

    with err.status(f"loading {model}"):
        import_backend(backend)
        return pipeline("text-generation", model, backend=backend, **options)


def _answer(
    pipe: TextGenerationPipeline,
    messages: list[dict[str, str]],
    number: int,
    settings: dict[str, Any],
    allow_long: bool,
) -> list[dict[str, str]]:
    """Write the answer to a chat, and return the chat with it; without the question too, if nothing was written.

    Where the template opens a thought, its `<think>` is a part of the answer.
    """
    opened, pieces = "", list[str]()
    try:
        limit = settings.get("max_new_tokens")
        length = _count_tokens(pipe, [messages], limit or 1, allow_long)
        if limit is None:
            free = pipe.backend.config.max_position_embeddings - length
            settings = {**settings, "max_new_tokens": ANSWER if allow_long else min(ANSWER, free)}
        prompt = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if prompt.endswith(THINK):
            opened = THINK
            write(THINK)
        with contextlib.closing(pipe.stream(messages, stream_index=number, **settings)) as answer:
            for piece in answer:
                pieces.append(piece)
                write(piece)
    except KeyboardInterrupt:
        write(" [stopped]")
    except OlmozooError as error:  # such as a chat that has grown too long
        write(f"olmozoo: {error}")
    write("\n")
    return [*messages, {"role": "assistant", "content": opened + "".join(pieces)}] if pieces else messages[:-1]


def _count_tokens(pipe: TextGenerationPipeline, prompts: list[Any], max_new_tokens: int, allow_long: bool) -> int:
    """The tokens of all prompts.

    Raises:
        InputError: a prompt and its answer may be longer than what the model was trained for.
    """
    lengths = [len(pipe.encode(prompt)) for prompt in prompts]
    limit, longest = pipe.backend.config.max_position_embeddings, max(lengths, default=0)
    if longest + max_new_tokens > limit and not allow_long:
        raise InputError(
            f"a prompt of {longest:,} tokens and --max-new-tokens {max_new_tokens:,} are more than the {limit:,} "
            "positions that the model was trained for: shorten one of them, or give --allow-long"
        )
    return sum(lengths)


def _prompts(prompt: str | None, file: Path | None, jsonl: bool) -> list[Any]:
    """What `generate` is to continue: texts and chats."""
    if prompt is not None and file is not None:
        raise InputError("a prompt and --file: expected one of them")
    if jsonl and prompt not in (None, "-"):
        raise InputError("--jsonl is for --file and standard input, not for a prompt")
    if file is not None and str(file) == "-":
        file, prompt = None, "-"
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
    if not jsonl and (file is None or file.suffix != ".jsonl"):
        return [text.removesuffix("\n")]  # editors end a file so, and the model would read it
    name = file or "standard input"
    return [_prompt(line, f"{name}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]


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
    """The options that were given. One of sampling enables sampling."""
    settings = {name: value for name, value in given.items() if value is not None}
    if "do_sample" not in settings and settings.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        settings["do_sample"] = True
    return settings
