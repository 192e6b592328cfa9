"""Weights in other formats than safetensors and `.bin`, read as canonical tensors, lazily and one at a time.

What Transformers 4 wrote for its TensorFlow and Flax classes (`tf_model.h5`, `flax_model.msgpack`), and what the wings'
own frameworks write: Keras weights, a SavedModel, Flax msgpack, Orbax. Every reader gives canonical names, and linear
weights as (out, in). None of them runs anything of a file: no Keras, TensorFlow or pickle loader is called, a `.keras`
is opened for its arrays alone. Where the bytes of a tensor lie plainly in the file they are mapped, as in
`checkpoint.py`.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmozoo.bundle import Bundle, fields
from olmozoo.checkpoint import DTYPE_CODES, DTYPES, WEIGHTS, Array, TensorInfo, aligned_copy, fail, mapped
from olmozoo.errors import CheckpointError

FLAX_WEIGHTS, KERAS_WEIGHTS, KERAS, SAVED_MODEL, ORBAX = WEIGHTS[3:]
VARIABLES = "variables/variables"  # what the names of a SavedModel's files of values begin with
OCDBT = "manifest.ocdbt"  # the file that makes a folder an Orbax checkpoint, where its arrays are not in folders
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # the key of what says which is which

# What frameworks call the leaves; the kernel is the one that has its two dimensions the other way round.
LEAVES = {"kernel": "weight", "embedding": "weight", "embeddings": "weight", "scale": "weight", "gamma": "weight"}
LEAVES |= {"weight": "weight", "beta": "bias", "bias": "bias"}
# Where the model's own names begin in those of Transformers 4: before it come the names of scopes, in several ways.
DECODER_PART = re.compile(
    r"(?:^|[./])((?:embed_tokens|embed_positions|project_in|project_out|final_layer_norm|layers[._/]\d+)[./].+)$"
)
MAX_ENTRIES = 1_000_000  # of a msgpack file: far above any model, and little memory


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file (or folder) in one of the formats above, by canonical name.

    Raises:
        CheckpointError: it is broken, or the library that reads it is not installed.
    """
    if path.name == ORBAX:
        return _read_orbax(path)
    if path.name == SAVED_MODEL:
        return _read_saved_model(path)
    if path.suffix == ".msgpack":
        return _read_msgpack(path)
    if path.suffix == ".keras":
        return _read_keras_archive(path)
    with path.open("rb") as stream:
        return _read_h5(path, stream, 0, _keras_name if path.name == KERAS_WEIGHTS else _transformers_name)


def canonical_name(name: str) -> str:
    """The canonical name of what Transformers 4 called so, in an index of shards or in safetensors.

    Raises:
        CheckpointError: no weight is called so.
    """
    return _old_name(name)[0]


def canonical_tensors(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of safetensors that a TensorFlow or Flax class of Transformers 4 wrote, by canonical name.

    Raises:
        CheckpointError: a name is none of a weight.
    """

    def found() -> Iterator[tuple[str, TensorInfo]]:
        for name, info in tensors.items():
            canonical, transposed = _old_name(name)
            yield canonical, _tensor(path, info.dtype, info.shape, info.read, transposed and len(info.shape) == 2)

    return _gather(path, found())


def _old_name(name: str) -> tuple[str, bool]:
    return _transformers_name(name) if name.endswith(":0") else _flax_name(name)


def _named(module: str, leaf: str) -> tuple[str, bool]:
    """The canonical name of a module's leaf, and whether its values are transposed."""
    if leaf not in LEAVES:
        raise CheckpointError(f"{module}: {leaf!r} is none of {', '.join(sorted(LEAVES))}")
    return f"{module}.{LEAVES[leaf]}", leaf == "kernel"


def _flax_name(path: str) -> tuple[str, bool]:
    module, _, leaf = path.replace("/", ".").removeprefix("params.").rpartition(".")
    return _named(module, leaf)


def _transformers_name(path: str, dataset: Any = None) -> tuple[str, bool]:
    match = DECODER_PART.search(path.removesuffix(":0"))
    if not match:
        raise CheckpointError(f"{path} is not the name of a weight of OPT")
    module, _, leaf = re.sub(r"^layers_", "layers.", match[1]).replace("/", ".").rpartition(".")
    return _named(f"model.decoder.{module}", leaf)


def _keras_name(path: str, dataset: Any) -> tuple[str, bool]:
    """The name of `layers/tf_olmo_model/blocks/olmo_block_1/mlp/up_proj/vars/0`: each step's own, from its `vars`."""
    *steps, variables, index = path.split("/")
    names, group = [], dataset.file
    for step in steps:
        group = group[step]
        if "vars" in group:
            names.append(group["vars"].attrs["name"])
        elif step == "blocks":  # a list has no name of its own; the one called `layers` holds what has a name anyway
            names.append("layers")
    if variables != "vars" or index not in ("0", "1") or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path} is not the name of a weight")
    linear = dataset.ndim == 2 and not names[-1].startswith("embed_")
    return ".".join([*names, ("weight", "bias")[int(index)]]), linear


