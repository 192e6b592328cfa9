"""TensorFlow's SavedModel, read and written."""

import shutil

import numpy as np
import pytest

from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.tensors import dtype_of
from olmozoo.families.parameter import by_variable
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.formats import CONFIGS, answer, model_of, tree


@pytest.mark.parametrize(
    ("family", "head", "dtype"),
    [("olmo", None, "bfloat16"), ("opt", "causal_lm", "float32"), ("olmoe", "causal_lm", "float32")],
)
def test_a_saved_model_serves_and_comes_back(tmp_path, family, head, dtype):
    tf = pytest.importorskip("tensorflow")
    there = tmp_path / "a %41 #?é"
    config = CONFIGS[family]
    if family == "opt":
        config = config.replace(dropout=0.1)  # which brings a variable that is no weight
    source = write_checkpoint(tmp_path / "source", config, head, dtype=dtype_of(dtype))
    convert_checkpoint(source, there, to="savedmodel", verify=True)
    assert {path.name for path in there.iterdir()} <= {"config.json", "generation_config.json", "saved_model"}
    convert_checkpoint(there, tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)
    variables = [name for name, _ in tf.train.list_variables(str(there / "saved_model/variables/variables"))]
    table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
    assert len(variables) == len(by_variable(table)) + 1, "each is there once, and the names"
    if dtype == "float32":
        ids, mask = left_padded(config)
        loaded = tf.saved_model.load(str(there / "saved_model"))
        served = loaded.serve(tf.constant(ids), tf.constant(mask))
        expected = answer("tf", model_of("tf", family, head, source), config)
        assert np.abs(served["logits"].numpy()[mask.astype(bool)] - expected).max() < 1e-5


def test_a_saved_model_that_keras_tracked_is_read(tmp_path):
    keras = pytest.importorskip("keras")
    import tensorflow as tf

    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype="float32")
    model = model_of("tf", "olmo", "causal_lm", source)
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None, None), tf.int32)]
    archive.add_endpoint("serve", lambda ids: model(ids, use_cache=False).logits, input_signature=signature)
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    archive.write_out(str(tmp_path / "there/saved_model"), verbose=False)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)
