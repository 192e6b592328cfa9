"""Rows of tokens on the console: what is learned, what is context, what is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from olmozoo.cli.common import out, printable
from olmozoo.typing import Array

if TYPE_CHECKING:
    from olmozoo.text.tokenizer import Tokenizer

# What is not learned is dim, what is learned is green and in brackets where there are no colours.
LEARNED, CONTEXT, PADDING = "green", "dim", "dim red"
OPEN, CLOSE = "\u27e6", "\u27e7"


def show_instances(rows: Sequence[tuple[Array, Array, int]], tokenizer: Tokenizer | None) -> None:
    """Print rows token by token: learned, context, padding. Every other token is underlined.

    Args:
        rows: of each the ids, bools that say which of them are learned, and the number of tokens before the padding.
        tokenizer: without one, ids are printed.
    """
    colors = out.color_system is not None and not out.no_color
    marks = f"[{LEARNED}]learned[/] [{CONTEXT}]context[/] [{PADDING}]padding[/]" if colors else f"{OPEN}learned{CLOSE}"
    out.print(f"{marks}; \\n ends a line", highlight=False, soft_wrap=True)
    for n, (ids, mask, tokens) in enumerate(rows):
        padding = len(ids) - tokens
        out.print(
            f"instance {n}: {tokens:,} tokens, {int(mask[1:].sum()):,} to learn, {padding:,} of padding",
            style="bold",
            highlight=False,
            soft_wrap=True,
        )
        text = Text()
        before = False
        for k, (content, learned) in enumerate(_pieces(ids[:tokens].tolist(), mask.tolist(), tokenizer)):
            if not colors and learned != before:
                text.append(OPEN if learned else CLOSE)
            before = learned
            text.append(content, style=f"{LEARNED if learned else CONTEXT}{' underline' if k % 2 else ''}")
        if not colors and before:
            text.append(CLOSE)
        if padding:
            last = int(ids[-1])
            name = str(last) if tokenizer is None else printable(tokenizer.backend.id_to_token(last))
            text.append(f"{name} x {padding:,}", style=PADDING)
        out.print(text, soft_wrap=True)


def _pieces(ids: list[int], mask: list[bool], tokenizer: Tokenizer | None) -> Iterator[tuple[str, bool]]:
    """Tokens as text without control characters, and whether each is learned.

    Tokens that are parts of one character come together.
    """
    if tokenizer is None:
        yield from ((f"{i} ", learned) for i, learned in zip(ids, mask, strict=False))
        return
    texts = tokenizer.token_bytes()
    waiting, last = b"", False
    for i, learned in zip(ids, mask, strict=False):
        if waiting and learned != last:
            yield _shown(waiting), last
            waiting = b""
        waiting, last = waiting + (texts[i] if i < len(texts) else f"<{i}>".encode()), learned
        try:
            waiting.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and len(waiting) - error.start < 4:
                continue
        yield _shown(waiting), last
        waiting = b""
    if waiting:
        yield _shown(waiting), last


def _shown(token: bytes) -> str:
    return "\\n\n".join(map(printable, token.decode("utf-8", "replace").split("\n")))
