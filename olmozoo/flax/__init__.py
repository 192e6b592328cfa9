"""The JAX/Flax wing."""

from olmozoo.errors import MissingBackendError

try:
    import flax.linen  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise MissingBackendError("olmozoo.flax needs JAX and Flax: pip install 'olmozoo[flax]'") from error

from olmozoo.flax.auto import FlaxAutoModelForCausalLM
from olmozoo.flax.cache import KVCache
from olmozoo.flax.olmo2 import FlaxOlmo2ForCausalLM, FlaxOlmo2Model

__all__ = ["FlaxAutoModelForCausalLM", "FlaxOlmo2ForCausalLM", "FlaxOlmo2Model", "KVCache"]
