"""The registry of wings: how each loads, calls and generates, with NumPy arrays in and out.

What is above the wings (pipeline, evaluation, verification, conversion of live models) goes through it, and names no
framework. A new wing is one class here.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar, Self, Unpack

import numpy as np

from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.reader import OpenCheckpoint
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.families.registry import model_class
from olmozoo.generation.config import GenerationConfig
from olmozoo.modeling import given_quantization
from olmozoo.quantization import GROUP_SIZE
from olmozoo.typing import Array, HubOptions, StrPath


class Backend(ABC):
    """A causal language model, loaded in one wing. Ids and masks are (batch, seq) arrays, padded on the left.

    Args:
        source: the checkpoint.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; default an accelerator if there is one, else the CPU.

    Attributes:
        model: the model, of the wing's own class.
        device: its device, in the framework's own form. None where the framework chooses.

    Raises:
        MissingBackendError: the framework is not installed.
        InputError: there is no such device.
    """

    wing: ClassVar[str]
    framework: ClassVar[str]  # the module that has to be installed
    device: Any = None

    def __init__(self, source: OpenCheckpoint, dtype: str | None = None, device: str | None = None) -> None:
        cls = self.model_class(source.config, "causal_lm")
        self.device = self.choose_device(dtype or source.checkpoint.dtype.name, device)
        self.model = self.load(cls, source, dtype)

    @classmethod
    def of(cls, model: Any) -> Self:
        """The backend of a live model of this wing, which stays on its device."""
        backend = cls.__new__(cls)
        backend.model = model
        backend.device = cls.device_of(model)
        return backend

    @classmethod
    def device_of(cls, model: Any) -> Any:
        """The device of a live model; None where the framework chooses."""
        return None

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        config: ModelConfig = self.model.config
        return config

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's defaults of `generate`."""
        settings: GenerationConfig = self.model.generation_config
        return settings

    def forward(self, input_ids: Array, attention_mask: Array, **options: Any) -> dict[str, Any]:
        """Logits, hidden states and whatever else `options` asks of a forward call; floats are at least float32."""
        with self.scope():
            output = self.model(
                input_ids=self.to_framework(input_ids), attention_mask=self.to_framework(attention_mask), **options
            )
            arrays: dict[str, Any] = _arrays(output, self.to_numpy)
            return arrays

    def generate(self, input_ids: Array, attention_mask: Array, **settings: Any) -> Array:
        """Prompt and answer, (batch, seq + new)."""
        with self.scope():
            sequences: Array = self.model._generate(input_ids, attention_mask, **settings).sequences
            return sequences

    # -- what a wing defines --------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def module(cls) -> ModuleType:
        """The wing, imported."""

    @classmethod
    def training(cls) -> ModuleType:
        """The wing's module of training steps, imported."""
        return import_module(f"{cls.module().__name__}.training")

    @classmethod
    def model_class(cls, config: ModelConfig | type[ModelConfig], head: Head | None) -> type[Any]:
        """The wing's class of a family with a head.

        Raises:
            MissingBackendError: the framework is not installed.
            ConfigError: the family has no such head.
        """
        cls.module()
        return model_class(cls.wing, config, head)

    @classmethod
    def empty_model(cls, config: ModelConfig, head: Head | None, dtype: np.dtype[Any]) -> Any:
        """A model whose parameters have no values yet; `bind_parameters` sets them.

        Args:
            config: its config.
            head: None for the decoder alone.
            dtype: of the parameters, where the wing does not take that from their values.
        """
        return cls.model_class(config, head)(config, seed=None, dtype=dtype.name)

    @classmethod
    @abstractmethod
    def choose_device(cls, dtype: str, device: str | None) -> Any:
        """The device for a model in that dtype, in the framework's own form."""

    @classmethod
    @abstractmethod
    def is_cpu(cls, device: Any) -> bool:
        """Whether a device that `choose_device` has chosen is the CPU."""

    def load(self, cls: type[Any], source: OpenCheckpoint, dtype: str | None) -> Any:
        """A model of the class with the weights of a checkpoint."""
        with self.scope():
            return cls._from_checkpoint(source, dtype=dtype)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """What the framework's calls run in."""
        return contextlib.nullcontext()

    def to_framework(self, array: Array) -> Any:
        """An array of ids as the model takes it."""
        return array

    @abstractmethod
    def to_numpy(self, value: Any) -> Array:
        """One of the model's outputs as an array."""


