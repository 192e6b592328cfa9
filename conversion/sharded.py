"""Checkpoints that many processes wrote, each its own part: as whole tensors, of which nothing is read before its turn.

Three kinds: PyTorch's distributed checkpoint (a `.metadata` file and the files it names), `rankN.pt` files of
sharded tensors, and `model/rankN.pt` files of FSDP's flat parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conversion.archives import as_tensor, read_archive
from conversion.pickles import Record, unpickle
from conversion.tensors import Piece, assembled, by_rows, integers, reshaped
from olmozoo.checkpoint.formats.names import missing_library
from olmozoo.checkpoint.formats.pytorch import torch_tensor
from olmozoo.checkpoint.tensors import DTYPE_NAMES, LazyTensor
from olmozoo.errors import CheckpointError, raise_problems

METADATA = ".metadata"


def read_distributed(folder: Path, prefix: str) -> dict[str, LazyTensor]:
    """The tensors of a distributed checkpoint whose names begin with `prefix`, without it.

    Raises:
        CheckpointError: `.metadata` is broken, names a file outside the folder or one that is not there, or its pieces
            do not make up their tensors. One error lists every problem.
    """
    file = folder / METADATA
    metadata = unpickle(file.read_bytes(), str(file))
    if not isinstance(metadata, Record) or metadata.kind != "Metadata":
        raise CheckpointError(f"{file} has no Metadata of torch.distributed.checkpoint")
    entries, storage = metadata["state_dict_metadata"], metadata["storage_data"]
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{file}: state_dict_metadata and storage_data are not both mappings")
    stored = {}
    for index, info in storage.items():
        if isinstance(index, Record) and isinstance(index.state, dict):
            stored[index.state.get("fqn"), _sizes(index.state.get("offset"))] = info
    tensors: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for name, entry in entries.items():
        if not isinstance(name, str) or not name.startswith(prefix) or getattr(entry, "kind", "").startswith("Bytes"):
            continue
        try:
            tensors[name.removeprefix(prefix)] = _distributed(folder, name, entry, stored)
        except CheckpointError as error:
            problems.append(str(error))
    raise_problems(f"{file} is broken", problems)
    return tensors


def _distributed(folder: Path, name: str, entry: Any, stored: dict[Any, Any]) -> LazyTensor:
    if not isinstance(entry, Record) or entry.kind != "TensorStorageMetadata":
        raise CheckpointError(f"{name} is a {getattr(entry, 'kind', type(entry).__name__)}, expected a tensor")
    properties, shape = entry["properties"], _sizes(entry["size"])
    # The dtype is the first field, whether the properties were pickled as a tuple or by name.
    state = properties.state if isinstance(properties, Record) else None
    kind = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    dtype = DTYPE_NAMES.get(getattr(kind, "kind", ""))
    if shape is None or dtype is None or not isinstance(entry["chunks"], list):
        raise CheckpointError(f"{name} has no shape, no dtype of {', '.join(DTYPE_NAMES)}, or no list of chunks")
    pieces = []
    for chunk in entry["chunks"]:
        if not isinstance(chunk, Record):
            raise CheckpointError(f"{name} has a chunk that is a {type(chunk).__name__}")
        offsets, sizes = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
        if offsets is None or sizes is None:
            raise CheckpointError(f"{name} has a chunk with offsets or sizes that cannot be")
        info = stored.get((name, offsets))
        if info is None:
            raise CheckpointError(f"{name}: storage_data has no chunk at {list(offsets)}")
        pieces.append(Piece(offsets, sizes, _chunk(folder, name, info)))
    return assembled(name, folder / METADATA, dtype, shape, pieces)


def _chunk(folder: Path, name: str, info: Any) -> Callable[[], LazyTensor]:
    if not isinstance(info, Record):
        raise CheckpointError(f"{name} is in a {type(info).__name__}, expected a _StorageInfo")
    path, span = info["relative_path"], integers((info["offset"], info["length"]))
    if not isinstance(path, str) or span is None:
        raise CheckpointError(f"{name} is in {path!r}, at an offset or of a length that cannot be")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.name:
        raise CheckpointError(f"{name} is in {path!r}, expected a path inside {folder}")
    if info.state.get("transform_descriptors"):
        raise CheckpointError(f"{name} in {path} went through {info['transform_descriptors']}, expected it as it is")
    file = folder / pure
    if not file.is_file():
        raise CheckpointError(f"{name} is in {path}, which is not there")
    if sum(span) > file.stat().st_size:
        raise CheckpointError(
            f"{name} ends at byte {sum(span)} of {path}, the file at {file.stat().st_size}: truncated"
        )
    return lambda: as_tensor(read_archive(file, *span), name)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A torch.Size, or a list, as a tuple of integers; None for anything else."""
    if isinstance(value, Record):
        value = value.args[0] if value.kind == "Size" and value.args else None
    return integers(value)


