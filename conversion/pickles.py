"""Pickles of untrusted files, read without importing or running anything that they name.

Each class or function in a pickle becomes a `Record`: its name, its arguments and its state, and nothing else. That is
all a reader of tensors needs, and it makes no difference which version of which package wrote the file.
"""

from __future__ import annotations

import base64
import io
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from olmozoo.errors import CheckpointError

PACKAGES = frozenset({"torch", "numpy", "collections", "pathlib", "_codecs", "olmo", "olmo_core"})
BUILTINS = frozenset({"set", "frozenset", "slice", "complex", "bytearray", "int", "float", "bool", "str", "bytes"})

TUPLES = (pickle.TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0])
MAX_TUPLE = 1_000_000  # values


class Record:
    """What stands for an object of a class that is not imported.

    Attributes:
        module, kind: where its class or function is from, and its name.
        args: what that was called with.
        state: what was then put into it: a dict of its attributes as a rule.
    """

    module: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        match state:
            case (None, dict() as slots):  # how a class with slots is pickled
                self.state = slots
            case _:
                self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop an entry of a mapping: none that is read is of a foreign class."""

    def append(self, item: Any) -> None:
        """Drop an entry of a list or a set, as above."""

    extend = add = append

    def __getitem__(self, name: str) -> Any:
        if not isinstance(self.state, dict) or name not in self.state:
            raise CheckpointError(f"a {self.kind} has no {name}")
        return self.state[name]


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """A loader of tuples that counts the values in each, nested ones included.

    A few dozen that contain one another twice have more values than could be hashed or printed in a lifetime.
    """

    def loaded(unpickler: Any) -> None:
        load(unpickler)
        made = unpickler.stack[-1]
        size = 1 + sum(unpickler.tuples.get(id(item), (1, None))[0] for item in made)
        if size > MAX_TUPLE:
            raise CheckpointError(f"it has a tuple of more than {MAX_TUPLE:,} values")
        unpickler.tuples[id(made)] = size, made

    return loaded


# The unpickler in Python, and not the one in C: that one sets aside memory for as many entries as a file claims.
class _Unpickler(pickle._Unpickler):
    # Nor does it know bytearrays, for which it would do the same; no checkpoint has one.
    dispatch: ClassVar[dict[int, Any]] = {
        code: _counted(load) if code in TUPLES else load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, data: bytes, load: Callable[[Any], Any] | None, allowed: bool) -> None:
        super().__init__(io.BytesIO(data))
        self.load_storage, self.allowed = load, allowed
        self.kinds: dict[tuple[str, str], Any] = {}
        self.tuples: dict[int, tuple[int, Any]] = {}  # id -> size, and the tuple, which must live as long
        if allowed:
            self.kinds["collections", "OrderedDict"] = OrderedDict
            self.kinds["__builtin__", "getattr"] = self.kinds["builtins", "getattr"] = self._nested

    def _nested(self, owner: Any, name: Any) -> Any:
        """A class inside a class: old protocols pickle one as a call of getattr."""
        if not (isinstance(owner, type) and issubclass(owner, Record) and isinstance(name, str)):
            raise CheckpointError("it calls getattr for something other than a class in a class")
        return self.find_class(owner.module, f"{owner.kind}.{name}")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.kinds:
            return self.kinds[module, name]
        known = module.partition(".")[0] in PACKAGES or (module in ("builtins", "__builtin__") and name in BUILTINS)
        if not self.allowed or not known:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint has any business to name")
        return self.kinds.setdefault((module, name), type("Record", (Record,), {"module": module, "kind": name}))

    def persistent_load(self, pid: Any) -> Any:
        if self.load_storage is None:
            raise CheckpointError("it refers to data outside itself, and there is none")
        return self.load_storage(pid)


def unpickle(data: bytes, where: str, load: Callable[[Any], Any] | None = None, *, classes: bool = True) -> Any:
    """The object in a pickle, with `Record`s for all but plain Python data.

    Args:
        data: the pickle.
        where: what it is, for messages.
        load: returns what a persistent id stands for; by default they are refused.
        classes: whether it may name classes at all.

    Raises:
        CheckpointError: it is broken, or names something from outside the packages that write checkpoints.
    """
    try:
        return _Unpickler(data, load, classes).load()
    except Exception as error:  # a broken pickle can raise almost anything
        raise CheckpointError(f"{where} is not a readable pickle: {error}") from error


def encode_key(name: str) -> str:
    """A tensor's name as the native trainer spells it in its safetensors files."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False), protocol=4)).decode("ascii")


def decode_key(key: str, where: str) -> str:
    """The inverse of `encode_key`: base64 of a pickled ((name, ...), value is pickled), nested names joined with dots.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        data = base64.b64decode(key, altchars=b"-_", validate=True)
    except ValueError as error:
        raise CheckpointError(f"{where}: the key {key!r} is neither a name nor base64: {error}") from error
    found = unpickle(data, f"{where}: the key {key!r}", classes=False)
    match found:
        case ((*names,), False) if names and all(isinstance(name, str) for name in names):
            return ".".join(names)
    raise CheckpointError(f"{where}: the key {key!r} is {reprlib.repr(found)}, expected ((name,), False)")
