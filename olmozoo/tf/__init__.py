"""The Keras wing: Keras 3 on TensorFlow."""

import os

from olmozoo.errors import MissingBackendError

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
try:
    import keras
    import tensorflow  # noqa: F401
except ImportError as error:
    raise MissingBackendError("olmozoo.tf needs TensorFlow and Keras 3: pip install 'olmozoo[tf]'") from error
if keras.backend.backend() != "tensorflow":
    raise MissingBackendError(
        f"olmozoo.tf needs Keras on TensorFlow, and here Keras runs on {keras.backend.backend()}: set the environment "
        "variable KERAS_BACKEND=tensorflow before Keras is imported"
    )

from olmozoo.tf.auto import (
    TFAutoModel,
    TFAutoModelForCausalLM,
    TFAutoModelForQuestionAnswering,
    TFAutoModelForSequenceClassification,
)
from olmozoo.tf.base import canonical_state
from olmozoo.tf.cache import KVCache
from olmozoo.tf.flexolmo import TFFlexOlmoForCausalLM, TFFlexOlmoModel
from olmozoo.tf.olmo import TFOlmoForCausalLM, TFOlmoForSequenceClassification, TFOlmoModel
from olmozoo.tf.olmo2 import TFOlmo2ForCausalLM, TFOlmo2ForSequenceClassification, TFOlmo2Model
from olmozoo.tf.olmo3 import TFOlmo3ForCausalLM, TFOlmo3ForSequenceClassification, TFOlmo3Model
from olmozoo.tf.olmoe import TFOlmoeForCausalLM, TFOlmoeModel
from olmozoo.tf.opt import TFOPTForCausalLM, TFOPTForQuestionAnswering, TFOPTForSequenceClassification, TFOPTModel

__all__ = [
    "KVCache",
    "TFAutoModel",
    "TFAutoModelForCausalLM",
    "TFAutoModelForQuestionAnswering",
    "TFAutoModelForSequenceClassification",
    "TFFlexOlmoForCausalLM",
    "TFFlexOlmoModel",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
    "TFOlmo2ForCausalLM",
    "TFOlmo2ForSequenceClassification",
    "TFOlmo2Model",
    "TFOlmo3ForCausalLM",
    "TFOlmo3ForSequenceClassification",
    "TFOlmo3Model",
    "TFOlmoForCausalLM",
    "TFOlmoForSequenceClassification",
    "TFOlmoModel",
    "TFOlmoeForCausalLM",
    "TFOlmoeModel",
    "canonical_state",
]
