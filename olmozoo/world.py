"""The processes and devices of a training run.

Every process runs the same loop on the same batches, and computes on its part of them. The first one writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from olmozoo.errors import InputError, TrainingError
from olmozoo.sharding import MESH_AXES, checked_mesh
from olmozoo.typing import Array

TEXT = 128  # bytes of a reason that processes tell each other


@dataclass
class World:
    """The processes and devices of a training run; by default one of each.

    Attributes:
        device: what this process computes on, in the framework's own form; None where the framework chooses.
        sizes: the number of devices by axis of the mesh; axes of one device are left out.
        mesh: the devices in the framework's own form; None where there is one.
        rank: the number of this process.
        size: how many there are.
        gather: returns the arrays of all processes, one after the other, as the first dimension; every process calls it
            with an array of the same shape.
    """

    device: Any = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    mesh: Any = None
    rank: int = 0
    size: int = 1
    gather: Callable[[Array], Array] = lambda array: array[None]

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def rows(self) -> int:
        """The number of parts that the rows of a batch are split into."""
        return self.sizes.get("fsdp", 1)

    def by_first(self, call: Callable[[], Any]) -> Any:
        """Let the first process call a function, for which all others wait.

        Returns:
            What the function returns, in the first process; in the others True or False, where it is one of these, else
            None.

        Raises:
            TrainingError: the function raised an error, which the first process raises itself.
        """
        if self.size == 1:
            return call()
        result, failure = None, None
        if self.is_first:
            try:
                result = call()
            except Exception as error:
                failure = error
        codes = {None: 0, True: 1, False: 2}
        own = 3 if failure is not None else codes.get(result, 0) if isinstance(result, bool) else 0
        code = int(self.gather(np.array([own]))[0, 0])
        if failure is not None:
            raise failure
        if code == 3:
            raise TrainingError("the first process failed; its own error says why")
        return result if self.is_first else {1: True, 2: False}.get(code)

    def reason(self, text: str | None) -> str | None:
        """The first reason to stop that a process has, in every process; None where there is none."""
        if self.size == 1:
            return text
        own = np.frombuffer((text or "").encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8).astype(np.int32)
        found = (bytes(row.astype(np.uint8)).rstrip(b"\0").decode(errors="ignore") for row in self.gather(own))
        return next((each for each in found if each), None)

    def kept(self, items: Iterable[tuple[str, Array]]) -> dict[str, Array]:
        """Arrays that every process takes part in gathering, one by one, and the first one keeps."""
        return {name: array for name, array in items if self.is_first}


def mesh_of_run(mesh: Mapping[str, int] | None, devices: int, found: str, *, whole: bool) -> dict[str, int]:
    """The number of devices by axis of the mesh; axes of one device are left out.

    Args:
        mesh: of the config. Without `fsdp`, that is all devices that the other axes leave.
        devices: how many there are.
        found: the same in words, for the error.
        whole: whether the mesh is all of them, by default too. Else it may be a part, and is by default one.

    Raises:
        InputError: there are not as many devices as the mesh has.
    """
    if mesh is None and not whole:
        return {}
    sizes = {**dict.fromkeys(MESH_AXES, 1), **(mesh or {})}
    if "fsdp" not in (mesh or {}):
        sizes["fsdp"] = max(1, devices // math.prod(sizes.values()))
    count = math.prod(sizes.values())
    if count > devices or (whole and count < devices):
        text = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
        raise InputError(f"mesh is {text}: {count} devices, and {found}")
    return checked_mesh(sizes)