def read_ranks(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of `rankN.pt` files, each the part of one process.

    Raises:
        CheckpointError: a file is broken or missing, or the parts do not make up their tensors.
    """
    sharded: dict[str, tuple[np.dtype[Any], tuple[int, ...], list[Piece]]] = {}
    flat: dict[str, tuple[np.dtype[Any], tuple[int, ...], list[Piece]]] = {}
    whole: dict[str, LazyTensor] = {}
    for file in rank_files(folder):
        state = read_archive(file)
        if isinstance(state, dict) and isinstance(state.get("modules"), list):
            parts, found = _flat_parts(file, state["modules"]), flat
        elif isinstance(state, dict) and isinstance(state.get("model"), dict):
            parts, found = _shards(file, state["model"], whole), sharded
        else:
            raise CheckpointError(f"{file} has neither sharded tensors under 'model' nor flat ones under 'modules'")
        for name, dtype, shape, piece in parts:
            known = found.setdefault(name, (dtype, shape, []))
            if known[:2] != (dtype, shape):
                raise CheckpointError(
                    f"{file}: {name} is {dtype.name} {list(shape)}, elsewhere {known[0].name} {list(known[1])}"
                )
            known[2].append(piece)
    problems: list[str] = []
    for name, (dtype, shape, pieces) in {**sharded, **flat}.items():
        try:
            if name in flat:
                whole[name] = reshaped(assembled(name, folder, dtype, (math.prod(shape),), pieces), shape)
            else:
                whole[name] = assembled(name, folder, dtype, shape, pieces)
        except CheckpointError as error:
            problems.append(str(error))
    raise_problems(f"{folder} is broken", problems)
    return whole


def rank_files(folder: Path) -> list[Path]:
    """The `rankN.pt` files of a folder, in order.

    Raises:
        CheckpointError: the numbers have a gap.
    """
    files = {int(match[1]): p for p in folder.glob("rank*.pt") if (match := re.fullmatch(r"rank(\d+)\.pt", p.name))}
    missing = [f"rank{rank}.pt is not there" for rank in range(max(files, default=-1)) if rank not in files]
    raise_problems(f"{folder} is not complete", missing)
    return [files[rank] for rank in sorted(files)]


Part = tuple[str, np.dtype[Any], tuple[int, ...], Piece]


def _shards(file: Path, state: dict[Any, Any], whole: dict[str, LazyTensor]) -> Iterator[Part]:
    """What one process has of each sharded tensor; tensors that it has whole go to `whole`."""
    for name, value in state.items():
        if not (isinstance(value, Record) and value.kind == "_rebuild_from_type_v2" and len(value.args) == 4):
            if isinstance(value, Record):
                whole[name] = as_tensor(value, name)
            continue
        kind, pickled = value.args[1], value.args[3]
        if getattr(kind, "kind", "") != "ShardedTensor" or not isinstance(pickled, tuple) or len(pickled) < 2:
            whole[name] = as_tensor(value, name)
            continue
        shards, metadata = pickled[:2]
        shape = _sizes(metadata["size"]) if isinstance(metadata, Record) else None
        if not isinstance(shards, list) or shape is None:
            raise CheckpointError(f"{file}: {name} is a sharded tensor without shards or a shape")
        for shard in shards:
            source, box = as_tensor(shard["tensor"], name), shard["metadata"]
            offsets, sizes = _sizes(box["shard_offsets"]), _sizes(box["shard_sizes"])
            if offsets is None or sizes is None:
                raise CheckpointError(f"{file}: {name} has a shard with offsets or sizes that cannot be")
            yield name, source.dtype, shape, Piece(offsets, sizes, lambda source=source: source)  # type: ignore[misc]


def _flat_parts(file: Path, modules: list[Any]) -> Iterator[Part]:
    """What one process has of each parameter that FSDP flattened: a span of its values in row-major order."""
    try:
        for module in modules:
            prefix = f"{module['name']}." if module["name"] else ""
            for handle in module["handles"]:
                data = as_tensor(handle["flat_param.data"], prefix or "the root module")
                position = 0
                for name, shape, begin, count, at in _spans(handle):
                    sizes = integers(shape.args[0] if isinstance(shape, Record) else shape)
                    start = position if at is None else at
                    position = start + count
                    if sizes is None or count < 0 or not 0 <= start <= position <= math.prod(data.shape):
                        raise CheckpointError(f"{file}: {prefix}{name} has a shape or a span that cannot be")
                    part = by_rows(
                        name,
                        data.file,
                        data.dtype,
                        (count,),
                        lambda a, b, data=data, start=start: data.rows(start + a, start + b),  # type: ignore[misc]
                    )
                    piece = Piece((begin,), (count,), lambda part=part: part)  # type: ignore[misc]
                    yield prefix + name, data.dtype, sizes, piece
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a file of flat parameters: {error!r}") from error


def _spans(handle: dict[str, Any]) -> Iterator[tuple[str, Any, int, int, int | None]]:
    """Name, whole shape, first value, number of values, where they begin in the flat data (None: where the last end).

    Up to PyTorch 2.0 the ends of spans were kept, inclusive, for the parameters from the first in this part on; since
    2.1 there is a record for each parameter: whether it is in this part, then where, how many, and which values.
    """
    names, shapes = handle["flat_param._fqns"], handle["flat_param._shapes"]
    if "flat_param._shard_indices" in handle:
        first = handle["flat_param._shard_indices"][0]
        spans = handle["flat_param._shard_param_offsets"]
        for name, shape, (begin, end) in zip(names[first:], shapes[first:], spans, strict=False):
            yield name, shape, begin, end - begin + 1, None
        return
    for name, shape, info in zip(names, shapes, handle["flat_param._shard_param_infos"], strict=True):
        inside, at, count, begin, _ = info.args if isinstance(info, Record) else info
        if inside:
            yield name, shape, begin, count, at


def write_distributed(folder: Path, tensors: Sequence[LazyTensor], prefix: str) -> None:
    """Write a distributed checkpoint of one process, whose names begin with `prefix` and a dot.

    Raises:
        CheckpointError: PyTorch is not installed, or cannot write.
    """
    try:
        import torch.distributed.checkpoint
    except ImportError as error:
        raise missing_library(f"writing {folder}", "torch", "pt") from error
    checkpoint: Any = torch.distributed.checkpoint
    try:
        checkpoint.save(
            {prefix: {tensor.name: torch_tensor(tensor) for tensor in tensors}},
            storage_writer=checkpoint.FileSystemWriter(folder, single_file_per_rank=False),
            no_dist=True,
        )
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{folder} could not be written: {error}") from error
