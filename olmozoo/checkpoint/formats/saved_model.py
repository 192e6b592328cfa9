"""TensorFlow's SavedModel: its variables are read by TensorFlow without loading a function; Keras writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.files import FolderHandle
from olmozoo.checkpoint.formats.names import canonical, flax_name, gather, guarded, missing_library
from olmozoo.checkpoint.tensors import DTYPE_NAMES, LazyTensor
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array

FOLDER = "saved_model"
VARIABLES = "variables/variables"  # the prefix of the files of values
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # the key of the message that says which variable is which


def read(folder: Path) -> dict[str, LazyTensor]:
    """The variables of a SavedModel that a Keras model exported, by canonical name.

    Raises:
        CheckpointError: it is broken, has other variables, or TensorFlow is not installed.
    """
    try:
        import tensorflow as tf
        from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
    except ImportError as error:
        raise missing_library(f"reading {folder}", "tensorflow", "tf") from error

    handle = FolderHandle(folder)  # TensorFlow opens the files of values when it reads the first of them

    def variables() -> Iterator[LazyTensor]:
        reader = tf.train.load_checkpoint(str(folder / VARIABLES))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        size = sum(file.stat().st_size for file in folder.glob(f"{VARIABLES}.data-*"))
        graph = TrackableObjectGraph.FromString(reader.get_tensor(OBJECT_GRAPH))
        keys: dict[str, tuple[str, str]] = {}
        for attribute in (attribute for node in graph.nodes for attribute in node.attributes):
            name = attribute.full_name.partition("/")[2]  # the model's own name comes first
            if not name.endswith("seed_generator_state"):
                # Where a model was tracked by Keras's `ExportArchive`, each variable is there twice.
                keys.setdefault(flax_name(name)[0], (name, attribute.checkpoint_key))
        total = 0
        for name, key in keys.values():
            dtype = np.dtype(dtypes[key].as_numpy_dtype)
            tensor = LazyTensor(
                name,
                dtype,
                tuple(shapes[key]),
                lambda key=key: _values(reader, key, handle),  # type: ignore[misc]
                folder,
            )
            if dtype not in DTYPE_NAMES.values():
                raise CheckpointError(f"{name} has dtype {dtype}, expected one of {', '.join(DTYPE_NAMES)}")
            total += tensor.nbytes
            if total > size:
                raise CheckpointError(f"the tensors up to {name} have {total:,} bytes, the files of values {size:,}")
            yield canonical(guarded(tensor), flax_name(name))

    try:
        return gather(folder, variables())
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{folder} is not a readable SavedModel: {error}") from error


def _values(reader: Any, key: str, handle: FolderHandle) -> Array:
    values: Array = reader.get_tensor(key)
    handle.check()
    return values


def write(folder: Path, model: Any) -> None:
    """Export a live Keras model; see its `export`."""
    model.export(folder, verbose=False)
