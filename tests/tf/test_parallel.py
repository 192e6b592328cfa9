"""Batches that are split over devices and workers train as whole ones do."""

import json

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.configs import CONFIGS, SMALL_OLMO2
from tests.helpers.processes import free_port, start

pytest.importorskip("tensorflow")

import keras
import tensorflow as tf

from olmozoo.tf import TFOlmo2ForCausalLM
from tests.tf.replica_cases import trained


@pytest.fixture(scope="module")
def whole():
    policy = keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # Keras makes its own of floatx only once
    try:
        return trained(tf.distribute.get_strategy(), True)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_unequal_numbers_of_labels_weigh_as_in_one_batch(whole, workers, tmp_path):
    addresses = [f"localhost:{free_port()}" for _ in range(workers)]
    environments = [{}]
    if workers > 1:
        environments = [
            {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
            for index in range(workers)
        ]
    for found in start("tests.tf.replica_cases", tmp_path, environments, 200):
        assert found["replicas"] == 2
        for name in ("right", "wrong"):
            assert isinstance(found[name], tuple), found[name]
        losses, weights = found["right"]
        np.testing.assert_allclose(losses, whole[0], atol=1e-10)
        for one, two in zip(whole[1], weights, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-10)
        assert np.abs(np.subtract(found["wrong"][0], whole[0])).max() > 1e-3


@pytest.mark.parametrize("kind", ["DataParallel", "ModelParallel"])
def test_a_distribution_of_keras_is_refused(kind):
    devices = keras.distribution.list_devices()
    if kind == "DataParallel":
        distribution = keras.distribution.DataParallel(devices=devices[:1])
    else:
        mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], devices[:1])
        distribution = keras.distribution.ModelParallel(layout_map=keras.distribution.LayoutMap(mesh))
    model = TFOlmo2ForCausalLM(SMALL_OLMO2)
    with distribution.scope():
        with pytest.raises(InputError, match=f"set to a {kind}, which Keras on TensorFlow ignores: use tf.distribute"):
            TFOlmo2ForCausalLM(CONFIGS["olmo2"])
        with pytest.raises(InputError, match=kind):
            model.compile(keras.optimizers.AdamW(1e-3))
