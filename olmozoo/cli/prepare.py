"""`olmozoo prepare`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn

from olmozoo.cli.common import Revision, progress_bar, show, write
from olmozoo.cli.instances import show_instances

if TYPE_CHECKING:
    from olmozoo.text.tokenizer import Tokenizer
    from olmozoo.training.manifest import Manifest


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
        show_instances([(row.ids, row.mask, row.tokens) for row in found], loaded)
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
