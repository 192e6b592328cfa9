"""Orbax: its arrays are read through TensorStore, and written by Orbax.

Nothing that the checkpoint's own metadata describes is made or run. The arrays may be in one OCDBT store, or in a
folder each.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.files import FolderHandle
from olmozoo.checkpoint.formats.flax_msgpack import nested
from olmozoo.checkpoint.formats.names import canonical, flax_name, gather, guarded, missing_library
from olmozoo.checkpoint.tensors import DTYPE_NAMES, LazyTensor
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array

FOLDER = "orbax"
OCDBT = "manifest.ocdbt"  # marks a store that has all arrays in it
METADATA = "_METADATA"
PARAMS = "params."  # where a training state has its parameters, beside an optimizer's and others
ARRAY_METADATA = (".zarray", "zarr.json")
AT_ONCE = 4  # arrays that are written together
# The most bytes of arrays for each byte on disk: compressed zeros come near it, anything else is a bomb.
MAX_RATIO, MIN_LIMIT = 1000, 1 << 26


def read(folder: Path) -> dict[str, LazyTensor]:
    """The arrays of a checkpoint, by canonical name. A folder of a `CheckpointManager` serves too.

    Raises:
        CheckpointError: it is broken, a piece of an array is missing, or TensorStore is not installed.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise missing_library(f"reading {folder}", "orbax-checkpoint", "flax") from error
    folder = _array_folder(folder)
    handle = FolderHandle(folder)  # TensorStore opens files when it reads their values

    def arrays() -> Iterator[LazyTensor]:
        base = {"driver": "file", "path": f"{folder.resolve()}/"}
        is_ocdbt = (folder / OCDBT).is_file()
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base} if is_ocdbt else base).result()
        keys = [key.decode() for key in store.list().result()]
        pieces = Counter(key.partition("/")[0] for key in keys if not key.endswith((".zattrs", *ARRAY_METADATA)))
        zeros_left_out = _leaves_zeros_out(folder)
        limit = max(MIN_LIMIT, MAX_RATIO * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        is_training_state = any(key.startswith(PARAMS) for key in keys)
        for key in keys:
            name, _, file = key.rpartition("/")
            if file not in ARRAY_METADATA or (is_training_state and not name.startswith(PARAMS)):
                continue
            driver = "zarr" if file == ".zarray" else "zarr3"
            spec = {"driver": driver, "kvstore": (store / f"{name}/").spec().to_json()}
            array = tensorstore.open(spec, open=True, read=True).result()
            tensor = LazyTensor(
                name,
                np.dtype(array.dtype.numpy_dtype),
                tuple(array.shape),
                lambda array=array: _values(array, handle),  # type: ignore[misc]
                folder,
            )
            chunk: Any = tuple(array.chunk_layout.read_chunk.shape or ())
            if tensor.dtype not in DTYPE_NAMES.values() or math.prod(chunk) > math.prod(tensor.shape):
                raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)} in chunks of {list(chunk)}")
            if tensor.nbytes > limit:
                raise CheckpointError(
                    f"{name} has {tensor.nbytes:,} bytes, the whole checkpoint {limit // MAX_RATIO:,}"
                )
            written: Any = tuple(array.chunk_layout.write_chunk.shape or ())
            needed = math.prod(-(-size // piece) for size, piece in zip(tensor.shape, written, strict=True))
            if pieces[name] < needed and not zeros_left_out:
                raise CheckpointError(f"{name} has {pieces[name]} of its {needed} pieces")
            yield canonical(guarded(tensor), flax_name(name))

    try:
        return gather(folder, arrays())
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{folder} is not a readable Orbax checkpoint: {error}") from error


def _values(array: Any, handle: FolderHandle) -> Array:
    values = np.asarray(array.read().result())
    handle.check()
    return values


def has_arrays(folder: Path) -> bool:
    """Whether a folder is one tree of arrays."""
    return any(any(folder.glob(pattern)) for pattern in (OCDBT, *(f"*/{name}" for name in ARRAY_METADATA)))


def _array_folder(folder: Path) -> Path:
    """The folder of the one tree of arrays: this one, or where a `CheckpointManager` put it, such as `1/default`.

    Of several steps, the last is taken, as `CheckpointManager.restore` does, with a warning.
    """
    if has_arrays(folder):
        return folder
    found = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if has_arrays(path)]
    parts = ("ocdbt.process_", ".orbax-checkpoint-tmp")  # of the tree around it, and of one that is not finished
    found = [path for path in found if not any(part in str(path.relative_to(folder)) for part in parts)]
    steps = sorted({int(name) for path in found if (name := path.relative_to(folder).parts[0]).isdecimal()})
    if len(steps) > 1:
        warnings.warn(f"{folder} has steps {', '.join(map(str, steps))}: step {steps[-1]} is read", stacklevel=2)
        found = [path for path in found if path.relative_to(folder).parts[0] == str(steps[-1])]
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no {OCDBT} and no array")
    names = ", ".join(path.relative_to(folder).as_posix() for path in found)
    raise CheckpointError(f"{folder} has several Orbax checkpoints, expected one: {names}; move the others away")


def _leaves_zeros_out(folder: Path) -> bool:
    """Whether the writer may have left pieces out that are all zero, as older versions of Orbax do."""
    try:
        settings = json.loads((folder / METADATA).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and settings.get("store_array_data_equal_to_fill_value") is not True


def _error_of(write: Any) -> Exception | None:
    """Wait for a write; the error that it ended with."""
    try:
        write.result()
    except Exception as error:
        return error
    return None


def write(folder: Path, tensors: list[LazyTensor]) -> None:
    """Write the leaves of a Flax tree, named by their paths joined by slashes, into a new folder, a few at a time.

    Raises:
        CheckpointError: Orbax is not installed, or cannot write.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise missing_library("writing orbax", "orbax-checkpoint", "flax") from error
    handlers: Any = ocp.type_handlers

    class LazyHandler(handlers.NumpyHandler):  # type: ignore[misc]
        """Writes a few arrays at a time: Orbax's own handler is given all of them at once."""

        async def serialize(self, values: Any, infos: Any, args: Any) -> list[Any]:
            for start in range(0, len(values), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                arrays = [tensor.read() for tensor in values[part]]
                # A call for each array: a call for several ends at the first error, while the others are still written
                # and make files in a folder that is being removed.
                writes: list[Any] = []
                for array, info, arg in zip(arrays, infos[part], args[part], strict=True):
                    writes += await super().serialize([array], [info], [arg])
                errors = [error for write in writes if (error := _error_of(write)) is not None]
                if errors:
                    raise errors[0]
            return []

    registry = handlers.create_type_handler_registry((LazyTensor, LazyHandler(deepcopy_host_arrays=False)))
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(nested(tensors)))
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds
        raise CheckpointError(f"Orbax could not write: {error}") from error
