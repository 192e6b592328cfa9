"""A causal language model in any of the three frameworks, with NumPy arrays in and out.

The one place above the wings that knows how each is called; pipeline, verify and the tests go through it.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import numpy as np

from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.errors import InputError
from olmozoo.hub import resolve
from olmozoo.typing import Array


class Backend(ABC):
    """A loaded model. Ids and masks are (batch, seq) arrays, padded on the left.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.
    """

    framework: str  # the module that must be there
    wing: str

    @abstractmethod
    def __init__(self, path_or_repo: str | os.PathLike[str], dtype: str | None = None, **hub: Any) -> None:
        self.model: Any

    @abstractmethod
    def forward(self, input_ids: Array, attention_mask: Array, **options: Any) -> dict[str, Any]:
        """Logits, hidden states and what else `options` asks of a forward call."""

    @abstractmethod
    def generate(self, input_ids: Array, attention_mask: Array, **settings: Any) -> Array:
        """Prompt and answer, (batch, seq + new)."""


class PyTorch(Backend):
    """A model of `olmozoo.pt`."""

    framework, wing = "torch", "pt"

    def __init__(self, path_or_repo: str | os.PathLike[str], dtype: str | None = None, **hub: Any) -> None:
        from olmozoo.pt import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path_or_repo, dtype=dtype, **hub)

    def forward(self, input_ids: Array, attention_mask: Array, **options: Any) -> dict[str, Any]:
        """See `Backend.forward`."""
        import torch

        with torch.inference_mode():
            output = self.model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), **options)
        return _arrays(output, lambda tensor: _wide(tensor.float() if tensor.element_size() < 4 else tensor))

    def generate(self, input_ids: Array, attention_mask: Array, **settings: Any) -> Array:
        """See `Backend.generate`."""
        import torch

        return self.model.generate(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), **settings).numpy()


class TensorFlow(Backend):
    """A model of `olmozoo.tf`."""

    framework, wing = "tensorflow", "tf"

    def __init__(self, path_or_repo: str | os.PathLike[str], dtype: str | None = None, **hub: Any) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on standard error otherwise
        from olmozoo.tf import TFAutoModelForCausalLM

        self.model = TFAutoModelForCausalLM.from_pretrained(path_or_repo, dtype=dtype, **hub)

    def forward(self, input_ids: Array, attention_mask: Array, **options: Any) -> dict[str, Any]:
        """See `Backend.forward`."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
        return _arrays(output, lambda tensor: _wide(tensor.numpy()))

    def generate(self, input_ids: Array, attention_mask: Array, **settings: Any) -> Array:
        """See `Backend.generate`."""
        return self.model.generate(input_ids, attention_mask, **settings).numpy()


class Flax(Backend):
    """A model of `olmozoo.flax`; where it is in float64, that is enabled in JAX for its calls alone."""

    framework, wing = "flax", "flax"

    def __init__(self, path_or_repo: str | os.PathLike[str], dtype: str | None = None, **hub: Any) -> None:
        import jax

        from olmozoo.flax import FlaxAutoModelForCausalLM

        own = dtype or Checkpoint(resolve(path_or_repo, need="weights", **hub)).dtype
        self._scope = (lambda: jax.enable_x64(True)) if own == "float64" else contextlib.nullcontext
        with self._scope():
            self.model = FlaxAutoModelForCausalLM.from_pretrained(path_or_repo, dtype=dtype, **hub)

    def forward(self, input_ids: Array, attention_mask: Array, **options: Any) -> dict[str, Any]:
        """See `Backend.forward`."""
        with self._scope():
            return _arrays(self.model(input_ids, attention_mask, **options), _wide)

    def generate(self, input_ids: Array, attention_mask: Array, **settings: Any) -> Array:
        """See `Backend.generate`."""
        with self._scope():
            return np.asarray(self.model.generate(input_ids, attention_mask, **settings).sequences)


BACKENDS: dict[str, type[Backend]] = {cls.wing: cls for cls in (PyTorch, TensorFlow, Flax)}


def installed() -> list[str]:
    """The wings whose framework is installed; nothing is imported."""
    return [name for name, cls in BACKENDS.items() if find_spec(cls.framework) is not None]


def load(
    path_or_repo: str | os.PathLike[str], backend: str | None = None, dtype: str | None = None, **hub: Any
) -> Backend:
    """Load a causal language model in a wing; default the first that is installed.

    Raises:
        InputError: there is no such wing.
        MissingBackendError: its framework is not installed.
    """
    name = backend or next(iter(installed()), "pt")
    if name not in BACKENDS:
        raise InputError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name](path_or_repo, dtype, **hub)


def _wide(value: Any) -> Array:
    """A NumPy array in float32 or float64 (or an integer kind) of an array in any dtype."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind not in "iub" and array.dtype.itemsize < 4 else array


def _arrays(value: Any, convert: Any) -> Any:
    if hasattr(value, "items"):
        return {key: _arrays(item, convert) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_arrays(item, convert) for item in value)
    return convert(value)
