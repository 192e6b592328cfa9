"""What `test_parallel.py` asserts: training with unequal numbers of labels, on two devices or by two workers."""

import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from olmozoo.tf import TFAutoModelForCausalLM
from olmozoo.tf.parallel import token_mean
from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import CONFIGS
from tests.helpers.processes import run

ROWS = 4


def trained(strategy, right):
    """The losses of three steps, and the weights after them."""
    config = CONFIGS["olmo2"]
    ids, mask = left_padded(config, batch=ROWS, length=11)
    labels = np.where(mask, ids, -100)
    labels[0, 2:] = -100  # one label; row 2 has 6
    with strategy.scope():
        model = TFAutoModelForCausalLM.from_config(config, seed=1)
        optimizer = keras.optimizers.SGD(np.float64(0.1))
        optimizer.build(model.trainable_variables)
    data = tf.data.Dataset.from_tensors({"input_ids": ids, "attention_mask": mask, "labels": labels})
    data = data.unbatch().batch(ROWS)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = strategy.experimental_distribute_dataset(data.with_options(options).repeat(3))

    def step(batch):
        with tf.GradientTape() as tape:
            loss = model(**batch).loss
            loss = token_mean(loss, batch["labels"]) if right else loss / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train(batch):
        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(step, [batch]), axis=None)

    losses = [float(train(batch)) for batch in batches]
    return losses, [variable.numpy() for variable in model.trainable_variables]


if __name__ == "__main__":
    work, rank = Path(sys.argv[1]), int(sys.argv[2])
    keras.config.set_floatx("float64")
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    cases = {
        "replicas": lambda: strategy.num_replicas_in_sync,
        "right": lambda: trained(strategy, True),
        "wrong": lambda: trained(strategy, False),
    }
    run(cases, work, rank)
