"""Losses of the heads: next token, classification, answer positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from olmozoo.families.config import infer_problem_type
from olmozoo.pt.layers import at_least_float32


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Mean cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`."""
    wide = logits.to(at_least_float32(logits.dtype))
    labels = labels.long().to(logits.device)
    return F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum") / (labels != ignored).sum().clamp(min=1)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s, v) against the labels (b, s) one place on, -100 ignored."""
    return cross_entropy(logits.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten(), -100)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (b, n) by `problem_type`, see `SequenceClassifier.forward`."""
    wide = logits.to(at_least_float32(logits.dtype))
    kind = problem_type or infer_problem_type(logits.shape[1], integers=not labels.is_floating_point())
    if kind == "regression":
        return F.mse_loss(wide, labels.to(wide).view_as(wide))
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.flatten(), -100)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide))


def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s) against places (b,), clamped to 0 .. s, where s is ignored."""
    length = logits.shape[1]
    return cross_entropy(logits, places.flatten().clamp(0, length), length)
