"""What a run is besides its weights, in files that no framework owns.

A step's folder `stepN` is an ordinary model folder, with `training/state.json` and `training/optimizer.safetensors`:
the optimizer's running means under canonical names. Any wing continues from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.checkpoint.files import remove as remove_file
from olmozoo.checkpoint.files import write_json
from olmozoo.checkpoint.formats import safetensors
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, raise_problems
from olmozoo.families.config import is_number, read_json
from olmozoo.families.parameter import Parameter
from olmozoo.typing import Array
from olmozoo.world import World

TRAINING = "training"
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
CLIP_MEANS = "grad_norm_exp_avg"
STEP = re.compile(r"step(\d+)")
EVERYTHING = re.compile(r".*", re.DOTALL)
MOST = 1 << 62  # of a count


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps of the run so far.
        epoch: the current one, from 0.
        examples: instances of this epoch that were seen.
        tokens: tokens of the run that were seen.
        updates: the optimizer's own count of steps, for its bias correction.
        bolted_on: the step or tokens where a second warmup began; None without one.
        bound: the bound of the last clipping, where the next one is at it.
        least_loss: of a step so far.
        targets: tokens of the run that were learned.
    """

    step: int = 0
    epoch: int = 0
    examples: int = 0
    tokens: int = 0
    updates: int = 0
    bolted_on: int | None = None
    bound: float | None = None
    least_loss: float | None = None
    targets: int = 0


@dataclass
class Saved:
    """The state that a step's folder has.

    Attributes:
        progress: where the run was.
        moments: the optimizer's running means by name, such as `exp_avg.model.norm.weight`.
        clip_means: the running means of gradient norms, for `max_grad_norm_ratio`.
        settings: `betas`, `eps`, `weight_decay` (by parameter) and `max_grad_norm` of the optimizer.
        run: what must not differ where a run is resumed, such as the length of instances.
    """

    progress: Progress
    moments: dict[str, LazyTensor] = field(default_factory=dict)
    clip_means: Array | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def steps(folder: Path) -> dict[int, Path]:
    """The steps that are saved in a run's folder, in order."""
    found = {int(match[1]): path for path in folder.glob("step*") if (match := STEP.fullmatch(path.name))}
    return {number: found[number] for number in sorted(found) if (found[number] / TRAINING / STATE).is_file()}


def latest(folder: Path) -> Path | None:
    """The newest step in a run's folder."""
    return next(reversed(steps(folder).values()), None)


@contextlib.contextmanager
def shared_folder(folder: Path, world: World) -> Iterator[Path]:
    """A folder that the first process writes, renamed into place when it is whole.

    Every process enters it, since the first one gathers parts from all. Yields where that one writes.

    Raises:
        CheckpointError: it cannot be written, in the first process; a TrainingError in the others.
    """
    with contextlib.ExitStack() as stack:
        staging = world.by_first(lambda: stack.enter_context(atomic_folder(folder, EVERYTHING)))
        yield folder if staging is None else staging
        world.by_first(stack.pop_all().close)


def save(
    folder: Path,
    write_model: Callable[[Path], None],
    progress: Progress,
    moments: Iterable[tuple[str, Array]],
    clip_means: Array | None,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    world: World,
) -> None:
    """Write a step's folder, renamed into place when it is whole. Every process calls this.

    Args:
        folder: the folder.
        write_model: writes the model and its tokenizer into a folder.
        progress: see `Saved`, as the others.
        moments: running means.
        clip_means: running means of gradient norms.
        settings: of the optimizer.
        run: see `Saved`.
        world: the processes; the first one writes.

    Raises:
        CheckpointError: it cannot be written; the step before is whole.
    """
    with shared_folder(folder, world) as staging:
        write_model(staging)
        arrays = world.kept(moments) | ({} if clip_means is None else {CLIP_MEANS: clip_means})

        def write() -> None:
            inner = staging / TRAINING
            inner.mkdir()
            tensors = [
                LazyTensor(name, array.dtype, array.shape, lambda array=array: array)  # type: ignore[misc]
                for name, array in arrays.items()
            ]
            safetensors.write(inner / OPTIMIZER, tensors)
            state = {"format": 1, **dataclasses.asdict(progress), "optimizer": dict(settings), "run": dict(run)}
            write_json(inner / STATE, state)

        world.by_first(write)


def load(folder: Path) -> Saved:
    """The state in a step's folder.

    Raises:
        CheckpointError: it is broken or of a newer format.
    """
    file = folder / TRAINING / STATE
    state = read_json(file)
    if state.get("format") != 1:
        raise CheckpointError(f"{file} has the format {state.get('format')!r}, expected 1")
    for name in ("optimizer", "run"):
        if not isinstance(state.get(name), dict):
            raise CheckpointError(f"{file}: {name} is {reprlib.repr(state.get(name))}, expected an object")
    progress = Progress(**{f.name: state[f.name] for f in dataclasses.fields(Progress) if f.name in state})
    check(progress, state["optimizer"], file)
    tensors = dict(safetensors.read_tensors(folder / TRAINING / OPTIMIZER))
    means = tensors.pop(CLIP_MEANS, None)
    return Saved(progress, tensors, None if means is None else means.read(), state["optimizer"], state["run"])


