"""The `olmozoo` command. No framework, and nothing else that is slow, is imported before a command needs it."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Annotated

import typer

from olmozoo.cli import checkpoint, evaluate, generate, plan, prepare, train, verify
from olmozoo.cli.common import err, printable, write
from olmozoo.errors import OlmozooError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (
    *(generate.generate, generate.chat, checkpoint.info, checkpoint.convert),
    *(verify.verify, checkpoint.diff, evaluate.evaluate, prepare.prepare, plan.plan),
):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train.train)

# What errors of the library call by its arguments' names, in the words of the command line.
OPTIONS = {
    "do_sample=False": "--no-sample",
    "do_sample=True": "--sample",
    "force=True": "--force",
    "stop_strings": "--stop",
    "give one as chat_template": "give prompts without messages",
    "give an id as pad": "give an id with --pad",
    "give an id as eos": "give an id with --eos",
    "Give another id as pad": "Give another id with --pad",
    "use tulu as template": "use --template tulu",
    "window and stride": "--window and --stride",
    **{
        name: "--" + name.replace("_", "-")
        for name in (
            *("max_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams"),
            *("length_penalty", "num_return_sequences", "batch_size", "max_shard_size", "param_dtype"),
        )
    },
}
# Words that are options only where an error begins with their value.
VALUES = (
    *(
        "backend",
        "backends",
        "batch",
        "device",
        "dtype",
        "eos",
        "fsdp",
        "length",
        "memory",
        "optimizer",
        "packing",
        "pad",
    ),
    *("preview", "processes", "seed", "stride", "temperature", "template", "tensor", "to", "window"),
)


def show_version(asked: bool) -> None:
    """Write the version and end, where it is asked for."""
    if asked:
        from olmozoo import __version__

        write(f"olmozoo {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """OLMo, OLMo 2, OLMo 3 and OPT in PyTorch, Keras/TensorFlow and JAX/Flax: one checkpoint, one answer."""


def main() -> None:
    """Run the command; errors that olmozoo raises on purpose are one message and exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # notices of the frameworks are not for standard error
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        app()
    except (OlmozooError, ImportError, OSError) as error:
        message = "olmozoo: " + printable(in_options(str(error)), "\n")
        err.print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def in_options(message: str) -> str:
    """An error of the library in the words of the command line."""
    message = re.sub(r"\b(" + "|".join(OPTIONS) + r")\b", lambda found: OPTIONS[found[1]], message)
    return re.sub(r"^(" + "|".join(VALUES) + r")(?= (?:is|are) )", r"--\1", message)
