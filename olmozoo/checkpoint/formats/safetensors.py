"""safetensors: validated and written by its library; tensors are views of the mapped file.

The library's own reader copies each tensor. So it opens and validates a file, and the tensors are then mapped at the
offsets of the header that it has accepted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from olmozoo.checkpoint.formats.names import canonical_tensors
from olmozoo.checkpoint.tensors import DTYPES, INTEGERS, LazyTensor, MappedFile
from olmozoo.errors import CheckpointError, raise_problems

FILE = "model.safetensors"
MAX_DIMENSIONS = 64  # the limit of NumPy
MAX_VALUES = 1 << 59  # also the limit of NumPy, which counts an empty tensor's other dimensions too


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, by canonical name; those of quantized weights are integers.

    Raises:
        CheckpointError: the library refuses the file, or a tensor is of a dtype that no model here has.
    """
    return canonical_tensors(path, read_tensors(path, DTYPES | INTEGERS))


def read_tensors(path: Path, dtypes: Mapping[str, np.dtype[Any]] = DTYPES) -> dict[str, LazyTensor]:
    """The tensors of one file, by the names in it, of the dtypes that are allowed; see `read`."""
    file = MappedFile(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, ValueError) as error:  # ValueError: a path that is not Unicode
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}{_sizes(file)}") from error
    if not os.path.samestat(os.fstat(file.stream.fileno()), path.stat()):
        raise CheckpointError(f"{path} was replaced while it was read: load again")
    length = int.from_bytes(file.stream.read(8), "little")
    try:
        header: dict[str, Any] = json.loads(file.stream.read(length), object_pairs_hook=_without_duplicates)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    header.pop("__metadata__", None)
    codes = ", ".join(DTYPES)
    problems = [
        f"{name} has dtype {entry['dtype']}, expected one of {codes}"
        for name, entry in header.items()
        if entry["dtype"] not in dtypes
    ]
    problems += [
        f"{name} has the shape {entry['shape'][:8]} in {len(entry['shape'])} dimensions: too large"
        for name, entry in header.items()
        if len(entry["shape"]) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in entry["shape"]) >= MAX_VALUES
    ]
    raise_problems(f"{path} has tensors that no model has", problems)
    return {
        name: file.tensor(name, dtypes[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _sizes(file: MappedFile) -> str:
    """What a file that the library refused says of sizes, in numbers: the library's own errors have none."""
    length = int.from_bytes(file.stream.read(8), "little")
    if length > file.size - 8:
        return f" (a header of {length:,} bytes in a file of {file.size:,} bytes)"
    try:
        header = json.loads(file.stream.read(length))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        last = max(ends, key=lambda name: ends[name])
        return f" ({last} ends at byte {8 + length + ends[last]:,}, the file at {file.size:,})"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; the library takes the last of two that have one name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"the header has {name!r} twice")
        found[name] = value
    return found


def write(path: Path, tensors: list[LazyTensor]) -> None:
    """Write one new file; the same tensors give the same bytes.

    The library takes the memory of all tensors at once: mapped ones need none, others are in memory until it is done.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {tensor.name: tensor.contiguous() for tensor in tensors}
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    try:
        serialize_file(specs, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code:
            raise OSError(int(code[1]), os.strerror(int(code[1])), path) from error
        raise CheckpointError(f"{path} could not be written: {error}") from error
