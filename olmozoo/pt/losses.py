"""Losses of the heads: next token, classification, answer positions; and of routers to experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from olmozoo.families.config import infer_problem_type
from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.modeling import check_range
from olmozoo.outputs import BaseModelOutput, CausalLMOutput
from olmozoo.pt.layers import at_least_float32, concrete


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int, num_items: int | Tensor | None = None) -> Tensor:
    """Cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`.

    It is the sum over `num_items`, by default the number of labels that are not ignored.
    """
    wide = logits.to(at_least_float32(logits.dtype))
    labels = labels.long().to(logits.device)
    if num_items is None:
        num_items = (labels != ignored).sum().clamp(min=1)
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(wide.device)
    return F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum") / num_items


def next_token_loss(logits: Tensor, labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """`cross_entropy` of logits (b, s, v) against labels (b, s), each with the label after it; -100 is ignored."""
    check_range("labels", concrete(labels), logits.shape[-1], ignored=-100)
    return cross_entropy(logits.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten(), -100, num_items)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (b, n) that `problem_type` names, or by default `infer_problem_type`."""
    wide = logits.to(at_least_float32(logits.dtype))
    kind = problem_type or infer_problem_type(logits.shape[1], integers=not labels.is_floating_point())
    if kind == "regression":
        return F.mse_loss(wide, labels.to(wide).view_as(wide))
    if kind == "single_label_classification":
        check_range("labels", concrete(labels), logits.shape[1], ignored=-100)
        return cross_entropy(logits, labels.flatten(), -100)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide))


def answer_position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s) against positions (b,), clamped to 0 .. s, where s is ignored."""
    length = logits.shape[1]
    return cross_entropy(logits, positions.flatten().clamp(0, length), length)


def target_losses(logits: Tensor, targets: Tensor, z_loss: bool) -> tuple[Tensor, Tensor]:
    """The sums (b,) over each row of the cross-entropy in nats and of the squared log-partition, in at least float32.

    Args:
        logits: (b, s, v).
        targets: (b, s), the token that each position predicts; -100 counts in neither sum.
        z_loss: whether the second is wanted; else it is 0.
    """
    wide = logits.to(at_least_float32(logits.dtype))
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten().long(), ignore_index=-100, reduction="none")
    losses = losses.view_as(targets).sum(-1)
    if not z_loss:
        return losses, torch.zeros_like(losses)
    return losses, (wide.logsumexp(-1).square() * (targets != -100)).sum(-1)


def add_router_loss(
    result: CausalLMOutput, output: BaseModelOutput, mask: Tensor | None, past: int, config: ExpertsConfig
) -> None:
    """Add to a head's output the decoder's router logits and the load-balancing loss, which its loss has then too.

    Args:
        result: of the head.
        output: of the decoder.
        mask: the attention_mask of the call; one of two dimensions says which tokens count.
        past: positions in the cache before the call.
        config: of the model.
    """
    length = output.last_hidden_state.shape[1]
    real = mask[:, past : past + length] if mask is not None and mask.ndim == 2 else None
    result.router_logits = output.router_logits
    result.aux_loss = load_balancing_loss(output.router_logits, real, config.num_experts_per_tok)
    if result.loss is not None:
        result.loss = result.loss + config.router_aux_loss_coef * result.aux_loss.to(result.loss.dtype)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], real: Tensor | None, chosen: int, group: Any = None
) -> Tensor:
    """`experts * sum_e f_e P_e` (arXiv:2101.03961, equation 4), over the real tokens of all layers together.

    f_e is the share of tokens that are sent to expert e, and P_e its mean probability. Where all experts have equal
    shares, the loss is `chosen`.

    Args:
        router_logits: one tensor a layer, (b * s, experts).
        real: (b, s), 1 for tokens that count; None for all.
        chosen: experts a token is sent to.
        group: ranks of `torch.distributed` whose tokens count too. Each returns its part of the loss, which is their
            sum; so are the gradients.
    """
    logits = torch.cat([layer.to(router_logits[0].device) for layer in router_logits])  # (layers * b * s, e)
    probabilities = logits.to(at_least_float32(logits.dtype)).softmax(-1)
    sent = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen).indices, 1.0)
    if real is None:
        weights = torch.ones_like(probabilities[:, 0])
    else:
        weights = real.to(probabilities).flatten().repeat(len(router_logits))
    sent, count = weights @ sent, weights.sum()  # which have no gradient
    if group is not None:
        dist.all_reduce(sent, group=group)
        dist.all_reduce(count, group=group)
    count = count.clamp(min=1)
    return logits.shape[-1] * ((sent / count) * (weights @ probabilities / count)).sum()
