"""The `olmozoo` command. No framework, and nothing else that is slow, is imported before a command needs it."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olmozoo.errors import InputError, OlmozooError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="OLMo, OLMo 2 and OPT in PyTorch, Keras/TensorFlow and JAX/Flax: one checkpoint, one answer.",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A folder, or a repository on the hub such as allenai/OLMo-2-0425-1B.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Backend = Annotated[str | None, typer.Option(help="pt, tf or flax; default the first that is installed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to write.")]
Sample = Annotated[bool | None, typer.Option(help="Draw tokens, or take the likeliest; default the model's own way.")]
Temperature = Annotated[float | None, typer.Option(help="Sample with scores divided by this.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many of the likeliest tokens; 0 for all.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the fewest tokens that make up this probability.")]
MinP = Annotated[float | None, typer.Option(help="Sample from tokens at least so probable beside the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, tokens of the text so far become rarer.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling; the same gives the same text on every backend.")]
Dtype = Annotated[str | None, typer.Option(help="float64, float32, bfloat16 or float16; default the checkpoint's own.")]


@app.command()
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
    from olmozoo.pipeline import pipeline

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


@app.command()
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
    from olmozoo.pipeline import pipeline

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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def info(model: Model, revision: Revision = None) -> None:
    """Show a model's config, its parameters by group and their size, from config.json alone."""
    from olmozoo.checkpoint import DTYPES
    from olmozoo.families.base import ModelConfig

    config = ModelConfig.from_pretrained(model, revision=revision)
    fields = Table("field", "value", title=f"{config.name}: config")
    for name, value in sorted(config.to_dict().items()):
        fields.add_row(*(escape(_printable(text)) for text in (name, value)))
    out.print(fields)

    counts = config.count_parameters()
    total = sum(counts.values())
    groups = Table("group", "parameters", "share", title="parameters of the causal language model")
    for group, count in counts.items():
        groups.add_row(group, f"{count:,}", f"{count / total:.1%}")
    groups.add_section()
    groups.add_row("total", f"{total:,}", "100.0%")
    for column in groups.columns[1:]:
        column.justify = "right"
    out.print(groups)

    sizes = Table("dtype", "weights", "cache per token", title="memory")
    cache = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
    for dtype in DTYPES.values():
        sizes.add_row(dtype.name, _bytes(total * dtype.itemsize), _bytes(cache * dtype.itemsize))
    for column in sizes.columns[1:]:
        column.justify = "right"
    out.print(sizes)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A folder or a repository, with weights in any of the formats.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(help="safetensors, pt-bin, keras, keras-weights, savedmodel, flax-msgpack or orbax."),
    ],
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str, typer.Option(help="The most bytes a file, for safetensors, pt-bin and flax-msgpack.")
    ] = "5GB",
    verify: Annotated[bool, typer.Option(help="Read what was written, and compare every tensor bit for bit.")] = False,
    revision: Revision = None,
) -> None:
    """Write a checkpoint in another framework's format, with its config and tokenizer, tensor by tensor.

    The folder takes its place when it is whole; before that, what was there stays as it was.
    """
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    from olmozoo.convert import convert_checkpoint

    columns = (*Progress.get_default_columns()[:-1], DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"reading {source}", total=None)
        convert_checkpoint(
            source,
            target,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            progress=lambda done, total: bar.update(task, description="writing", completed=done, total=total),
            revision=revision,
        )
    _write(f"{target}\n")


