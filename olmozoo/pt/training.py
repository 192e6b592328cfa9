"""One step of training in PyTorch: the gradients of micro-batches, and the optimizer's update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from olmozoo.errors import MissingBackendError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter
from olmozoo.pt.base import from_numpy, to_numpy
from olmozoo.pt.losses import target_losses
from olmozoo.quantization import Quantization, is_quantizable, rounded

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.data import Batch


def scope(run: TrainConfig, device: Any) -> contextlib.AbstractContextManager[Any]:
    """What training on a device runs in."""
    return contextlib.nullcontext()


def make_model(
    cls: Any, config: ModelConfig, weights: Iterable[tuple[Parameter, np.ndarray]], run: TrainConfig, device: Any
) -> Any:
    """A model of the class with these weights, in the run's precision."""
    model = cls(config, seed=None)
    model.bind_parameters(((parameter, np.array(array)) for parameter, array in weights), device)
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
                state = self.state[parameter]
                mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(torch.lerp(parameter.grad, mean, beta_1).sign_(), alpha=-lr)
                mean.lerp_(parameter.grad, 1 - beta_2)


class TrainStep:
    """The model, its gradients and its optimizer.

    Args:
        model: a causal language model, with its adapters where LoRA is trained.
        trained: the parameters that are trained; the others are frozen.
        decays: the weight decay of each.
        config: the run's.

    Attributes:
        aux_factor: of the load-balancing loss of a mixture of experts; 0 without one.
    """

    def __init__(self, model: Any, trained: Sequence[Parameter], decays: Sequence[float], config: TrainConfig) -> None:
        self.model, self.names = model, [parameter.name for parameter in trained]
        self.config = config
        self.aux_factor = getattr(model.config, "router_aux_loss_coef", 0.0)
        if config.lora is not None:
            add_adapters(model, trained, config)
        found = dict(model.named_parameters(remove_duplicate=False))
        self.parameters: list[nn.Parameter] = [found[self._path(name)] for name in self.names]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        settings = config.optimizer
        groups = [
            {"params": [p for p, d in zip(self.parameters, decays, strict=True) if d == decay], "weight_decay": decay}
            for decay in sorted(set(decays))
        ]
        beta_1, beta_2 = settings.betas
        self.optimizer: torch.optim.Optimizer
        if settings.name == "lionw":
            self.optimizer = LionW(groups, lr=0.0, betas=(beta_1, beta_2))
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(beta_1, beta_2), eps=settings.eps, fused=True)

    def _path(self, name: str) -> str:
        """The name of a parameter in the module; PEFT calls its adapters by one more name."""
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
        torch.manual_seed(seed)
        z_factor = self.config.z_factor
        targets = torch.from_numpy(batch.targets).to(self.model.device)
        output = self._outputs(batch, **({"output_router_logits": True} if self.aux_factor else {}))
        cross_entropy, z = (rows.sum() for rows in target_losses(output.logits, targets, z_factor > 0))
        aux = output.aux_loss * batch.share if self.aux_factor else torch.zeros_like(z)
        ((cross_entropy + z_factor * z) / divisor + self.aux_factor * aux).backward()
        return cross_entropy.detach(), z.detach(), aux.detach()

    def norms(self) -> np.ndarray:
        """The norm of each parameter's gradient."""
        return torch.stack([parameter.grad.norm() for parameter in self.parameters]).cpu().numpy()

    def update(self, learning_rate: float, scales: np.ndarray | None) -> None:
        """Update the parameters by their gradients, each times its scale, and forget the gradients."""
        if scales is not None:
            for parameter, scale in zip(self.parameters, scales.tolist(), strict=True):
                parameter.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> np.ndarray:
        """The summed cross-entropy of each row, (batch,)."""
        self.model.eval()  # `gradients` sets it back
        targets = torch.from_numpy(batch.targets).to(self.model.device)
        losses, _ = target_losses(self._outputs(batch).logits, targets, False)
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

    def values(self) -> dict[str, np.ndarray]:
        """The trained parameters by name."""
        return {name: to_numpy(parameter) for name, parameter in zip(self.names, self.parameters, strict=True)}

    def moments(self) -> dict[str, np.ndarray]:
        """The optimizer's running means, by names such as `exp_avg.model.norm.weight`; empty before the first step."""
        return {
            f"{moment}.{name}": to_numpy(self.optimizer.state[parameter][moment])
            for moment in self.config.optimizer.moments
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if self.optimizer.state[parameter]
        }

    def restore(self, values: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], count: int) -> None:
        """Set trained parameters and the optimizer's running means, after `count` of its updates."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in values:
                parameter.data.copy_(from_numpy(values[name]))
            if not moments:
                continue
            state: dict[str, Any] = {"step": torch.tensor(float(count), device=parameter.device)}
            for moment in self.config.optimizer.moments:
                array = from_numpy(np.array(moments[f"{moment}.{name}"]))
                state[moment] = array.to(parameter.device, parameter.dtype)
            self.optimizer.state[parameter] = state


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
