"""The `olmozoo` command. No framework, and nothing else that is slow, is imported before a command needs it."""

from __future__ import annotations

import sys

import typer

from olmozoo.cli import checkpoint, evaluate, generate, verify
from olmozoo.cli.common import err
from olmozoo.errors import OlmozooError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="OLMo, OLMo 2 and OPT in PyTorch, Keras/TensorFlow and JAX/Flax: one checkpoint, one answer.",
)
for command in (
    *(generate.generate, generate.chat, checkpoint.info, checkpoint.convert),
    *(verify.verify, checkpoint.diff, evaluate.evaluate),
):
    app.command()(command)


def main() -> None:
    """Run the command; errors that olmozoo raises on purpose are one message and exit code 2."""
    try:
        app()
    except (OlmozooError, ImportError, OSError) as error:
        err.print(f"olmozoo: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
