"""One step of training in PyTorch: the gradients of micro-batches, and the optimizer's update."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmozoo.errors import InputError, MissingBackendError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter
from olmozoo.pt.base import from_numpy, to_numpy
from olmozoo.pt.losses import load_balancing_loss, target_losses
from olmozoo.pt.parallel import (
    copies,
    expert_of,
    is_split,
    local,
    local_part,
    parallelize,
    sum_gradients,
    write_expert,
)
from olmozoo.quantization import Quantization, is_quantizable, rounded
from olmozoo.world import World, mesh_of_run

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.data import Batch


@contextlib.contextmanager
def scope(run: TrainConfig, choose_device: Callable[[], torch.device]) -> Iterator[World]:
    """What training runs in: the processes that torchrun has started, or this one.

    Raises:
        InputError: the mesh of the run has another number of devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    found = f"torchrun has started {size} processes" if size > 1 else "there is one process: start it by torchrun"
    sizes = mesh_of_run(run.mesh, size, found, whole=True)
    device = choose_device()
    if size == 1:
        yield World(device)
        return
    if device.index is not None:
        raise InputError(f"device is '{device}', expected '{device.type}': each process takes one of its own")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    begins = not dist.is_initialized()
    if begins:
        dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        mesh = dist.init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

        def gather(array: np.ndarray) -> np.ndarray:
            own = torch.from_numpy(array).to(device)
            found = [torch.empty_like(own) for _ in range(size)]
            dist.all_gather(found, own)
            return torch.stack(found).cpu().numpy()

        yield World(device, sizes, mesh, dist.get_rank(), size, gather)
    finally:
        if begins:
            dist.destroy_process_group()


def make_model(
    cls: Any, config: ModelConfig, weights: Iterable[tuple[Parameter, np.ndarray]], run: TrainConfig, world: World
) -> Any:
    """A model of the class with these weights, in the run's precision.

    Raises:
        InputError: the mesh does not fit the model.
    """
    model, dtype = cls(config, seed=None), np.dtype("float64" if run.precision == "fp64" else "float32")
    if world.mesh is None:
        model.bind_parameters(((parameter, np.array(array, dtype)) for parameter, array in weights), world.device)
        return model
    parallelize(model, world.mesh)
    sum_gradients(model)
    model.bind_parts(weights, dtype, copy=True)
    return model


class LionW(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675) with decoupled weight decay: a step of the size of the learning rate in every value."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the parameters."""
        for group in self.param_groups:
            lr, (beta_1, beta_2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = local(self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter)))
                values, gradient = local(parameter), local(parameter.grad)
                values.mul_(1 - lr * group["weight_decay"])
                values.add_(torch.lerp(gradient, mean, beta_1).sign_(), alpha=-lr)
                mean.lerp_(gradient, 1 - beta_2)


