"""Canonical names of the tensors in Keras, Flax and Transformers 4 files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError
from olmozoo.families.parameter import Kind, Parameter
from olmozoo.typing import Array

FLAX_LEAVES: dict[Kind, str] = {"linear": "kernel", "embedding": "embedding", "norm": "scale", "bias": "bias"}
# What frameworks call the leaves; only a kernel has its two dimensions the other way round.
LEAVES = {"kernel": "weight", "embedding": "weight", "embeddings": "weight", "scale": "weight", "gamma": "weight"}
LEAVES |= {"weight": "weight", "beta": "bias", "bias": "bias"}
# Where the model's own names begin in those of Transformers 4, after the names of several kinds of scopes.
DECODER_PART = re.compile(
    r"(?:^|[./])((?:embed_tokens|embed_positions|project_in|project_out|final_layer_norm|layers[._/]\d+)[./].+)$"
)
FOREIGN_NAME = re.compile(r"/|:0$|\.(kernel|embedding|scale)$")  # as TensorFlow and Flax name tensors, and nobody else
# The name of a tensor of all experts of a layer, in a file of Keras or Flax, or of Transformers 5.
STACK = re.compile(r"(\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?$")

Named = tuple[str, bool]  # a canonical name, and whether the values are transposed


def flax_path(parameter: Parameter, name: str) -> str:
    """The path of a parameter in a Flax tree, joined by slashes; `name` is its canonical name."""
    if parameter.stack is not None:  # as all experts' of a layer, which have one leaf
        name = name.replace(f".experts.{parameter.stack[1]}.", ".experts.")
    return "/".join([*name.split(".")[:-1], FLAX_LEAVES[parameter.kind]])


def flax_name(path: str) -> Named:
    """The canonical name of a leaf of a Flax tree, its path joined by slashes or dots.

    Raises:
        CheckpointError: the leaf is none of a weight.
    """
    module, _, leaf = path.replace("/", ".").removeprefix("params.").rpartition(".")
    return _named(module, leaf)


def transformers_name(path: str) -> Named:
    """The canonical name of what a TensorFlow class of Transformers 4 called so.

    Raises:
        CheckpointError: no weight is called so.
    """
    match = DECODER_PART.search(path.removesuffix(":0"))
    if not match:
        raise CheckpointError(f"{path} is not the name of a weight of OPT")
    module, _, leaf = re.sub(r"^layers_", "layers.", match[1]).replace("/", ".").rpartition(".")
    return _named(f"model.decoder.{module}", leaf)


def _named(module: str, leaf: str) -> Named:
    if leaf not in LEAVES:
        raise CheckpointError(f"{module}: {leaf!r} is none of {', '.join(sorted(LEAVES))}")
    return f"{module}.{LEAVES[leaf]}", leaf == "kernel"


def canonical_name(name: str) -> str:
    """The canonical name of what Transformers 4 called so, in an index of shards or in safetensors.

    Raises:
        CheckpointError: no weight is called so.
    """
    return _old_name(name)[0] if FOREIGN_NAME.search(name) else name


def _old_name(name: str) -> Named:
    return transformers_name(name) if name.endswith(":0") else flax_name(name)


def canonical_tensors(path: Path, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by canonical name, also where a class of Transformers 4 wrote it.

    Raises:
        CheckpointError: a name is none of a weight.
    """
    if not any(FOREIGN_NAME.search(name) for name in tensors):
        return tensors
    return gather(path, (canonical(tensor, _old_name(name)) for name, tensor in tensors.items()))


def canonical(tensor: LazyTensor, named: Named) -> LazyTensor:
    """A tensor under its canonical name, a linear weight as a transposed view: (out, in), of experts (e, out, in)."""
    name, is_transposed = named
    return (tensor.transposed() if is_transposed and len(tensor.shape) > 1 else tensor).renamed(name)


def separate_experts(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by name, one for each expert also where all experts of a layer are stacked in one tensor.

    So they are in files of Keras and Flax, and where Transformers 5 saved with `save_original_format=False`, under its
    names in memory: `gate_up_proj` (e, 2 * inner, hidden), first the rows of gate and then those of up.
    """
    separate: dict[str, LazyTensor] = {}
    last: dict[str, Array] = {}  # the stack that was read last; its matrices are read one after another

    def read(name: str, expert: int, rows: slice) -> Array:
        stack = last.get(name)
        if stack is None:
            stack = tensors[name].read()
            last.clear()
            last[name] = stack
        return stack[expert, rows]

    for name, tensor in tensors.items():
        match = STACK.search(name)
        if match is None or len(tensor.shape) != 3:
            separate[name] = tensor
            continue
        count, rows, columns = tensor.shape
        parts = {match[2]: (0, rows)}
        if match[2] == "gate_up_proj" and rows % 2 == 0:
            parts = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
        for part, (start, stop) in parts.items():
            for expert in range(count):
                new = f"{name[: match.end(1)]}.{expert}.{part}.weight"
                values = partial(read, name, expert, slice(start, stop))
                separate[new] = LazyTensor(new, tensor.dtype, (stop - start, columns), values, tensor.file)
    return separate


def gather(path: Path, tensors: Iterable[LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by name.

    Raises:
        CheckpointError: two have one name.
    """
    found: dict[str, LazyTensor] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise CheckpointError(f"{path} has {tensor.name} twice")
        found[tensor.name] = tensor
    return found


def guarded(tensor: LazyTensor) -> LazyTensor:
    """A tensor whose reading raises CheckpointErrors only: libraries check values as late as when they read them."""

    def read() -> Array:
        try:
            return tensor.read()
        except Exception as error:
            raise CheckpointError(f"{tensor.file}: {tensor.name} cannot be read: {error}") from error

    return dataclasses.replace(tensor, read=read)


def missing_library(doing: str, library: str, extra: str) -> CheckpointError:
    """The error that names a library which is not installed; `doing` is such as "reading FILE"."""
    return CheckpointError(f"{doing} needs {library}: pip install {library}, or 'olmozoo[{extra}]'")
