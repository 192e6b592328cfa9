"""A checkpoint folder in another format."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo import hub
from olmozoo.checkpoint.atomic import replacing_folder
from olmozoo.checkpoint.files import EVERY_WEIGHT, GENERATION_CONFIG, PICKLED, parse_size
from olmozoo.checkpoint.formats.flax_msgpack import _to_msgpack
from olmozoo.checkpoint.formats.keras import _to_keras, _to_keras_weights
from olmozoo.checkpoint.formats.orbax import _to_orbax
from olmozoo.checkpoint.formats.pytorch import write_pickled
from olmozoo.checkpoint.formats.saved_model import _to_saved_model
from olmozoo.checkpoint.matching import match_tensors
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import Output, _Job, dtype_of, same_bits
from olmozoo.checkpoint.writer import write_config, write_weights
from olmozoo.errors import CheckpointError, HubError, InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, BASE_PREFIX, HEAD_MODULES, Head, Parameter
from olmozoo.typing import Array


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **hub_options: Any,
) -> None:
    """Write a checkpoint in another format, with its config, generation settings and tokenizer.

    `target` is a folder whatever the format. It is made beside the old one and takes its place when it is whole, so
    that a crash, a full disk or a failed check leaves the old one as it was.

    Args:
        source: a folder, or a repository on the hub, with weights in any format that olmozoo reads.
        target: the folder to write; in an old one, other files are kept, old weights are not.
        to: a key of `FORMATS`.
        dtype: what floating-point values are cast to; default each tensor's own.
        max_shard_size: bytes a file, for the formats that have shards: safetensors, pt-bin and flax-msgpack.
        verify: read what was written, and compare every tensor bit for bit, before it takes its place.
        progress: called as progress(bytes done, bytes in all).
        **hub_options: as of `hub.resolve`.

    Raises:
        InputError: there is no such format.
        HubError: the repository or a file cannot be had.
        ConfigError: config.json is missing or bad.
        CheckpointError: the weights are broken, do not fit the config or do not fit `dtype`; or nothing could be
            written, and the message says why.
    """
    if to not in FORMATS:
        raise InputError(f"to is {to!r}, expected one of {', '.join(FORMATS)}")
    parse_size(max_shard_size)
    folder = hub.resolve(source, need="weights", **hub_options)
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint(folder)
    head = head_of(folder, config, checkpoint)
    wanted = dtype_of(dtype) if dtype is not None else checkpoint.dtype if to in ONE_DTYPE else None
    tensors = _tensors(checkpoint, config, head, wanted)
    job = _Job(config, head, _counted(tensors, progress), max_shard_size)
    with replacing_folder(target, EVERY_WEIGHT) as staging:
        write_config(staging, config, head, list(tensors.values()))
        _copy_settings(source, folder, staging, hub_options)
        FORMATS[to](job, staging)
        if verify:
            _verify(staging, config, head, tensors)


def head_of(folder: Path, config: ModelConfig, checkpoint: Checkpoint) -> Head | None:
    """The head of a checkpoint: by `architectures` in its config.json, else, or if that names none, by its tensors."""
    names = getattr(config, "architectures", None)
    names = [str(name) for name in names] if isinstance(names, list) else []
    for head in config.heads:
        if any(name.endswith(ARCHITECTURES[head]) for name in names):
            return head
    is_base, tied = any(name.endswith(ARCHITECTURES[None]) for name in names), config.tie_word_embeddings
    modules = {name.split(".")[0] for name in checkpoint.tensors}
    for head in config.heads:
        if HEAD_MODULES[head] in modules and not (head == "causal_lm" and is_base and tied):
            return head
    return "causal_lm" if tied and BASE_PREFIX[:-1] in modules and not is_base else None


def _tensors(
    checkpoint: Checkpoint, config: ModelConfig, head: Head | None, dtype: np.dtype[Any] | None
) -> dict[Parameter, Output]:
    sources, fresh = match_tensors(checkpoint, config, head, False)
    raise_problems(f"{checkpoint.folder} lacks a head to convert", fresh.values())
    result = {}
    for parameter in config.parameters(head):
        if parameter.tied_to is None:
            info = checkpoint.tensors[sources[parameter.name]]
            read = _cast(parameter.name, info.read, info.dtype if dtype is None else dtype)
            name = parameter.name if head else parameter.name.removeprefix(BASE_PREFIX)
            result[parameter] = Output(name, dtype or info.dtype, parameter.shape, read)
    return result


def _cast(name: str, read: Callable[[], Array], dtype: np.dtype[Any]) -> Callable[[], Array]:
    def values() -> Array:
        array = read()
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore"):  # told below, with the tensor's name
            result = array.astype(dtype)
        if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
            lost = int(np.isinf(result).sum()) - int(np.isinf(array).sum())
            if lost:
                raise CheckpointError(f"{name} has {lost} value(s) too large for {dtype.name}: choose a wider dtype")
        return result

    return values


def _counted(tensors: dict[Parameter, Output], progress: Callable[[int, int], None] | None) -> dict[Parameter, Output]:
    """The tensors, telling `progress` when each has been read."""
    if progress is None:
        return tensors
    total, done = sum(output.nbytes for output in tensors.values()), 0

    def counted(output: Output) -> Output:
        def read() -> Array:
            nonlocal done
            array = output.read()
            done += output.nbytes
            progress(done, total)
            return array

        return dataclasses.replace(output, read=read)

    progress(0, total)
    return {parameter: counted(output) for parameter, output in tensors.items()}


def _copy_settings(source: Any, folder: Path, staging: Path, hub_options: dict[str, Any]) -> None:
    """Copy generation_config.json and the tokenizer's files, where there are any."""
    (staging / GENERATION_CONFIG).unlink(missing_ok=True)  # that of the folder's old model
    sources = [folder]
    if not Path(source).expanduser().is_dir():
        with contextlib.suppress(HubError):  # a repository need not have a tokenizer
            sources.append(hub.resolve(source, need="tokenizer", **hub_options))
    found = {name: content for place in sources for name, content in settings_files(place).items()}
    put_settings(found, staging)


