"""The JAX/Flax wing."""

from olmozoo.errors import MissingBackendError

try:
    import flax.linen  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise MissingBackendError("olmozoo.flax needs JAX and Flax: pip install 'olmozoo[flax]'") from error

from olmozoo.flax.auto import (
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForQuestionAnswering,
    FlaxAutoModelForSequenceClassification,
)
from olmozoo.flax.base import canonical_state
from olmozoo.flax.cache import KVCache
from olmozoo.flax.flexolmo import FlaxFlexOlmoForCausalLM, FlaxFlexOlmoModel
from olmozoo.flax.olmo import FlaxOlmoForCausalLM, FlaxOlmoForSequenceClassification, FlaxOlmoModel
from olmozoo.flax.olmo2 import FlaxOlmo2ForCausalLM, FlaxOlmo2ForSequenceClassification, FlaxOlmo2Model
from olmozoo.flax.olmo3 import FlaxOlmo3ForCausalLM, FlaxOlmo3ForSequenceClassification, FlaxOlmo3Model
from olmozoo.flax.olmoe import FlaxOlmoeForCausalLM, FlaxOlmoeModel
from olmozoo.flax.opt import (
    FlaxOPTForCausalLM,
    FlaxOPTForQuestionAnswering,
    FlaxOPTForSequenceClassification,
    FlaxOPTModel,
)

__all__ = [
    "FlaxAutoModel",
    "FlaxAutoModelForCausalLM",
    "FlaxAutoModelForQuestionAnswering",
    "FlaxAutoModelForSequenceClassification",
    "FlaxFlexOlmoForCausalLM",
    "FlaxFlexOlmoModel",
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "FlaxOlmo2ForCausalLM",
    "FlaxOlmo2ForSequenceClassification",
    "FlaxOlmo2Model",
    "FlaxOlmo3ForCausalLM",
    "FlaxOlmo3ForSequenceClassification",
    "FlaxOlmo3Model",
    "FlaxOlmoForCausalLM",
    "FlaxOlmoForSequenceClassification",
    "FlaxOlmoModel",
    "FlaxOlmoeForCausalLM",
    "FlaxOlmoeModel",
    "KVCache",
    "canonical_state",
]
