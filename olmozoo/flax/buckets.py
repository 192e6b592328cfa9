"""Calls outside of jit, padded to a few lengths: JAX would compile each operation for each new length, and keep it.

Padding is on the right, where causal attention does not look. Calls whose answer would depend on it are left alone.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.generation.prepare import bucket
from olmozoo.outputs import ModelOutput

IGNORED = -100  # a label that a language model does not learn
# The axes of the sequence in what a call returns; `logits` have one where they are a language model's.
SEQUENCE_AXES: dict[str, tuple[int, ...]] = {
    "loss": (),
    "last_hidden_state": (1,),
    "logits": (),
    "start_logits": (1,),
    "end_logits": (1,),
    "past_key_values": (2,),
    "hidden_states": (1,),
    "attentions": (2, 3),
    "aux_loss": (),
    "router_logits": (),  # the first axis is of the batch too; see `cut_output`
}
NEEDED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep")
SETTINGS = ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits")


def is_traced(*trees: Any) -> bool:
    """Whether one of the arrays is traced, or the call is inside of a function that is being traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in (*jax.tree.leaves(trees), jnp.zeros(())))


def pad_call(config: ModelConfig, head: Head | None, arguments: dict[str, Any]) -> tuple[dict[str, Any], int] | None:
    """The arrays of a call in NumPy, padded to `bucket(length)`, and the length.

    Args:
        config: the model's config.
        head: the model's head.
        arguments: those of the module, resolved; none is traced.

    Returns:
        None where the call has to be made as it is: it has a cache, dropout or an argument of its family, or a loss
        over positions, or a router's loss with a mask that does not say which tokens are real; or it is wrong, and its
        error has to name what was given.
    """
    others = arguments.keys() - {*NEEDED, *SETTINGS, "deterministic"}
    if not arguments["deterministic"] or any(arguments[name] is not None for name in others):
        return None
    given = [arguments.get(name) for name in NEEDED]
    if any(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in given):  # NumPy would lose the sharding
        return None
    ids, embeds, mask, positions, cache_position, labels, keep = (None if x is None else np.asarray(x) for x in given)
    if (ids is None) == (embeds is None):
        return None
    tokens: Any = ids if embeds is None else embeds
    if tokens.ndim != (2 if embeds is None else 3) or 0 in tokens.shape:
        return None
    batch, length = tokens.shape[:2]
    limit = config.position_limit
    spare = (0, bucket(length) - length)
    arrays: dict[str, Any] = {}

    if ids is not None:
        if not _are_integers(ids, 0, config.vocab_size):
            return None
        arrays["input_ids"] = np.pad(ids, ((0, 0), spare), mode="edge")
    else:
        arrays["inputs_embeds"] = np.pad(tokens, ((0, 0), spare, (0, 0)), mode="edge")
    if head == "sequence_classification":  # it looks for the last token that is not the pad token
        pad = config.pad_token_id
        if ids is None or labels is not None or pad is None or not 0 <= pad < config.vocab_size:
            return None
        arrays["input_ids"][:, length:] = pad

    positions = cache_position[None] if positions is None and cache_position is not None else positions
    if positions is None and (mask is None or mask.ndim != 2 or limit is None):
        positions = np.arange(length)[None]
    if positions is not None:
        if positions.shape not in ((1, length), (batch, length)) or not _are_integers(positions, 0, limit):
            return None
        arrays["position_ids"] = np.pad(positions, ((0, 0), spare), mode="edge")
    elif limit is not None and length > limit:
        return None

    mask = np.ones((batch, length), np.int32) if mask is None else mask
    if mask.shape == (batch, length):
        arrays["attention_mask"] = np.pad(mask, ((0, 0), spare))
    elif mask.ndim == 4 and mask.shape[2:] == (length, length) and not arguments.get("output_router_logits"):
        hidden: Any = -np.inf if jnp.issubdtype(mask.dtype, jnp.floating) else 0
        arrays["attention_mask"] = np.pad(mask, ((0, 0), (0, 0), spare, spare), constant_values=hidden)
    else:
        return None

    if labels is not None:
        if head != "causal_lm" or labels.shape != (batch, length):
            return None
        if not _are_integers(labels[labels != IGNORED], 0, config.vocab_size):
            return None
        arrays["labels"] = np.pad(labels, ((0, 0), spare), constant_values=IGNORED)
    if keep is not None and (keep.ndim or keep):
        if not np.issubdtype(keep.dtype, np.integer) or keep.ndim > 1:
            return None
        if keep.ndim == 0:
            keep = np.arange(length)[-operator.index(keep) :]
        if not _are_integers(keep, -length, length):
            return None
        arrays["logits_to_keep"] = keep % length
    return arrays, length


def _are_integers(values: np.ndarray, least: int, limit: int | None) -> bool:
    """Whether all are integers of at least `least` and below `limit`."""
    if not np.issubdtype(values.dtype, np.integer):
        return False
    return values.size == 0 or bool(values.min() >= least and (limit is None or values.max() < limit))


def cut_output(output: ModelOutput, head: Head | None, arrays: dict[str, Any], length: int) -> ModelOutput:
    """The output of a call that `pad_call` has padded, without what belongs to padding."""

    def cut(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return leaf[tuple(slice(length if axis in axes else None) for axis in range(leaf.ndim))]

    for name in output.keys():  # noqa: SIM118
        axes = SEQUENCE_AXES[name]
        if name == "logits" and head == "causal_lm" and "logits_to_keep" not in arrays:
            axes = (1,)
        if axes:
            output[name] = jax.tree.map(lambda leaf, axes=axes: cut(leaf, axes), output[name])
    if output.get("router_logits") is not None:  # (b * s, e)
        rows, padded = arrays["attention_mask"].shape
        layers = (layer.reshape(rows, padded, -1)[:, :length] for layer in output["router_logits"])
        output["router_logits"] = tuple(layer.reshape(rows * length, -1) for layer in layers)
    return output
