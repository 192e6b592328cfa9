"""The PyTorch wing."""

from olmozoo.errors import MissingBackendError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise MissingBackendError("olmozoo.pt needs PyTorch: pip install 'olmozoo[pt]'") from error

from olmozoo.pt.auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)
from olmozoo.pt.base import canonical_state
from olmozoo.pt.cache import KVCache
from olmozoo.pt.flexolmo import FlexOlmoForCausalLM, FlexOlmoModel
from olmozoo.pt.olmo import OlmoForCausalLM, OlmoForSequenceClassification, OlmoModel
from olmozoo.pt.olmo2 import Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model
from olmozoo.pt.olmo3 import Olmo3ForCausalLM, Olmo3ForSequenceClassification, Olmo3Model
from olmozoo.pt.olmoe import OlmoeForCausalLM, OlmoeModel
from olmozoo.pt.opt import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "FlexOlmoForCausalLM",
    "FlexOlmoModel",
    "KVCache",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "Olmo2ForCausalLM",
    "Olmo2ForSequenceClassification",
    "Olmo2Model",
    "Olmo3ForCausalLM",
    "Olmo3ForSequenceClassification",
    "Olmo3Model",
    "OlmoForCausalLM",
    "OlmoForSequenceClassification",
    "OlmoModel",
    "OlmoeForCausalLM",
    "OlmoeModel",
    "canonical_state",
]
