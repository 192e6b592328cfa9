"""A live model of one framework as one of another."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from olmozoo.backends import BACKENDS
from olmozoo.checkpoint.tensors import widest
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.quantization import QuantizedTensor


def convert(model: Any, to: str) -> Any:
    """A model of another framework with the same config, head, weights and generation settings, without the disk.

    The two share nothing that changes: training one leaves the other as it is. Each tensor keeps its dtype; a Keras
    model, which has one for all, takes the widest.

    Args:
        model: a model of `olmozoo.pt`, `olmozoo.tf` or `olmozoo.flax`, with parameters of its own.
        to: "pt", "tf" or "flax".

    Raises:
        InputError: `model` is none of olmozoo's, or has other parameters than its config says; or `to` is none of
            the wings.
        MissingBackendError: the framework is not installed.
        ConfigError: the model is in float64 and JAX has that switched off.
    """
    if to not in BACKENDS:
        raise InputError(f"to is {to!r}, expected one of {', '.join(BACKENDS)}")
    if not isinstance(getattr(model, "config", None), ModelConfig) or not hasattr(model, "read_parameters"):
        raise InputError(f"a {type(model).__name__} is no model of olmozoo.pt, olmozoo.tf or olmozoo.flax")
    dtype = widest(array.dtype for _, array in model.read_parameters() if not isinstance(array, QuantizedTensor))
    made = BACKENDS[to].empty_model(model.config, model.head, dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    uniform = dtype if to == "tf" else None
    values = (
        (parameter, array if isinstance(array, QuantizedTensor) else np.array(array, uniform, order="C"))
        for parameter, array in model.read_parameters()
    )
    if to == "pt":
        made.bind_parameters(values, dtype=dtype)
    else:
        made.bind_parameters(values)
    if to == "pt":
        made.train(getattr(model, "training", False) is True)
    return made
