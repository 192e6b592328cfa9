"""A live model of one framework as one of another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from olmozoo.checkpoint.tensors import dtype_of, widest
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, Head, Parameter
from olmozoo.typing import Array

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
    config, head = model.config, model.head
    read = _live_reader(model, wing)
    table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
    made = _empty_model(to, config, head, lambda: widest(read(parameter).dtype for parameter in table))
    made.generation_config = copy.deepcopy(model.generation_config)
    if to == "flax":
        from olmozoo.flax.base import to_leaf

        made.params = made._bind((parameter, to_leaf(parameter, read(parameter))) for parameter in table)
        return made
    for parameter in table:
        if to == "pt":
            from olmozoo.pt.base import to_tensor

            made._bind(parameter, to_tensor(np.array(read(parameter), order="C")))
        else:
            made._bind(parameter, read(parameter).astype(dtype_of(made.variable_dtype)))
    if to == "pt":
        made.tie_weights()
        made.train(getattr(model, "training", False) is True)
    return made


def _live_reader(model: Any, wing: str) -> Callable[[Parameter], Array]:
    if wing != "flax":
        model.check()
    if wing == "pt":
        from olmozoo.pt.base import to_array as pt_array

        return lambda parameter: pt_array(model._find(parameter))
    if wing == "tf":
        read: Callable[[Parameter], Array] = model._read
        return read
    from flax.traverse_util import flatten_dict

    from olmozoo.flax.base import to_array as flax_array

    leaves: Any = flatten_dict(model.checked(model.params))  # type: ignore[no-untyped-call]
    return lambda parameter: flax_array(parameter, leaves[model._path(parameter)])


def _empty_model(wing: str, config: ModelConfig, head: Head | None, dtype: Callable[[], np.dtype[Any]]) -> Any:
    """A model of that wing whose parameters are yet to be bound."""
    cls = _model_class(wing, config, head)
    if wing == "pt":
        return cls(config, seed=None)
    if wing == "tf":
        return cls(config, seed=None, dtype=dtype().name)
    return cls(config, dtype=dtype(), param_dtype=dtype(), _do_init=False)


def _model_class(wing: str, config: ModelConfig, head: Head | None) -> Any:
    from importlib import import_module

    return getattr(import_module(f"olmozoo.{wing}"), WINGS[wing] + config.name + ARCHITECTURES[head])
