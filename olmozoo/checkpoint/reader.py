"""Reading a checkpoint folder: shards joined, every problem in one error."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.files import PICKLED, SAFETENSORS, WEIGHTS, index_entries
from olmozoo.checkpoint.formats import read_tensors
from olmozoo.checkpoint.formats.names import canonical_name, canonical_tensors
from olmozoo.checkpoint.formats.pytorch import _read_pickled
from olmozoo.checkpoint.formats.safetensors import read_safetensors
from olmozoo.checkpoint.tensors import TensorInfo, widest
from olmozoo.errors import CheckpointError, raise_problems
from olmozoo.typing import Array, StrPath

TF_HEAD = (
    "model.decoder.embed_tokens.weight"  # Transformers 4's OPT in TensorFlow has this head, whatever its config says
)
FOREIGN_NAME = re.compile(r"/|:0$|\.(kernel|embedding|scale)$")  # as TensorFlow and Flax name tensors, and nobody else
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a table that older programs saved; it is made from the config


class Checkpoint:
    """The tensors of a folder, by the names in its files; nothing is read before `checkpoint[name]`.

    Looked for, in this order: model.safetensors, model.safetensors.index.json and its shards, pytorch_model.bin,
    pytorch_model.bin.index.json and its shards. The `.bin` kinds need PyTorch and are read with `weights_only`. Then
    what `formats.py` reads, in the order of `WEIGHTS`.

    Raises:
        CheckpointError: no weights, or broken ones. One error lists every problem.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file, names in self._files(problems).items():
            try:
                found = _read_weights(file)
            except (CheckpointError, OSError) as error:
                problems.append(str(error) if file.name in str(error) else f"{file}: {error}")
                continue
            for name in sorted(found.keys() & self.tensors.keys()):
                problems.append(f"{name} is in both {self.tensors[name].file.name} and {file.name}")
            if names is not None:
                problems += [f"{name} is not in {file.name}, where the index puts it" for name in names - found.keys()]
                problems += [
                    f"{name} is in {file.name}, where the index has no such tensor" for name in found.keys() - names
                ]
            self.tensors.update({name: info for name, info in found.items() if not IGNORED.search(name)})
            if file.suffix == ".h5" and file.name.startswith("tf_") and TF_HEAD in found:
                self.tensors["lm_head.weight"] = found[TF_HEAD]
        raise_problems(f"{self.folder} is broken", problems)

    def _files(self, problems: list[str]) -> dict[Path, set[str] | None]:
        for single in WEIGHTS:
            if (self.folder / single).exists():
                return {self.folder / single: None}
            index = self.folder / f"{single}.index.json"
            if index.is_file():
                return self._shards(index, problems)
        raise CheckpointError(
            f"{self.folder} has no weights: expected {SAFETENSORS}, {SAFETENSORS}.index.json, {PICKLED}, "
            f"{PICKLED}.index.json or {', '.join(WEIGHTS[2:])}; "
            f"found {', '.join(sorted(os.listdir(self.folder))) or 'nothing'}"
        )

    def _shards(self, index: Path, problems: list[str]) -> dict[Path, set[str] | None]:
        shards: dict[Path, set[str] | None] = {}
        for name, shard in index_entries(index).items():
            if FOREIGN_NAME.search(name):
                try:
                    name = canonical_name(name)
                except CheckpointError as error:
                    problems.append(f"{index.name}: {error}")
                    continue
            if (self.folder / shard).is_file():
                names = shards.setdefault(self.folder / shard, set())
                assert names is not None
                names.add(name)
            elif f"{index.name} names the shard {shard}, which is not there" not in problems:
                problems.append(f"{index.name} names the shard {shard}, which is not there")
        return shards

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name].read()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The checkpoint's own dtype: that of its tensors; where they differ, what holds the values of all."""
        return widest(info.dtype for info in self.tensors.values())


def _read_weights(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".bin":
        return _read_pickled(file)

    if file.suffix != ".safetensors":
        return read_tensors(file)
    tensors = read_safetensors(file)
    foreign = any(FOREIGN_NAME.search(name) for name in tensors)
    return canonical_tensors(file, tensors) if foreign else tensors
