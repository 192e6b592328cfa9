"""A checkpoint folder: a strict lazy reader and an atomic streaming writer, with no framework in sight.

The safetensors format is read and written here rather than through its library for three reasons: tensors come as views
of the mapped file, with nothing copied before a framework wants them; a shard is written one tensor at a time, so that
saving needs the memory of one tensor and not of one shard; and a broken file is told apart tensor by tensor. Files are
the same in both directions (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from olmozoo.checkpoint.files import Behind, new_file
from olmozoo.checkpoint.formats._pickling import Made, Named, Persistent, pickled
from olmozoo.checkpoint.tensors import ALIGNMENT, Output, TensorInfo, dtype_of
from olmozoo.errors import CheckpointError, raise_problems
from olmozoo.typing import Array

MAPPINGS = 16  # of a `.bin`, one after the other: what was read of one stays in memory until it goes


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
    raise_problems(
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


STORAGES = {  # what PyTorch calls the values of a dtype
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


def write_pickled(file: Path, outputs: list[Output], *, single: bool = False) -> None:
    """Write a state dict as `torch.save` does, without PyTorch and with one tensor in memory at a time.

    It is a zip of stored entries: a pickle, and the values of each tensor. `torch.load(file, weights_only=True)` loads
    it, also with `mmap=True`.

    Args:
        file: a new file.
        outputs: the tensors.
        single: write the one tensor that there is, and not a dict.
    """
    with (
        new_file(file) as stream,
        contextlib.closing(Behind(stream)) as behind,
        zipfile.ZipFile(behind, "w") as archive,
    ):
        tensors = {output.name: _rebuilt(number, output) for number, output in enumerate(outputs)}
        content = pickled(tensors[outputs[0].name] if single else tensors)
        # A ZipInfo of our own, and not a name alone, has a fixed date: the same weights give the same bytes.
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), content)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for number, output in enumerate(outputs):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            header = 30 + len(entry.filename) + 20 + 4  # the entry's own, its sizes in 64 bits, the padding's head
            padding = -(behind.tell() + header) % ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)  # as torch.save aligns tensors
            with archive.open(entry, "w", force_zip64=True) as values:
                output.write(values)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _rebuilt(number: int, output: Output) -> Made:
    """A tensor whose storage lies in the entry of that number."""
    strides = tuple(math.prod(output.shape[i + 1 :]) for i in range(len(output.shape)))
    kind = Named("torch", STORAGES[output.dtype.name])
    storage = Persistent(("storage", kind, str(number), "cpu", math.prod(output.shape)))
    hooks = Made(Named("collections", "OrderedDict"), ())
    return Made(Named("torch._utils", "_rebuild_tensor_v2"), (storage, 0, output.shape, strides, False, hooks))
