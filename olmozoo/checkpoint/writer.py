"""Writing a checkpoint folder: config.json, generation_config.json and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.checkpoint.files import CONFIG, GENERATION_CONFIG, parse_size, remove, shards, write_json
from olmozoo.checkpoint.formats import SHARDED_WEIGHTS, WRITABLE, Format
from olmozoo.checkpoint.quantized import parts, quantization_config
from olmozoo.checkpoint.tensors import LazyIntegers, LazyTensor, dtype_of, widest
from olmozoo.errors import CheckpointError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, BASE_PREFIX, Head, Parameter
from olmozoo.hub import ADAPTER_CONFIG
from olmozoo.typing import Array, StrPath


def save_checkpoint(
    folder: StrPath,
    config: ModelConfig,
    head: Head | None,
    read: Callable[[Parameter], Array],
    dtype: Callable[[Parameter], Any],
    *,
    integers: Callable[[Parameter], LazyIntegers | None] = lambda parameter: None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json, generation_config.json and safetensors under canonical names.

    The new folder is written beside the old one and renamed into place, so that a crash or a full disk leaves the old
    one unchanged. Other files in the old folder are kept; its old weights are not. The same weights give the same
    bytes. Memory: one shard.

    Args:
        folder: the target; made with its parents if need be.
        config: written as config.json, with `architectures` and `dtype` set.
        head: the model's head; None writes a base model, whose names have no leading `model.`.
        read: returns a parameter's values in the shape of the table; called once for each.
        dtype: returns the dtype of those values without reading them.
        integers: returns the integers of a quantized weight; they are written as compressed-tensors writes them.
        generation_config: the contents of generation_config.json; None writes none.
        max_shard_size: bytes a file, as a number or as "5GB" (10**9) or "5GiB" (2**30).

    Raises:
        CheckpointError: the folder has an adapter or cannot be written; the message says why.
    """
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} has an adapter, which loading would merge into this model: save elsewhere")
    prefix = BASE_PREFIX if head is None else ""
    tensors = [
        LazyTensor(
            p.name.removeprefix(prefix),
            dtype_of(dtype(p)),
            p.shape,
            lambda p=p: read(p),  # type: ignore[misc]
            integers=integers(p),
        )
        for p in config.parameters(head)
        if p.tied_to is None
    ]
    with atomic_folder(folder, SHARDED_WEIGHTS) as staging:
        write_config(staging, config, head, tensors)
        if generation_config is not None:
            write_json(staging / GENERATION_CONFIG, generation_config)
        write_weights(staging, tensors, max_shard_size)


def save_together(
    save: Callable[..., None],
    config: ModelConfig,
    head: Head | None,
    read: Callable[[Parameter], Array],
    writes: bool,
    agree: Callable[[bool], bool],
) -> None:
    """Save from several processes, each of which has a part of every parameter; one of them writes.

    Args:
        save: `save_checkpoint` with all arguments but `read`.
        config, head: as of `save_checkpoint`.
        read: gathers a parameter. Every process calls it for each, in the same order.
        writes: whether this process is the one that writes.
        agree: returns what the process that writes gives; every process calls it, and waits there.

    Raises:
        CheckpointError: the folder could not be written, in every process.
    """
    gathered = ((parameter, read(parameter)) for parameter in config.parameters(head) if parameter.tied_to is None)

    def take(parameter: Parameter) -> Array:
        found, values = next(gathered)
        assert found.name == parameter.name, "parameters are written in the order of the table"
        return values

    failure: Exception | None = None
    if writes:
        try:
            save(read=take)
        except Exception as error:
            failure = error
    for _ in gathered:  # so that no process waits for one that has stopped
        pass
    right = agree(failure is None)
    if failure is not None:
        raise failure
    if not right:
        raise CheckpointError("the process that writes could not write the checkpoint; its own error says why")


def write_config(folder: Path, config: ModelConfig, head: Head | None, tensors: list[LazyTensor]) -> None:
    """Write the config.json of a model with this head and these tensors as a new file."""
    prefix = BASE_PREFIX if head is None else ""
    linear = [p.name.removeprefix(prefix) for p in config.parameters(head) if p.kind == "linear"]
    quantization = quantization_config(tensors, linear)
    config = config.replace(
        extra={
            **{key: value for key, value in config.extra.items() if key not in ("torch_dtype", "quantization_config")},
            "architectures": [config.name + ARCHITECTURES[head]],
            "dtype": widest(tensor.dtype for tensor in tensors).name,
            **({} if quantization is None else {"quantization_config": quantization}),
        }
    )
    remove(folder / CONFIG)
    config.save_pretrained(folder)


def write_weights(
    folder: Path,
    tensors: list[LazyTensor],
    max_shard_size: int | str = "5GB",
    format: Format = WRITABLE["safetensors"],
) -> None:
    """Write tensors into `folder` as one file, or as shards with an index.

    Args:
        folder: where to.
        tensors: as `format.write` takes them, in order; quantized weights are written as their parts.
        max_shard_size: bytes a file.
        format: one that writes single files.
    """
    assert format.write is not None
    tensors = [part for tensor in tensors for part in parts(tensor)]
    groups = shards(tensors, parse_size(max_shard_size))
    if len(groups) == 1 or not format.sharded:
        format.write(folder / format.file, tensors)
        return
    weight_map = {}
    stem, suffix = format.file.split(".")
    for number, group in enumerate(groups, 1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
        format.write(folder / file, group)
        weight_map.update({tensor.name: file for tensor in group})
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    write_json(folder / f"{format.file}.index.json", {"metadata": metadata, "weight_map": weight_map})
