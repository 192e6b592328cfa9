"""Keras weights: `.weights.h5` and `.keras` as Keras saves them, and the `tf_model.h5` of Transformers 4.

Read through h5py, without Keras: nothing of a file's config is made or run. Written by Keras from a live model, since
the names in its files are Keras's own.
"""

from __future__ import annotations

import dataclasses
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.files import FileSlice
from olmozoo.checkpoint.formats.names import Named, canonical, gather, guarded, missing_library, transformers_name
from olmozoo.checkpoint.tensors import DTYPE_NAMES, LazyTensor
from olmozoo.errors import CheckpointError, raise_problems
from olmozoo.typing import Array

FILE = "model.keras"
WEIGHTS_FILE = "model.weights.h5"
TRANSFORMERS_FILE = "tf_model.h5"
LORA = ("/vars/lora_a", "/vars/lora_b", "/vars/lora_scale")  # see `olmozoo.tf.layers.WithAdapters`
# Transformers 4's OPT in TensorFlow has a head tied to this, whatever its config says.
TF_HEAD = "model.decoder.embed_tokens.weight"


def read_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `.weights.h5`.

    Raises:
        CheckpointError: it is broken, has other names than Keras gives our models, or h5py is not installed.
    """
    return _read_h5(path, FileSlice(path), _keras_name)


def read_transformers(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a TensorFlow model of Transformers 4; raises as `read_weights` does."""
    return _read_h5(path, FileSlice(path), lambda name, _: transformers_name(name))


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `.keras` archive; raises as `read_weights` does."""
    try:
        with path.open("rb") as stream:
            entry = zipfile.ZipFile(stream).getinfo(WEIGHTS_FILE)
            stream.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{path} is not a zip archive with a {WEIGHTS_FILE}: {error}") from error
    if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > path.stat().st_size:
        raise CheckpointError(f"{path}: {WEIGHTS_FILE} is compressed or truncated")
    return _read_h5(path, FileSlice(path, start, entry.file_size), _keras_name)


def _read_h5(path: Path, stream: FileSlice, name_of: Callable[[str, Any], Named]) -> dict[str, LazyTensor]:
    """The datasets of an HDF5 file. Only hard links are followed, so that nothing leads out of the file."""
    try:
        import h5py
    except ImportError as error:
        raise missing_library(f"reading {path}", "h5py", "tf") from error
    datasets: list[tuple[str, Any]] = []
    problems: list[str] = []
    tensors: list[LazyTensor] = []
    try:
        file = h5py.File(stream, "r")
        file.visititems(lambda name, item: datasets.append((name, item)) if hasattr(item, "dtype") else None)
        for name, dataset in datasets:
            if name.split("/")[0] in ("optimizer", "metrics"):
                continue  # of a compiled model
            if name.endswith(LORA):
                continue  # part of the kernel beside it
            try:
                named = name_of(name, dataset)
                tensor = _merged(_tensor(path, dataset, stream.length), dataset, path, stream.length)
                tensors.append(canonical(guarded(tensor), named))
            except CheckpointError as error:
                problems.append(f"{name}: {error}")
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{path} is not a readable HDF5 file: {error}") from error
    raise_problems(f"{path} is broken", problems)
    return gather(path, tensors)


def _tensor(path: Path, dataset: Any, size: int) -> LazyTensor:
    """A dataset whose values are plain bytes in the file: the file bounds what reading it takes."""
    dtype, shape = dataset.dtype, dataset.shape
    if dtype == np.dtype("V2") and dataset.attrs.get("dtype") == "bfloat16":
        dtype = DTYPE_NAMES["bfloat16"]
    if dtype not in DTYPE_NAMES.values():
        raise CheckpointError(f"dtype is {dtype}, expected one of {', '.join(DTYPE_NAMES)}")
    offset = dataset.id.get_offset()  # None where values are compressed or in another file
    if shape is None or offset is None:
        raise CheckpointError("it is empty, compressed or in another file, expected plain values")
    tensor = LazyTensor(dataset.name, dtype, shape, partial(_values, dataset, dtype), path)
    if 0 in shape or offset + tensor.nbytes > size:
        raise CheckpointError(f"{list(shape)} at byte {offset} needs {tensor.nbytes} bytes, the file has {size}")
    return tensor


def _merged(kernel: LazyTensor, dataset: Any, path: Path, size: int) -> LazyTensor:
    """A kernel (in, out) with the LoRA adapters that lie beside it, if any, added."""
    group = dataset.parent
    if not dataset.name.endswith("/vars/0") or LORA[0].split("/")[-1] not in group:
        return kernel
    a, b, scale = (_tensor(path, group[name.split("/")[-1]], size) for name in LORA)
    *experts, rows, columns = kernel.shape
    if a.shape[:-1] != (*experts, rows) or b.shape != (*experts, *a.shape[-1:], columns) or scale.shape != ():
        raise CheckpointError(f"adapters of {list(a.shape)} and {list(b.shape)} do not fit {list(kernel.shape)}")

    def read() -> Array:
        wide = np.promote_types(kernel.dtype, np.float32) if kernel.dtype.itemsize > 2 else np.dtype(np.float32)
        delta = scale.read().astype(wide) * (a.read().astype(wide) @ b.read().astype(wide))
        merged: Array = (kernel.read().astype(wide) + delta).astype(kernel.dtype)
        return merged

    return dataclasses.replace(kernel, read=read)


def _values(dataset: Any, dtype: np.dtype[Any]) -> Array:
    values: Array = dataset[()]
    return values.view(dtype)


def _keras_name(path: str, dataset: Any) -> Named:
    """The name of `layers/tf_olmo_model/blocks/olmo_block_1/mlp/up_proj/vars/0`: each step's own, from its `vars`."""
    *steps, variables, index = path.split("/")
    names, group = [], dataset.file
    for step in steps:
        group = group[step]
        if "vars" in group:  # a list, such as `blocks`, has none
            names.append(group["vars"].attrs["name"])
    if variables != "vars" or index not in ("0", "1") or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path} is not the name of a weight")
    is_linear = dataset.ndim > 1 and not names[-1].startswith("embed_")
    names = [f"layers.{name}" if name.isdigit() else name for name in names]  # a block may be called that too
    return ".".join([*names, ("weight", "bias")[int(index)]]), is_linear


def write(path: Path, model: Any) -> None:
    """Write the archive of a live Keras model."""
    model.save(path)


def write_weights(path: Path, model: Any) -> None:
    """Write the weights of a live Keras model."""
    model.save_weights(path)
