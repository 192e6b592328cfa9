"""Losses of the heads: next token, classification, answer positions; and of routers to experts."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import ops

from olmozoo.families.config import infer_problem_type
from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.modeling import check_range
from olmozoo.outputs import BaseModelOutput, CausalLMOutput
from olmozoo.tf.layers import Tensor, at_least_float32, concrete


def cross_entropy(logits: Tensor, labels: Tensor, ignored: Any) -> Tensor:
    """Mean cross-entropy in nats, in at least float32, of logits (n, v) against labels (n,); 0 if all are `ignored`."""
    wide = ops.cast(logits, at_least_float32(logits.dtype))
    counted = ops.not_equal(labels, ignored)
    losses = ops.sparse_categorical_crossentropy(ops.where(counted, labels, 0), wide, from_logits=True)
    total = ops.sum(ops.where(counted, losses, ops.zeros_like(losses)))
    return total / ops.cast(ops.maximum(ops.count_nonzero(counted), 1), wide.dtype)


def next_labels(labels: Tensor) -> Tensor:
    """Labels (b, s), each replaced by the one after it, which is what its position predicts; -100 after the last."""
    return tf.pad(labels[:, 1:], [[0, 0], [0, 1]], constant_values=-100)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s, v) against labels (b, s), each with the label after it; -100 is ignored."""
    check_range("labels", concrete(labels), logits.shape[-1], ignored=-100)
    labels = ops.reshape(next_labels(labels), (-1,))
    return cross_entropy(ops.reshape(logits, (-1, logits.shape[-1])), labels, -100)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (b, n) that `problem_type` names, or by default `infer_problem_type`."""
    wide = ops.cast(logits, at_least_float32(logits.dtype))
    labels = ops.convert_to_tensor(labels)
    kind = problem_type or infer_problem_type(logits.shape[1], integers=labels.dtype.is_integer)
    if kind == "single_label_classification":
        check_range("labels", concrete(labels), logits.shape[1], ignored=-100)
        return cross_entropy(logits, ops.reshape(labels, (-1,)), -100)
    labels = ops.reshape(ops.cast(labels, wide.dtype), ops.shape(wide))
    if kind == "regression":
        return ops.mean(ops.square(wide - labels))
    return ops.mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, wide))


def answer_position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of logits (b, s) against positions (b,), clamped to 0 .. s, where s is ignored."""
    length = ops.shape(logits)[1]
    return cross_entropy(logits, clamped(positions, length), length)


def clamped(positions: Tensor, length: Any) -> Tensor:
    """Positions (b,) of a sequence of `length`: those outside become `length`, which is ignored, or 0."""
    return ops.clip(ops.reshape(positions, (-1,)), 0, length)


def counted_labels(labels: Tensor, ignored: Any) -> tuple[Tensor, Tensor]:
    """Labels for Keras's metrics, and their weights: 0, with label 0, where they are `ignored`, else 1."""
    counted = ops.not_equal(labels, ignored)
    return ops.where(counted, labels, ops.zeros_like(labels)), ops.cast(counted, "float32")


def target_losses(logits: Tensor, targets: Tensor, z_loss: bool) -> tuple[Tensor, Tensor]:
    """The sums (b,) over each row of the cross-entropy in nats and of the squared log-partition, in at least float32.

    Args:
        logits: (b, s, v).
        targets: (b, s), the token that each position predicts; -100 counts in neither sum.
        z_loss: whether the second is wanted; else it is 0.
    """
    wide = ops.cast(logits, at_least_float32(logits.dtype))
    learned = ops.not_equal(targets, -100)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(ops.where(learned, targets, 0), wide)  # (b, s)
    weights = ops.cast(learned, wide.dtype)
    losses = ops.sum(losses * weights, -1)
    if not z_loss:
        return losses, ops.zeros_like(losses)
    return losses, ops.sum(ops.square(tf.reduce_logsumexp(wide, -1)) * weights, -1)


def add_router_loss(
    result: CausalLMOutput, output: BaseModelOutput, mask: Tensor | None, past: Any, config: ExpertsConfig
) -> None:
    """Add to a head's output the decoder's router logits and the load-balancing loss, which its loss has then too.

    Args:
        result: of the head.
        output: of the decoder.
        mask: the attention_mask of the call; one of two dimensions says which tokens count.
        past: positions in the cache before the call.
        config: of the model.
    """
    batch, length, _ = ops.shape(output.last_hidden_state)
    real = None
    if mask is not None and len(mask.shape) == 2:
        real = tf.slice(ops.convert_to_tensor(mask), (0, past), (batch, length))
    result.router_logits = output.router_logits
    result.aux_loss = load_balancing_loss(output.router_logits, real, config.num_experts_per_tok)
    if result.loss is not None:
        result.loss = result.loss + config.router_aux_loss_coef * ops.cast(result.aux_loss, result.loss.dtype)


def load_balancing_loss(router_logits: tuple[Tensor, ...], real: Tensor | None, chosen: int) -> Tensor:
    """`experts * sum_e f_e P_e` (arXiv:2101.03961, equation 4), over the real tokens of all layers together.

    f_e is the share of tokens that are sent to expert e, and P_e its mean probability. Where all experts have equal
    shares, the loss is `chosen`.

    Args:
        router_logits: one tensor a layer, (b * s, experts).
        real: (b, s), 1 for tokens that count; None for all.
        chosen: experts a token is sent to.
    """
    logits = ops.concatenate(router_logits, 0)  # (layers * b * s, e)
    probabilities = tf.nn.softmax(ops.cast(logits, at_least_float32(logits.dtype)))
    experts = tf.math.top_k(probabilities, chosen).indices
    sent = ops.sum(tf.one_hot(experts, logits.shape[-1], dtype=probabilities.dtype), 1)
    if real is None:
        weights = ops.ones_like(probabilities[:, 0])
    else:
        weights = ops.tile(ops.reshape(ops.cast(real, probabilities.dtype), (-1,)), len(router_logits))
    count = ops.maximum(ops.sum(weights), 1)
    sent, mean = (tf.linalg.matvec(x, weights, transpose_a=True) / count for x in (sent, probabilities))
    return logits.shape[-1] * ops.sum(sent * mean)