@app.command()
def verify(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="A second folder or repository: A is compared with this B, files and answers.")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Of pt, tf, flax, the first is the reference; default all. With --against, the first runs A and the "
            "others B (one alone runs both); default the first that is installed."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float64, float32, or bfloat16 and float16, which are held to a band of rounding.")
    ] = "float64",
    prompt: Annotated[list[str] | None, typer.Option(help="A text of the batch; give it several times.")] = None,
    attentions: Annotated[bool, typer.Option("--attentions", help="Compare attention weights too.")] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Show the likeliest next tokens and divergences.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the divergence by layer into this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the whole report, with plots, into this web page.")] = None,
    revision: Revision = None,
    against_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the second.")] = None,
) -> None:
    """Run one left-padded batch through the backends and compare every layer. Exit code 1 where a bound is broken."""
    from importlib.util import find_spec

    from olmozoo import verify as room
    from olmozoo.backend import BACKENDS, installed

    if (plot or html) and find_spec("matplotlib") is None:
        raise InputError("--plot and --html need matplotlib: pip install 'olmozoo[plot]'")
    default = installed()[:1] if against else list(BACKENDS)
    with err.status("starting") as status:
        report = room.verify(
            model,
            against=against,
            backends=[name.strip() for name in backends.split(",") if name.strip()] if backends else default,
            dtype=dtype,
            prompts=prompt,
            attentions=attentions,
            logits=logits,
            progress=lambda text: status.update(escape(_printable(text))),
            revision=revision,
            against_revision=against_revision,
        )
        if plot is not None:
            room.plot(report, plot)
        if html is not None:
            room.write_html(report, html)
    if report.weights is not None:
        _show_diff(report.weights, report.weights.differing[:LISTED])
    _show_report(report)
    if not report.ok:
        raise typer.Exit(1)


def _show_report(report: Any) -> None:
    """Write a `Report` as tables and a verdict."""
    table = Table("layer", title=f"difference from {report.reference} in {report.dtype}; bound {report.bound:g}")
    for label in report.compared:
        table.add_column(f"{label}: largest", justify="right")
        table.add_column("relative", justify="right")
    for name in dict.fromkeys(row.name for row in report.rows):
        cells = {row.backend: row for row in report.rows if row.name == name}
        style = None if all(row.ok for row in cells.values()) else "bold red"
        pairs = [(cells[la].largest, cells[la].relative) if la in cells else () for la in report.compared]
        texts = [f"{value:.2e}" for pair in pairs for value in pair] if all(pairs) else ["-"] * 2 * len(pairs)
        table.add_row(name, *texts, style=style)
    out.print(table)
    if report.band:
        band = Table("layer", title=f"distance from the float32 answer in {report.dtype}")
        labels = list(dict.fromkeys(entry.backend for entry in report.band))
        for heading in (*labels, "expected of rounding", "bound"):
            band.add_column(heading, justify="right")
        for name in dict.fromkeys(entry.name for entry in report.band):
            entries = [entry for entry in report.band if entry.name == name]
            numbers = [*(entry.distance for entry in entries), entries[0].expected, entries[0].allowed]
            style = None if all(entry.ok for entry in entries) else "bold red"
            band.add_row(name, *(f"{value:.2e}" for value in numbers), style=style)
        out.print(band)
    for entry in report.next_tokens:
        tokens = Table("token", title=escape(f"likeliest after {entry.prompt!r}"))
        for label in entry.probabilities:
            tokens.add_column(label, justify="right")
        for i, token in enumerate(entry.tokens):
            tokens.add_row(escape(repr(token)), *(f"{shares[i]:.6f}" for shares in entry.probabilities.values()))
        out.print(tokens)
    for label, (mean, largest) in report.divergence.items():
        out.print(f"KL divergence of {label} from {report.reference}: mean {mean:.2e}, largest {largest:.2e} nats")
    for label, share in report.agreement.items():
        out.print(f"next token: {label} agrees with {report.reference} at {share:.1%} of positions")
    for name in report.bad_weights:
        out.print(f"[bold red]not finite:[/] {escape(_printable(name))} holds NaN or infinity")
    for note in report.notes:
        out.print(f"[bold red]not alike:[/] {escape(note)}")
    out.print(f"[green]{report.verdict}[/]" if report.ok else f"[bold red]{report.verdict}[/]")


