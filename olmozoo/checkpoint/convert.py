"""A checkpoint folder in another format.

This module is on top of the others in this package: a Keras model, which writes three of the formats, is made by the
TensorFlow wing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo import hub
from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.checkpoint.files import GENERATION_CONFIG, parse_size, remove
from olmozoo.checkpoint.formats import ALL_WEIGHTS, WRITABLE, Format
from olmozoo.checkpoint.formats.names import flax_path
from olmozoo.checkpoint.matching import match_tensors
from olmozoo.checkpoint.reader import Checkpoint, read_unchanged
from olmozoo.checkpoint.tensors import LazyTensor, dtype_of, same_bits, widest
from olmozoo.checkpoint.writer import write_config, write_weights
from olmozoo.errors import CheckpointError, InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, BASE_PREFIX, HEAD_MODULES, Head, Parameter
from olmozoo.modeling import given_quantization
from olmozoo.quantization import GROUP_SIZE
from olmozoo.typing import StrPath

Tensors = dict[Parameter, LazyTensor]  # under canonical names


def convert_checkpoint(
    source: StrPath,
    target: StrPath,
    *,
    to: str,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    adapter: StrPath | None = None,
    quantization: str | None = None,
    group_size: int = GROUP_SIZE,
    **hub_options: Any,
) -> None:
    """Write a checkpoint in another format, with its config, generation settings and tokenizer.

    `target` is a folder whatever the format. It is written beside the old one and renamed into place, so that a crash,
    a full disk or a failed check leaves the old one unchanged. Memory: one shard; for Orbax, a few of the largest
    tensors; for the formats that Keras writes, the whole model. A bfloat16 value is never anything else on its way.

    Args:
        source: a folder, or a repository on the hub, with weights in any format that olmozoo reads.
        target: the folder to write, another than `source`; in an old one, other files are kept.
        to: a key of `formats.WRITABLE`.
        dtype: what floating-point values are cast to; default each tensor's own.
        max_shard_size: bytes a file, for the formats that have shards: safetensors, pt-bin and flax-msgpack.
        verify: read what was written, and compare every tensor bit for bit, before the rename.
        force: replace the weights of a `target` that has some, in whatever format, rather than refuse.
        progress: called as progress(bytes read, bytes in all).
        adapter: a folder or a repository with a LoRA adapter of PEFT; default one in the model's folder. The merged
            model is written.
        quantization: `int8` or `int4`, which safetensors alone have, or `none` for floats; default, as in the source
            where safetensors are written, else floats.
        group_size: of int4.
        **hub_options: as of `hub.resolve`.

    Raises:
        InputError: there is no such format, or it has no quantized weights; or `target` is `source`, or has weights
            and `force` is not given.
        HubError: the repository or a file cannot be downloaded.
        ConfigError: config.json is missing or bad.
        CheckpointError: the weights are broken, do not fit the config or do not fit `dtype`; or nothing could be
            written, and the message says why.
    """
    if to not in WRITABLE:
        raise InputError(f"to is {to!r}, expected one of {', '.join(WRITABLE)}")
    format = WRITABLE[to]
    parse_size(max_shard_size)
    how = given_quantization(quantization, group_size)
    if to != "safetensors":
        if how not in (None, "none"):
            raise InputError(f"quantization is {quantization!r}, and only safetensors have quantized weights, not {to}")
        how = "none"
    found = locate(source, need="model", adapter=adapter, **hub_options)
    folder = found.folder
    for read in (folder, Path(source)):  # the folder of an adapter is another than that of its base
        check_target(read, target, force)
    opened, settings = read_unchanged(
        folder, lambda: (open_merged(found, quantization=how), settings_files(found.generation, found.tokenizer))
    )
    config, checkpoint = opened.config, opened.checkpoint
    head = head_of(config, checkpoint)
    wanted = dtype_of(dtype) if dtype is not None else checkpoint.dtype if format.one_dtype else None
    tensors = _tensors(checkpoint, config, head, wanted)
    counted = _counted(tensors, progress)
    with atomic_folder(target, ALL_WEIGHTS) as staging:
        write_config(staging, config, head, list(tensors.values()))
        remove(staging / GENERATION_CONFIG)  # that of the folder's old model
        for name in (hub.ADAPTER_CONFIG, *hub.ADAPTER_WEIGHTS):  # that of the folder's old model too
            remove(staging / name)
        write_settings(settings, staging)
        if format.takes == "keras_model":
            _write_keras(format, staging, _keras_model(config, head, counted, staging))
        elif format.takes == "flax":
            write_weights(staging, _flax_leaves(counted), max_shard_size, format)
        else:
            write_weights(staging, list(counted.values()), max_shard_size, format)
        if verify:
            _verify(staging, config, head, tensors)


def check_target(source: Path, target: StrPath, force: bool, replaced: re.Pattern[str] = ALL_WEIGHTS) -> None:
    """Check that a conversion writes neither over what it reads nor, without `force`, over other weights.

    Args:
        source: the folder or file that is read.
        target: the folder that is written.
        force: allow a target with weights.
        replaced: names of weights.

    Raises:
        InputError: `target` is `source` or contains it, or has weights.
    """
    folder = Path(target).resolve()
    if source.resolve().is_relative_to(folder):
        raise InputError(f"the target {target} is or contains the source {source}: choose another folder")
    found = sorted(path.name for path in folder.iterdir() if replaced.fullmatch(path.name)) if folder.is_dir() else []
    if found and not force:
        raise InputError(
            f"the target {target} has weights already: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}; "
            "choose another folder, or replace them with force=True"
        )


def head_of(config: ModelConfig, checkpoint: Checkpoint) -> Head | None:
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


def _tensors(checkpoint: Checkpoint, config: ModelConfig, head: Head | None, dtype: np.dtype[Any] | None) -> Tensors:
    sources, fresh = match_tensors(checkpoint, config, head, False)
    raise_problems(f"{checkpoint.folder} lacks a head to convert", fresh.values())
    result = {}
    for parameter in config.parameters(head):
        if parameter.tied_to is None:
            tensor = checkpoint.tensors[sources[parameter.name]]
            name = parameter.name if head else parameter.name.removeprefix(BASE_PREFIX)
            result[parameter] = tensor.cast(dtype or tensor.dtype).renamed(name)
    return result


def _flax_leaves(tensors: Tensors) -> list[LazyTensor]:
    """The leaves of a Flax tree: linear weights are (in, out), and those of experts are stacked."""
    leaves: list[LazyTensor] = []
    experts: dict[str, list[LazyTensor]] = {}
    for parameter, tensor in tensors.items():
        leaf = tensor.renamed(flax_path(parameter, tensor.name))
        leaf = leaf.transposed() if parameter.kind == "linear" else leaf
        if parameter.stack is None:
            leaves.append(leaf)
        else:
            experts.setdefault(leaf.name, []).append(leaf)
    return leaves + [_stacked(parts) for parts in experts.values()]


def _stacked(parts: list[LazyTensor]) -> LazyTensor:
    """Tensors of one shape and name as one with a first dimension more."""
    dtype, shape = widest(part.dtype for part in parts), (len(parts), *parts[0].shape)
    return LazyTensor(parts[0].name, dtype, shape, lambda: np.stack([part.read() for part in parts]), parts[0].file)


def _keras_model(config: ModelConfig, head: Head | None, tensors: Tensors, staging: Path) -> Any:
    """A live Keras model with these tensors and the generation settings in `staging`."""
    from olmozoo.backends import BACKENDS
    from olmozoo.generation import GenerationConfig

    dtype = next(iter(tensors.values())).dtype
    model = BACKENDS["tf"].empty_model(config, head, dtype)
    model.bind_parameters((parameter, tensor.read()) for parameter, tensor in tensors.items())
    model.generation_config = GenerationConfig.from_folder(staging, config)
    return model


def _write_keras(format: Format, staging: Path, model: Any) -> None:
    assert format.write is not None
    try:
        format.write(staging / format.file, model)
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # of many kinds, of Keras, HDF5 and TensorFlow
        raise CheckpointError(f"Keras could not write {format.file}: {error}") from error


def _counted(tensors: Tensors, progress: Callable[[int, int], None] | None) -> Tensors:
    """The tensors, calling `progress` when each has been read."""
    if progress is None:
        return tensors
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def counted(tensor: LazyTensor) -> LazyTensor:
        def counting(read: Callable[[], Any]) -> Callable[[], Any]:
            def counted_read() -> Any:
                nonlocal done
                values = read()
                done += tensor.nbytes
                progress(done, total)
                return values

            return counted_read

        integers = tensor.integers
        if integers is not None:
            integers = dataclasses.replace(integers, read=counting(integers.read))
        return dataclasses.replace(tensor, read=counting(tensor.read), integers=integers)

    progress(0, total)
    return {parameter: counted(tensor) for parameter, tensor in tensors.items()}


def _verify(staging: Path, config: ModelConfig, head: Head | None, tensors: Tensors) -> None:
    written = _tensors(Checkpoint(staging), config, head, None)
    problems = [
        f"{tensor.name} differs"
        for parameter, tensor in tensors.items()
        if not same_bits(written[parameter].read(), tensor.read())
    ]
    raise_problems("what was written differs from what was read", problems)


def settings_files(folder: Path, tokenizer: Path | None = None) -> dict[str, bytes]:
    """A folder's generation_config.json, and the files of its tokenizer or of another folder's: name -> content."""
    tokenizer = folder if tokenizer is None else tokenizer
    names = [name for name in hub.TOKENIZER_FILES if (tokenizer / name).is_file()]
    templates = [path for path in sorted((tokenizer / hub.CHAT_TEMPLATES).glob("*.jinja")) if path.is_file()]
    names += [f"{hub.CHAT_TEMPLATES}/{path.name}" for path in templates]
    settings = [folder / GENERATION_CONFIG] if (folder / GENERATION_CONFIG).is_file() else []
    return {path.name: path.read_bytes() for path in settings} | {n: (tokenizer / n).read_bytes() for n in names}


def write_settings(files: dict[str, bytes], folder: Path) -> None:
    """Write such files as new ones, never through a link. A tokenizer replaces all files of an older one."""
    if any(name != GENERATION_CONFIG for name in files):
        for name in (hub.CHAT_TEMPLATES, *hub.TOKENIZER_FILES):
            remove(folder / name)
    for name, content in files.items():
        remove(folder / name)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