class PyTorch(Backend):
    """A model of `olmozoo.pt`."""

    wing, framework = "pt", "torch"

    @classmethod
    def module(cls) -> ModuleType:
        """See `Backend.module`."""
        import olmozoo.pt

        return olmozoo.pt

    @classmethod
    def device_of(cls, model: Any) -> Any:
        """The device of the model's parameters."""
        return next(model.parameters()).device

    @classmethod
    def choose_device(cls, dtype: str, device: str | None) -> Any:
        """The one asked for; by default CUDA or another accelerator if there is one (MPS not for float64)."""
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if device is None:
            if accelerator is None or (accelerator.type == "mps" and dtype == "float64"):
                return torch.device("cpu")
            return accelerator
        here = ["cpu", "meta"] if accelerator is None else [accelerator.type, "cpu", "meta"]
        with contextlib.suppress(RuntimeError):  # no such word
            if (chosen := torch.device(device)).type in here:
                return chosen
        raise _no_device(device, "PyTorch", here)

    @classmethod
    def is_cpu(cls, device: Any) -> bool:
        """See `Backend.is_cpu`."""
        return bool(device.type == "cpu")

    def load(self, cls: type[Any], source: OpenCheckpoint, dtype: str | None) -> Any:
        """See `Backend.load`."""
        return cls._from_checkpoint(source, dtype=dtype, device=self.device)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """No gradients."""
        import torch

        return torch.inference_mode()

    def to_framework(self, array: Array) -> Any:
        """See `Backend.to_framework`."""
        import torch

        return torch.from_numpy(array).to(self.device)

    def to_numpy(self, value: Any) -> Array:
        """See `Backend.to_numpy`."""
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()
        return np.asarray(value.cpu())


class TensorFlow(Backend):
    """A model of `olmozoo.tf`."""

    wing, framework = "tf", "tensorflow"

    @classmethod
    def module(cls) -> ModuleType:
        """See `Backend.module`."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it writes notices to standard error
        import olmozoo.tf

        return olmozoo.tf

    @classmethod
    def choose_device(cls, dtype: str, device: str | None) -> Any:
        """The one asked for; by default TensorFlow takes a GPU by itself."""
        if device is None:
            return None
        import tensorflow as tf

        kind, index = _kind_and_index(device)
        devices = tf.config.list_logical_devices("GPU" if kind in ("cuda", "gpu") else kind.upper())
        if index < len(devices):
            return devices[index].name
        raise _no_device(device, "TensorFlow", {d.device_type.lower() for d in tf.config.list_logical_devices()})

    @classmethod
    def is_cpu(cls, device: Any) -> bool:
        """See `Backend.is_cpu`."""
        import tensorflow as tf

        return "CPU" in device if device else not tf.config.list_logical_devices("GPU")

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The device."""
        import tensorflow as tf

        scope: contextlib.AbstractContextManager[Any] = tf.device(self.device)
        return scope

    def to_numpy(self, value: Any) -> Array:
        """See `Backend.to_numpy`."""
        return _at_least_float32(value.numpy())


