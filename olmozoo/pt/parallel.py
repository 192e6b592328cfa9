"""A model over several devices: PyTorch's FSDP2 and DTensor, from the parameter table.

    mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("fsdp", "tensor"))
    model = Olmo2ForCausalLM.from_pretrained(folder, device_mesh=mesh)

Along `tensor`, modules keep their code and their parameters become DTensors: a linear with split outputs returns the
local ones, one with split inputs sums its outputs over the devices, and everything else has whole parameters. The norms
of OLMo 2 over all heads at once stay over all heads: their parts exchange the sum of squares, and nothing is gathered.
Along `experts`, each rank has some of a layer's experts and a copy of all else. Along both, the experts of a layer are
stacked in one parameter (see `olmozoo.pt.experts`). Along `fsdp`, each block is a unit of `fully_shard`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from olmozoo.errors import InputError, MissingBackendError
from olmozoo.families.parameter import BASE_PREFIX
from olmozoo.pt.experts import SparseMLP, SplitExperts
from olmozoo.sharding import Placement as Split
from olmozoo.sharding import layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")


def parallelize(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    """Split a model over a mesh, in place.

    Args:
        model: a model of `olmozoo.pt`, with or without values (on the meta device). The same on every rank.
        mesh: with dimensions named `fsdp`, `tensor` or `experts`, `fsdp` before the others.
        **options: further arguments of `torch.distributed.fsdp.fully_shard`, such as `mp_policy`.

    Returns:
        The model.

    Raises:
        InputError: the mesh has other dimensions, or does not fit the model; every problem is named.
    """
    from torch.distributed.fsdp import fully_shard

    splits = layout(model.config, model.head, mesh_sizes(mesh), style="pt")
    names = mesh.mesh_dim_names or ()
    computed = tuple(name for name in names if name != "fsdp")  # what modules are split along
    stacks = _stack_experts(model, splits)
    if computed:
        _split_modules(model, mesh[computed], splits, stacks)
        model.tie_weights()
    if "fsdp" in names:
        on_fsdp = {model.get_parameter(path): _axis(split, "fsdp") for path, split in stacks.items()}

        def placement(parameter: nn.Parameter) -> Any:
            from torch.distributed.tensor import Shard

            dim = on_fsdp.get(parameter)
            return None if dim is None else Shard(1 + dim)

        options = {"shard_placement_fn": placement, **options}
        for block in model.base_model.stack.layers:
            fully_shard(block, mesh=mesh["fsdp"], **options)
        fully_shard(model, mesh=mesh["fsdp"], **options)
    return model


def mesh_sizes(mesh: DeviceMesh) -> dict[str, int]:
    """The number of devices by dimension of the mesh.

    Raises:
        InputError: a dimension has no name.
    """
    if mesh.mesh_dim_names is None:
        raise InputError("the mesh has no mesh_dim_names, expected 'fsdp', 'tensor' or 'experts'")
    return {name: mesh.size(dim) for dim, name in enumerate(mesh.mesh_dim_names)}


def _stack_experts(model: nn.Module, splits: dict[str, Split]) -> dict[str, Split]:
    """Make the experts of a layer `SplitExperts` where the mesh splits them; return the splits of one by path."""
    found = {}
    for split in splits.values():
        if split.owner is not None:
            path = ".".join(model._variable_path(split.parameter))
            found[path] = split
    for module in model.modules():
        if found and isinstance(module, SparseMLP):
            module.experts = SplitExperts(module.experts)
    return found


def _split_modules(model: nn.Module, mesh: DeviceMesh, splits: dict[str, Split], stacks: dict[str, Split]) -> None:
    """Make the parameters of every module DTensors on the mesh without `fsdp`, and convert inputs and outputs."""
    from torch.distributed.tensor import distribute_tensor

    modules: dict[str, dict[str, Split]] = {}
    for name, split in splits.items():
        if split.owner is None:
            path, leaf = (name if model.head else name.removeprefix(BASE_PREFIX)).rsplit(".", 1)
            modules.setdefault(path, {})[leaf] = split
    normed = {path.rsplit(".", 1)[0]: set[str]() for path in modules}
    for path, leaves in modules.items():  # what norms over all heads are of
        if leaves["weight"].parameter.kind == "norm" and _axis(leaves["weight"]) is not None:
            parent, norm = path.rsplit(".", 1)
            normed[parent].add(norm.replace("norm", "proj"))
    for path, leaves in modules.items():
        parent, own = path.rsplit(".", 1) if "." in path else ("", path)
        _split_module(model.get_submodule(path), mesh, leaves, own in normed.get(parent, ()))
    for path, split in stacks.items():
        stack, old, dim = model.get_submodule(path.removesuffix(".weight")), model.get_parameter(path), _axis(split)
        placements = _on(mesh, None if dim is None else 1 + dim, 0)
        new = distribute_tensor(old.detach(), mesh, placements, src_data_rank=None)
        stack.weight = nn.Parameter(new, old.requires_grad)


def _axis(split: Split, name: str = "tensor") -> int | None:
    """The dimension of a parameter that is on an axis of the mesh."""
    return next((dim for dim, axes in enumerate(split.split) if name in axes), None)


def _on(mesh: DeviceMesh, tensor: int | None, experts: int | None = None) -> list[Any]:
    """The placements of a tensor, of which dimensions are split along `tensor` and `experts`; None for none."""
    from torch.distributed.tensor import Replicate, Shard

    dims = {"tensor": tensor, "experts": experts}
    split = (dims[name] for name in mesh.mesh_dim_names or ())
    return [Replicate() if dim is None else Shard(dim) for dim in split]


def _split_module(module: nn.Module, mesh: DeviceMesh, leaves: dict[str, Split], keeps: bool) -> None:
    """Make the parameters of one module DTensors.

    Args:
        module: the module.
        mesh: without `fsdp`.
        leaves: its parameters.
        keeps: whether its output stays a DTensor, for a norm over all of it.
    """
    from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor

    weight = leaves["weight"]
    axis, kind = _axis(weight), weight.parameter.kind
    split_input = (kind == "linear" and axis == 1) or (kind == "norm" and axis == 0)
    entry = _on(mesh, -1 if split_input else None)
    # The logits and the outputs of a module whose inputs are split are whole; a norm's are as its input.
    whole = not (axis == 0 and kind in ("linear", "norm")) or weight.parameter.axes[0] == "vocab"

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for leaf, split in leaves.items():
            old = getattr(module, leaf)
            new = distribute_tensor(old.detach(), mesh, _on(mesh, _axis(split)), src_data_rank=None)
            setattr(module, leaf, nn.Parameter(new, old.requires_grad))

    def enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        first, *others = inputs
        if kind == "embedding" and axis == 0 and module.weight.requires_grad and not module.weight._backward_hooks:
            # The gradient of a split embedding is whole otherwise.
            module.weight.register_hook(lambda gradient: gradient.redistribute(placements=_on(mesh, 0)))
        if not isinstance(first, DTensor):
            first = DTensor.from_local(first, mesh, entry, run_check=False)
        return first, *others

    def leave(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        outputs = outputs.redistribute(placements=_on(mesh, None)) if whole else outputs
        return outputs if keeps else outputs.to_local()

    distribute_module(module, mesh, partition, enter, leave)


# -- values ---------------------------------------------------------------------------------------------------------


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; its class is imported only where there are some."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Any, values: np.ndarray, convert: Callable[[np.ndarray], Tensor]) -> Tensor:
    """A DTensor like `tensor`, of whose values this rank takes its part."""
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = _part(tensor)
    part = values[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local = convert(part).to(mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def expert_of(stack: Any, expert: int) -> Tensor:
    """One of the experts of a split tensor (experts, out, in), as a DTensor whose values are the sum of the ranks'.

    A rank that has not this expert has -0.0, which changes no value that it is added to, 0.0 and -0.0 included.
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    stack = stack.detach()
    part = local(stack, expert)
    if part.ndim == stack.ndim:
        part = part.new_full(part.shape[1:], -0.0)
    placements = [
        Partial() if placement.is_shard(0) else Shard(placement.dim - 1) if placement.is_shard() else placement
        for placement in stack.placements
    ]
    return DTensor.from_local(part.contiguous(), stack.device_mesh, placements, run_check=False)


