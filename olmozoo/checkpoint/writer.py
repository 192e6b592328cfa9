"""Writing a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from olmozoo.checkpoint.atomic import replacing_folder
from olmozoo.checkpoint.files import CONFIG, GENERATION_CONFIG, SAFETENSORS, grouped, parse_size, write_json
from olmozoo.checkpoint.formats.safetensors import write_safetensors
from olmozoo.checkpoint.tensors import Output, dtype_of, widest
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, BASE_PREFIX, Head, Parameter
from olmozoo.typing import Array, StrPath


def save_checkpoint(
    folder: StrPath,
    config: ModelConfig,
    head: Head | None,
    read: Callable[[Parameter], Array],
    dtype: Callable[[Parameter], Any],
    *,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json, generation_config.json and safetensors under canonical names, in one step.

    The new folder is made beside the old one and takes its place when it is whole, so a crash or a full disk leaves the
    old one as it was. Other files in the old folder are kept; its old weights are not. The same weights give the same
    bytes.

    Args:
        folder: the target; made with its parents if need be.
        config: written as config.json, with `architectures` and `dtype` set.
        head: the model's head; None writes a base model, whose names have no leading `model.`.
        read: gives a parameter's values in the shape of the table; called once each, when they are about to be written.
        dtype: gives the dtype of those values without reading them.
        generation_config: the contents of generation_config.json; None writes none.
        max_shard_size: bytes a file, as a number or as "5GB" (10**9) or "5GiB" (2**30).

    Raises:
        CheckpointError: the folder cannot be written; the message says why.
    """
    prefix = BASE_PREFIX if head is None else ""
    outputs = [
        Output(p.name.removeprefix(prefix), dtype_of(dtype(p)), p.shape, lambda p=p: read(p))  # type: ignore[misc]
        for p in config.parameters(head)
        if p.tied_to is None
    ]
    with replacing_folder(folder) as staging:
        write_config(staging, config, head, outputs)
        if generation_config is not None:
            write_json(staging / GENERATION_CONFIG, generation_config)
        write_weights(staging, outputs, max_shard_size, write=partial(write_safetensors, kept=True))


def write_config(folder: Path, config: ModelConfig, head: Head | None, outputs: list[Output]) -> None:
    """Write config.json for these tensors of a model with this head, in a new file."""
    config = config.replace(
        extra={
            **{key: value for key, value in config.extra.items() if key != "torch_dtype"},
            "architectures": [config.name + ARCHITECTURES[head]],
            "dtype": widest(output.dtype for output in outputs).name,
        }
    )
    (folder / CONFIG).unlink(missing_ok=True)
    config.save_pretrained(folder)


def write_weights(
    folder: Path,
    outputs: list[Output],
    max_shard_size: int | str = "5GB",
    single: str = SAFETENSORS,
    write: Callable[[Path, list[Output]], None] | None = None,
) -> None:
    """Write tensors into `folder` as one file, or as shards with an index, one tensor in memory at a time.

    Args:
        folder: where to.
        outputs: the tensors, in order.
        max_shard_size: bytes a file.
        single: the name of the file where there is one alone.
        write: writes one file; default `write_safetensors`.
    """
    write = write or write_safetensors
    shards = grouped(outputs, parse_size(max_shard_size))
    if len(shards) == 1:
        write(folder / single, shards[0])
        return
    weight_map = {}
    stem, suffix = single.split(".")
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write(folder / file, shard)
        weight_map.update({output.name: file for output in shard})
    metadata = {"total_size": sum(output.nbytes for output in outputs)}
    write_json(folder / f"{single}.index.json", {"metadata": metadata, "weight_map": weight_map})
