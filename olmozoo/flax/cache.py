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
        return cls._empty(config, batch_size, [max_length] * config.num_hidden_layers, dtype)

    @classmethod
    def _empty(cls, config: ModelConfig, batch_size: int, slots: list[int], dtype: Any) -> Self:
        """An empty cache with so many slots in each layer."""
        shapes = [(batch_size, config.kv_heads_in(layer), n, config.head_dim) for layer, n in enumerate(slots)]
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
            tuple(_write_first(*both) for both in zip(memory, side, strict=True))
            for memory, side in zip((self.keys, self.values), zip(*pairs, strict=True), strict=True)
        )
        return self.replace(keys=keys, values=values, length=jnp.int32(pairs[0][0].shape[2]))

    def reorder(self, rows: Array) -> Self:
        """A cache whose row i is row `rows[i]` of this one."""
        keys, values = (tuple(x[rows] for x in side) for side in (self.keys, self.values))
        return self.replace(keys=keys, values=values)


@struct.dataclass
class WindowCache(KVCache):
    """A cache that keeps, of a layer with a window, the last positions alone: position p is in slot `p % slots`.

    It is the cache of a compiled loop, with an attention mask as wide as `max_length`. A layer with a window has
    `min(max_length, window + spare)` slots: one call adds at most `spare + 1` positions, and `length` may go back by
    `spare`.
    """

    @classmethod
    def create(
        cls, config: ModelConfig, batch_size: int, max_length: int, dtype: Any = jnp.float32, spare: int = 0
    ) -> Self:
        """An empty cache for `batch_size` rows of up to `max_length` positions."""
        return cls._empty(config, batch_size, config.cache_slots(max_length, spare), dtype)


def cached_length(past_key_values: Any) -> Any:
    """The number of positions cached, of either form; 0 for None. That of a `KVCache` may be traced."""
    if past_key_values is None:
        return 0
    return past_key_values.length if isinstance(past_key_values, KVCache) else past_key_values[0][0].shape[2]


def open_cache(
    past_key_values: Any, windows: Sequence[int | None], new: int
) -> tuple[Sequence[Any], Any, list[int], Any]:
    """The cache for one call that adds `new` positions, by a model with so many `windows`, one a layer.

    Returns:
        Each layer's past, as `update` takes it; the number of positions cached, traced perhaps; for each layer the
        number of keys that queries are compared with, which for a `KVCache` is all that there is memory for; and `end`
        of `causal_mask` for layers with a window.

    Raises:
        InputError: `past_key_values` is no cache, has another number of layers, or has no room.
    """
    layers = len(windows)
    if past_key_values is None:
        return [None] * layers, 0, [new] * layers, None
    is_object = isinstance(past_key_values, KVCache)
    if not is_object and not isinstance(past_key_values, (tuple, list)):
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is a {kind}, expected a tuple of pairs or a KVCache")
    found = len(past_key_values.keys if is_object else past_key_values)
    if found != layers:
        raise InputError(f"past_key_values has {found} layers, expected {layers}")
    past = cached_length(past_key_values)
    if not is_object:
        return [(key, value, None) for key, value in past_key_values], past, [past + new] * layers, None
    pairs = list(zip(past_key_values.keys, past_key_values.values, strict=True))
    rooms = [key.shape[2] for key, _ in pairs]
    if isinstance(past_key_values, WindowCache):
        positions = past if new == 1 else past + jnp.arange(new)
        starts = [past if w is None else positions % n for w, n in zip(windows, rooms, strict=True)]
        return [(*pair, start) for pair, start in zip(pairs, starts, strict=True)], past, rooms, past + new
    end = new if isinstance(past, jax.core.Tracer) else int(past) + new
    if end > rooms[0]:
        raise InputError(f"the cache has room for {rooms[0]} positions, {end} are needed")
    return [(*pair, past) for pair in pairs], past, rooms, None


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
    """Write `new` (batch, kv_heads, new, head_dim) at `start` of one array of a `KVCache`, or each position at its own.

    Args:
        memory: (batch, kv_heads, slots, head_dim).
        new: (batch, kv_heads, new, head_dim).
        start: the slot of the first position, or (new,) the slots of all.
    """
    new = new.astype(memory.dtype)
    if jnp.ndim(start) == 0:
        return lax.dynamic_update_slice_in_dim(memory, new, start, axis=2)

    def write(i: Array, memory: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(memory, lax.dynamic_slice_in_dim(new, i, 1, 2), start[i], axis=2)

    return lax.fori_loop(0, new.shape[2], write, memory)


def _write_first(memory: Array, new: Array) -> Array:
    """Write `new` (batch, kv_heads, new, head_dim) as the first positions of one array; of too many, the last alone."""
    slots, count = memory.shape[2], new.shape[2]
    if count > slots:
        new = jnp.roll(new[:, :, -slots:], count % slots, axis=2)
    return _write(memory, new, 0)


def close_cache(past_key_values: Any, presents: list[tuple[Array, Array]], new: int, use_cache: bool) -> Any:
    """The cache that a call returns: of the kind that it was given; where none was, a tuple of pairs if wanted."""
    if isinstance(past_key_values, KVCache):
        keys, values = zip(*presents, strict=True)
        return past_key_values.replace(keys=keys, values=values, length=past_key_values.length + new)
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
