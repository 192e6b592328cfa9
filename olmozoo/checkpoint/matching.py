"""The tensors of a checkpoint against the parameter table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from olmozoo import foreign
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.errors import CheckpointError, InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, BASE_PREFIX, Head, Parameter
from olmozoo.quantization import QuantizedTensor
from olmozoo.typing import Array


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    head: Head | None = None,
    *,
    dtype: np.dtype[Any],
    ignore_mismatched_sizes: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Parameter, Array | QuantizedTensor]]:
    """Every parameter of the table with its values, the largest first; tied ones are left out.

    Those of a quantized weight are its integers, as they are.

    The order keeps the peak of memory low: where values are copied, the largest are there twice while little else is.
    All checks come before the first tensor is read. A base model's checkpoint and one with another head both serve.
    Where such a checkpoint has nothing for this head, the head starts from its initial values (`seed`) and a warning
    says so.

    Args:
        checkpoint: the tensors.
        config: the model's config.
        head: the model's head; None for the base model.
        dtype: what values are cast to.
        ignore_mismatched_sizes: start tensors of a wrong shape anew, with a warning, rather than refuse.
        seed: for values that start anew.

    Raises:
        CheckpointError: one error that lists every missing, unexpected, duplicate and misshapen tensor.
    """
    for parameter, read in find_weights(
        checkpoint, config, head, dtype=dtype, ignore_mismatched_sizes=ignore_mismatched_sizes, seed=seed
    ):
        values = read()
        yield parameter, values if isinstance(values, QuantizedTensor) else values.astype(dtype, copy=False)


def find_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    head: Head | None = None,
    *,
    dtype: np.dtype[Any],
    ignore_mismatched_sizes: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Parameter, Callable[[], Any]]]:
    """Every parameter of the table with a function that returns its values, in the dtype of the file.

    Where the file is mapped, they are a view of it: whoever takes a slice reads that slice alone. Order, arguments and
    errors are those of `load_weights`.
    """
    sources, fresh = match_tensors(checkpoint, config, head, ignore_mismatched_sizes)
    if fresh:
        warnings.warn(
            f"{checkpoint.folder}: started anew, for training: {', '.join(sorted(fresh.values()))}", stacklevel=5
        )
    for parameter in sorted(config.parameters(head), key=lambda parameter: -parameter.size):
        if parameter.tied_to is None:
            if parameter.name in sources:
                tensor = checkpoint.tensors[sources[parameter.name]]
                yield parameter, tensor.exact_values if tensor.integers is None else tensor.integers.read
            else:
                yield parameter, partial(parameter.initial, seed, dtype)


def check_floats(checkpoint: Checkpoint) -> None:
    """Check that no weight of a checkpoint is quantized, as a model over several devices needs.

    Raises:
        InputError: one is.
    """
    if quantized := [name for name, tensor in checkpoint.tensors.items() if tensor.integers is not None]:
        raise InputError(
            f"{checkpoint.folder}: {quantized[0]} is quantized, and models over several devices are in floats: load it "
            "with quantization='none'"
        )


def initial_weights(
    config: ModelConfig, head: Head | None = None, *, seed: int = 0, dtype: Any = "float32"
) -> Iterator[tuple[Parameter, Array]]:
    """Every parameter of the table with its initial values, in the table's order; tied ones are left out."""
    for parameter in config.parameters(head):
        if parameter.tied_to is None:
            yield parameter, parameter.initial(seed, dtype)


def match_tensors(
    checkpoint: Checkpoint, config: ModelConfig, head: Head | None, ignore_mismatched_sizes: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Canonical name -> name in the files, and canonical name -> why, for what starts anew.

    Raises:
        CheckpointError: one error that lists every missing, unexpected, duplicate and misshapen tensor.
    """
    table = {parameter.name: parameter for kind in (None, *config.heads) for parameter in config.parameters(kind)}
    wanted = {parameter.name for parameter in config.parameters(head)}
    backbone = {parameter.name for parameter in config.parameters()}
    prefixed = {name for name in checkpoint.tensors if name.startswith(BASE_PREFIX)}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for name in checkpoint.tensors:
        canonical = name if name in prefixed or name in table else BASE_PREFIX + name
        if canonical not in table:
            problems.append(f"unexpected: {name} {list(checkpoint.tensors[name].shape)}")
        elif canonical in sources:
            problems.append(f"duplicate: {name} is {sources[canonical]} again")
        else:
            sources[canonical] = name

    heads_found = {name for name in sources if name not in backbone}
    fresh: dict[str, str] = {}
    for parameter in config.parameters(head):
        name = parameter.name
        if name in sources:
            found = checkpoint.tensors[sources[name]].shape
            if found != parameter.shape:
                text = f"{sources[name]} is {list(found)}, expected {list(parameter.shape)}"
                if ignore_mismatched_sizes:
                    fresh[name] = text
                else:
                    problems.append(f"wrong shape: {text}")
        elif parameter.tied_to is None:
            # Only a checkpoint that is plainly of another kind may lack a head; a broken one is not taken for such.
            other_kind = not prefixed or bool(heads_found - wanted) or not name.startswith("lm_head.")
            if name not in backbone and other_kind and not heads_found & wanted:
                fresh[name] = f"{name} (not in the checkpoint)"
            else:
                problems.append(f"missing: {name} {list(parameter.shape)}")
    for parameter in config.parameters(head):
        tied, name = parameter.tied_to, parameter.name
        if tied and name in sources and tied in sources and not problems:
            head_values, values = checkpoint[sources[name]], checkpoint[sources[tied]]
            if not np.array_equal(head_values, values, equal_nan=True):
                problems.append(f"{name} differs from {tied}, to which the config ties it")
    if problems and (reason := foreign.quantization(checkpoint.folder, checkpoint.tensors)):
        raise CheckpointError(reason)
    raise_problems(f"{checkpoint.folder} does not fit its config as {config.name}{ARCHITECTURES[head]}", problems)
    return {name: source for name, source in sources.items() if name in wanted and name not in fresh}, fresh