def write_expert(stack: Any, expert: int, values: np.ndarray, convert: Callable[[np.ndarray], Tensor]) -> None:
    """Write the values of one expert into a split tensor (experts, out, in): this rank's part, if it has one."""
    part = local(stack.detach(), expert)
    if part.ndim < stack.ndim:
        shape, offset = _part(stack)
        slices = (slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
        part.copy_(convert(values[tuple(slices)]))


def empty_part(tensor: Any, dtype: torch.dtype) -> Tensor:
    """A DTensor like `tensor` in another dtype, without values."""
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    local = torch.empty(_part(tensor)[0], dtype=dtype, device=mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _own_index(stack: Any, index: int) -> int | None:
    """The index of an expert among those of this rank."""
    shape, offset = _part(stack)
    return index - offset[0] if 0 <= index - offset[0] < shape[0] else None


def _part(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a DTensor, and where it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def root_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh over which a model is split, also by `fully_shard` alone; None where it is not."""
    meshes = [p.device_mesh for p in model.parameters() if is_split(p)]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 has gathered, so that each rank has its parts alone."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def sum_gradients(model: nn.Module) -> None:
    """Let FSDP2 add up the gradients of ranks, rather than average them."""
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor, expert: int | None = None) -> Tensor:
    """This rank's part of a tensor, which shares its memory; a tensor that is not split, as it is.

    Args:
        tensor: the tensor.
        expert: the index of one expert in a split tensor (experts, out, in); the part is empty where others have it.
    """
    if not is_split(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    if expert is None:
        return part
    own = _own_index(tensor, expert)
    return part[:0] if own is None else part[own]


def copies(tensor: Tensor) -> int:
    """The number of ranks that have the same part of a tensor."""
    if not is_split(tensor):
        return 1
    mesh, placements = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate())


def is_first(mesh: DeviceMesh) -> bool:
    """Whether this is the first rank of the mesh."""
    return not any(mesh.get_coordinate() or ())


def highest(value: int, mesh: DeviceMesh) -> int:
    """The highest value of all ranks of the mesh; every rank calls this."""
    import torch.distributed as dist

    found = torch.tensor(value, device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return int(found)


class Pace:
    """Keeps ranks that share weights in step: each call of the model needs all of them.

    Args:
        mesh: over which the model is split; None where it is not.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh

    def step(self) -> None:
        """Say that this rank calls the model now."""
        if self.mesh is not None:
            highest(1, self.mesh)

    def finish(self, call: Callable[[], Any]) -> None:
        """Take part in the calls of the ranks that are not finished yet, by calls of `call`."""
        while self.mesh is not None and highest(0, self.mesh):
            call()


def token_mean(loss: Tensor, labels: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """A loss whose gradient, averaged over ranks as FSDP2 and DDP do, is that of the mean over all ranks' tokens.

    The mean of the ranks' own means is another where ranks have unequal numbers of labels.

    Args:
        loss: the mean over the labels of this rank, as a language model returns it.
        labels: (batch, seq), -100 where there is nothing to learn; the first of each row is no target.
        mesh: with a dimension `fsdp` over which rows are split; default all ranks.

    Returns:
        loss * n * ranks / total, where n of the total number of labels are on this rank. Its mean over ranks is the
        mean loss.
    """
    import torch.distributed as dist

    if mesh is not None and "fsdp" not in mesh_sizes(mesh):
        return loss  # every rank has all rows
    group = None if mesh is None else mesh.get_group("fsdp")
    own = (labels[:, 1:] != -100).sum().to(loss.device)
    total = own.clone()
    dist.all_reduce(total, group=group)
    return loss * (own * dist.get_world_size(group) / total.clamp(min=1)).to(loss.dtype)


# -- one process, several devices -----------------------------------------------------------------------------------


def dispatch(model: Any, device_map: Any, max_memory: Any = None, offload_folder: Any = None) -> Any:
    """Put the blocks of a model on several devices by accelerate; they run one after the other.

    Args:
        model: a model on the CPU.
        device_map: "auto" or another word of accelerate, or a device by name of a module.
        max_memory: bytes by device, as accelerate takes them: `{0: "20GB", "cpu": "60GB"}`.
        offload_folder: where what fits on no device goes.

    Returns:
        The model, with `hf_device_map`.

    Raises:
        MissingBackendError: accelerate is not installed.
    """
    try:
        import accelerate
    except ImportError as error:
        raise MissingBackendError(
            "device_map over several devices needs accelerate: pip install 'olmozoo[accelerate]'"
        ) from error
    blocks = model._no_split_modules
    if isinstance(device_map, str):
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = accelerate.utils.get_balanced_memory(
                model, max_memory, no_split_module_classes=blocks, low_zero=low
            )
        device_map = accelerate.infer_auto_device_map(model, max_memory, no_split_module_classes=blocks)
    if "disk" in device_map.values() and offload_folder is None:
        raise InputError("the model does not fit on the devices and in memory: pass offload_folder, or more max_memory")
    return accelerate.dispatch_model(model, device_map, offload_dir=offload_folder, force_hooks=True)
