"""Key/value caches. A block takes its layer's past and gives back its present, so that a call is a pure function."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values in memory set aside once, for `max_length` positions. It never changes: a call returns another.

    Outside of jit a call that has no room for its positions is refused. Inside, the number of positions held is not
    known, and new ones would overwrite the last: do not ask for more than `max_length`.

    Attributes:
        keys: one array a layer, (batch, kv_heads, max_length, head_dim).
        values: the same.
        length: the number of positions held, an int32 scalar; it may be traced.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array

    @classmethod
    def create(cls, config: ModelConfig, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Self:
        """An empty cache for `batch_size` rows of up to `max_length` positions."""
        layers = range(config.num_hidden_layers)
        shapes = [(batch_size, config.kv_heads_in(layer), max_length, config.head_dim) for layer in layers]
        keys, values = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
        return cls(keys, values, jnp.zeros((), jnp.int32))

    @property
    def max_length(self) -> int:
        """The most positions it can hold."""
        return self.keys[0].shape[2]

    def get_seq_length(self) -> Array:
        """The number of positions held."""
        return self.length

    def reorder(self, rows: Array) -> Self:
        """A cache whose row i is row `rows[i]` of this one."""
        keys, values = (tuple(x[rows] for x in side) for side in (self.keys, self.values))
        return self.replace(keys=keys, values=values)


def cache_length(past_key_values: Any) -> int:
    """The number of positions that a cache of either form holds; 0 for None."""
    if past_key_values is None:
        return 0
    return int(past_key_values.length) if isinstance(past_key_values, KVCache) else past_key_values[0][0].shape[2]


def open_cache(past_key_values: Any, layers: int, new: int) -> tuple[list[Any], Any, int]:
    """What a call with `new` positions finds.

    Returns:
        Each layer's past, as `update` takes it; the number of positions held, traced perhaps; and the number of keys
        that queries will be set against.

    Raises:
        InputError: `past_key_values` is no cache, has another number of layers, or has no room.
    """
    if past_key_values is None:
        return [None] * layers, 0, new
    is_object = isinstance(past_key_values, KVCache)
    if not is_object and not isinstance(past_key_values, (tuple, list)):
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is a {kind}, expected a tuple of pairs or a KVCache")
    found = len(past_key_values.keys if is_object else past_key_values)
    if found != layers:
        raise InputError(f"past_key_values has {found} layers, expected {layers}")
    if not is_object:
        past = past_key_values[0][0].shape[2]
        return [(key, value, None) for key, value in past_key_values], past, past + new
    past, room = past_key_values.length, past_key_values.max_length
    end = new if isinstance(past, jax.core.Tracer) else int(past) + new
    if end > room:
        raise InputError(f"the cache holds {room} positions, {end} were asked of it")
    return [(*pair, past) for pair in zip(past_key_values.keys, past_key_values.values, strict=True)], past, room


def update(past: Any, key: Array, value: Array) -> tuple[Array, Array]:
    """Add key and value (batch, kv_heads, new, head_dim) to a layer's past; all that the layer holds then.

    Raises:
        InputError: the cache is of other rows or heads.
    """
    if past is None:
        return key, value
    old_key, old_value, start = past
    if old_key.shape[:2] != key.shape[:2]:
        raise InputError(f"the cache is of {old_key.shape[:2]} rows and heads, expected {key.shape[:2]}")
    if start is None:
        return jnp.concatenate([old_key, key], axis=2), jnp.concatenate([old_value, value], axis=2)
    return (
        lax.dynamic_update_slice_in_dim(old_key, key.astype(old_key.dtype), start, axis=2),
        lax.dynamic_update_slice_in_dim(old_value, value.astype(old_value.dtype), start, axis=2),
    )


def close_cache(past_key_values: Any, presents: list[tuple[Array, Array]], new: int, use_cache: bool) -> Any:
    """What a call returns for the cache it was given: the kind that went in; where none did, pairs if wanted."""
    if isinstance(past_key_values, KVCache):
        keys, values = zip(*presents, strict=True)
        return KVCache(keys, values, past_key_values.length + new)
    return tuple(presents) if use_cache or past_key_values is not None else None
