"""Weights in other formats than safetensors and `.bin`, read as canonical tensors, lazily and one at a time.

What Transformers 4 wrote for its TensorFlow and Flax classes (`tf_model.h5`, `flax_model.msgpack`), and what the wings'
own frameworks write: Keras weights, a SavedModel, Flax msgpack, Orbax. Every reader gives canonical names, and linear
weights as (out, in). None of them runs anything of a file: no Keras, TensorFlow or pickle loader is called, a `.keras`
is opened for its arrays alone. Where the bytes of a tensor lie plainly in the file they are mapped, as in
`checkpoint.py`.
"""

from __future__ import annotations

from pathlib import Path

from olmozoo.checkpoint.files import KERAS_WEIGHTS, ORBAX, SAVED_MODEL
from olmozoo.checkpoint.formats.flax_msgpack import _read_msgpack
from olmozoo.checkpoint.formats.keras import _keras_name, _read_h5, _read_keras_archive
from olmozoo.checkpoint.formats.names import _transformers_name
from olmozoo.checkpoint.formats.orbax import _read_orbax
from olmozoo.checkpoint.formats.saved_model import _read_saved_model
from olmozoo.checkpoint.tensors import TensorInfo


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file (or folder) in one of the formats above, by canonical name.

    Raises:
        CheckpointError: it is broken, or the library that reads it is not installed.
    """
    if path.name == ORBAX:
        return _read_orbax(path)
    if path.name == SAVED_MODEL:
        return _read_saved_model(path)
    if path.suffix == ".msgpack":
        return _read_msgpack(path)
    if path.suffix == ".keras":
        return _read_keras_archive(path)
    with path.open("rb") as stream:
        return _read_h5(path, stream, 0, _keras_name if path.name == KERAS_WEIGHTS else _transformers_name)