@app.command()
def diff(
    a: Model,
    b: Annotated[str, typer.Argument(help="The folder or repository to compare it with.")],
    every: Annotated[bool, typer.Option("--all", help="List every tensor, also those that are the same.")] = False,
    as_json: AsJson = False,
    revision_a: Annotated[str | None, typer.Option(help="Branch, tag or commit of repository A.")] = None,
    revision_b: Annotated[str | None, typer.Option(help="Branch, tag or commit of repository B.")] = None,
) -> None:
    """Compare the configs and weights of two checkpoints, with no framework. Exit code 1 where something differs."""
    from olmozoo import diff as room

    with err.status("comparing") as status:
        found = room.diff(
            a,
            b,
            revision_a=revision_a,
            revision_b=revision_b,
            progress=lambda text: status.update(escape(_printable(text))),
        )
    if as_json:
        _write(f"{json.dumps(found.to_dict(every), default=str)}\n")
    else:
        _show_diff(found, found.tensors if every else found.differing[:LISTED])
    if not found.same:
        raise typer.Exit(1)


LISTED = 30  # tensors that `diff` and `verify` list unless told otherwise


def _printable(value: Any) -> str:
    """The text of a value from a file; half a surrogate pair, which no terminal takes, is spelled out."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _show_diff(found: Any, tensors: list[Any]) -> None:
    """Write a `Diff` as tables, with these of its tensors."""
    if found.config:
        fields = Table("field", "A", "B", title="config")
        for entry in found.config:
            fields.add_row(*(escape(_printable(text)) for text in (entry.name, entry.a, entry.b)))
        out.print(fields)
    if tensors:
        table = Table("tensor", "A", "B", title="weights")
        for column in ("differing", "largest", "relative", "NaN A/B", "inf A/B"):
            table.add_column(column, justify="right")
        for row in tensors:
            numbers = ["", "", "", "", ""]
            if row.a and row.b and row.a.partition(" ")[2] == row.b.partition(" ")[2]:
                share = f"{row.differing / max(row.elements, 1):.1%}"
                numbers = [f"{row.differing:,} ({share})", f"{row.largest:.2e}", f"{row.relative:.2e}"]
                numbers += [f"{row.nan_a:,}/{row.nan_b:,}", f"{row.inf_a:,}/{row.inf_b:,}"]
            sides = [escape(side or "(absent)") for side in (row.a, row.b)]
            table.add_row(escape(_printable(row.name)), *sides, *numbers, style=None if row.same else "bold")
        Console(width=max(out.width, 140) if not out.is_terminal else None).print(table)
    if len(found.differing) > len(tensors):
        out.print(f"... and {len(found.differing) - len(tensors):,} more that differ: --all lists them")
    count = f"different: {len(found.differing):,} of {len(found.tensors):,} tensors, {len(found.config)} in the config"
    out.print("[green]the same config and the same weights[/]" if found.same else f"[bold red]{count}[/]")


@app.command()
def evaluate(
    model: Model,
    file: Annotated[Path, typer.Argument(help="A .txt, or a .jsonl of texts or of multiple-choice questions.")],
    backend: Backend = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window; default the model's most, up to 1024.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default half a window.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that run at once.")] = 4,
    as_json: AsJson = False,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Measure perplexity and bits per byte of texts, or accuracy on multiple-choice questions.

    A line of a .jsonl is {"text": ...}, or {"context": ..., "choices": [...], "answer": ...}.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from olmozoo import evaluate as room

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        result = room.evaluate(
            model,
            file,
            backend=backend,
            dtype=dtype,
            window=window,
            stride=stride,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, description="scoring", completed=done, total=total),
            revision=revision,
        )
    if as_json:
        sys.stdout.write(f"{json.dumps(result.to_dict())}\n")
        return
    table = Table("measure", "value", title=file.name)
    table.columns[1].justify = "right"
    if isinstance(result, room.Perplexity):
        table.add_row("perplexity", f"{result.perplexity:.4f}")
        table.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
        table.add_row("texts", f"{result.documents:,}")
        table.add_row("tokens scored", f"{result.tokens:,}")
        table.add_row("bytes", f"{result.bytes:,}")
    else:
        table.add_row("accuracy", f"{result.accuracy:.2%}")
        table.add_row("accuracy, length-normalized", f"{result.accuracy_normalized:.2%}")
        table.add_row("questions", f"{len(result.answers):,}")
    out.print(table)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def main() -> None:
    """Run the command; errors that olmozoo raises on purpose are one message and exit code 2."""
    try:
        app()
    except (OlmozooError, ImportError, OSError) as error:
        err.print(f"olmozoo: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
