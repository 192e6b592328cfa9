"""The PyTorch wing."""

from olmozoo.errors import MissingBackendError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise MissingBackendError("olmozoo.pt needs PyTorch: pip install 'olmozoo[pt]'") from error

from olmozoo.pt.auto import AutoModelForCausalLM
from olmozoo.pt.cache import KVCache
from olmozoo.pt.olmo2 import Olmo2ForCausalLM, Olmo2Model

__all__ = ["AutoModelForCausalLM", "KVCache", "Olmo2ForCausalLM", "Olmo2Model"]
