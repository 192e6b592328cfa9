"""Reading a checkpoint folder: shards joined, every problem in one error."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from olmozoo import foreign
from olmozoo.checkpoint.files import CONFIG, GENERATION_CONFIG, FolderHandle, index_entries
from olmozoo.checkpoint.formats import FORMATS, Format, keras, orbax
from olmozoo.checkpoint.formats.names import canonical_name, separate_experts
from olmozoo.checkpoint.quantized import join
from olmozoo.checkpoint.tensors import LazyTensor, widest
from olmozoo.errors import CheckpointError, OlmozooError, raise_problems
from olmozoo.families.config import ModelConfig, read_json
from olmozoo.families.parameter import BASE_PREFIX
from olmozoo.typing import Array, StrPath

IGNORED = "rotary_emb.inv_freq"  # the end of names of a table that older programs saved; it is made from the config
# The most bytes of tensors for each byte of their file; tied and overlapping ones are stored once.
MAX_RATIO = 4
TRIES = 20  # readings of a folder that other processes keep replacing

Result = TypeVar("Result")


class Checkpoint:
    """The tensors of a folder, by the names in its files; no values are read before `checkpoint[name]`.

    A folder is searched for the formats of `formats.FORMATS` in their order: safetensors first, and a single file
    before shards with an index. Files are opened once, here: a save that replaces the folder later is never mixed in.
    For one that replaces it meanwhile, see `open_checkpoint`.

    Args:
        folder: the folder.

    Attributes:
        folder: the same.
        tensors: the tensors by name; a quantized weight is one tensor, under the name that it has in floats.
        is_quantized: whether the files have quantized weights.

    Raises:
        CheckpointError: no weights, or broken ones. One error lists every problem.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, LazyTensor] = {}
        problems: list[str] = []
        format, files = self._files(problems)
        for file, names in files.items():
            if file.exists() and not (file.is_file() or file.is_dir()):
                problems.append(f"{file} is not a regular file")
                continue
            if file.is_file() and (problem := foreign.file_problem(file)):
                problems.append(problem)
                continue
            try:
                found = format.read(file)
            except (CheckpointError, OSError) as error:
                problems.append(str(error) if file.name in str(error) else f"{file}: {error}")
                continue
            total = sum(tensor.nbytes for tensor in found.values())
            if file.is_file() and total > MAX_RATIO * file.stat().st_size:
                problems.append(f"{file.name} has {file.stat().st_size:,} bytes, its tensors {total:,}: they overlap")
            for name in sorted(found.keys() & self.tensors.keys()):
                problems.append(f"{name} is in both {Path(self.tensors[name].file).name} and {file.name}")
            if names is not None:
                problems += [f"{name} is not in {file.name}, where the index puts it" for name in names - found.keys()]
                problems += [f"{name} is in {file.name}, but not in the index" for name in found.keys() - names]
            self.tensors.update({name: tensor for name, tensor in found.items() if not name.endswith(IGNORED)})
        if problems and (reason := foreign.quantization(self.folder, problems)):
            raise CheckpointError(reason)
        raise_problems(f"{self.folder} is broken", problems)
        if plain := foreign.plain_names(self.tensors):
            example = next(name for name, new in plain.items() if name != new)
            warnings.warn(
                f"{self.folder}: names are read without prefixes of a training program: {example} as {plain[example]}",
                stacklevel=2,
            )
            self.tensors = {plain[name]: tensor.renamed(plain[name]) for name, tensor in self.tensors.items()}
        joined = join(self.tensors, problems)
        self.is_quantized, self.tensors = joined.keys() != self.tensors.keys(), joined
        if problems and not self.is_quantized and (reason := foreign.quantization(self.folder, problems)):
            raise CheckpointError(reason)
        raise_problems(f"{self.folder} has tensors that no model has", problems)
        self.tensors = separate_experts(self.tensors)
        if format.file == keras.TRANSFORMERS_FILE and keras.TF_HEAD in self.tensors:
            self.tensors["lm_head.weight"] = self.tensors[keras.TF_HEAD].renamed("lm_head.weight")

    def _files(self, problems: list[str]) -> tuple[Format, dict[Path, set[str] | None]]:
        """The format of the weights, and its files, with the tensors that an index puts into each."""
        for format in FORMATS:
            if (self.folder / format.file).exists():
                return format, {self.folder / format.file: None}
            index = self.folder / f"{format.file}.index.json"
            if format.sharded and index.is_file():
                return format, self._shards(index, problems)
        expected = ", ".join(f"{f.file} (or its .index.json)" if f.sharded else f.file for f in FORMATS)
        found = ", ".join(sorted(os.listdir(self.folder))) or "nothing"
        others = (path.name for path in self.folder.iterdir() if path.is_dir() and orbax.has_arrays(path))
        hint = "".join(f". {name} is an Orbax checkpoint: rename it to {orbax.FOLDER}" for name in sorted(others))
        raise CheckpointError(f"{self.folder} has no weights: expected one of {expected}; found {found}{hint}")

    def _shards(self, index: Path, problems: list[str]) -> dict[Path, set[str] | None]:
        shards: dict[Path, set[str]] = {}
        absent: dict[str, None] = {}
        for name, shard in index_entries(index).items():
            try:
                name = canonical_name(name)
            except CheckpointError as error:
                problems.append(f"{index.name}: {error}")
                continue
            if (self.folder / shard).is_file():
                shards.setdefault(self.folder / shard, set()).add(name)
            else:
                absent[shard] = None
        problems += [f"{index.name} names the shard {shard}, which does not exist" for shard in absent]
        return dict(shards)

    def __getitem__(self, name: str) -> Array:
        """The values of a tensor, as a view of its file where possible."""
        return self.tensors[name].read()

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The dtype of the tensors; where they differ, one that represents the values of all."""
        return widest(tensor.dtype for tensor in self.tensors.values())


@dataclass(frozen=True)
class OpenCheckpoint:
    """The files of a folder that belong to one save.

    Attributes:
        config: of the model.
        generation: the contents of generation_config.json; None where there is none.
        checkpoint: the tensors.
    """

    config: ModelConfig
    generation: dict[str, Any] | None
    checkpoint: Checkpoint


def open_checkpoint(
    folder: StrPath, config_class: type[ModelConfig] = ModelConfig, config: Any = None, **overrides: Any
) -> OpenCheckpoint:
    """Open a folder for loading, so that its config, generation settings and tensors are of one save.

    Args:
        folder: the folder.
        config_class: the family; default the one that config.json names.
        config: used instead of config.json: one of ours or of Transformers.
        **overrides: fields of the config to change.

    Raises:
        ConfigError: config.json or generation_config.json is missing or bad.
        CheckpointError: no weights, or broken ones; or the folder is replaced again and again.
    """
    path = Path(folder)

    def read() -> OpenCheckpoint:
        contents = read_json(path / CONFIG) if config is None else config.to_dict()
        used = config_class.from_dict(contents, **overrides)
        settings = path / GENERATION_CONFIG
        generation = read_json(settings) if settings.exists() else None
        checkpoint = Checkpoint(path)
        name_tied_embedding(checkpoint.tensors, used)
        return OpenCheckpoint(used, generation, checkpoint)

    source = read_unchanged(path, read)
    if "quantization_config" not in source.config.extra:
        return source
    if reason := foreign.quantization(path, source.checkpoint.tensors):
        raise CheckpointError(reason)
    if not source.checkpoint.is_quantized:
        warnings.warn(
            f"{path}: the weights are not quantized; quantization_config in config.json is ignored, and not written "
            "back",
            stacklevel=2,
        )
    extra = {name: value for name, value in source.config.extra.items() if name != "quantization_config"}
    return dataclasses.replace(source, config=source.config.replace(extra=extra))


def name_tied_embedding(tensors: dict[str, LazyTensor], config: ModelConfig) -> None:
    """Give a head the name of the embedding that it is tied to, where only the head is there.

    `safetensors.torch.save_model` writes one of two tied tensors, the one whose name comes first in the alphabet.
    """
    for parameter in config.parameters("causal_lm"):
        name, tied = parameter.name, parameter.tied_to
        if tied and name in tensors and not {tied, tied.removeprefix(BASE_PREFIX)} & tensors.keys():
            tensors[tied] = tensors.pop(name).renamed(tied)


def read_unchanged(folder: Path, read: Callable[[], Result]) -> Result:
    """The result of `read`, which is called again where the folder was replaced meanwhile.

    Raises:
        CheckpointError: the folder is replaced again and again.
    """
    for _ in range(TRIES):
        handle = FolderHandle(folder)
        try:
            result = read()
        except (OlmozooError, OSError):
            if handle.is_current():
                raise
            continue
        if handle.is_current():
            return result
    raise CheckpointError(f"{folder} was replaced {TRIES} times while it was read: load again")