def check(progress: Progress, settings: Mapping[str, Any], file: Path) -> None:
    """Check the numbers of a state; see `Progress` and `Saved`.

    Raises:
        CheckpointError: some cannot be; every problem is named.
    """
    problems = []

    def expect(name: str, value: Any, fits: bool, expected: str) -> None:
        if not fits:
            problems.append(f"{name} is {reprlib.repr(value)}, expected {expected}")

    for name in ("step", "epoch", "examples", "tokens", "updates", "bolted_on", "targets"):
        value = getattr(progress, name)
        fits = (type(value) is int and 0 <= value < MOST) or (value is None and name == "bolted_on")
        expect(name, value, fits, "an integer from 0 on")
    bound, loss = progress.bound, progress.least_loss
    expect("bound", bound, bound in (None, math.inf) or (is_number(bound) and bound > 0), "a number above 0")
    expect("least_loss", loss, loss is None or is_number(loss), "a number")
    betas, eps, decays = settings.get("betas"), settings.get("eps"), settings.get("weight_decay", {})
    pair = isinstance(betas, list) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    expect("betas", betas, "betas" not in settings or pair, "two numbers from 0 to less than 1")
    expect("eps", eps, eps is None or (is_number(eps) and eps >= 0), "a number from 0 on")
    numbers = isinstance(decays, dict) and all(is_number(decay) and decay >= 0 for decay in decays.values())
    expect("weight_decay", decays, numbers, "numbers from 0 on by the names of parameters")
    raise_problems(f"{file} has numbers that cannot be", problems)


def check_moments(saved: Saved, trained: Sequence[Parameter], moments: Sequence[str], clips: bool) -> None:
    """Check that a state has the running means of the parameters that are trained.

    Args:
        saved: the state.
        trained: the parameters.
        moments: the names of the optimizer's running means.
        clips: whether the running means of gradient norms are used.

    Raises:
        CheckpointError: it has not; every problem is named.
    """
    expected = {f"{moment}.{parameter.name}": parameter.shape for moment in moments for parameter in trained}
    problems = []
    for name, shape in expected.items() if saved.moments else ():
        if name not in saved.moments:
            problems.append(f"{name} is not there")
        elif saved.moments[name].shape != shape:
            problems.append(f"{name} is {list(saved.moments[name].shape)}, expected {list(shape)}")
    means = saved.clip_means
    if clips and means is not None and (means.shape != (len(trained),) or not np.isfinite(means).all()):
        problems.append(f"{CLIP_MEANS} is {list(means.shape)}, expected {len(trained)} finite numbers")
    raise_problems("the state of the optimizer does not fit: set reset_optimizer_state to true", problems)


def remove(folder: Path) -> None:
    """Remove a step's folder, which is renamed first: a part of it is never taken for a step."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_abandoned(folder: Path) -> None:
    """Remove what a killed run left of steps that it was writing or removing."""
    for pattern in (".*step*.saving-*", ".*.removed", ".*step*.lock"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` steps; -1 keeps all."""
    found = list(steps(folder).values())
    for path in found[: max(0, len(found) - count)] if count >= 0 else []:
        remove(path)


def trim_lines(file: Path, last: int, step_of: Callable[[str], int]) -> None:
    """Remove the lines of steps after `last`, which are done again, and those that are not finished or damaged.

    Args:
        file: the file. A link is removed, so that what it leads to stays as it is.
        last: the last step that stays.
        step_of: returns the step of a line, or raises a ValueError.

    Raises:
        CheckpointError: it is a folder, a pipe or a device.
    """
    if file.is_symlink():  # nothing is written where it leads to
        file.unlink()
    if not file.exists():
        return
    if not file.is_file():
        raise CheckpointError(f"{file} is not a regular file: remove it")
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and step_of(line) <= last:
                kept.append(line)
        except (ValueError, RecursionError):
            continue
    temporary = file.with_name(f".{file.name}.new")
    remove_file(temporary)
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(file)


def step_of_json(line: str) -> int:
    """The step of a line of metrics.jsonl.

    Raises:
        ValueError: the line is not numbers by name, or has not those of a step.
    """
    data = json.loads(line)
    if not isinstance(data, dict) or not all(is_number(x) or (type(x) is float) for x in data.values()):
        raise ValueError("it is not numbers by name")
    if type(data.get("step")) is not int or ("loss" in data and not {"loss_per_target", "lr"} <= data.keys()):
        raise ValueError("it has not the numbers of a step")
    return int(data["step"])


def as_arrays(tensors: Mapping[str, LazyTensor]) -> dict[str, Array]:
    """The values of running means.

    Raises:
        CheckpointError: some are not finite.
    """
    arrays = {name: np.asarray(tensor.read()) for name, tensor in tensors.items()}
    raise_problems(
        "the state of the optimizer has values that are not finite: set reset_optimizer_state to true",
        (name for name, array in arrays.items() if not np.isfinite(array).all()),
    )
    return arrays
