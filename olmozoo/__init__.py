"""olmozoo: OLMo, OLMo 2, OLMo 3, OLMoE, FlexOlmo and OPT in PyTorch, in Keras/TensorFlow and in JAX/Flax.

Configs and the neutral parts are here; models are in `olmozoo.pt`, `olmozoo.tf` and `olmozoo.flax`. Importing this
package imports no framework.
"""

from olmozoo.errors import CheckpointError, ConfigError, HubError, InputError, MissingBackendError, OlmozooError
from olmozoo.families.config import ModelConfig
from olmozoo.families.flexolmo import FlexOlmoConfig
from olmozoo.families.olmo import OlmoConfig
from olmozoo.families.olmo2 import Olmo2Config
from olmozoo.families.olmo3 import Olmo3Config
from olmozoo.families.olmoe import OlmoeConfig
from olmozoo.families.opt import OPTConfig
from olmozoo.generation.config import GenerationConfig
from olmozoo.interop import convert
from olmozoo.text.pipeline import pipeline
from olmozoo.text.streaming import TextIteratorStreamer, TextStreamer
from olmozoo.text.tokenizer import Tokenizer

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FlexOlmoConfig",
    "GenerationConfig",
    "HubError",
    "InputError",
    "MissingBackendError",
    "ModelConfig",
    "OPTConfig",
    "Olmo2Config",
    "Olmo3Config",
    "OlmoConfig",
    "OlmoeConfig",
    "OlmozooError",
    "TextIteratorStreamer",
    "TextStreamer",
    "Tokenizer",
    "convert",
    "pipeline",
]
