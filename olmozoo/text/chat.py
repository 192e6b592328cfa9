"""Chat templates: a repository's Jinja programs, which render messages as the text that its model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmozoo.errors import CheckpointError, InputError
from olmozoo.hub import CHAT_TEMPLATES

Message = Mapping[str, Any]
DEPTH = 100  # of lists and objects in a message


def chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The repository's chat templates by name; files of their own go before tokenizer_config.json."""
    files = {path.stem: path for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))}
    if (single := folder / "chat_template.jinja").is_file():
        files["default"] = single
    if files:
        return {name: _read(path) for name, path in files.items()}
    listed = settings.get("chat_template")
    try:
        if isinstance(listed, list):
            listed = {entry["name"]: entry["template"] for entry in listed}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: chat_template has an entry without name and template") from error
    templates = {} if listed is None else listed if isinstance(listed, dict) else {"default": listed}
    for name, template in templates.items():
        if not isinstance(template, str):
            raise CheckpointError(f"{folder}: chat template {name!r} is {template!r}, expected text")
    return templates


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable text: {error}") from error


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of a chat out of plain values; keys that hold None are left out.

    Raises:
        InputError: a message is malformed.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f"messages are {messages!r}, expected a list of at least one")
    checked = []
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {n} is {message!r}, expected an object with a role and a content")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise InputError(f"message {n} has the content {message.get('content')!r}, expected text")
        kept = {key: value for key, value in message.items() if value is not None}
        checked.append(plain(kept, f"message {n}"))
    return checked


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy out of JSON's types alone: the methods of anything else would be in the template's reach."""
    if depth > DEPTH:
        raise InputError(f"{where} is nested more than {DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key, where, depth + 1): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where, depth + 1) for item in value]
    raise InputError(f"{where} holds a value of type {type(value).__name__}, expected what JSON can say")


def render_chat(
    source: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """A chat as text, by a template.

    Args:
        source: the template.
        messages: the chat so far.
        add_generation_prompt: end with the words that open the assistant's answer.
        continue_final_message: end with the last words of the last message; a text names the key that has them.
        variables: further names for the template.

    Returns:
        The text, and the ranges of characters that the template marks as the assistant's.

    Raises:
        InputError: a message is malformed, or the template is no program, fails, or takes or makes too much.
    """
    from olmozoo.text.sandbox import compile_template, run_template

    chat = checked(messages)
    if continue_final_message and add_generation_prompt:
        raise InputError("continue_final_message and add_generation_prompt exclude each other: choose one")
    final = _mark_end(chat, continue_final_message) if continue_final_message else ""
    try:
        template = compile_template(source)
    except Exception as error:  # Jinja's and Python's compilers fail in many ways
        line, message = getattr(error, "lineno", None), getattr(error, "message", None)
        where = "" if line is None else f"line {line}: "
        reason = message or f"{type(error).__name__}: {error}"
        raise InputError(f"the chat template is not Jinja: {where}{reason}") from error
    names = {**plain(dict(variables), "template variable"), "messages": chat}
    try:
        text, spans = run_template(template, {**names, "add_generation_prompt": add_generation_prompt})
    except Exception as error:  # a template may fail in any way a program can
        raise InputError(f"the chat template failed: {type(error).__name__}: {error}") from error
    return (_cut_at_mark(text, final) if continue_final_message else text), spans


# Ends the words that an answer continues. Templates strip messages, so that the mark shows whether they did.
_MARK = "\ue000 the message continues here\ue001 "


def _mark_end(chat: list[dict[str, Any]], key: bool | str) -> str:
    """Mark the end of the last message's words; returns these."""
    name = key if isinstance(key, str) else "content"
    words = chat[-1].get(name)
    if isinstance(words, str):
        chat[-1][name] = words + _MARK
        return words
    for block in reversed(words if isinstance(words, list) else []):
        if isinstance(block, dict) and isinstance(text := block.get("text"), str):
            block["text"] = text + _MARK
            return text
    raise InputError(f"the last message has no text as its {name} to continue")


def _cut_at_mark(text: str, words: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or words.strip() not in text:
        raise InputError("the chat template leaves the last message out, or changes it: there is nothing to continue")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
