"""Pickles of what PyTorch loads, written without it.

The pickle module writes down a function or class of a package only where it can import it; this one takes its name.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from itertools import chain
from typing import Any


@dataclass(frozen=True)
class Named:
    """A function or class, by the names of its module and its own."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """An object that reading the pickle makes.

    Attributes:
        by: the function or class that is called.
        args: with these; None makes an object of the class without a call of its `__init__`.
        state: what is then put into it, if anything: a dict of its attributes as a rule.
    """

    by: Named
    args: tuple[Any, ...] | None
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """An object outside the pickle, by what its reader knows it as."""

    id: Any


def pickled(value: Any) -> bytes:
    """The pickle of a value: plain data and the above, in tuples, lists and dicts. Protocol 2, as torch.save writes."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value: Any) -> bytes:
    match value:
        case Named(module, name):
            return f"c{module}\n{name}\n".encode()
        case Persistent(id):
            return _code(id) + b"Q"
        case Made(by, args, state):
            made = _code(by) + (b")\x81" if args is None else _code(args) + b"R")
            return made if state is None else made + _code(state) + b"b"
        case tuple():
            return b"(" + _codes(value) + b"t"
        case list():
            return b"](" + _codes(value) + b"e"
        case dict():
            return b"}(" + _codes(chain.from_iterable(value.items())) + b"u"
    return pickle.dumps(value, protocol=2)[2:-1]  # less the protocol and the stop


def _codes(values: Any) -> bytes:
    return b"".join(map(_code, values))
