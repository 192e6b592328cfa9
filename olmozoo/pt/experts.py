"""A sparse MLP: a router sends each token to a few of many gated MLPs (arXiv:1701.06538, arXiv:2409.02060).

Shapes in comments: n tokens (batch times positions), e experts, k of them a token, c hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olmozoo.errors import InputError
from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.pt.layers import GatedMLP, Linear, at_least_float32, linear


class SparseMLP(nn.Module):
    """The sum of the outputs of a token's k experts, each times the weight that the router gives it.

    Each expert is computed once, on the tokens that are sent to it. A graph that is traced (`torch.compile`,
    `torch.export`) has no shapes that depend on values: there every expert is computed on all tokens.

    Attributes:
        experts: a module for each; on a mesh with a dimension `tensor` or `experts`, `SplitExperts`.
    """

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        hidden, inner, act = config.hidden_size, config.intermediate_size, config.hidden_act
        self.gate = Linear(hidden, config.num_experts, bias=False)
        self.experts: Any = nn.ModuleList(GatedMLP(hidden, inner, act) for _ in range(config.num_experts))
        self.count, self.chosen = config.num_experts, config.num_experts_per_tok
        self.normalized = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (b, s, c) for x (b, s, c), and the router's logits (b * s, e)."""
        tokens = x.flatten(0, 1)  # (n, c)
        logits = self.gate(tokens)
        weights, indices = route(logits, self.chosen, self.normalized)
        if isinstance(self.experts, SplitExperts):
            tokens, weights = self.experts.enter(tokens), self.experts.enter(weights)
            out = self.experts.leave(self.grouped(tokens, weights, indices, self.experts.first, self.experts.own()))
        elif torch.compiler.is_compiling() or torch.jit.is_tracing():
            out = self.everywhere(tokens, weights, indices)
        else:
            out = self.grouped(tokens, weights, indices, 0, self.experts)
        return out.view_as(x), logits

    def grouped(
        self,
        tokens: Tensor,
        weights: Tensor,
        indices: Tensor,
        first: int,
        experts: Iterable[Callable[[Tensor], Tensor]],
    ) -> Tensor:
        """Tokens sorted by expert; where gradients are kept, an expert without tokens gets one too, of zeros.

        Args:
            tokens: (n, c).
            weights: (n, k).
            indices: of experts, (n, k).
            first: the first expert of `experts`.
            experts: those whose outputs are added up.
        """
        order = indices.flatten().argsort(stable=True)  # (n * k,)
        counts = indices.flatten().bincount(minlength=self.count).tolist()
        out, gradients = torch.zeros_like(tokens), torch.is_grad_enabled()
        for expert, rows in zip(experts, order.split(counts)[first:], strict=False):
            if len(rows) or gradients:
                sent = rows // self.chosen  # of which token
                part = expert(tokens[sent]) * weights.flatten()[rows, None]
                out = out.index_add(0, sent, part.to(out.dtype))
        return out

    def everywhere(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """All experts on all tokens."""
        zeros = weights.new_zeros(weights.shape[0], self.count)
        columns = zeros.scatter(1, indices, weights).split(1, dim=1)  # (n, 1) each
        out = torch.zeros_like(tokens)
        for expert, column in zip(self.experts, columns, strict=True):
            out = out + expert(tokens) * column
        return out


def route(logits: Tensor, chosen: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """Weights and indices (n, k) of the experts of each token, from logits (n, e).

    The softmax is over all experts, in at least float32, so that the weights of the chosen ones sum to less than 1.

    Args:
        logits: of the router.
        chosen: k.
        normalized: whether the weights are divided by their sum.
    """
    probabilities = logits.to(at_least_float32(logits.dtype)).softmax(-1)
    weights, experts = probabilities.topk(chosen)
    if normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


# -- on a mesh --------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """The weights (e, out, in) of a linear layer of all experts."""

    def __init__(self, weight: Tensor, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad)


class SplitExperts(nn.Module):
    """The experts of a layer on a mesh, of which each rank has some, or a part of each, or both.

    Weights are DTensors (e, out, in), of which the dimension `experts` of the mesh splits the first, and `tensor` that
    of the MLP. Every rank has all tokens of its rows and computes its part of the outputs; the parts are added up, once
    for all experts.

    Args:
        experts: as they are on one device; their values are copied.

    Raises:
        InputError: some of them are frozen, and others are not.
    """

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights = [getattr(expert, name).weight for expert in experts]
            if (trained := sum(w.requires_grad for w in weights)) not in (0, len(weights)):
                raise InputError(
                    f"{trained} of the {len(weights)} experts of a layer are trained, expected all or none on a mesh "
                    "with tensor or experts, where they are one parameter"
                )
            setattr(self, name, Stack(torch.stack([w.detach() for w in weights]), trained > 0))
        self.act = experts[0].act

    def own(self) -> list[Callable[[Tensor], Tensor]]:
        """The experts of this rank."""
        weights = (getattr(self, name).weight.to_local().unbind() for name in ("gate_proj", "up_proj", "down_proj"))
        return [partial(self.mlp, *each) for each in zip(*weights, strict=True)]

    def mlp(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        """One expert, or this rank's part of one."""
        return linear(self.act(linear(x, gate)) * linear(x, up), down)

    @property
    def first(self) -> int:
        """The first expert of this rank."""
        weight = self.gate_proj.weight
        mesh = weight.device_mesh
        return mesh.get_local_rank("experts") * len(weight.to_local()) if "experts" in mesh.mesh_dim_names else 0

    def enter(self, x: Tensor) -> Tensor:
        """A tensor that all ranks have, whose gradient is the sum of theirs."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = self.gate_proj.weight.device_mesh
        shared = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return shared.to_local(grad_placements=[Partial()] * mesh.ndim)

    def leave(self, part: Tensor) -> Tensor:
        """The sum of the parts of all ranks."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = self.gate_proj.weight.device_mesh
        parts = DTensor.from_local(part, mesh, [Partial()] * mesh.ndim, run_check=False)
        return parts.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
