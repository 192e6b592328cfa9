"""Keras weights: `.weights.h5` and `.keras` as Keras saves them, and the `tf_model.h5` of Transformers 4.

Read without Keras: nothing of a file's config is made or run. h5py lists the datasets in a process of its own, with a
bound on time and memory, since a damaged file can make the HDF5 library allocate gigabytes or never return. Written by
Keras from a live model, since the names in its files are Keras's own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint import bounded
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


def _read_h5(path: Path, stream: FileSlice, name_of: Callable[[str, H5], Named]) -> dict[str, LazyTensor]:
    """The datasets of an HDF5 file, which are listed in another process and read here, as plain bytes."""
    if importlib.util.find_spec("h5py") is None:
        raise missing_library(f"reading {path}", "h5py", "tf")
    try:
        found = bounded.run(
            "list_hdf5", stream.stream, stream.start, stream.length, libraries=("numpy", "h5py"), size=stream.length
        )
    except bounded.BoundError as error:
        raise CheckpointError(f"{path} is not a readable HDF5 file: {error}") from error
    file = H5(path, stream, **found)
    problems: list[str] = []
    tensors: list[LazyTensor] = []
    for name in file.datasets:
        if name.split("/")[0] in ("optimizer", "metrics"):
            continue  # of a compiled model
        if name.endswith(LORA):
            continue  # part of the kernel beside it
        try:
            tensors.append(canonical(guarded(file.merged(name)), name_of(name, file)))
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
    raise_problems(f"{path} is broken", problems)
    return gather(path, tensors)


@dataclasses.dataclass(frozen=True)
class H5:
    """An HDF5 file.

    Attributes:
        path: where it is.
        stream: its bytes.
        datasets, names: as of `bounded.list_hdf5`.
    """

    path: Path
    stream: FileSlice
    datasets: dict[str, Any]
    names: dict[str, Any]

    def tensor(self, name: str) -> LazyTensor:
        """A dataset whose values are plain bytes in the file: the file bounds what reading it takes."""
        if isinstance(found := self.datasets[name], str):
            raise CheckpointError(found)
        of_file, shape, offset = found
        if of_file not in DTYPE_NAMES:
            raise CheckpointError(f"dtype is {of_file}, expected one of {', '.join(DTYPE_NAMES)}")
        if shape is None or offset is None:  # no offset where values are compressed or in another file
            raise CheckpointError("it is empty, compressed or in another file, expected plain values")
        dtype, shape = DTYPE_NAMES[of_file], tuple(shape)
        tensor = LazyTensor(name, dtype, shape, partial(self.stream.array, dtype, shape, offset), self.path)
        if 0 in shape or offset + tensor.nbytes > self.stream.length:
            size = self.stream.length
            raise CheckpointError(f"{list(shape)} at byte {offset} needs {tensor.nbytes} bytes, the file has {size}")
        return tensor

    def merged(self, name: str) -> LazyTensor:
        """A dataset, with the LoRA adapters added that lie beside a kernel (in, out) or (experts, in, out)."""
        kernel, group = self.tensor(name), name.removesuffix("/vars/0")
        if group == name or group + LORA[0] not in self.datasets:
            return kernel
        beside = [group + part for part in LORA]
        if missing := [part for part in beside if part not in self.datasets]:
            raise CheckpointError(f"{missing[0]} is not there, {beside[0]} is")
        a, b, scale = map(self.tensor, beside)
        if len(kernel.shape) < 2 or (a.shape[:-1], b.shape, scale.shape) != (
            kernel.shape[:-1],
            (*kernel.shape[:-2], *a.shape[-1:], kernel.shape[-1]),
            (),
        ):
            raise CheckpointError(f"adapters of {list(a.shape)} and {list(b.shape)} do not fit {list(kernel.shape)}")

        def read() -> Array:
            wide = np.promote_types(kernel.dtype, np.float32) if kernel.dtype.itemsize > 2 else np.dtype(np.float32)
            delta = scale.read().astype(wide) * (a.read().astype(wide) @ b.read().astype(wide))
            merged: Array = (kernel.read().astype(wide) + delta).astype(kernel.dtype)
            return merged

        return dataclasses.replace(kernel, read=read)


def _keras_name(path: str, file: H5) -> Named:
    """The name of `layers/tf_olmo_model/blocks/olmo_block_1/mlp/up_proj/vars/0`: each step's own, from its `vars`."""
    *steps, variables, index = path.split("/")
    groups = ["/".join(steps[:count]) for count in range(1, len(steps) + 1)]
    # A list, such as `blocks`, has no `vars`.
    names = [file.names[f"{group}/vars"] for group in groups if f"{group}/vars" in file.names]
    if variables != "vars" or index not in ("0", "1") or not names or None in names:
        raise CheckpointError(f"{path} is not the name of a weight")
    is_linear = len(file.datasets[path][1]) > 1 and not names[-1].startswith("embed_")
    names = [f"layers.{name}" if name.isdigit() else name for name in names]  # a block may be called that too
    return ".".join([*names, ("weight", "bias")[int(index)]]), is_linear


def write(path: Path, model: Any) -> None:
    """Write the archive of a live Keras model."""
    model.save(path)


def write_weights(path: Path, model: Any) -> None:
    """Write the weights of a live Keras model."""
    model.save_weights(path)
