"""PyTorch's `.bin`: read by `torch.load` as tensors alone, mapped, and written by `torch.save`."""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from olmozoo.checkpoint.formats.names import missing_library
from olmozoo.checkpoint.tensors import LazyTensor, dtype_of
from olmozoo.errors import CheckpointError, raise_problems
from olmozoo.typing import Array

FILE = "pytorch_model.bin"
# Everything that the pickle of a state dict names. PyTorch allows more, with which a few bytes allocate any amount.
NAMES = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w+Storage|torch (Size|device|[a-z]\w*)|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout|torch\._tensor _rebuild_from_type_v2"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state|sparse_tensor|meta_tensor_no_storage)"
)
INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # the first integer of a file in the old format
OLD_PICKLES = 5  # magic number, version, sizes of types, tensors, keys of storages
SMALLEST_BOUND = 1 << 16  # of integers, whatever the size of the file: versions and type sizes are among them


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. Nothing but tensors is unpickled (`weights_only`).

    Raises:
        CheckpointError: it is broken or holds anything but dense tensors by name, or PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_library(f"reading {path}", "torch", "pt") from error
    try:
        is_archive = zipfile.is_zipfile(path)  # the old format is not, and cannot be mapped
        if is_archive:
            _check_records(path)
        else:
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for _ in range(OLD_PICKLES):
                    _check_pickle(content, len(content))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{path} is not a readable state dict: {error}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} is not a mapping from names to tensors")
    raise_problems(
        f"{path} has tensors that are not dense",
        (f"{name}: {t.layout} on {t.device}" for name, t in state.items() if t.layout != torch.strided or t.is_meta),
    )
    raise_problems(
        f"{path} has tensors that are larger than what is stored of them",
        (
            f"{name}: {list(t.shape)} {t.dtype}, stored are {t.untyped_storage().nbytes():,} bytes"
            for name, t in state.items()
            if math.prod(t.shape) * t.element_size() > t.untyped_storage().nbytes()
        ),
    )
    return {
        name: LazyTensor(name, dtype_of(tensor.dtype), tuple(tensor.shape), partial(_values, tensor), path)
        for name, tensor in state.items()
    }


def _values(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach().resolve_neg()  # it may be a Parameter, or a negated view
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.view(torch.int16).numpy().view(dtype_of("bfloat16"))
        return array
    values: Array = tensor.numpy()
    return values


def _check_records(path: Path) -> None:
    """Check that each record of an archive begins where its directory says, where PyTorch maps it, and its pickles."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            archive.open(entry).close()  # compares the name in the record's own header
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{entry.filename} is compressed, expected it stored")
            if entry.filename.lower().endswith("data.pkl"):  # PyTorch ignores the case
                _check_pickle(io.BytesIO(archive.read(entry)), size)


def _check_pickle(stream: io.BytesIO | mmap.mmap, size: int) -> None:
    """Check one pickle before it is run: nothing in it may allocate more than the file, of `size` bytes, explains."""
    for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # it reads and tells, no more
        if opcode.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
            raise CheckpointError(f"it names {argument!r}, which no state dict needs")
        if opcode.name in INTEGERS and argument != OLD_MAGIC and int(argument or 0) > max(size, SMALLEST_BOUND):
            raise CheckpointError(f"it has an integer beyond the size of the file, {size:,} bytes")


def write(path: Path, tensors: list[LazyTensor]) -> None:
    """Write a state dict into one new file; the same tensors give the same bytes.

    Raises:
        CheckpointError: PyTorch is not installed, or cannot write.
        OSError: the file cannot be written.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_library(f"writing {path.name}", "torch", "pt") from error
    with path.open("xb") as stream:
        try:
            torch.save({tensor.name: torch_tensor(tensor) for tensor in tensors}, stream)
        except RuntimeError as error:  # raised while PyTorch closes an archive that it could not write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise CheckpointError(f"{path} could not be written: {error}") from error


def torch_tensor(tensor: LazyTensor) -> Any:
    """The values as a `torch.Tensor`, sharing the memory of a mapped file."""
    import torch

    array = tensor.contiguous()
    if tensor.dtype.name == "bfloat16":  # torch takes NumPy's own dtypes only
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
