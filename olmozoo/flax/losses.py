"""Losses of the heads: next token, classification, answer positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from olmozoo.families.config import infer_problem_type
from olmozoo.flax.layers import at_least_float32, concrete
from olmozoo.modeling import check_range


def cross_entropy(logits: Array, labels: Array, ignored: int) -> Array:
    """Mean cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`."""
    wide = logits.astype(at_least_float32(logits.dtype))
    learned = labels != ignored
    picked = jnp.take_along_axis(wide, jnp.where(learned, labels, 0)[:, None], axis=-1)[:, 0]
    losses = jnp.where(learned, jax.nn.logsumexp(wide, axis=-1) - picked, 0)
    return losses.sum() / jnp.maximum(learned.sum(), 1)


def next_token_loss(logits: Array, labels: Array) -> Array:
    """Cross-entropy of logits (b, s, v) against labels (b, s), each with the label after it; -100 is ignored."""
    check_range("labels", concrete(labels), logits.shape[-1], ignored=-100)
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), -100)


def classification_loss(logits: Array, labels: Array, problem_type: str | None) -> Array:
    """The loss of logits (b, n) that `problem_type` names, or by default `infer_problem_type`."""
    wide = logits.astype(at_least_float32(logits.dtype))
    integers = not jnp.issubdtype(labels.dtype, jnp.floating)
    kind = problem_type or infer_problem_type(logits.shape[1], integers)
    if kind == "regression":
        return jnp.square(wide - labels.reshape(wide.shape)).mean()
    if kind == "single_label_classification":
        check_range("labels", concrete(labels), logits.shape[1], ignored=-100)
        return cross_entropy(logits, labels.reshape(-1), -100)
    return -(labels * jax.nn.log_sigmoid(wide) + (1 - labels) * jax.nn.log_sigmoid(-wide)).mean()


def answer_position_loss(logits: Array, positions: Array) -> Array:
    """Cross-entropy of logits (b, s) against positions (b,), clamped to 0 .. s, where s is ignored."""
    length = logits.shape[1]
    return cross_entropy(logits, positions.reshape(-1).clip(0, length), length)


def target_losses(logits: Array, targets: Array, z_loss: bool) -> tuple[Array, Array]:
    """The sums (b,) over each row of the cross-entropy in nats and of the squared log-partition, in at least float32.

    Args:
        logits: (b, s, v).
        targets: (b, s), the token that each position predicts; -100 counts in neither sum.
        z_loss: whether the second is wanted; else it is 0.
    """
    wide = logits.astype(at_least_float32(logits.dtype))
    learned = targets != -100
    partition = jax.nn.logsumexp(wide, axis=-1)  # (b, s)
    picked = jnp.take_along_axis(wide, jnp.where(learned, targets, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(learned, partition - picked, 0).sum(-1)
    if not z_loss:
        return losses, jnp.zeros_like(losses)
    return losses, jnp.where(learned, jnp.square(partition), 0).sum(-1)
