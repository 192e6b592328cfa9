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
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from olmozoo.checkpoint.files import KERAS, KERAS_WEIGHTS, new_file
from olmozoo.checkpoint.formats.names import _nbytes, _needs, _tensor
from olmozoo.checkpoint.tensors import DTYPE_CODES, DTYPES, Output, TensorInfo, _Job, _turned, mapped
from olmozoo.errors import CheckpointError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import HEAD_MODULES
from olmozoo.generation.config import GenerationConfig


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
    raise_problems(f"{path} is broken", problems)
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


def keras_steps(config: ModelConfig, name: str) -> Iterator[tuple[str, str]]:
    """The way to a parameter's layer as Keras saves it: each step's place in the file, and its layer's name.

    Keras names a place by the attribute that leads there, but what it finds in a list by its class. The list `layers`
    that every model has comes before most attributes, in alphabetical order, and takes what is in it.
    """
    parts = iter(name.split(".")[:-1])
    for part in parts:
        if part == "model":
            yield f"layers/{_snake_case(f'TF{config.name}Model')}", part
        elif part in HEAD_MODULES.values():
            yield "layers/dense", part
        elif part == "layers":
            number = next(parts)
            yield f"blocks/{_snake_case(f'{config.name}Block')}" + (f"_{number}" if number != "0" else ""), number
        elif part == "norm":
            yield "layers/rms_norm", part
        else:
            yield part, part


def _snake_case(name: str) -> str:
    """The name of a class as Keras spells it in files."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _skeleton(file: Path, job: _Job) -> list[tuple[int, Output]]:
    """Make a Keras weights file with holes for the tensors, and return them with the bytes at which they belong.

    Nothing is written twice, and no value passes through the HDF5 library.
    """
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError("writing Keras weights needs h5py: pip install h5py, or 'olmozoo[tf]'") from error
    plain = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plain.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plain.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    places = []
    with h5py.File(file, "w") as h5:
        h5.require_group("vars").attrs["name"] = _snake_case(job.keras_class)
        for parameter, output in job.tensors.items():
            group = h5
            for place, name in keras_steps(job.config, output.name):
                group = group.require_group(place)
                group.require_group("vars").attrs["name"] = name
            turned = _turned(parameter, output, output.name)
            bfloat16 = output.dtype.name == "bfloat16"  # HDF5 has no such type
            kind = h5py.h5t.py_create(np.dtype("V2") if bfloat16 else output.dtype)
            index = b"1" if parameter.kind == "bias" else b"0"
            dataset = h5py.h5d.create(group["vars"].id, index, kind, h5py.h5s.create_simple(turned.shape), dcpl=plain)
            if bfloat16:
                h5py.Dataset(dataset).attrs["dtype"] = "bfloat16"
            places.append((dataset.get_offset(), turned))
    return sorted(places, key=lambda place: place[0])


def _to_keras_weights(job: _Job, staging: Path) -> None:
    with new_file(staging / KERAS_WEIGHTS) as stream:
        _fill(stream, job, staging)


def _fill(stream: IO[bytes], job: _Job, staging: Path) -> None:
    """Write a Keras weights file from its beginning to its end: systems are slow in writing into holes."""
    skeleton = staging / f".{KERAS_WEIGHTS}"
    places = _skeleton(skeleton, job)
    with skeleton.open("rb") as rest:
        for offset, output in places:
            stream.write(rest.read(offset - rest.tell()))
            output.write(stream)
            rest.seek(output.nbytes, os.SEEK_CUR)
        stream.write(rest.read())
    skeleton.unlink()


def _to_keras(job: _Job, staging: Path) -> None:
    """The archive that `model.save("model.keras")` writes, with no model made."""
    dtype = next(iter(job.tensors.values())).dtype.name
    config = {
        "module": f"olmozoo.tf.{job.config.model_type}",
        "class_name": job.keras_class,
        "config": {
            "config": job.config.to_dict(),
            "generation_config": GenerationConfig.from_folder(staging, job.config).to_dict(),
            "name": _snake_case(job.keras_class),
            "dtype": {
                "module": "keras",
                "class_name": "DTypePolicy",
                "config": {"name": dtype},
                "registered_name": None,
            },
        },
        "registered_name": f"olmozoo>{job.keras_class}",
        "compile_config": {},
    }
    with new_file(staging / KERAS) as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps({"keras_version": "3"}))
        archive.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
        with archive.open(zipfile.ZipInfo(KERAS_WEIGHTS), "w", force_zip64=True) as entry:
            _fill(entry, job, staging)
