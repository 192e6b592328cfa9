"""Several devices in TensorFlow: every device has the whole model, and a part of each batch.

`tf.distribute.MirroredStrategy` serves the devices of one machine, `MultiWorkerMirroredStrategy` those of several.
Nothing in Keras on TensorFlow splits the weights of a model: `olmozoo.pt` and `olmozoo.flax` do.
"""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.tf.layers import Tensor


def token_mean(loss: Tensor, labels: Tensor) -> Tensor:
    """A loss whose sum over replicas is the mean over all replicas' tokens; call it in `strategy.run`.

    Keras adds up the gradients of replicas, so that theirs are those of the whole batch. The mean of the replicas' own
    means is another where they have unequal numbers of labels.

    Args:
        loss: the mean over the labels of this replica, as a language model returns it.
        labels: (batch, seq), -100 where there is nothing to learn; the first of each row is no target.

    Returns:
        loss * n / total, where n of the total number of labels are on this replica.
    """
    own = tf.reduce_sum(tf.cast(ops.not_equal(labels[:, 1:], -100), loss.dtype))
    context = tf.distribute.get_replica_context()
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
    return loss * own / tf.maximum(total, 1)


def check_distribution() -> None:
    """Refuse a distribution of Keras, which on TensorFlow does nothing: every weight stays whole on one device.

    Raises:
        InputError: `keras.distribution.set_distribution` was called.
    """
    found = keras.distribution.distribution()
    if found is not None:
        raise InputError(
            f"keras.distribution is set to a {type(found).__name__}, which Keras on TensorFlow ignores: use "
            "tf.distribute.MirroredStrategy to split batches, or olmozoo.flax or olmozoo.pt to split weights"
        )
