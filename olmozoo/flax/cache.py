"""Key/value caches. Both kinds are pytrees, and adding to one returns a new one, so that a call is a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig


@struct.dataclass
class KVCache:
    """Preallocated keys and values, for `max_length` positions.

    Outside of jit a call that has no room for its positions is refused. Inside, the number of positions cached is not
    known, and new ones would overwrite the last: do not ask for more than `max_length`.

    Attributes:
        keys: one array a layer, (batch, kv_heads, max_length, head_dim).
        values: the same for values.
        length: scalar int32, the number of positions cached; it may be traced.
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
        """The number of positions that there is memory for."""
        return self.keys[0].shape[2]

    def get_seq_length(self) -> Array:
        """The number of positions cached."""
        return self.length

    def begin_with(self, pairs: Sequence[tuple[Array, Array]]) -> Self:
        """The cache with the keys and values of a tuple of pairs in its first positions."""
        keys, values = (
            tuple(_write(*both, 0) for both in zip(memory, side, strict=True))
            for memory, side in zip((self.keys, self.values), zip(*pairs, strict=True), strict=True)
        )
        return KVCache(keys, values, jnp.int32(pairs[0][0].shape[2]))

    def reorder(self, rows: Array) -> Self:
        """A cache whose row i is row `rows[i]` of this one."""
        keys, values = (tuple(x[rows] for x in side) for side in (self.keys, self.values))
        return self.replace(keys=keys, values=values)


def cached_length(past_key_values: Any) -> Any:
    """The number of positions cached, of either form; 0 for None. That of a `KVCache` may be traced."""
    if past_key_values is None:
        return 0
    return past_key_values.length if isinstance(past_key_values, KVCache) else past_key_values[0][0].shape[2]


def open_cache(past_key_values: Any, layers: int, new: int) -> tuple[Sequence[Any], Any, int]:
    """The cache for one call that adds `new` positions.

    Returns:
        Each layer's past, as `update` takes it; the number of positions cached, traced perhaps; and the number of keys
        that queries are compared with, which for a `KVCache` is all that there is memory for.

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
    past = cached_length(past_key_values)
    if not is_object:
        return [(key, value, None) for key, value in past_key_values], past, past + new
    room = past_key_values.max_length
    end = new if isinstance(past, jax.core.Tracer) else int(past) + new
    if end > room:
        raise InputError(f"the cache has room for {room} positions, {end} are needed")
    return [(*pair, past) for pair in zip(past_key_values.keys, past_key_values.values, strict=True)], past, room


def update(past: Any, key: Array, value: Array) -> tuple[Array, Array]:
    """Add key and value (batch, kv_heads, new, head_dim) to a layer's past; return all that are cached then.

    Raises:
        InputError: the cache has other rows or heads.
    """
    if past is None:
        return key, value
    old_key, old_value, start = past
    if old_key.shape[:2] != key.shape[:2]:
        raise InputError(f"the cache has {old_key.shape[:2]} rows and heads, expected {key.shape[:2]}")
    if start is None:
        return jnp.concatenate([old_key, key], axis=2), jnp.concatenate([old_value, value], axis=2)
    return _write(old_key, key, start), _write(old_value, value, start)


def _write(memory: Array, new: Array, start: Any) -> Array:
    """Write `new` (batch, kv_heads, new, head_dim) at `start` of one array of a `KVCache`."""
    return lax.dynamic_update_slice_in_dim(memory, new.astype(memory.dtype), start, axis=2)


def close_cache(past_key_values: Any, presents: list[tuple[Array, Array]], new: int, use_cache: bool) -> Any:
    """The cache that a call returns: of the kind that it was given; where none was, a tuple of pairs if wanted."""
    if isinstance(past_key_values, KVCache):
        keys, values = zip(*presents, strict=True)
        return KVCache(keys, values, past_key_values.length + new)
    return tuple(presents) if use_cache or past_key_values is not None else None


def padded_left(past_key_values: Any, length: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The positions cached, of either form, as a tuple of pairs with zeros before them, `length` positions in all.

    In NumPy: JAX would compile for each new length.
    """
    cached, pairs = int(cached_length(past_key_values)), past_key_values
    if isinstance(pairs, KVCache):
        pairs = zip(pairs.keys, pairs.values, strict=True)
    pad = ((0, 0), (0, 0), (length - cached, 0), (0, 0))
    return tuple(tuple(np.pad(np.asarray(x)[:, :, :cached], pad) for x in pair) for pair in pairs)