class Flax(Backend):
    """A model of `olmozoo.flax`; float64 is enabled in JAX for the calls of a model that is in it, and no others."""

    wing, framework = "flax", "flax"

    @classmethod
    def module(cls) -> ModuleType:
        """See `Backend.module`."""
        import olmozoo.flax

        return olmozoo.flax

    @classmethod
    def empty_model(cls, config: ModelConfig, head: Head | None, dtype: np.dtype[Any]) -> Any:
        """See `Backend.empty_model`."""
        return cls.model_class(config, head)(config, dtype=dtype, param_dtype=dtype, _do_init=False)

    @classmethod
    def choose_device(cls, dtype: str, device: str | None) -> Any:
        """The one asked for; by default JAX takes an accelerator by itself."""
        if device is None:
            return None
        import jax

        kind, index = _kind_and_index(device)
        with contextlib.suppress(RuntimeError):  # no such platform
            if index < len(devices := jax.devices(kind)):
                return devices[index]
        raise _no_device(device, "JAX", {d.platform for d in jax.devices()} | {"cpu"})

    @classmethod
    def is_cpu(cls, device: Any) -> bool:
        """See `Backend.is_cpu`."""
        import jax

        return bool((device or jax.devices()[0]).platform == "cpu")

    def load(self, cls: type[Any], source: OpenCheckpoint, dtype: str | None) -> Any:
        """See `Backend.load`. In the dtype of the file, whatever that is: float64 needs to be enabled."""
        import jax

        with jax.default_device(self.device), jax.enable_x64(True):
            return cls._from_checkpoint(source, dtype=dtype)

    @contextlib.contextmanager
    def scope(self) -> Any:
        """The device, and float64 where the model is in it."""
        import jax

        wide = jax.enable_x64(True) if self.model.dtype == np.float64 else contextlib.nullcontext()
        with jax.default_device(self.device), wide:
            yield

    def to_numpy(self, value: Any) -> Array:
        """See `Backend.to_numpy`."""
        from olmozoo.flax.sharding import to_host

        return _at_least_float32(to_host(value))


BACKENDS: dict[str, type[Backend]] = {cls.wing: cls for cls in (PyTorch, TensorFlow, Flax)}


def installed() -> list[str]:
    """The wings whose framework is installed; nothing is imported."""
    return [name for name, cls in BACKENDS.items() if find_spec(cls.framework) is not None]


def backend_class(name: str | None = None) -> type[Backend]:
    """The wing of a name; default the first that is installed.

    Raises:
        InputError: there is no such wing.
    """
    name = name or next(iter(installed()), "pt")
    if name not in BACKENDS:
        raise InputError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)} (PyTorch, Keras, JAX)")
    return BACKENDS[name]


def backend_of(model: Any) -> Backend:
    """The backend of a live causal language model.

    Raises:
        InputError: the model is none of olmozoo's, or has no language-model head.
    """
    modules = {base.__module__ for base in type(model).__mro__}
    for name, cls in BACKENDS.items():
        if any(module.startswith(f"olmozoo.{name}.") for module in modules) and hasattr(model, "head"):
            if model.head != "causal_lm":
                raise InputError(f"the model is a {type(model).__name__}, expected one for causal language modeling")
            return cls.of(model)
    raise InputError(f"a {type(model).__name__} is no model of olmozoo.pt, olmozoo.tf or olmozoo.flax")


def load(
    path_or_repo: StrPath,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    adapter: StrPath | None = None,
    quantization: str | None = None,
    group_size: int = GROUP_SIZE,
    **hub: Unpack[HubOptions],
) -> Backend:
    """Load a causal language model in a wing.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        backend: "pt", "tf" or "flax"; default the first that is installed.
        dtype: name of the parameters' dtype; default the checkpoint's own.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; default an accelerator if there is one, else the CPU.
        adapter: a folder or a repository with a LoRA adapter of PEFT; default one in the model's folder.
        quantization: `int8`, `int4`, or `none` for floats; default as the folder has it (see `olmozoo.quantization`).
        group_size: of int4.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: there is no such wing or device, or the weights cannot be quantized so.
        MissingBackendError: the wing's framework is not installed.
    """
    cls = backend_class(backend)
    cls.module()  # before anything is downloaded
    how = given_quantization(quantization, group_size)
    source = open_merged(locate(path_or_repo, need="weights", adapter=adapter, **hub), quantization=how)
    return cls(source, dtype, device)


def _kind_and_index(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    if not kind or (index and not index.isdecimal()):
        raise InputError(f"device is {device!r}, expected a kind and an index, such as 'cpu' or 'cuda:1'")
    return kind, int(index or 0)


def _no_device(device: str, framework: str, here: Iterable[str]) -> InputError:
    return InputError(f"device is {device!r}, and {framework} has {', '.join(sorted(here))} here")


def _at_least_float32(array: Array) -> Array:
    """The array, in float32 where it is in a shorter floating dtype."""
    return array.astype(np.float32) if array.dtype.kind not in "iub" and array.dtype.itemsize < 4 else array


def _arrays(value: Any, convert: Any) -> Any:
    if hasattr(value, "items"):
        return {key: _arrays(item, convert) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_arrays(item, convert) for item in value)
    return convert(value)