def _tensor(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], read: Callable[[], Array], transposed: bool
) -> TensorInfo:
    def values() -> Array:
        array = read()
        return aligned_copy(array, transposed) if transposed or not array.flags.aligned else array

    return TensorInfo(path, dtype, shape[::-1] if transposed else shape, values)


def _nbytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _gather(path: Path, found: Iterator[tuple[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, info in found:
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is there twice")
        tensors[name] = info
    return tensors


def _needs(path: Path, library: str, extra: str) -> CheckpointError:
    return CheckpointError(f"reading {path} needs {library}: pip install {library}, or 'olmozoo[{extra}]'")


# -- HDF5: Transformers 4's TensorFlow files, and Keras's own ---------------------------------------------------------


def _read_h5(
    path: Path, stream: Any, start: int, name_of: Callable[[str, Any], tuple[str, bool]]
) -> dict[str, TensorInfo]:
    """The datasets of an HDF5 file that begins at byte `start` of `path`; `stream` reads that part alone.

    The library reads names, shapes and places; the values are mapped from the places it gives. Only hard links are
    followed, so nothing leads out of the file.
    """
    try:
        import h5py
    except ImportError as error:
        raise _needs(path, "h5py", "tf") from error
    size = path.stat().st_size
    datasets: list[tuple[str, Any]] = []
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    try:
        with h5py.File(stream, "r") as file:
            file.visititems(lambda name, item: datasets.append((name, item)) if hasattr(item, "dtype") else None)
            for name, dataset in datasets:
                if name.split("/")[0] in ("optimizer", "metrics") and name_of is _keras_name:
                    continue  # of a compiled model
                try:
                    canonical, transposed = name_of(name, dataset)
                    if canonical in tensors:
                        raise CheckpointError(f"{name} is {canonical}, which is there already")
                    dtype, shape, offset = _plain(name, dataset, size - start)
                except CheckpointError as error:
                    problems.append(str(error))
                    continue
                transposed = transposed and len(shape) == 2
                values = mapped(path, dtype, shape, start + offset)
                tensors[canonical] = _tensor(path, dtype, shape, values, transposed)
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{path} is not a readable HDF5 file: {error}") from error
    fail(f"{path} is broken", problems)
    return tensors


def _plain(name: str, dataset: Any, size: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """dtype, shape and place of a dataset whose bytes lie in the file as they are."""
    dtype = dataset.dtype
    if dtype == np.dtype("V2") and dataset.attrs.get("dtype") == "bfloat16":
        dtype = DTYPES["BF16"]
    if dtype not in DTYPE_CODES:
        raise CheckpointError(f"{name} has dtype {dtype}, expected one of {', '.join(d.name for d in DTYPE_CODES)}")
    offset, shape = dataset.id.get_offset(), dataset.shape  # no place where values are compressed or in another file
    if shape is None or offset is None:
        raise CheckpointError(f"{name} is empty, compressed or in another file, expected plain values")
    if 0 in shape or offset + _nbytes(dtype, shape) > size:
        raise CheckpointError(
            f"{name} {list(shape)} at byte {offset} needs {_nbytes(dtype, shape)} bytes, the file has {size}"
        )
    return dtype, shape, offset


class Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self.stream, self.start, self.length, self.position = stream, start, length, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if position < 0:
            raise OSError(f"a position of {position}")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.stream.seek(self.start + self.position)
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        count: int = self.stream.readinto(view)
        self.position += count
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _read_keras_archive(path: Path) -> dict[str, TensorInfo]:
    with path.open("rb") as stream:
        try:
            entry = zipfile.ZipFile(stream).getinfo(KERAS_WEIGHTS)
            stream.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
        except Exception as error:  # of many kinds, for what can be wrong inside a file
            raise CheckpointError(f"{path} is not a zip archive with a {KERAS_WEIGHTS}: {error}") from error
        if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > path.stat().st_size:
            raise CheckpointError(f"{path}: {KERAS_WEIGHTS} is compressed or truncated")
        return _read_h5(path, Window(stream, start, entry.file_size), start, _keras_name)


# -- msgpack: Transformers 4's Flax files, and Flax's own -------------------------------------------------------------


class _Leaf(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class _Unpacker:
    """What flax.serialization packs (https://github.com/msgpack/msgpack/blob/master/spec.md), with no array read.

    Every length is checked against the bytes that are there before anything is made of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self.position, self.end, self.entries = 0, len(self.data), 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} at byte {self.position} of {len(self.data)}")

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        if count > self.end - self.position:
            raise self.fail(f"{count} bytes expected, {self.end - self.position} left: truncated?")
        self.position += count
        return self.position - count

    def take(self, count: int) -> bytes:
        start = self.skip(count)
        return self.data[start : start + count].tobytes()

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def size(self, code: int, fixed: range, wide: dict[int, int]) -> int | None:
        """The length in a value's head, if the value is of the kind with these codes."""
        if code in fixed:
            return code - fixed.start
        return self.number(wide[code]) if code in wide else None

    def value(self, depth: int = 0) -> Any:
        self.entries += 1
        if depth > 64 or self.entries > MAX_ENTRIES:
            raise self.fail("nested too deeply, or too many entries")
        code = self.number(1)
        if code < 0x80:
            return code
        if code in (0xC2, 0xC3):
            return code == 0xC3
        if code in (0xCC, 0xCD, 0xCE, 0xCF):
            return self.number(1 << code - 0xCC)
        if (count := self.size(code, range(0x80, 0x90), {0xDE: 2, 0xDF: 4})) is not None:
            return self.mapping(count, depth)
        if (count := self.size(code, range(0xA0, 0xC0), {0xD9: 1, 0xDA: 2, 0xDB: 4})) is not None:
            try:
                return self.take(count).decode()
            except UnicodeDecodeError as error:
                raise self.fail("a text that is not UTF-8") from error
        if (count := self.size(code, range(0), {0xC7: 1, 0xC8: 2, 0xC9: 4})) is not None:
            return self.array(count)
        if code in range(0xD4, 0xD9):
            return self.array(1 << code - 0xD4)
        raise self.fail(f"the type code {code:#x}, which no parameters have")

    def mapping(self, count: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in result:
                raise self.fail(f"the key {key!r} is there twice or is no text")
            result[key] = self.value(depth + 1)
        return result

    def array(self, count: int) -> _Leaf:
        """An array of NumPy's: the extension type 1, which holds a triple of shape, dtype and bytes."""
        kind = self.number(1)
        begin, outer = self.skip(count), self.end
        self.position, self.end = begin, begin + count
        if kind != 1 or self.number(1) != 0x93:
            raise self.fail(f"an extension of type {kind} that is no array")
        shape = tuple(self.value() for _ in range(self.number(1) & 0x0F))
        name = self.value()
        dtype = next((dtype for dtype in DTYPE_CODES if dtype.name == name), None)
        length = self.size(self.number(1), range(0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
        if dtype is None or any(type(dimension) is not int for dimension in shape):
            raise self.fail(f"an array of dtype {name!r} and shape {shape}")
        if length is None or length != _nbytes(dtype, shape) or length == 0:
            raise self.fail(f"{length} bytes for {dtype.name} {list(shape)}, expected {_nbytes(dtype, shape)},")
        offset = self.skip(length)
        if self.position != self.end:
            raise self.fail(f"{self.end - self.position} bytes too many in an array")
        self.end = outer
        return _Leaf(dtype, shape, offset)


def _read_msgpack(path: Path) -> dict[str, TensorInfo]:
    unpacker = _Unpacker(path)
    tree = unpacker.value()
    if not isinstance(tree, dict) or unpacker.position != unpacker.end:
        raise unpacker.fail("something other than one map of parameters")
    return _gather(path, _leaves(path, tree, ""))


def _leaves(path: Path, tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, TensorInfo]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "__msgpack_chunked_array__" not in value:
            yield from _leaves(path, value, f"{name}.")
            continue
        canonical, transposed = _flax_name(name)
        if isinstance(value, _Leaf):
            dtype, shape = value.dtype, value.shape
            read = mapped(path, dtype, shape, value.offset)
        else:
            dtype, shape, read = _chunked(path, name, value)
        yield canonical, _tensor(path, dtype, shape, read, transposed and len(shape) == 2)


def _chunked(path: Path, name: str, value: Any) -> tuple[np.dtype[Any], tuple[int, ...], Callable[[], Array]]:
    """An array above 1 GiB, which Flax cuts into flat pieces: {shape: {"0": ...}, chunks: {"0": ...}}."""

    def in_order(key: str, kind: type) -> list[Any]:
        items = value.get(key) if isinstance(value, dict) else None
        if not isinstance(items, dict) or set(items) != {str(i) for i in range(len(items))}:
            raise CheckpointError(f"{path}: {name} is no array")
        if not items or any(type(item) is not kind for item in items.values()):
            raise CheckpointError(f"{path}: {name} has bad {key}")
        return [items[str(i)] for i in range(len(items))]

    shape, chunks = tuple(in_order("shape", int)), in_order("chunks", _Leaf)
    dtype = chunks[0].dtype
    found = sum(_nbytes(dtype, chunk.shape) for chunk in chunks)
    if any(chunk.dtype != dtype or len(chunk.shape) != 1 for chunk in chunks) or found != _nbytes(dtype, shape):
        raise CheckpointError(f"{path}: {name} has {found} bytes, expected {_nbytes(dtype, shape)} for {list(shape)}")

    def read() -> Array:
        pieces = [mapped(path, dtype, chunk.shape, chunk.offset)() for chunk in chunks]
        return np.concatenate(pieces).reshape(shape)

    return dtype, shape, read


# -- folders: Orbax and SavedModel ------------------------------------------------------------------------------------


def _read_orbax(folder: Path) -> dict[str, TensorInfo]:
    """The arrays of an Orbax checkpoint, from its key-value store; what its metadata asks to be made is not made.

    The store is a tree of Orbax's own kind, or plain folders, as older versions and `olmozoo convert` write it.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise _needs(folder, "orbax-checkpoint", "flax") from error
    folder = _orbax_tree(folder)
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    in_folders = not (folder / OCDBT).is_file()

    def found() -> Iterator[tuple[str, TensorInfo]]:
        store = tensorstore.KvStore.open(base if in_folders else {"driver": "ocdbt", "base": base}).result()
        keys = [key.decode() for key in store.list().result()]
        present = Counter(
            key.partition("/")[0] for key in keys if not key.endswith((".zarray", ".zattrs", "zarr.json"))
        )
        all_present = _has_every_piece(folder)
        for key in keys:
            name, _, file = key.rpartition("/")
            if file in (".zarray", "zarr.json"):
                place = (store / f"{name}/").spec().to_json()
                spec = {"driver": "zarr" if file == ".zarray" else "zarr3", "kvstore": place}
                array = tensorstore.open(spec, open=True, read=True).result()
                dtype, shape = np.dtype(array.dtype.numpy_dtype), tuple(array.shape)
                chunk: Any = tuple(array.chunk_layout.read_chunk.shape or ())
                if dtype not in DTYPE_CODES or _nbytes(dtype, chunk) > _nbytes(dtype, shape):
                    raise CheckpointError(f"{name} is {dtype} {list(shape)} in chunks of {list(chunk)}")
                pieces: Any = tuple(array.chunk_layout.write_chunk.shape or ())
                needed = math.prod(-(-size // piece) for size, piece in zip(shape, pieces, strict=True))
                if all_present and present[name] < needed:
                    raise CheckpointError(f"{name} has {present[name]} of its {needed} pieces")
                canonical, transposed = _flax_name(name)
                values = _guarded(folder, canonical, partial(_read_array, array))
                piece = folder / name / ".".join("0" for _ in shape)
                if in_folders and chunk == shape and _is_plain(array) and _is_of_size(piece, _nbytes(dtype, shape)):
                    values = mapped(piece, dtype, shape, 0)
                yield canonical, _tensor(folder, dtype, shape, values, transposed)

    try:
        return _gather(folder, found())
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{folder} is not a readable Orbax checkpoint: {error}") from error


def _orbax_tree(folder: Path) -> Path:
    """The folder of the one tree of arrays: this one, or where a manager of checkpoints put it, such as `1/default`."""

    def is_tree(place: Path) -> bool:
        return any(any(place.glob(pattern)) for pattern in (OCDBT, "*/.zarray", "*/zarr.json"))

    if is_tree(folder):
        return folder
    trees = [place for pattern in ("*", "*/*") for place in sorted(folder.glob(pattern)) if is_tree(place)]
    parts = ("ocdbt.process_", ".orbax-checkpoint-tmp")  # of the tree around it, and of one not finished
    trees = [place for place in trees if not any(part in str(place.relative_to(folder)) for part in parts)]
    if len(trees) == 1:
        return trees[0]
    if not trees:
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no {OCDBT} and no array")
    found = ", ".join(place.relative_to(folder).as_posix() for place in trees)
    raise CheckpointError(f"{folder} holds several Orbax checkpoints, expected one: {found}")


def _has_every_piece(folder: Path) -> bool:
    """Whether the writer of an Orbax checkpoint has promised that: else one of zeros may be left out."""
    try:
        settings = json.loads((folder / "_METADATA").read_bytes())
        return settings["store_array_data_equal_to_fill_value"] is True
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _is_plain(array: Any) -> bool:
    """Whether the pieces of an array of TensorStore hold its values as they are in memory."""
    metadata = array.spec().to_json().get("metadata", {})
    packed = metadata.get("compressor") or metadata.get("filters") or metadata.get("codecs")
    return not packed and metadata.get("order") == "C" and not str(metadata.get("dtype")).startswith(">")


def _is_of_size(file: Path, nbytes: int) -> bool:
    return file.is_file() and file.stat().st_size == nbytes


def _read_array(array: Any) -> Array:
    return np.asarray(array.read().result())


def _read_saved_model(folder: Path) -> dict[str, TensorInfo]:
    """The variables of a SavedModel that a wing exported, from their files alone: no function in it is loaded."""
    if find_spec("google_crc32c") is None:
        raise _needs(folder, "google-crc32c", "tf")

    def found() -> Iterator[tuple[str, TensorInfo]]:
        bundle = Bundle(folder / VARIABLES)
        for canonical, (key, transposed) in saved_keys(bundle.read_text(OBJECT_GRAPH)).items():
            dtype, shape = bundle.describe(key)
            values = _guarded(folder, canonical, partial(bundle.read, key))
            yield canonical, _tensor(folder, dtype, shape, values, transposed)

    try:
        return _gather(folder, found())
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{folder} is not a readable SavedModel: {error}") from error


def saved_keys(graph: bytes) -> dict[str, tuple[str, bool]]:
    """Canonical name -> key in the variables of a SavedModel, and whether it is transposed there.

    Args:
        graph: a message of TensorFlow's `trackable_object_graph.proto`.
    """
    keys: dict[str, tuple[str, bool]] = {}
    for node in fields(graph).get(1, []):
        for attribute in map(fields, fields(node).get(2, [])):
            full_name, key = (attribute[number][0].decode() for number in (2, 3))
            name = full_name.partition("/")[2]  # the model's own name comes first
            if not name.endswith("seed_generator_state"):
                canonical, transposed = _flax_name(name)
                # Where a model was tracked by Keras's `ExportArchive`, each variable is there twice.
                keys.setdefault(canonical, (key, transposed))
    return keys


def _guarded(folder: Path, name: str, read: Callable[[], Array]) -> Callable[[], Array]:
    def values() -> Array:
        try:
            return read()
        except Exception as error:  # the libraries check values only as they read them
            raise CheckpointError(f"{folder}: {name} cannot be read: {error}") from error

    return values
