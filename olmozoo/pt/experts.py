"""A sparse MLP: a router sends each token to a few of many gated MLPs (arXiv:1701.06538, arXiv:2409.02060).

Shapes in comments: n tokens (batch times positions), e experts, k of them a token, c hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.pt.layers import GatedMLP, Linear, at_least_float32


class SparseMLP(nn.Module):
    """The sum of the outputs of a token's k experts, each times the weight that the router gives it.

    Each expert is computed once, on the tokens that are sent to it. A graph that is traced (`torch.compile`,
    `torch.export`) has no shapes that depend on values: there every expert is computed on all tokens.
    """

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        hidden, inner, act = config.hidden_size, config.intermediate_size, config.hidden_act
        self.gate = Linear(hidden, config.num_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(hidden, inner, act) for _ in range(config.num_experts))
        self.chosen = config.num_experts_per_tok
        self.normalized = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (b, s, c) for x (b, s, c), and the router's logits (b * s, e)."""
        tokens = x.flatten(0, 1)  # (n, c)
        logits = self.gate(tokens)
        weights, experts = route(logits, self.chosen, self.normalized)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            out = self.everywhere(tokens, weights, experts)
        else:
            out = self.grouped(tokens, weights, experts)
        return out.view_as(x), logits

    def grouped(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Tokens sorted by expert; where gradients are kept, an expert without tokens gets one too, of zeros."""
        order = experts.flatten().argsort(stable=True)  # (n * k,)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        out, gradients = torch.zeros_like(tokens), torch.is_grad_enabled()
        for expert, rows in zip(self.experts, order.split(counts), strict=True):
            if len(rows) or gradients:
                sent = rows // self.chosen  # of which token
                part = expert(tokens[sent]) * weights.flatten()[rows, None]
                out = out.index_add(0, sent, part.to(out.dtype))
        return out

    def everywhere(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """All experts on all tokens."""
        zeros = weights.new_zeros(weights.shape[0], len(self.experts))
        columns = zeros.scatter(1, experts, weights).split(1, dim=1)  # (n, 1) each
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
