"""Two checkpoints compared by their files alone: configs and tensors, with no framework and little memory.

Both sides go by canonical names, whatever prefix their files have. A tied head that one side has written out and the
other has not is compared with the embedding that it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.reader import Checkpoint, OpenCheckpoint
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import BASE_PREFIX, HEAD_MODULES
from olmozoo.typing import Array

PART = 1 << 20  # elements compared at a time; in float64, and with what is worked out on the way, some 60 MB
PROVENANCE = ("transformers_version", "_name_or_path")  # who wrote a config.json: of no meaning to the model
ABSENT = "(absent)"


@dataclass(frozen=True)
class ConfigDifference:
    """A field of config.json with two values; `ABSENT` stands for none."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class TensorDifference:
    """One tensor on both sides.

    Attributes:
        name: the canonical name.
        a, b: dtype and shape on either side, such as "float32 [320, 40]"; None where it is not there.
        elements: their number; 0 where the shapes differ or one side has no such tensor, and nothing is compared.
        differing: elements whose values differ; two NaN count as equal.
        largest: the largest absolute difference between finite elements.
        relative: that over the largest finite absolute value on either side, so between 0 and 2.
        nan_a, nan_b, inf_a, inf_b: how many elements are NaN or infinite on either side.
    """

    name: str
    a: str | None
    b: str | None
    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0

    @property
    def same(self) -> bool:
        """Whether dtype, shape and every value are the same."""
        return self.a == self.b and not self.differing


@dataclass(frozen=True)
class Diff:
    """What `diff` found.

    Attributes:
        a, b: the two folders or repositories, as they were given.
        config: the fields that differ, by name.
        tensors: every tensor of either side: what cannot be compared first, then the largest relative difference first.
    """

    a: str
    b: str
    config: list[ConfigDifference] = field(default_factory=list)
    tensors: list[TensorDifference] = field(default_factory=list)

    @property
    def differing(self) -> list[TensorDifference]:
        """The tensors that are not the same, in the order of `tensors`."""
        return [tensor for tensor in self.tensors if not tensor.same]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.config and not self.differing

    def to_dict(self, every: bool = True) -> dict[str, Any]:
        """All of it as JSON can say it.

        Args:
            every: list tensors that are the same too.
        """
        tensors = self.tensors if every else self.differing
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "compared": len(self.tensors),
            "config": [asdict(entry) for entry in self.config],
            "tensors": [{**asdict(tensor), "same": tensor.same} for tensor in tensors],
        }


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    revision_a: str | None = None,
    revision_b: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **hub: Any,
) -> Diff:
    """Compare the configs and the tensors of two checkpoints, a part of a tensor at a time.

    Args:
        a, b: folders, or repositories on the hub.
        revision_a, revision_b: branch, tag or commit of either repository.
        progress: called with a status text.
        **hub: `subfolder`, `token`, `cache_dir`, `local_files_only`, for both.

    Raises:
        HubError: a repository cannot be downloaded and is not in the cache.
        ConfigError: a config.json is absent, broken or of no known family.
        CheckpointError: a checkpoint is broken, or has a tensor under two names.
    """
    given = ((a, revision_a), (b, revision_b))
    sides = [open_merged(locate(path, need="weights", revision=revision, **hub)) for path, revision in given]
    found = diff_opened(sides[0], sides[1], progress)
    return replace(found, a=os.fspath(a), b=os.fspath(b))


def diff_opened(a: OpenCheckpoint, b: OpenCheckpoint, progress: Callable[[str], None]) -> Diff:
    """Compare two checkpoints that are open; see `diff`."""
    configs = a.config, b.config
    sides = [_canonical(side.checkpoint) for side in (a, b)]
    for side, other, config in zip(sides, reversed(sides), configs, strict=True):
        head = f"{HEAD_MODULES['causal_lm']}.weight"
        if head in other and head not in side and config.tie_word_embeddings and config.embedding.name in side:
            side[head] = side[config.embedding.name]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        progress(f"comparing {name}")
        rows.append(_compare(name, sides[0].get(name), sides[1].get(name)))
    rows.sort(key=lambda row: (row.elements > 0, -row.relative, -row.differing, row.name))
    return Diff(str(a.checkpoint.folder), str(b.checkpoint.folder), list(_config_differences(*configs)), rows)


def _canonical(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by canonical names."""
    found: dict[str, LazyTensor] = {}
    for name, info in checkpoint.tensors.items():
        whole = name.startswith(BASE_PREFIX) or name.partition(".")[0] in HEAD_MODULES.values()
        canonical = name if whole else BASE_PREFIX + name
        if canonical in found:
            raise CheckpointError(
                f"{checkpoint.folder} has {canonical} twice: in {Path(info.file).name} without {BASE_PREFIX!r} too"
            )
        found[canonical] = info
    return found


def _config_differences(a: ModelConfig, b: ModelConfig) -> Iterator[ConfigDifference]:
    fields_a, fields_b = _fields(a), _fields(b)
    for name in sorted(fields_a.keys() | fields_b.keys()):
        value_a, value_b = fields_a.get(name, ABSENT), fields_b.get(name, ABSENT)
        if value_a != value_b:
            yield ConfigDifference(name, value_a, value_b)


def _fields(config: ModelConfig) -> dict[str, Any]:
    """What a config means: every field with its default, the older name of `dtype` as the newer one."""
    fields = {name: value for name, value in config.to_dict().items() if name not in PROVENANCE}
    if "torch_dtype" in fields:
        fields["dtype"] = fields.get("dtype", fields.pop("torch_dtype"))
    return fields


def _describe(info: LazyTensor | None) -> str | None:
    return None if info is None else f"{info.dtype.name} {list(info.shape)}"


def _compare(name: str, a: LazyTensor | None, b: LazyTensor | None) -> TensorDifference:
    described = _describe(a), _describe(b)
    if a is None or b is None or a.shape != b.shape:
        return TensorDifference(name, *described)
    differing, largest, scale = 0, 0.0, 0.0
    nan, inf = [0, 0], [0, 0]
    for parts in _parts(a.read(), b.read()):
        finite = [np.isfinite(part) for part in parts]
        for side, part in enumerate(parts):
            nan[side] += int(np.isnan(part).sum())
            inf[side] += int(np.isinf(part).sum())
            scale = max(scale, float(np.max(np.abs(part), where=finite[side], initial=0.0)))
        with np.errstate(invalid="ignore"):  # infinity less infinity, which is left out below
            apart = np.abs(parts[0] - parts[1])
        largest = max(largest, float(np.max(apart, where=finite[0] & finite[1], initial=0.0)))
        differing += int(((parts[0] != parts[1]) & ~(np.isnan(parts[0]) & np.isnan(parts[1]))).sum())
    return TensorDifference(
        name,
        *described,
        elements=math.prod(a.shape),
        differing=differing,
        largest=largest,
        relative=largest / scale if scale else 0.0,
        nan_a=nan[0],
        nan_b=nan[1],
        inf_a=inf[0],
        inf_b=inf[1],
    )


def _parts(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Two arrays of one shape in parts of about `PART` elements: some of their rows, in float64."""
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    rows = max(PART // max(math.prod(a.shape[1:]), 1), 1)
    for start in range(0, len(a), rows):
        yield a[start : start + rows].astype(np.float64), b[start : start + rows].astype(np.float64)
