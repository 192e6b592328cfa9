"""Weights in other formats than safetensors and `.bin`, read as canonical tensors, lazily and one at a time.

What Transformers 4 wrote for its TensorFlow and Flax classes (`tf_model.h5`, `flax_model.msgpack`), and what the wings'
own frameworks write: Keras weights, a SavedModel, Flax msgpack, Orbax. Every reader gives canonical names, and linear
weights as (out, in). None of them runs anything of a file: no Keras, TensorFlow or pickle loader is called, a `.keras`
is opened for its arrays alone. Where the bytes of a tensor lie plainly in the file they are mapped, as in
`checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from olmozoo.checkpoint.files import OBJECT_GRAPH, VARIABLES
from olmozoo.checkpoint.formats._bundle import Bundle, fields
from olmozoo.checkpoint.formats.names import _flax_name, _gather, _guarded, _needs, _tensor
from olmozoo.checkpoint.tensors import TensorInfo, _Job, _turned
from olmozoo.errors import CheckpointError


def _read_saved_model(folder: Path) -> dict[str, TensorInfo]:
    """The variables of a SavedModel that a wing exported, from their files alone: no function in it is loaded."""
    if find_spec("google_crc32c") is None:
        raise _needs(folder, "google-crc32c", "tf")

    def found() -> Iterator[tuple[str, TensorInfo]]:
        bundle = Bundle(folder / VARIABLES)
        for canonical, (key, transposed) in saved_keys(bundle.read_text(OBJECT_GRAPH)).items():
            dtype, shape = bundle.describe(key)
            values = _guarded(folder, canonical, partial(bundle.read, key))
            yield canonical, _tensor(folder, dtype, shape, values, transposed)

    try:
        return _gather(folder, found())
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        raise CheckpointError(f"{folder} is not a readable SavedModel: {error}") from error


def saved_keys(graph: bytes) -> dict[str, tuple[str, bool]]:
    """Canonical name -> key in the variables of a SavedModel, and whether it is transposed there.

    Args:
        graph: a message of TensorFlow's `trackable_object_graph.proto`.
    """
    keys: dict[str, tuple[str, bool]] = {}
    for node in fields(graph).get(1, []):
        for attribute in map(fields, fields(node).get(2, [])):
            full_name, key = (attribute[number][0].decode() for number in (2, 3))
            name = full_name.partition("/")[2]  # the model's own name comes first
            if not name.endswith("seed_generator_state"):
                canonical, transposed = _flax_name(name)
                # Where a model was tracked by Keras's `ExportArchive`, each variable is there twice.
                keys.setdefault(canonical, (key, transposed))
    return keys


def _to_saved_model(job: _Job, staging: Path) -> None:
    from olmozoo.checkpoint.formats._saved_model_writer import write_saved_model

    write_saved_model(staging, job.keras_class, [_turned(p, output, output.name) for p, output in job.tensors.items()])
