"""A model over several devices: JAX's own sharding, from the parameter table.

    mesh = make_mesh(fsdp=4, tensor=2)
    model = FlaxOlmo2ForCausalLM.from_pretrained(folder, mesh=mesh)

The compiler inserts the communication, but for that of experts (see `olmozoo.flax.experts`). `shardings` places the
parameters. `constrain` splits the hidden states after each block by rows; without it the compiler may compute every row
on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.sharding import layout


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: Any = None, *, experts: int = 1) -> Mesh:
    """A mesh with the axes `fsdp` and `tensor`, and `experts` where it has more than one device.

    All are of type Auto: the compiler decides about all other arrays.

    Args:
        fsdp: the number of devices that parameters and the batch are split over.
        tensor: the number of devices that heads, the MLP and the vocabulary are split over.
        devices: default all of JAX's, of every process.
        experts: the number of devices that the experts of a mixture are split over.

    Raises:
        InputError: there are not `fsdp * tensor * experts` devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"fsdp": fsdp, "tensor": tensor} | ({} if experts == 1 else {"experts": experts})
    count = math.prod(sizes.values())
    if min(sizes.values()) < 1 or count != len(devices):
        given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise InputError(f"{given} make {count} devices, expected {len(devices)}")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def check_mesh(mesh: Mesh) -> Mesh:
    """The mesh.

    Raises:
        InputError: it has an axis that is not of type Auto.
    """
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]
    if explicit:
        raise InputError(
            f"the mesh has axes of type Explicit or Manual ({', '.join(explicit)}), expected AxisType.Auto: make it by "
            "olmozoo.flax.sharding.make_mesh, or by jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))"
        )
    return mesh


def parameter_shardings(config: ModelConfig, head: Head | None, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter goes, by canonical name; linear weights are (in, out) here.

    That of an expert is the one of the variable of all of a layer's, (experts, in, out).

    Raises:
        InputError: the mesh does not fit the model; every problem is named.
    """
    places = layout(config, head, dict(check_mesh(mesh).shape))
    shardings = {}
    for name, place in places.items():
        axes = [axes[0] if axes else None for axes in place.split]
        if place.parameter.kind == "linear":
            axes.reverse()
        if place.parameter.stack is not None:
            axes.insert(0, None if place.owner is None else "experts")
        shardings[name] = NamedSharding(mesh, PartitionSpec(*axes))
    return shardings


def optimizer_shardings(tx: Any, model: Any, params: Any = None) -> Any:
    """Where the state of an optimizer of optax goes: what is as a parameter is, with it; all else on every device.

    `jax.jit(tx.init, out_shardings=optimizer_shardings(tx, model))(model.params)` makes a state that is split; under
    `jit` alone it would be on one device.

    Args:
        tx: the optimizer.
        model: a model with a mesh.
        params: a tree of arrays on the mesh that are trained; default all parameters of the model.
    """
    import optax

    if params is None:
        shapes, shardings = model.params_shape_tree, model.shardings()
    else:
        shapes, shardings = params, jax.tree.map(lambda x: x.sharding, params)
    state = jax.eval_shape(tx.init, shapes)
    everywhere = NamedSharding(model.mesh, PartitionSpec())
    return optax.tree_map_params(
        tx, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: everywhere
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where ids, masks and labels (batch, seq) go: their rows are split over `fsdp`."""
    return NamedSharding(mesh, PartitionSpec("fsdp" if "fsdp" in mesh.shape else None))


def constrain(x: Array, mesh: Mesh | None, heads: int | None = None) -> Array:
    """The array (batch, ...) with its rows split over `fsdp` and, with `heads`, axis 1 over `tensor`.

    An axis that the mesh does not divide is not split. Without a mesh, the array as it is.
    """
    if mesh is None:
        return x
    rows, parts = mesh.shape.get("fsdp", 1), mesh.shape.get("tensor", 1)
    spec: list[str | None] = [None] * x.ndim
    if rows > 1 and x.shape[0] % rows == 0:
        spec[0] = "fsdp"
    if heads is not None and parts > 1 and heads % parts == 0:
        spec[1] = "tensor"
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree on every device, so that each process has their values. Without a mesh, as they are."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, everywhere), tree)


def from_slices(
    shape: tuple[int, ...], dtype: Any, sharding: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Array:
    """An array whose parts are read one by one, each once, by the devices of this process alone."""
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if (key := str(index)) not in parts:  # asked for once for each copy
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


def to_host(x: Any, index: int | None = None) -> np.ndarray:
    """The whole array in NumPy, also where other processes have parts of it; they all have to call this.

    Args:
        x: the array.
        index: gather and return one entry of the first dimension alone; default all.
    """
    if isinstance(x, Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x if index is None else x[index], tiled=True))
    return np.asarray(x) if index is None else np.asarray(x)[index]


def agree(right: bool) -> bool:
    """The value that process 0 has; every process has to call this."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(right)))
