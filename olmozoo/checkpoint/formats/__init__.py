"""The table of formats: one row says how a format is recognised, read and written.

Adding a format is one file in this folder and one row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from olmozoo.checkpoint.formats import flax_msgpack, keras, orbax, pytorch, safetensors, saved_model
from olmozoo.checkpoint.tensors import LazyTensor


@dataclass(frozen=True)
class Format:
    """One way to keep weights in a folder.

    Attributes:
        file: the name of its file or folder in a checkpoint, by which it is recognised.
        read: returns the tensors of such a file, or of one shard, by canonical name.
        to: its name in `olmozoo convert --to`; None for a format that is read only.
        write: writes one new file, shard or folder.
        takes: what `write` is given: tensors under canonical names, tensors as the leaves of a Flax tree, or a live
            Keras model.
        sharded: whether there may be shards with an index.
    """

    file: str
    read: Callable[[Path], dict[str, LazyTensor]]
    to: str | None = None
    write: Callable[[Path, Any], None] | None = None
    takes: Literal["canonical", "flax", "keras_model"] = "canonical"
    sharded: bool = False

    @property
    def one_dtype(self) -> bool:
        """Whether all tensors have one dtype, as the variables of a Keras model do."""
        return self.takes == "keras_model"


FORMATS = (  # in the order in which a folder is searched for weights
    Format(safetensors.FILE, safetensors.read, "safetensors", safetensors.write, sharded=True),
    Format(pytorch.FILE, pytorch.read, "pt-bin", pytorch.write, sharded=True),
    Format(keras.TRANSFORMERS_FILE, keras.read_transformers, sharded=True),
    Format(flax_msgpack.FILE, flax_msgpack.read, "flax-msgpack", flax_msgpack.write, "flax", sharded=True),
    Format(keras.WEIGHTS_FILE, keras.read_weights, "keras-weights", keras.write_weights, "keras_model"),
    Format(keras.FILE, keras.read, "keras", keras.write, "keras_model"),
    Format(saved_model.FOLDER, saved_model.read, "savedmodel", saved_model.write, "keras_model"),
    Format(orbax.FOLDER, orbax.read, "orbax", orbax.write, "flax"),
)
WRITABLE = {format.to: format for format in FORMATS if format.to is not None}  # by the name in `--to`


def _names(formats: list[Format]) -> re.Pattern[str]:
    """A pattern of the names under which these formats keep weights, shards and their indices included."""
    parts = []
    for format in formats:
        stem, _, suffix = format.file.rpartition(".")
        shard = rf"{re.escape(stem)}(-\d+-of-\d+)?\.{suffix}(\.index\.json)?"
        parts.append(shard if format.sharded else re.escape(format.file))
    return re.compile("|".join(parts))


SHARDED_WEIGHTS = _names([format for format in FORMATS if format.sharded])
ALL_WEIGHTS = _names(list(FORMATS))
