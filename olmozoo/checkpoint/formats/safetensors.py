"""A checkpoint folder: a strict lazy reader and an atomic streaming writer, with no framework in sight.

The safetensors format is read and written here rather than through its library for three reasons: tensors come as views
of the mapped file, with nothing copied before a framework wants them; a shard is written one tensor at a time, so that
saving needs the memory of one tensor and not of one shard; and a broken file is told apart tensor by tensor. Files are
the same in both directions (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.files import new_file
from olmozoo.checkpoint.tensors import ALIGNMENT, DTYPE_CODES, DTYPES, MAX_DIMENSIONS, Output, TensorInfo, mapped
from olmozoo.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def read_safetensors(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Sizes and offsets are checked before anything is mapped.

    Raises:
        CheckpointError: the file is truncated, overlong or malformed; it names the tensor and both numbers.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{file}: a file of {size} bytes cannot have a header of {length} bytes: truncated?")
        try:
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    data, tensors, spans = 8 + length, {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _header_entry(file, name, entry)
        if data + end > size:
            raise CheckpointError(f"{file}: {name} ends at byte {data + end}, the file at {size}: truncated")
        spans.append((begin, end, name))
        tensors[name] = TensorInfo(file, dtype, shape, mapped(file, dtype, shape, data + begin))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise CheckpointError(f"{file}: {name} begins at byte {begin} of the data, expected {reached}")
        reached = end
    if data + reached != size:
        raise CheckpointError(f"{file}: the tensors end at byte {data + reached}, the file at {size}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _header_entry(file: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)

    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise CheckpointError(f"{file}: the header entry of {name} is {entry!r}, expected dtype, shape, data_offsets")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {entry.get('dtype')!r}, expected one of {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    # NumPy makes no array of more dimensions, nor an empty one whose other dimensions are too large together.
    if len(shape) > MAX_DIMENSIONS or math.prod(max(dimension, 1) for dimension in shape) * dtype.itemsize >= 1 << 62:
        raise CheckpointError(f"{file}: {name} has the shape {list(shape)[:8]} in {len(shape)} dimensions: too large")
    expected = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{file}: {name} has data_offsets {offsets}, expected {expected} bytes for {dtype.name} {list(shape)}"
        )
    return dtype, shape, (offsets[0], offsets[1])


def write_safetensors(file: Path, outputs: list[Output], kept: bool = False) -> None:
    """Write one new safetensors file, in the order given, one tensor in memory at a time; `kept` as for `new_file`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        ends = [offset, offset + output.nbytes]
        header[output.name] = {
            "dtype": DTYPE_CODES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": ends,
        }
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)  # the first tensor lies aligned when the file is mapped
    with new_file(file, kept) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            output.write(stream)
