"""A checkpoint folder: a strict lazy reader and an atomic streaming writer, with no framework in sight.

The safetensors format is read and written here rather than through its library for three reasons: tensors come as views
of the mapped file, with nothing copied before a framework wants them; a shard is written one tensor at a time, so that
saving needs the memory of one tensor and not of one shard; and a broken file is told apart tensor by tensor. Files are
the same in both directions (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import io
import json
import math
import os
import re
import shutil
import struct
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from olmozoo.errors import CheckpointError, InputError, OlmozooError
from olmozoo.families.base import (
    ARCHITECTURES,
    BASE_PREFIX,
    Head,
    ModelConfig,
    Parameter,
    read_json,
)

Array = np.ndarray[Any, np.dtype[Any]]
StrPath = str | os.PathLike[str]

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes: a cache line, and what TensorFlow and XLA ask of memory they did not set aside themselves
BAND = 1 << 20  # bytes that are copied before they are written; fits the caches
TURNED_BAND = 1 << 24  # bytes that are transposed before they are written
WRITE = 1 << 15  # bytes that the system is given at a time of a file that it keeps in memory
PASSING = 1 << 22  # bytes of any other new file that it has in memory before it is asked to let go of them
TILE = 256  # rows and columns that are transposed at a time
MAPPINGS = 16  # of a `.bin`, one after the other: what was read of one stays in memory until it goes
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMENSIONS = 64  # the limit of NumPy
MAX_FILE_NAME = 255  # bytes; the limit of most file systems
# What holds weights, in the order they are looked for. Those after the first two are read by `formats.py`.
WEIGHTS = (
    *(SAFETENSORS, PICKLED, "tf_model.h5", "flax_model.msgpack"),
    *("model.weights.h5", "model.keras", "saved_model", "orbax"),
)
WEIGHT_FILES = re.compile(
    r"(model|pytorch_model|tf_model|flax_model)(-\d+-of-\d+)?\.(safetensors|bin|h5|msgpack)(\.index\.json)?"
)
EVERY_WEIGHT = re.compile(rf"{WEIGHT_FILES.pattern}|model\.weights\.h5|model\.keras|saved_model|orbax")
TF_HEAD = (
    "model.decoder.embed_tokens.weight"  # Transformers 4's OPT in TensorFlow has this head, whatever its config says
)
FOREIGN_NAME = re.compile(r"/|:0$|\.(kernel|embedding|scale)$")  # as TensorFlow and Flax name tensors, and nobody else
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a table that older programs saved; it is made from the config


def dtype_of(name: Any) -> np.dtype[Any]:
    """The NumPy dtype of a name such as "bfloat16", of a framework's dtype object, or of a dtype.

    Raises:
        CheckpointError: it is not one of float64, float32, float16, bfloat16.
    """
    text = str(getattr(name, "name", None) or getattr(name, "__name__", None) or name).removeprefix("torch.")
    for dtype in DTYPES.values():
        if text == dtype.name:
            return dtype
    raise CheckpointError(f"dtype is {name!r}, expected one of {', '.join(d.name for d in DTYPES.values())}")


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype, shape and how to get it (a view of the mapped file)."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]


class Checkpoint:
    """The tensors of a folder, by the names in its files; nothing is read before `checkpoint[name]`.

    Looked for, in this order: model.safetensors, model.safetensors.index.json and its shards, pytorch_model.bin,
    pytorch_model.bin.index.json and its shards. The `.bin` kinds need PyTorch and are read with `weights_only`. Then
    what `formats.py` reads, in the order of `WEIGHTS`.

    Raises:
        CheckpointError: no weights, or broken ones. One error lists every problem.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file, names in self._files(problems).items():
            try:
                found = _read_weights(file)
            except (CheckpointError, OSError) as error:
                problems.append(str(error) if file.name in str(error) else f"{file}: {error}")
                continue
            for name in sorted(found.keys() & self.tensors.keys()):
                problems.append(f"{name} is in both {self.tensors[name].file.name} and {file.name}")
            if names is not None:
                problems += [f"{name} is not in {file.name}, where the index puts it" for name in names - found.keys()]
                problems += [
                    f"{name} is in {file.name}, where the index has no such tensor" for name in found.keys() - names
                ]
            self.tensors.update({name: info for name, info in found.items() if not IGNORED.search(name)})
            if file.suffix == ".h5" and file.name.startswith("tf_") and TF_HEAD in found:
                self.tensors["lm_head.weight"] = found[TF_HEAD]
        fail(f"{self.folder} is broken", problems)

    def _files(self, problems: list[str]) -> dict[Path, set[str] | None]:
        for single in WEIGHTS:
            if (self.folder / single).exists():
                return {self.folder / single: None}
            index = self.folder / f"{single}.index.json"
            if index.is_file():
                return self._shards(index, problems)
        raise CheckpointError(
            f"{self.folder} has no weights: expected {SAFETENSORS}, {SAFETENSORS}.index.json, {PICKLED}, "
            f"{PICKLED}.index.json or {', '.join(WEIGHTS[2:])}; "
            f"found {', '.join(sorted(os.listdir(self.folder))) or 'nothing'}"
        )

    def _shards(self, index: Path, problems: list[str]) -> dict[Path, set[str] | None]:
        shards: dict[Path, set[str] | None] = {}
        for name, shard in index_entries(index).items():
            if FOREIGN_NAME.search(name):
                from olmozoo.formats import canonical_name  # stands on this room

                try:
                    name = canonical_name(name)
                except CheckpointError as error:
                    problems.append(f"{index.name}: {error}")
                    continue
            if (self.folder / shard).is_file():
                names = shards.setdefault(self.folder / shard, set())
                assert names is not None
                names.add(name)
            elif f"{index.name} names the shard {shard}, which is not there" not in problems:
                problems.append(f"{index.name} names the shard {shard}, which is not there")
        return shards

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name].read()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The checkpoint's own dtype: that of its tensors; where they differ, what holds the values of all."""
        return widest(info.dtype for info in self.tensors.values())


def widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The smallest dtype that holds the values of all of these: float32 for float16 and bfloat16 together."""
    kinds = set(dtypes)
    largest = max(kinds, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))
    return largest if len(kinds) < 2 or largest.itemsize > 2 else np.dtype(np.float32)


def index_entries(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> shard file.

    Raises:
        CheckpointError: it is not an index, or a shard is anything but a plain file name.
    """
    try:
        entries = read_json(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for name, shard in entries.items():
        if not _is_file_name(shard):
            raise CheckpointError(f"{index} puts {name} in {shard!r}, expected a plain file name")
    return entries


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", ".", "..")
        and not set(name) & set("\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= MAX_FILE_NAME
    )


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


def mapped(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Callable[[], Array]:
    """What gives the array that lies at byte `offset` of a file, as a view of the file."""

    def read() -> Array:
        if 0 in shape:
            return np.empty(shape, dtype)
        # A mapping of its own for each tensor, so that its pages go when the array goes; copy-on-write, so that a
        # framework may use the memory in place without ever changing the file.
        return np.memmap(file, dtype=dtype, mode="c", offset=offset, shape=shape).view(np.ndarray)

    return read


def _read_weights(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".bin":
        return _read_pickled(file)
    from olmozoo import formats  # stands on this room

    if file.suffix != ".safetensors":
        return formats.read_tensors(file)
    tensors = read_safetensors(file)
    foreign = any(FOREIGN_NAME.search(name) for name in tensors)
    return formats.canonical_tensors(file, tensors) if foreign else tensors


def _read_pickled(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a `.bin` file, mapped where the file allows it. Nothing but tensors is ever unpickled."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"reading {file} needs PyTorch: pip install 'olmozoo[pt]'") from error

    def load(mmap: bool) -> Any:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)

    is_mapped, used = True, 0
    try:
        _check_records(file)
        try:
            state = load(mmap=True)
        except RuntimeError:  # the old format, not a zip archive, cannot be mapped
            state, is_mapped = load(mmap=False), False
    except Exception as error:
        raise CheckpointError(f"{file} is not a readable state dict: {error}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors")
    fail(
        f"{file} holds what is no plain tensor",
        (f"{name}: {t.layout} on {t.device}" for name, t in state.items() if t.layout != torch.strided or t.is_meta),
    )

    def read(name: str) -> Array:
        nonlocal state, used
        if is_mapped and used > file.stat().st_size // MAPPINGS:
            state, used = load(mmap=True), 0
        tensor: torch.Tensor = state[name].detach().resolve_neg()  # it may be a Parameter
        used += tensor.nbytes
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(dtype_of(tensor.dtype))
        return tensor.numpy()

    return {
        name: TensorInfo(file, dtype_of(tensor.dtype), tuple(tensor.shape), partial(read, name))
        for name, tensor in state.items()
    }


def _check_records(file: Path) -> None:
    """See that each record of an archive begins where its directory says: PyTorch maps what lies there."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()  # compares the name at that place
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{entry.filename} is compressed, expected it stored")


# -- the checkpoint against the parameter table -----------------------------------------------------------------------


def fail(headline: str, problems: Iterable[str], kind: type[OlmozooError] = CheckpointError) -> None:
    """Raise one error that lists every problem, if there is any."""
    problems = list(problems)
    if problems:
        raise kind(f"{headline}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


def check_shapes(headline: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one InputError that lists every name that is missing, unexpected or of a wrong shape, if there is any."""
    problems = [f"missing: {name} {expected[name]}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected: {name} {found[name]}" for name in found.keys() - expected.keys()]
    problems += [
        f"wrong shape: {name} is {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    fail(headline, sorted(problems), InputError)


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    head: Head | None = None,
    *,
    dtype: np.dtype[Any],
    ignore_mismatched_sizes: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Parameter, Array]]:
    """Every parameter of the table with its values, the largest first; tied ones are left out.

    The order keeps the peak of memory low: where values are copied, the largest are there twice while little else is.
    All checks come before the first tensor is read. A base model's checkpoint and one with another head both serve.
    Where such a checkpoint has nothing for this head, the head starts from its initial values (`seed`) and a warning
    says so.

    Args:
        checkpoint: the tensors.
        config: the model's config.
        head: the model's head; None for the base model.
        dtype: what values are cast to.
        ignore_mismatched_sizes: start tensors of a wrong shape anew, with a warning, rather than refuse.
        seed: for values that start anew.

    Raises:
        CheckpointError: one error that lists every missing, unexpected, duplicate and misshapen tensor.
    """
    sources, fresh = match_tensors(checkpoint, config, head, ignore_mismatched_sizes)
    if fresh:
        warnings.warn(
            f"{checkpoint.folder}: started anew, for training: {', '.join(sorted(fresh.values()))}", stacklevel=3
        )
    for parameter in sorted(config.parameters(head), key=lambda parameter: -parameter.size):
        if parameter.tied_to is None:
            if parameter.name in sources:
                yield parameter, checkpoint[sources[parameter.name]].astype(dtype, copy=False)
            else:
                yield parameter, parameter.initial(seed, dtype)


def initial_weights(
    config: ModelConfig, head: Head | None = None, *, seed: int = 0, dtype: Any = "float32"
) -> Iterator[tuple[Parameter, Array]]:
    """Every parameter of the table with its initial values, in the table's order; tied ones are left out."""
    for parameter in config.parameters(head):
        if parameter.tied_to is None:
            yield parameter, parameter.initial(seed, dtype)


def match_tensors(
    checkpoint: Checkpoint, config: ModelConfig, head: Head | None, ignore_mismatched_sizes: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Canonical name -> name in the files, and canonical name -> why, for what starts anew.

    Raises:
        CheckpointError: one error that lists every missing, unexpected, duplicate and misshapen tensor.
    """
    table = {parameter.name: parameter for kind in (None, *config.heads) for parameter in config.parameters(kind)}
    wanted = {parameter.name for parameter in config.parameters(head)}
    backbone = {parameter.name for parameter in config.parameters()}
    prefixed = {name for name in checkpoint.tensors if name.startswith(BASE_PREFIX)}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for name in checkpoint.tensors:
        canonical = name if name in prefixed or name in table else BASE_PREFIX + name
        if canonical not in table:
            problems.append(f"unexpected: {name} {list(checkpoint.tensors[name].shape)}")
        elif canonical in sources:
            problems.append(f"duplicate: {name} is {sources[canonical]} again")
        else:
            sources[canonical] = name

    heads_found = {name for name in sources if name not in backbone}
    fresh: dict[str, str] = {}
    for parameter in config.parameters(head):
        name = parameter.name
        if name in sources:
            found = checkpoint.tensors[sources[name]].shape
            if found != parameter.shape:
                text = f"{sources[name]} is {list(found)}, expected {list(parameter.shape)}"
                if ignore_mismatched_sizes:
                    fresh[name] = text
                else:
                    problems.append(f"wrong shape: {text}")
        elif parameter.tied_to is None:
            # Only a checkpoint that is plainly of another kind may lack a head; a broken one is not taken for such.
            other_kind = not prefixed or bool(heads_found - wanted) or not name.startswith("lm_head.")
            if name not in backbone and other_kind and not heads_found & wanted:
                fresh[name] = f"{name} (not in the checkpoint)"
            else:
                problems.append(f"missing: {name} {list(parameter.shape)}")
    for parameter in config.parameters(head):
        tied, name = parameter.tied_to, parameter.name
        if tied and name in sources and tied in sources and not problems:
            head_values, values = checkpoint[sources[name]], checkpoint[sources[tied]]
            if not np.array_equal(head_values, values, equal_nan=True):
                problems.append(f"{name} differs from {tied}, to which the config ties it")
    fail(f"{checkpoint.folder} does not fit its config as {config.name}{ARCHITECTURES[head]}", problems)
    return {name: source for name, source in sources.items() if name in wanted and name not in fresh}, fresh


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array whose memory is aligned for any framework, and untouched: it takes none before it is written to."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def aligned(array: Array, transposed: bool) -> Array:
    """An array, or its transpose, in memory aligned for any framework: the array itself where it lies so already."""
    ready = array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0
    return array if ready and not transposed else aligned_copy(array, transposed)


def aligned_copy(array: Array, transposed: bool) -> Array:
    """A copy of an array, or of its transpose, in memory aligned for any framework: one pass, on all cores."""
    result = aligned_empty(array.shape[::-1] if transposed else array.shape, array.dtype)
    if transposed:
        _turn(array, result)
    else:
        _on_all_cores(lambda rows: np.copyto(result[rows], array[rows]), len(array), array.nbytes)
    return result


def _turn(array: Array, result: Array) -> None:
    """Write the transpose of a matrix into `result`.

    It goes by tiles that fit the cache of a core, each copied before it is turned, to rows that do not lie a power of
    two apart: those would push each other out. NumPy turns whole numbers faster than bfloat16.
    """
    bits = np.dtype(f"u{array.itemsize}")
    array, result = array.view(bits), result.view(bits)

    def fill(rows: slice) -> None:
        memory = np.empty((TILE, min(TILE, len(result)) + ALIGNMENT // array.itemsize), bits)
        for column in range(0, len(result), TILE):
            for row in range(rows.start, min(rows.stop, len(array)), TILE):
                part = array[row : row + TILE, column : column + TILE]
                tile = memory[: part.shape[0], : part.shape[1]]
                np.copyto(tile, part)
                result[column : column + TILE, row : row + TILE] = tile.T

    _on_all_cores(fill, len(array), array.nbytes)


def _on_all_cores(work: Callable[[slice], None], rows: int, nbytes: int) -> None:
    """Share rows out, where there are enough bytes for that to pay."""
    threads = os.cpu_count() or 1
    if threads == 1 or nbytes <= 1 << 20:
        work(slice(0, rows))
        return
    share = max(TILE, -(-rows // threads // TILE) * TILE)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, (slice(row, row + share) for row in range(0, rows, share))))


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits in the same shape and dtype: NaN, and the sign of zero, count."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    bands = [slice(i, i + BAND) for i in range(0, left.size, BAND)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading mapped pages in is most of the work
        return all(pool.map(lambda band: np.array_equal(left[band], right[band]), bands))


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its name on disk, dtype, shape, and how to get its values when its turn comes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]
    transposed: bool = False  # whether `read` gives the transpose of that

    @property
    def nbytes(self) -> int:
        """The size on disk, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def bands(self, limit: int) -> Iterator[Array]:
        """The values as they go to disk, in bands of rows; each holds until the one after the next is asked for.

        They come through a little memory that stays the same: systems are several times slower in writing from a mapped
        file, and in setting memory aside for each tensor. The next band is made while one is written.

        Args:
            limit: bytes a band, of at least a row.

        Raises:
            CheckpointError: the values are of another dtype or shape.
        """
        array = np.ascontiguousarray(self.read())
        source = array.T if self.transposed else array
        if (array.dtype, source.shape) != (self.dtype, self.shape):
            found, expected = f"{array.dtype.name} {list(source.shape)}", f"{self.dtype.name} {list(self.shape)}"
            raise CheckpointError(f"{self.name} is {found}, expected {expected}")
        most = max(1, limit * len(source) // max(1, self.nbytes))
        count = max(1, -(-len(source) // max(1, -(-len(source) // most))))  # as even as can be
        starts = range(0, len(source), count)
        memories = [np.empty_like(source[start:][:count], order="C") for start in starts[:3]]

        def fill(number: int) -> Array:
            part = source[starts[number] :][:count]
            band = memories[number % 3][: len(part)]
            if self.transposed:
                _turn(part.T, band)
            else:
                np.copyto(band, part)
            return band

        if len(starts) < 2:
            yield from map(fill, range(len(starts)))
            return
        with ThreadPoolExecutor(1) as ahead:
            bands: deque[Future[Array]] = deque()
            for number in range(len(starts)):
                bands.append(ahead.submit(fill, number))
                if number > 0:
                    yield bands.popleft().result()
            for last in bands:
                yield last.result()

    def pieces(self) -> Iterator[memoryview]:
        """The bytes that go to disk, band by band; see `bands`."""
        for band in self.bands(TURNED_BAND if self.transposed else BAND):
            yield band.reshape(-1).view(np.uint8).data

    def write(self, stream: IO[bytes]) -> None:
        """Write the bytes that go to disk into a file; see `pieces`."""
        for piece in self.pieces():
            stream.write(piece)


def save_checkpoint(
    folder: StrPath,
    config: ModelConfig,
    head: Head | None,
    read: Callable[[Parameter], Array],
    dtype: Callable[[Parameter], Any],
    *,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json, generation_config.json and safetensors under canonical names, in one step.

    The new folder is made beside the old one and takes its place when it is whole, so a crash or a full disk leaves the
    old one as it was. Other files in the old folder are kept; its old weights are not. The same weights give the same
    bytes.

    Args:
        folder: the target; made with its parents if need be.
        config: written as config.json, with `architectures` and `dtype` set.
        head: the model's head; None writes a base model, whose names have no leading `model.`.
        read: gives a parameter's values in the shape of the table; called once each, when they are about to be written.
        dtype: gives the dtype of those values without reading them.
        generation_config: the contents of generation_config.json; None writes none.
        max_shard_size: bytes a file, as a number or as "5GB" (10**9) or "5GiB" (2**30).

    Raises:
        CheckpointError: the folder cannot be written; the message says why.
    """
    prefix = BASE_PREFIX if head is None else ""
    outputs = [
        Output(p.name.removeprefix(prefix), dtype_of(dtype(p)), p.shape, lambda p=p: read(p))  # type: ignore[misc]
        for p in config.parameters(head)
        if p.tied_to is None
    ]
    with replacing_folder(folder) as staging:
        write_config(staging, config, head, outputs)
        if generation_config is not None:
            write_json(staging / GENERATION_CONFIG, generation_config)
        write_weights(staging, outputs, max_shard_size, write=partial(write_safetensors, kept=True))


class _NewFile(io.FileIO):
    """A new file that takes as much at a time as is best for the system; see `new_file`."""

    def __init__(self, path: Path, kept: bool) -> None:
        super().__init__(path, "x")
        self.kept = kept
        self.waiting = 0

    def write(self, data: Any) -> int:
        count = super().write(memoryview(data)[: WRITE if self.kept else BAND])
        self.waiting += count
        if self.waiting >= PASSING and not self.kept and hasattr(os, "posix_fadvise"):
            # Does not wait: what is not on disk by then stays in memory until it is asked again.
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.waiting = 0
        return count


def new_file(path: Path, kept: bool = False) -> IO[bytes]:
    """A new file, to write tensors into.

    What is written stays in the system's memory until it has come to disk, and mostly after that. New memory for it can
    cost more than the copying: on a virtual machine a file of gigabytes took twice as long as one that passed through
    the same few megabytes. Whoever reads such a file next reads it from disk.

    Args:
        path: where; its folder is there.
        kept: leave the file in memory, for whoever reads it next. Small parts are then what systems have at hand.

    Raises:
        FileExistsError: there is one: it may be a hard link to that of an older checkpoint.
    """
    return io.BufferedWriter(_NewFile(path, kept), WRITE)


class Behind:
    """A file that writes on while the next bytes are made; what it is given must hold until its next call returns."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[int] | None = None

    def write(self, data: Any) -> int:
        """Begin to write, once what was before is written."""
        self.flush()
        self._writing = self._thread.submit(self._stream.write, data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def tell(self) -> int:
        """The place in the file."""
        self.flush()
        return self._stream.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        self.flush()
        return self._stream.seek(offset, whence)

    def close(self) -> None:
        """Write all; the file itself stays open."""
        with self._thread:
            self.flush()


def write_config(folder: Path, config: ModelConfig, head: Head | None, outputs: list[Output]) -> None:
    """Write config.json for these tensors of a model with this head, in a new file."""
    config = config.replace(
        extra={
            **{key: value for key, value in config.extra.items() if key != "torch_dtype"},
            "architectures": [config.name + ARCHITECTURES[head]],
            "dtype": widest(output.dtype for output in outputs).name,
        }
    )
    (folder / CONFIG).unlink(missing_ok=True)
    config.save_pretrained(folder)


def write_weights(
    folder: Path,
    outputs: list[Output],
    max_shard_size: int | str = "5GB",
    single: str = SAFETENSORS,
    write: Callable[[Path, list[Output]], None] | None = None,
) -> None:
    """Write tensors into `folder` as one file, or as shards with an index, one tensor in memory at a time.

    Args:
        folder: where to.
        outputs: the tensors, in order.
        max_shard_size: bytes a file.
        single: the name of the file where there is one alone.
        write: writes one file; default `write_safetensors`.
    """
    write = write or write_safetensors
    shards = grouped(outputs, parse_size(max_shard_size))
    if len(shards) == 1:
        write(folder / single, shards[0])
        return
    weight_map = {}
    stem, suffix = single.split(".")
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write(folder / file, shard)
        weight_map.update({output.name: file for output in shard})
    metadata = {"total_size": sum(output.nbytes for output in outputs)}
    write_json(folder / f"{single}.index.json", {"metadata": metadata, "weight_map": weight_map})


def grouped(outputs: Iterable[Output], limit: int) -> list[list[Output]]:
    """Tensors in groups of at most `limit` bytes, in the order given; a larger one is a group of its own."""
    groups: list[list[Output]] = [[]]
    for output in outputs:
        if groups[-1] and sum(o.nbytes for o in groups[-1]) + output.nbytes > limit:
            groups.append([])
        groups[-1].append(output)
    return groups


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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object as JSON, keys sorted, in a new file (never through a link to an old one)."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Bytes of a number or of a text such as "5GB", "200MB", "1GiB".

    Raises:
        CheckpointError: it is neither.
    """
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    units |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if not match or match[2] not in units or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size is {size!r}, expected bytes as a number or as text such as '5GB'")
    return int(float(match[1]) * units[match[2]])


@contextlib.contextmanager
def replacing_folder(folder: StrPath, old: re.Pattern[str] = WEIGHT_FILES) -> Iterator[Path]:
    """Give a staging folder that takes the place of `folder` in one step if the block ends well, and goes if not.

    Files of the old folder other than those called as `old` says are in the staging folder from the start (as hard
    links: replace them, never write into them).

    Raises:
        CheckpointError: something other than a folder is there, or the current folder is that or in that; or the disk
            is full or not writable.
    """
    target = Path(os.path.realpath(folder))
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone already
        if Path.cwd().is_relative_to(target):
            raise CheckpointError(f"{target} holds the current folder, which would be gone: expected another folder")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is not a folder")
    staging = target.with_name(f".{target.name}.saving-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        if target.exists():
            shutil.copytree(target, staging, symlinks=True, ignore=_named(old, target), copy_function=_link)
        else:
            staging.mkdir()
        yield staging
        _swap(staging, target)
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        raise CheckpointError(f"{target} was not saved and is as it was before: {what}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _named(pattern: re.Pattern[str], target: Path) -> Callable[[str, list[str]], list[str]]:
    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == target and pattern.fullmatch(name)]

    return ignored


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove_abandoned(target: Path) -> None:
    """Clear away the staging folders of processes that were killed; an old folder that one had put aside comes back."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.saving-*"):
        process = path.name.removesuffix("-old").rpartition("-")[2]
        if process != str(os.getpid()) and process.isdigit() and Path(f"/proc/{process}").exists():
            continue
        if path.name.endswith("-old") and not target.exists():
            path.rename(target)  # the process was killed between the two renames of `_swap`
        else:
            shutil.rmtree(path, ignore_errors=True)


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; what was there is then at `staging`."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        old = target.with_name(f"{staging.name}-old")
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step, where the system can (Linux's renameat2); say whether it did."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