def settings_files(folder: Path) -> dict[str, bytes]:
    """A folder's generation_config.json and its tokenizer's files: name -> content."""
    names = [name for name in (GENERATION_CONFIG, *hub.TOKENIZER_FILES) if (folder / name).is_file()]
    names += [f"{hub.CHAT_TEMPLATES}/{path.name}" for path in sorted((folder / hub.CHAT_TEMPLATES).glob("*.jinja"))]
    return {name: (folder / name).read_bytes() for name in names}


def put_settings(files: dict[str, bytes], folder: Path) -> None:
    """Write such files as new ones. Where a tokenizer is among them, nothing of an older one stays beside it."""
    if any(name != GENERATION_CONFIG for name in files):
        shutil.rmtree(folder / hub.CHAT_TEMPLATES, ignore_errors=True)
        for name in hub.TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _verify(staging: Path, config: ModelConfig, head: Head | None, tensors: dict[Parameter, Output]) -> None:
    written = _tensors(Checkpoint(staging), config, head, None)
    problems = [
        f"{output.name} differs"
        for parameter, output in tensors.items()
        if not same_bits(written[parameter].read(), output.read())
    ]
    raise_problems("what was written is not what was read", problems)


def _to_safetensors(job: _Job, staging: Path) -> None:
    write_weights(staging, list(job.tensors.values()), job.max_shard_size)


def _to_pickled(job: _Job, staging: Path) -> None:
    write_weights(staging, list(job.tensors.values()), job.max_shard_size, PICKLED, write_pickled)


FORMATS: dict[str, Callable[[_Job, Path], None]] = {
    "safetensors": _to_safetensors,
    "pt-bin": _to_pickled,
    "keras": _to_keras,
    "keras-weights": _to_keras_weights,
    "savedmodel": _to_saved_model,
    "flax-msgpack": _to_msgpack,
    "orbax": _to_orbax,
}
ONE_DTYPE = ("keras", "keras-weights", "savedmodel")  # a Keras model has one dtype for all its variables
