"""Jinja for chat templates: a stranger's programs, which see plain values alone and are bounded in time and size.

Jinja's sandbox keeps a template from Python's internals. It does not bound what a template computes, so this
environment does: every call, filter and step of a loop checks the deadline, and whatever may be much larger than its
operands (`'a' * 10**9`, `tojson(indent=10**9)`, a text that doubles in a loop) is estimated before it is computed.
Python cannot interrupt a single operation of its own; bounded operands make each one short.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 10.0  # of a rendering
SIZE = 10_000_000  # characters that a rendering writes, and that any value in it has
VALUE = 10  # characters that a value of any kind counts as
SOURCE = 1_000_000  # characters of a template

# What may repeat its first operand as often as a number, or the size, of another one says.
_WIDENING = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes", "indent", "tojson", "slice", "batch")
)
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{5})")
_WIDE_FORMAT = re.compile(r"\{[^{}]*\{|[:.][^{}]*\d{5}")  # a field in a field's format may be of any width


class TemplateLimitError(Exception):
    """A template takes too long, or makes too much."""


@dataclass
class _Run:
    """One rendering."""

    deadline: float
    written: int = 0
    pieces: list[str] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")

    def write(self, size: int) -> None:
        self.written += size
        _check_size(self.written)


_RUN: ContextVar[_Run] = ContextVar("run")


@contextmanager
def _run() -> Iterator[_Run]:
    run = _Run(time.monotonic() + SECONDS)
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)


def compile_template(source: str) -> jinja2.Template:
    """A template, compiled.

    Raises:
        TemplateLimitError: it is too long.
        Exception: it is no program; Jinja and Python raise errors of many kinds.
    """
    if len(source) > SOURCE:
        raise TemplateLimitError(f"it has {len(source)} characters, at most {SOURCE} are read")
    return _compiled(source)


@lru_cache
def _compiled(source: str) -> jinja2.Template:
    environment = _environment()
    with _run():
        tree = environment.parse(source)
        limits = environment.extensions[_Limits.identifier]
        _Bounding(limits).visit(tree)
        tree.set_environment(environment)
        return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def run_template(template: jinja2.Template, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """What a template writes, and the ranges of characters that its generation blocks wrote.

    Raises:
        TemplateLimitError: it takes too long or writes too much.
        Exception: whatever a program may raise.
    """
    with _run() as run:
        for piece in template.generate(variables):
            run.pieces.append(piece)
        return "".join(run.pieces), run.spans


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounded operators, calls and filters."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, if its result is not too large."""
        run = _RUN.get()
        run.check_time()
        if operator == "+":
            _check_size(_measure(left) + _measure(right))
        elif operator == "%" and isinstance(left, str):
            _check_percent(left, right)
        elif operator in ("*", "**"):
            self._check_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def _check_product(operator: str, left: Any, right: Any) -> None:
        if not isinstance(left, int):
            left, right = right, left
        if isinstance(left, int) and isinstance(right, int):
            bits = abs(right) if operator == "**" else right.bit_length()
            _check_size(8 * left.bit_length() * max(1, bits) if operator == "**" else 8 * (left.bit_length() + bits))
        elif isinstance(left, int):
            _check_size(max(0, left) * max(1, _measure(right)))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call, if its result is not too large."""
        _RUN.get().check_time()
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps `str.format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            _check_arguments(name, [owner, *args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)


class _Limits(jinja2.ext.Extension):
    """What compiled templates call: at each step of a loop, for `~`, and around generation blocks.

    `{% generation %}...{% endgeneration %}` marks an answer's words, for training.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    def generated(self, caller: Callable[[], str]) -> str:
        """The words of a generation block, whose range is noted."""
        text = caller()
        run = _RUN.get()
        start = sum(map(len, run.pieces))
        run.spans.append((start, start + len(text)))
        return text

    def step(self, size: int) -> None:
        """Count what a step of a loop writes by itself. (The call checks the time.)"""
        _RUN.get().write(size)

    def concatenate(self, *values: Any) -> str:
        """The `~` operator."""
        _check_size(sum(map(_measure, values)))
        return "".join(map(str, values))


class _Bounding(NodeTransformer):
    """Inserts the calls of `_Limits` into a template's tree."""

    def __init__(self, limits: Any) -> None:
        self.limits = limits

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        size = 1 + sum(len(data.data) for child in node.body for data in child.find_all(nodes.TemplateData))
        step = self.limits.call_method("step", [nodes.Const(size)], lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        concatenation: nodes.Call = self.limits.call_method("concatenate", node.nodes, lineno=node.lineno)
        return concatenation


@lru_cache
def _environment() -> _Environment:
    """Jinja as Transformers sets it up for chat templates, which are written for that."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def written(value: Any) -> Any:
        if isinstance(value, Iterator):  # its text is its name
            return value
        _RUN.get().write(_measure(value))
        return value

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Limits, jinja2.ext.loopcontrols], finalize=written
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.filters = {name: _bounded(name, function) for name, function in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del environment.globals["lipsum"]  # text of any length
    return environment


def _bounded(name: str, function: Any) -> Any:
    """A filter that checks the time and its arguments first. Jinja's marks on the function are kept."""
    passed = int(hasattr(function, "jinja_pass_arg"))  # the context, or the like, comes first

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _RUN.get().check_time()
        values = [_listed(value) for value in args[passed:]]
        _check_arguments(name, [*values, *kwargs.values()])
        return function(*args[:passed], *values, **kwargs)

    return bounded


def _listed(value: Any) -> Any:
    """The values of an iterator as a list, so that they can be measured."""
    if not isinstance(value, Iterator):
        return value
    values, size = [], 0
    for item in value:
        _check_size(size := size + _measure(item))
        values.append(item)
    return values


def _check_arguments(name: str, values: list[Any]) -> None:
    """Check what a filter, or a method with its object, may make of its arguments."""
    sizes = [_measure(value) for value in values]
    _check_size(sum(sizes))
    numbers = [v if isinstance(v, int) else size for v, size in zip(values[1:], sizes[1:], strict=True)]
    if name in _WIDENING:
        _check_size(sizes[0] * max(numbers, default=1))
    elif name in ("urlize", "wordwrap", "join"):
        texts = [size for v, size in zip(values, sizes, strict=True) if isinstance(v, str)]
        _check_size(sizes[0] * max(texts[1:] if name != "join" else sizes[1:], default=1))
    elif name == "replace" and len(values) > 2 and str(values[1]) != str(values[2]):
        _check_size(str(values[0]).count(str(values[1])) * sizes[2])
    elif name in ("format", "format_map") and isinstance(values[0], str):
        if _WIDE_FORMAT.search(values[0]):
            raise TemplateLimitError("it formats to a width of its own")
        _check_size(values[0].count("{") * sum(sizes[1:]))
        _check_percent(values[0], values[1:])


def _check_percent(form: str, values: Any) -> None:
    """Check what `form % values` makes."""
    if _WIDE_PERCENT.search(form):
        raise TemplateLimitError("it formats to a width of its own")
    _check_size(form.count("%") * _measure(values))


def _measure(value: Any) -> int:
    """The number of characters in a value, as often as it has them; each value counts as some more."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += VALUE
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        _check_size(size)
    return size


def _check_size(size: int) -> None:
    if size > SIZE:
        raise TemplateLimitError(f"it makes more than {SIZE} characters")
