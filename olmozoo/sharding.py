"""How a model's parameters are split over a mesh of devices, from the axes in its parameter table alone.

A mesh is a mapping of names to numbers of devices, such as `{"fsdp": 4, "tensor": 2}`:

- `fsdp`: the batch is split, and parameters are stored in parts that are gathered where they are used.
- `tensor`: heads, the MLP and the vocabulary are split, with what is computed from them.
- `experts`: each device has some of the experts of a mixture, whole or split over the other axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from olmozoo.errors import InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head, Parameter

Style = Literal["pt", "flax"]
MESH_AXES = ("fsdp", "tensor", "experts")
RULES: dict[str, str] = {  # logical axis -> axis of the mesh; an axis that is not listed is not split
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "experts",
}


@dataclass(frozen=True)
class Placement:
    """How one parameter is split.

    Attributes:
        parameter: the entry of the parameter table.
        split: for each dimension of the shape on disk, the axes of the mesh that split it, the first one first.
        mesh: the number of devices along each axis of the mesh.
        owner: of an expert that is stored with the others of its layer, the coordinate along `experts` of the devices
            that have it; None for all else.
    """

    parameter: Parameter
    split: tuple[tuple[str, ...], ...]
    mesh: Mapping[str, int]
    owner: int | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part of the first device, which has the most; zeros for an expert of other devices."""
        part = self.slices(dict.fromkeys(self.mesh, 0))
        return tuple(each.stop - each.start for each in part)

    @property
    def local_size(self) -> int:
        """The number of values in the part of the first device."""
        return math.prod(self.local_shape)

    def slices(self, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
        """The part of the device at `coordinates` of the mesh, as slices of the shape on disk."""
        if self.owner not in (None, coordinates.get("experts", 0)):
            return (slice(0, 0),) * len(self.split)
        slices = []
        for size, axes in zip(self.parameter.shape, self.split, strict=True):
            start, stop = 0, size
            for axis in axes:  # as torch.chunk: equal parts, of which the last ones may be shorter or empty
                part = -(-(stop - start) // self.mesh[axis])
                start = min(start + coordinates[axis] * part, stop)
                stop = min(start + part, stop)
            slices.append(slice(start, stop))
        return tuple(slices)


def layout(
    config: ModelConfig,
    head: Head | None = "causal_lm",
    mesh: Mapping[str, int] | None = None,
    *,
    style: Style = "flax",
    rules: Mapping[str, str] | None = None,
) -> dict[str, Placement]:
    """How each parameter is split, by canonical name; a tied one is where the one it is tied to is.

    An axis of the mesh splits one dimension of a parameter at most, the first that the rules give to it. The axis
    `experts` splits the experts of a layer: of n experts on e devices, each device has n / e, in order. Routers are
    whole.

    Args:
        config: the model's config.
        head: its head; None for the decoder alone.
        mesh: devices by axis of the mesh; an axis that is left out has one device.
        style: "flax" splits the dimensions that `rules` name, evenly. "pt" splits by `rules` what is on other axes than
            `fsdp`, and then the first dimension of every parameter on `fsdp`, as FSDP2 does; the last parts may be
            smaller. On axes `tensor` and `experts` it splits experts as "flax" does.
        rules: axis of the mesh by logical axis; default `RULES`.

    Raises:
        InputError: an axis of the mesh has no such name, or a size that does not divide the model's; every problem is
            named.
    """
    given = checked_mesh(mesh or {})
    devices = {**dict.fromkeys(MESH_AXES, 1), **given}
    used = RULES if rules is None else rules
    table = {parameter.name: parameter for parameter in config.parameters(head)}
    placements: dict[str, Placement] = {}
    problems: dict[str, None] = {}
    experts = getattr(config, "num_experts", 0)
    stacks = "experts" in given or (style == "pt" and "tensor" in given)
    if "experts" in given and not experts:
        problems[f"the model has no experts, for experts = {given['experts']}"] = None
    for parameter in table.values():
        split: list[tuple[str, ...]] = []
        expert = parameter.stack[1] if parameter.stack is not None and stacks else None
        by_fsdp2 = style == "pt" and expert is None
        for size, logical in zip(parameter.shape, parameter.axes, strict=True):
            axis = used.get(logical)
            if axis not in given or (by_fsdp2 and axis == "fsdp") or any(axis in axes for axes in split):
                split.append(())
                continue
            split.append(() if axis == "experts" else (axis,))  # a router is whole
            heads = style == "pt" and logical in ("heads", "kv_heads")  # attention is computed on whole heads
            whole = size // config.head_dim if heads else size
            if whole % devices[axis]:
                problems[f"{logical} is {whole}, which {axis} = {devices[axis]} does not divide"] = None
        if by_fsdp2 and "fsdp" in given:
            split[0] = (*split[0], "fsdp")
        owner = None if expert is None else expert * devices["experts"] // experts
        placements[parameter.name] = Placement(parameter, tuple(split), devices, owner)
    raise_problems(f"{type(config).__name__} does not fit the mesh {dict(given)}", problems, InputError)
    return placements


def checked_mesh(mesh: Mapping[str, int]) -> dict[str, int]:
    """The axes of a mesh that have more than one device.

    Raises:
        InputError: a name is none of `MESH_AXES`, or a size is no positive integer.
    """
    for axis, size in mesh.items():
        if axis not in MESH_AXES:
            raise InputError(f"the mesh has an axis {axis!r}, expected {', '.join(MESH_AXES)}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{axis} is {size!r}, expected a number of devices")
    return {axis: size for axis, size in mesh.items() if size > 1}
