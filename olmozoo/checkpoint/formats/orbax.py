"""Weights in other formats than safetensors and `.bin`, read as canonical tensors, lazily and one at a time.

What Transformers 4 wrote for its TensorFlow and Flax classes (`tf_model.h5`, `flax_model.msgpack`), and what the wings'
own frameworks write: Keras weights, a SavedModel, Flax msgpack, Orbax. Every reader gives canonical names, and linear
weights as (out, in). None of them runs anything of a file: no Keras, TensorFlow or pickle loader is called, a `.keras`
is opened for its arrays alone. Where the bytes of a tensor lie plainly in the file they are mapped, as in
`checkpoint.py`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.files import ORBAX, new_file
from olmozoo.checkpoint.formats.flax_msgpack import _flax_tensors, _nested
from olmozoo.checkpoint.formats.names import _flax_name, _gather, _guarded, _nbytes, _needs, _tensor
from olmozoo.checkpoint.tensors import DTYPE_CODES, Output, TensorInfo, _Job, mapped
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array

OCDBT = "manifest.ocdbt"  # the file that makes a folder an Orbax checkpoint, where its arrays are not in folders


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


def _to_orbax(job: _Job, staging: Path) -> None:
    """Orbax writes the tree with one value for each array, in folders, while the arrays are written that then go there.

    Each array is one piece, whatever its size.
    """
    for module in ("orbax", "tensorstore"):
        if find_spec(module) is None:
            raise CheckpointError("writing orbax needs orbax-checkpoint: pip install 'olmozoo[flax]'")
    tensors, arrays = _flax_tensors(job), staging / f".{ORBAX}"
    with ThreadPoolExecutor(1) as beside:
        tree = beside.submit(_save_tree, (staging / ORBAX).absolute(), tensors)
        arrays.mkdir()
        for output in tensors:
            with new_file(arrays / output.name.replace("/", ".")) as stream:
                output.write(stream)
        places = tree.result()
    for output, place in zip(tensors, places, strict=True):
        (arrays / place.name).rename(place / ".".join("0" for _ in output.shape))
    arrays.rmdir()


def _save_tree(folder: Path, tensors: list[Output]) -> list[Path]:
    """Save a tree with Orbax, with no piece of an array, and return the folders in which those belong."""
    try:
        import orbax.checkpoint as ocp
        import tensorstore

        with ocp.Checkpointer(ocp.StandardCheckpointHandler(use_ocdbt=False)) as checkpointer:
            tree = _nested(tensors, lambda output: np.zeros(1, output.dtype))
            checkpointer.save(folder, args=ocp.args.StandardSave(tree))
        places = [folder / output.name.replace("/", ".") for output in tensors]
        for output, place in zip(tensors, places, strict=True):
            shutil.rmtree(place)
            metadata = {"chunks": output.shape, "compressor": None}
            store = {"driver": "file", "path": f"{place}/"}
            spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
            tensorstore.open(spec, create=True, dtype=output.dtype, shape=output.shape).result()
    except Exception as error:  # of many kinds
        raise CheckpointError(f"Orbax could not write: {error}") from error
    return places
