"""Losses of the heads: next token, classification, answer positions; and of routers to experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from olmozoo.families.config import infer_problem_type
from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.flax.layers import at_least_float32, concrete
from olmozoo.modeling import check_range
from olmozoo.outputs import BaseModelOutput, CausalLMOutput


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
    labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # to cut the logits would copy them
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), -100)


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


def add_router_loss(
    result: CausalLMOutput, output: BaseModelOutput, mask: Array | None, past: Any, config: ExpertsConfig
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
    real = None
    if mask is not None and jnp.ndim(mask) == 2:
        real = lax.dynamic_slice_in_dim(jnp.asarray(mask), past, length, axis=1)
    result.router_logits = output.router_logits
    result.aux_loss = load_balancing_loss(output.router_logits, real, config.num_experts_per_tok)
    if result.loss is not None:
        result.loss = result.loss + config.router_aux_loss_coef * result.aux_loss.astype(result.loss.dtype)


def load_balancing_loss(router_logits: tuple[Array, ...], real: Array | None, chosen: int) -> Array:
    """`experts * sum_e f_e P_e` (arXiv:2101.03961, equation 4), over the real tokens of all layers together.

    f_e is the share of tokens that are sent to expert e, and P_e its mean probability. Where all experts have equal
    shares, the loss is `chosen`.

    Args:
        router_logits: one array a layer, (b * s, experts).
        real: (b, s), 1 for tokens that count; None for all.
        chosen: experts a token is sent to.
    """
    logits = jnp.concatenate(router_logits)  # (layers * b * s, e)
    probabilities = jax.nn.softmax(logits.astype(at_least_float32(logits.dtype)))
    experts = lax.top_k(probabilities, chosen)[1]
    sent = jax.nn.one_hot(experts, logits.shape[-1], dtype=probabilities.dtype).sum(1)
    if real is None:
        weights = jnp.ones(len(logits), probabilities.dtype)
    else:
        weights = jnp.tile(real.reshape(-1).astype(probabilities.dtype), len(router_logits))
    count = jnp.maximum(weights.sum(), 1)
    return logits.shape[-1] * ((weights @ sent / count) * (weights @ probabilities / count)).sum()
