"""`olmozoo prepare`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn
from rich.text import Text

from olmozoo.cli.common import Revision, out, printable, progress_bar, show, write

if TYPE_CHECKING:
    from olmozoo.text.tokenizer import Tokenizer
    from olmozoo.training.manifest import Manifest
    from olmozoo.training.prepare import Instance


def prepare(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Files (.txt, .jsonl, .parquet; .gz and .zst of the first two), folders with such, globs.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="A folder or a repository with the tokenizer.")],
    length: Annotated[int, typer.Option(help="Tokens of an instance: the model's max_sequence_length.")],
    template: Annotated[
        str | None, typer.Option(help="Of chats: tulu, as AI2 prepares them; default the tokenizer's own template.")
    ] = None,
    packing: Annotated[
        str | None,
        typer.Option(
            help="none: a document an instance, cut and padded. concat: documents one after the other. best-fit: "
            "documents whole, several an instance. Default: concat for texts, none for chats and prompts."
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Processes that tokenize; default one a CPU core.")] = None,
    eos: Annotated[int | None, typer.Option(help="Id that ends a document; default the tokenizer's.")] = None,
    pad: Annotated[int | None, typer.Option(help="Id that fills instances up; default the tokenizer's.")] = None,
    preview: Annotated[
        int | None, typer.Option(metavar="N", help="Show the first N instances, and write nothing.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what OUT holds.")] = False,
    revision: Revision = None,
) -> None:
    """Write texts and chats as arrays of tokens to train on, with masks of what is learned.

    A line of a .jsonl is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}.

    OUT has input_ids.npy and label_mask.npy, which AI2's trainers read too, manifest.json and the tokenizer. It is
    renamed into place when it is complete.
    """
    from olmozoo.text.tokenizer import Tokenizer
    from olmozoo.training import prepare as training

    loaded = Tokenizer.from_pretrained(tokenizer, revision=revision)
    if preview is not None:
        found = training.preview(
            data, tokenizer=loaded, length=length, template=template, packing=packing, eos=eos, pad=pad, count=preview
        )
        show_instances(found, loaded)
        return
    with progress_bar(DownloadColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("tokenizing", total=None)
        manifest = training.prepare(
            data,
            target,
            tokenizer=loaded,
            length=length,
            template=template,
            packing=packing,
            processes=os.cpu_count() or 1 if processes is None else processes,
            eos=eos,
            pad=pad,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    show_manifest(manifest, loaded)
    write(f"{target}\n")


def show_manifest(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Print what was prepared."""

    def token(i: int) -> str:
        return f"{i} {tokenizer.backend.id_to_token(i)}"

    kinds = ", ".join(f"{count:,} {kind}" for kind, count in manifest.documents.items())
    slots = manifest.instances * manifest.length
    rows = [
        ("documents", kinds),
        ("left out, nothing to learn", f"{manifest.dropped:,}"),
        ("cut", f"{manifest.truncated:,}"),
        ("template of chats", manifest.template or "none"),
        ("packing", manifest.packing),
        ("instances", f"{manifest.instances:,} of {manifest.length:,} tokens"),
        ("tokens", f"{manifest.tokens:,} ({manifest.tokens / slots:.1%}; the rest is padding)"),
        ("tokens to learn", f"{manifest.targets:,} ({manifest.targets / slots:.1%})"),
        ("dtype", manifest.dtype),
        ("eos", token(manifest.eos_token_id)),
        ("pad", token(manifest.pad_token_id)),
    ]
    show("prepared", ["", "value"], rows, texts=2)


# What is not learned is dim, what is learned is green and in brackets where there are no colours.
LEARNED, CONTEXT, PADDING = "green", "dim", "dim red"
OPEN, CLOSE = "\u27e6", "\u27e7"


def show_instances(instances: list[Instance], tokenizer: Tokenizer) -> None:
    """Print instances token by token: learned, context, padding. Every other token is underlined."""
    colors = out.color_system is not None and not out.no_color
    marks = f"[{LEARNED}]learned[/] [{CONTEXT}]context[/] [{PADDING}]padding[/]" if colors else f"{OPEN}learned{CLOSE}"
    out.print(f"{marks}; \\n ends a line", highlight=False, soft_wrap=True)
    for n, instance in enumerate(instances):
        learned = int(instance.mask[1:].sum())
        padding = len(instance.ids) - instance.tokens
        out.print(
            f"instance {n}: {instance.tokens:,} tokens, {learned:,} to learn, {padding:,} of padding",
            style="bold",
            highlight=False,
            soft_wrap=True,
        )
        text = Text()
        before = False
        for k, (content, mask) in enumerate(_pieces(instance, tokenizer)):
            if not colors and mask != before:
                text.append(OPEN if mask else CLOSE)
            before = mask
            text.append(content, style=f"{LEARNED if mask else CONTEXT}{' underline' if k % 2 else ''}")
        if not colors and before:
            text.append(CLOSE)
        if padding:
            pad = printable(tokenizer.backend.id_to_token(int(instance.ids[-1])))
            text.append(f"{pad} x {padding:,}", style=PADDING)
        out.print(text, soft_wrap=True)


def _pieces(instance: Instance, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The tokens of an instance as text without control characters, and whether each is learned.

    Tokens that are parts of one character come together.
    """
    texts = tokenizer.token_bytes()
    waiting, mask = b"", False
    tokens = zip(instance.ids[: instance.tokens].tolist(), instance.mask.tolist(), strict=False)
    for i, learned in tokens:
        if waiting and learned != mask:
            yield _shown(waiting), mask
            waiting = b""
        waiting, mask = waiting + texts[i], learned
        try:
            waiting.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and len(waiting) - error.start < 4:
                continue
        yield _shown(waiting), mask
        waiting = b""
    if waiting:
        yield _shown(waiting), mask


def _shown(token: bytes) -> str:
    return "\\n\n".join(map(printable, token.decode("utf-8", "replace").split("\n")))
