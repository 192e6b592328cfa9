"""A live model of one framework as one of another."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from olmozoo.checkpoint.tensors import dtype_of, widest
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, Head

WINGS = {"pt": "", "tf": "TF", "flax": "Flax"}  # and how their classes' names begin


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
    if to not in WINGS:
        raise InputError(f"to is {to!r}, expected one of {', '.join(WINGS)}")
    modules = {cls.__module__.split(".")[1] for cls in type(model).__mro__ if cls.__module__.startswith("olmozoo.")}
    wing = next(iter(modules & set(WINGS)), None)
    if wing is None or not isinstance(getattr(model, "config", None), ModelConfig):
        raise InputError(f"a {type(model).__name__} is no model of olmozoo.pt, olmozoo.tf or olmozoo.flax")
    dtype = widest(array.dtype for _, array in model.read_parameters())
    made = _empty_model(to, model.config, model.head, dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    if to == "pt":  # whose parameters share the memory of arrays
        made.bind_parameters((parameter, np.array(array, order="C")) for parameter, array in model.read_parameters())
        made.train(getattr(model, "training", False) is True)
    elif to == "tf":
        one = dtype_of(made.variable_dtype)
        made.bind_parameters((parameter, array.astype(one)) for parameter, array in model.read_parameters())
    else:
        made.bind_parameters(model.read_parameters())
    return made


def _empty_model(wing: str, config: ModelConfig, head: Head | None, dtype: np.dtype[Any]) -> Any:
    """A model of that wing whose parameters are yet to be bound."""
    cls = _model_class(wing, config, head)
    if wing == "pt":
        return cls(config, seed=None)
    if wing == "tf":
        return cls(config, seed=None, dtype=dtype.name)
    return cls(config, dtype=dtype, param_dtype=dtype, _do_init=False)


def _model_class(wing: str, config: ModelConfig, head: Head | None) -> Any:
    from importlib import import_module

    return getattr(import_module(f"olmozoo.{wing}"), WINGS[wing] + config.name + ARCHITECTURES[head])
