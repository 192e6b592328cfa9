"""Canonical names of the tensors in Keras, Flax and Transformers 4 files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.tensors import TensorInfo, aligned_copy
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array

# What frameworks call the leaves; the kernel is the one that has its two dimensions the other way round.
LEAVES = {"kernel": "weight", "embedding": "weight", "embeddings": "weight", "scale": "weight", "gamma": "weight"}
LEAVES |= {"weight": "weight", "beta": "bias", "bias": "bias"}
# Where the model's own names begin in those of Transformers 4: before it come the names of scopes, in several ways.
DECODER_PART = re.compile(
    r"(?:^|[./])((?:embed_tokens|embed_positions|project_in|project_out|final_layer_norm|layers[._/]\d+)[./].+)$"
)


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


def _guarded(folder: Path, name: str, read: Callable[[], Array]) -> Callable[[], Array]:
    def values() -> Array:
        try:
            return read()
        except Exception as error:  # the libraries check values only as they read them
            raise CheckpointError(f"{folder}: {name} cannot be read: {error}") from error

    return values
