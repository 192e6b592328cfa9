"""A SavedModel of a checkpoint, in bounded memory and in little more time than TensorFlow needs to trace its call.

That is done in a process of its own: it exports the model with one value for each variable, while this process writes
the weights as TensorFlow would have. In the end TensorFlow joins the two, as it does what several machines have saved.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from olmozoo.checkpoint.files import OBJECT_GRAPH, SAVED_MODEL, VARIABLES
from olmozoo.checkpoint.formats._bundle import Entry, write_index, write_values
from olmozoo.checkpoint.formats.saved_model import saved_keys
from olmozoo.checkpoint.tensors import Output, dtype_of
from olmozoo.errors import CheckpointError
from olmozoo.families.config import ModelConfig

WEIGHTS, OTHERS = f".{SAVED_MODEL}-weights", f".{SAVED_MODEL}-others"  # the two parts until they are joined


def write_saved_model(folder: Path, class_name: str, outputs: list[Output]) -> None:
    """Write what the Keras wing's `export` writes.

    Args:
        folder: has the config.json, and gets the SavedModel.
        class_name: of the model, in `olmozoo.tf`.
        outputs: the tensors under canonical names, and as the Keras wing has them.

    Raises:
        CheckpointError: TensorFlow or google-crc32c is not installed, or something could not be written.
    """
    for module, name in (("google_crc32c", "google-crc32c"), ("tensorflow", "tensorflow")):
        if find_spec(module) is None:
            raise CheckpointError(f"writing savedmodel needs {name}: pip install 'olmozoo[tf]'")
    code = "import sys; from olmozoo.checkpoint.formats._saved_model_writer import export; export(*sys.argv[1:])"
    command = [sys.executable, "-P", "-c", code, str(folder), class_name, outputs[0].dtype.name]
    settings = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said) as process,
    ):
        try:
            entries = write_values(folder / WEIGHTS, outputs)
            process.communicate(json.dumps(entries).encode())
        finally:
            process.kill()  # if something was raised; else it has ended
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
            raise CheckpointError(f"TensorFlow could not write: {lines[-1]}")


def export(staging: str, class_name: str, dtype: str) -> None:
    """Write a SavedModel without its weights, join those to it when stdin tells where they lie, and end the process."""
    gc.disable()  # so short a life leaves little to collect, and looking for it takes a fifth of the time
    # TensorFlow and Keras import these where they are installed, for converters and plots, and do without where not.
    sys.modules.update(jax=None, matplotlib=None)  # type: ignore[call-overload]
    import tensorflow

    wing = importlib.import_module("olmozoo.tf")
    from olmozoo.tf.layers import from_numpy

    folder = Path(staging)
    model = getattr(wing, class_name)(ModelConfig.from_folder(folder), seed=None, dtype=dtype)
    for variable in model.weights:
        value = from_numpy(np.zeros(1, dtype_of(dtype)))
        tensorflow.raw_ops.AssignVariableOp(resource=variable.value.handle, value=value)
    made = folder / SAVED_MODEL
    model.export(made, verbose=False)
    reader = tensorflow.train.load_checkpoint(str(made / VARIABLES))
    keys = {name: key for name, (key, _) in saved_keys(reader.get_tensor(OBJECT_GRAPH)).items()}
    others = sorted(reader.get_variable_to_shape_map().keys() - keys.values())
    values = [reader.get_tensor(key) for key in others]
    for file in (made / VARIABLES).parent.iterdir():
        file.unlink()
    (made / "fingerprint.pb").unlink()  # of the values that were there before; there need not be one
    tensorflow.raw_ops.SaveV2(
        prefix=str(folder / OTHERS), tensor_names=others, shape_and_slices=[""] * len(others), tensors=values
    )
    told = sys.stdin.readline()
    if not told:
        return  # the other process has ended
    write_index(folder / WEIGHTS, {keys[name]: Entry(*entry) for name, entry in json.loads(told).items()})
    tensorflow.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(folder / OTHERS), str(folder / WEIGHTS)], destination_prefix=str(made / VARIABLES)
    )
    os._exit(0)  # all is written, and TensorFlow takes more than a second to go in good order
