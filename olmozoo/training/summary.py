"""What a run is, in a few lines before it starts: model, data, duration, learning rates, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from olmozoo import memory as memory_plan
from olmozoo.backends import backend_class
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.families.parameter import Parameter
from olmozoo.sharding import checked_mesh, layout
from olmozoo.training.config import TrainConfig
from olmozoo.training.parameters import stored_parameters
from olmozoo.training.schedules import learning_rate

if TYPE_CHECKING:
    from olmozoo.training.data import TrainingData
    from olmozoo.training.loop import Plan
    from olmozoo.training.state import Progress

# What is computed in, and the dtype of weights, gradients and running means.
DTYPES = {"fp32": ("float32", "float32"), "amp_bf16": ("bfloat16", "float32"), "fp64": ("float64", "float64")}


def check_mesh(config: TrainConfig, model: ModelConfig, mesh: Mapping[str, int], wing: str) -> None:
    """Check that a run fits a mesh.

    Raises:
        InputError: it does not.
    """
    rows = mesh.get("fsdp", 1)
    if config.global_train_batch_size % rows:
        raise InputError(
            f"global_train_batch_size is {config.global_train_batch_size}, which fsdp = {rows} does not divide"
        )
    if checked_mesh(mesh) and config.lora is not None and wing == "pt":
        raise InputError("lora in PyTorch is for one device: train it on one, or with --backend flax or tf")
    if checked_mesh(mesh) and (labels := [each.label for each in config.evaluators if each.quantization is not None]):
        raise InputError(f"evaluators: {labels[0]!r} has a quantization, which is for one device")
    if checked_mesh(mesh) and wing == "tf" and isinstance(model, ExpertsConfig):
        raise InputError(f"a model of type {model.model_type} has experts, which Keras trains on one device")
    if wing != "tf":  # where every device has the whole model
        layout(model, "causal_lm", mesh, style="pt" if wing == "pt" else "flax")


def summary(
    config: TrainConfig,
    model: ModelConfig,
    data: TrainingData,
    plan: Plan,
    last: int,
    trained: Sequence[Parameter],
    mesh: Mapping[str, int],
) -> dict[str, str]:
    """The size of a run by the names of its parts.

    Args:
        config: the run.
        model: the config of its model.
        data: its data.
        plan: its duration.
        last: the step that it ends at.
        trained: the parameters that are trained.
        mesh: the number of devices by axis; axes of one device may be left out.
    """
    total, count = _count(stored_parameters(model)), _count(trained)
    of_adapters = config.lora is not None
    frozen = total if of_adapters else total - count
    batch, length = config.global_train_batch_size, data.files.length
    rows = mesh.get("fsdp", 1)
    micro = f" in micro-batches of {config.micro_batch_size}" if config.micro_batch_size * rows < batch else ""
    micro += f", split over {rows} devices" if rows > 1 else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    optimizer, scheduler = config.optimizer, config.scheduler
    end = scheduler.t_max or plan.total
    too_long = {"warning": f"the run's {end:,} {scheduler.units} end within the warmup of {scheduler.t_warmup:,}"}
    return {
        "model": f"{model.name}, {total:,} parameters",
        "trained": f"{count:,}{' of adapters' if of_adapters else ''}; {frozen:,} frozen",
        "data": f"{len(data.files):,} instances of {length:,} tokens; {data.batches_per_epoch:,} steps an epoch",
        "batch": f"{batch:,} x {length:,} = {batch * length:,} tokens{micro}",
        "duration": f"{last:,} steps, {last / data.batches_per_epoch:.4g} epochs, {last * batch * length:,} tokens",
        "optimizer": f"{optimizer.name}, {scheduler.name} to {optimizer.learning_rate:.3g}, "
        f"warmup {scheduler.t_warmup:,} {scheduler.units}",
        "precision": config.precision,
        **({"devices": f"{math.prod(mesh.values())}: {axes}"} if axes else {}),
        **(too_long if scheduler.t_warmup >= end else {}),
    }


def rates(config: TrainConfig, data: TrainingData, plan: Plan, last: int, progress: Progress) -> dict[int, float]:
    """The learning rate at the first step, at the end of the warmup, at quarters of the run and at the last step."""
    in_steps = config.scheduler.units == "steps"
    tokens = config.global_train_batch_size * data.files.length
    warmup = config.scheduler.t_warmup if in_steps else -(-config.scheduler.t_warmup // tokens)
    first = progress.step + 1
    steps = {first, warmup, *(first + (last - first) * n // 4 for n in (1, 2, 3)), last}
    peak, bolted_on = config.optimizer.learning_rate, progress.bolted_on
    return {
        step: learning_rate(config.scheduler, peak, step if in_steps else step * tokens, plan.total, bolted_on)
        for step in sorted(steps)
        if first <= step <= last
    }


def memory(config: TrainConfig, model: ModelConfig, trained: Sequence[Parameter], length: int) -> memory_plan.Plan:
    """The memory of a step on each device; see `olmozoo.memory.plan`, with the factors of LoRA added."""
    adapters = trained if config.lora is not None else ()
    names = {parameter.name for parameter in trained}
    every = len(names) == len(stored_parameters(model))
    dtype, param_dtype = DTYPES[config.precision]
    mesh, wing = config.mesh or {}, backend_class(config.backend).wing
    rows = config.global_train_batch_size // mesh.get("fsdp", 1)
    found = memory_plan.plan(
        model,
        batch=min(config.micro_batch_size, rows),
        length=length,
        mesh={} if wing == "tf" else mesh,
        dtype=dtype,
        param_dtype=param_dtype,
        train=True,
        optimizer=config.optimizer.name,
        checkpointing=config.activation_checkpointing,
        trained=None if every else lambda parameter: parameter.name in names,
        backend="pt" if wing == "pt" else "flax",
    )
    added = _count(adapters) * memory_plan.SIZES[param_dtype]
    return replace(
        found,
        weights=found.weights + added,
        gradients=found.gradients + added,
        optimizer=found.optimizer + len(config.optimizer.moments) * added,
        gathered=found.gathered * memory_plan.SIZES[param_dtype] // memory_plan.SIZES[dtype],
        bounds=found.bounds if dtype == param_dtype else (*found.bounds, "activations"),  # some stay in float32
    )


def _count(parameters: Sequence[Parameter]) -> int:
    return sum(parameter.size for parameter in parameters)
