"""Chat templates: a repository's Jinja programs, which render messages as the text that its model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from olmozoo.errors import CheckpointError, InputError
from olmozoo.hub import CHAT_TEMPLATES

Message = Mapping[str, Any]


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


def plain(value: Any, where: str) -> Any:
    """A copy out of JSON's types alone: the methods of anything else would be in the template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    raise InputError(f"{where} holds a value of type {type(value).__name__}, expected what JSON can say")


@lru_cache
def compile_template(text: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error


@lru_cache
def _environment() -> Any:
    """Jinja as Transformers sets it up for chat templates, which are written for that."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks an answer's words, for training; they are rendered as is."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def render(template: Any, messages: list[dict[str, Any]], prompt: bool, names: dict[str, Any]) -> str:
    try:
        return str(template.render({**names, "messages": messages, "add_generation_prompt": prompt}))
    except Exception as error:  # a template may fail in any way a program can
        raise InputError(f"the chat template failed: {type(error).__name__}: {error}") from error