class TrainStep:
    """The model, its gradients and its optimizer.

    Args:
        model: a causal language model, with its adapters where LoRA is trained.
        trained: the parameters that are trained; the others are frozen.
        decays: the weight decay of each.
        config: the run's.
        world: its processes. Each one computes its rows of a batch.

    Attributes:
        aux_factor: of the load-balancing loss of a mixture of experts; 0 without one.
    """

    def __init__(
        self, model: Any, trained: Sequence[Parameter], decays: Sequence[float], config: TrainConfig, world: World
    ) -> None:
        self.model, self.config, self.world = model, config, world
        self.names = [parameter.name for parameter in trained]
        # Of an expert that has one parameter with others of its layer, its index there.
        self.experts = [p.stack[1] if p.stack and self._is_stacked(p) else None for p in trained]
        self.aux_factor = getattr(model.config, "router_aux_loss_coef", 0.0)
        self.group = world.mesh.get_group("fsdp") if world.rows > 1 else None  # of those with other rows
        self.part = world.mesh.get_local_rank("fsdp") if world.rows > 1 else 0
        if config.lora is not None:
            add_adapters(model, trained, config)
        found = dict(model.named_parameters(remove_duplicate=False))
        paths = [self._path(p) for p in trained]
        self.parameters: list[nn.Parameter] = [found[path] for path in paths]
        for path, count in Counter(path for path, e in zip(paths, self.experts, strict=True) if e is not None).items():
            if count < len(found[path]):
                raise InputError(
                    f"{count} of the {len(found[path])} experts of {path} are trained, expected all or none in PyTorch "
                    "on a mesh with tensor or experts, where they are one parameter"
                )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        settings = config.optimizer
        decay_of = dict(zip(self.parameters, decays, strict=True))  # the experts of a layer have the same
        groups = [
            {"params": [p for p, d in decay_of.items() if d == decay], "weight_decay": decay}
            for decay in sorted(set(decays))
        ]
        beta_1, beta_2 = settings.betas
        self.optimizer: torch.optim.Optimizer
        if settings.name == "lionw":
            self.optimizer = LionW(groups, lr=0.0, betas=(beta_1, beta_2))
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(beta_1, beta_2), eps=settings.eps, fused=True)

    def _is_stacked(self, parameter: Parameter) -> bool:
        return self.world.mesh is not None and self.model._stack(parameter) is not None

    def _path(self, parameter: Parameter) -> str:
        """The name of a parameter in the module; PEFT calls its adapters by one more name."""
        name = parameter.name
        if parameter.stack is not None and self._is_stacked(parameter):
            return parameter.stack[0]
        for factor in ("lora_A", "lora_B"):
            name = name.replace(f".{factor}.", f".{factor}.default.")
        return name

    def _outputs(self, batch: Batch, **options: Any) -> Any:
        device = self.model.device
        mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask).to(device)
        # With scores added, a query may see all keys alike. PyTorch's fused attention has a wrong gradient there: it
        # computes the weights again from their log-sum, where the number of keys is lost.
        plain = mask is not None and mask.ndim == 4
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "amp_bf16"):
            return self.model(
                torch.from_numpy(batch.input_ids).to(device), mask, use_cache=False, output_attentions=plain, **options
            )

    def gradients(self, batch: Batch, divisor: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            batch: the micro-batch.
            divisor: of the summed loss.
            seed: of dropout.

        Returns:
            The sums of the cross-entropy and of the squared log-partition, before the division; and the load-balancing
            loss times the micro-batch's share of tokens.
        """
        self.model.train()
        torch.manual_seed(seed + self.part)
        z_factor = self.config.z_factor
        share, batch = batch.share, batch.rows_for(self.part, self.world.rows)
        targets = torch.from_numpy(batch.targets).to(self.model.device)
        output = self._outputs(batch, **({"output_router_logits": True} if self.aux_factor else {}))
        cross_entropy, z = (rows.sum() for rows in target_losses(output.logits, targets, z_factor > 0))
        aux = self._balance(output.router_logits, batch) * share if self.aux_factor else torch.zeros_like(z)
        ((cross_entropy + z_factor * z) / divisor + self.aux_factor * aux).backward()
        sums = torch.stack([each.detach().to(z.dtype) for each in (cross_entropy, z, aux)])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums[0], sums[1], sums[2]

    def _balance(self, router_logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """This process's part of the load-balancing loss of all rows, given its own."""
        counted = None if batch.counted is None else torch.from_numpy(batch.counted).to(self.model.device)
        return load_balancing_loss(router_logits, counted, self.model.config.num_experts_per_tok, self.group)

    def norms(self) -> np.ndarray:
        """The norm of each parameter's gradient."""
        if self.world.mesh is None:
            return torch.stack([parameter.grad.norm() for parameter in self.parameters]).cpu().numpy()
        grads = [(parameter.grad, expert) for parameter, expert in zip(self.parameters, self.experts, strict=True)]
        squares = torch.stack([local(*each).norm().double().square() / copies(each[0]) for each in grads])
        dist.all_reduce(squares)
        return squares.sqrt().cpu().numpy()

    def update(self, learning_rate: float, scales: np.ndarray | None) -> None:
        """Update the parameters by their gradients, each times its scale, and forget the gradients."""
        if scales is not None:
            for parameter, expert, scale in zip(self.parameters, self.experts, scales.tolist(), strict=True):
                local(parameter.grad, expert).mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> np.ndarray:
        """The summed cross-entropy of each row, (batch,)."""
        self.model.eval()  # `gradients` sets it back
        part = batch.rows_for(self.part, self.world.rows)
        targets = torch.from_numpy(part.targets).to(self.model.device)
        losses, _ = target_losses(self._outputs(part).logits, targets, False)
        if self.group is not None:
            parts = [torch.empty_like(losses) for _ in range(self.world.rows)]
            dist.all_gather(parts, losses, group=self.group)
            losses = torch.cat(parts)[: len(batch.indices)]
        return losses.cpu().numpy()

    @contextlib.contextmanager
    def rounded(self, quantization: Quantization) -> Iterator[None]:
        """Round the weights that quantization makes integers to what these keep, until the block ends.

        Adapters are merged into them before.
        """
        lora, found = self.config.lora, dict(self.model.named_parameters())
        factors = dict(zip(self.names, self.parameters, strict=True))
        kept: list[tuple[nn.Parameter, Tensor]] = []

        def change(parameter: nn.Parameter, values: np.ndarray) -> None:
            kept.append((parameter, parameter.data))
            parameter.data = from_numpy(values).to(parameter.device)

        try:
            for entry in filter(is_quantizable, self.model._parameter_table()):
                module = entry.name.removesuffix(".weight")
                path = f"{module}.base_layer.weight"  # PEFT's name for what it adapts
                weight = found[path if path in found else entry.name]
                if f"{module}.lora_A.weight" not in factors:
                    change(weight, rounded(to_numpy(weight), quantization))
                    continue
                a, b = (factors[f"{module}.{name}.weight"] for name in ("lora_A", "lora_B"))
                pair = to_numpy(a), to_numpy(b)
                change(weight, rounded(to_numpy(weight), quantization, pair, lora.alpha / lora.rank))
                change(b, np.zeros_like(pair[1]))
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    # -- state ----------------------------------------------------------------------------------------------------

    def sync(self) -> Any:
        """The model with the weights as they are now, in evaluation mode."""
        return self.model.eval()

    def values(self) -> Iterator[tuple[str, np.ndarray]]:
        """The trained parameters by name, each gathered by all processes."""
        for name, parameter, expert in zip(self.names, self.parameters, self.experts, strict=True):
            yield name, to_numpy(parameter if expert is None else expert_of(parameter, expert))

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """The optimizer's running means, by names such as `exp_avg.model.norm.weight`; none before the first step."""
        for moment in self.config.optimizer.moments:
            for name, parameter, expert in zip(self.names, self.parameters, self.experts, strict=True):
                if self.optimizer.state[parameter]:
                    mean = self.optimizer.state[parameter][moment]
                    yield f"{moment}.{name}", to_numpy(mean if expert is None else expert_of(mean, expert))

    def restore(self, values: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], count: int) -> None:
        """Set trained parameters and the optimizer's running means, after `count` of its updates."""
        for name, parameter, expert in zip(self.names, self.parameters, self.experts, strict=True):
            if name in values:
                parameter.data.copy_(from_numpy(values[name]))
            if not moments:
                continue
            state = self.optimizer.state[parameter]
            state["step"] = torch.tensor(float(count), device=parameter.device)
            for moment in self.config.optimizer.moments:
                mean = moments[f"{moment}.{name}"]
                if expert is None:
                    state[moment] = _like(parameter, mean)
                else:
                    state.setdefault(moment, torch.zeros_like(parameter.detach()))
                    write_expert(state[moment], expert, mean, from_numpy)


def _like(parameter: Tensor, values: np.ndarray) -> Tensor:
    """A copy of values in the dtype, on the device and split as a parameter."""
    if not is_split(parameter):
        return from_numpy(np.array(values)).to(parameter.device, parameter.dtype)
    return local_part(parameter, values, lambda part: from_numpy(np.array(part)).to(parameter.dtype))


def add_adapters(model: Any, trained: Sequence[Parameter], config: TrainConfig) -> None:
    """Add PEFT's adapters to the model, with the initial values of `trained`."""
    try:
        import peft
    except ImportError as error:
        raise MissingBackendError("LoRA in PyTorch needs the peft package: pip install peft") from error
    lora = config.lora
    assert lora is not None
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
    )
    # Into the blocks, which have no config: in a model of this type PEFT looks for the experts of Transformers 5, which
    # are one tensor.
    peft.inject_adapter_in_model(settings, model.base_model.stack.layers)
    found = dict(model.named_parameters())
    for parameter in trained:
        path = parameter.name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        adapter = found[path]
        adapter.data = from_numpy(parameter.initial(config.seed, to_numpy(adapter).dtype)).to(adapter.device)
