"""Key/value caches. Both kinds are plain structures of tensors, and adding to one returns a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.tf.layers import static

Tensor: TypeAlias = tf.Tensor


class KVCache(NamedTuple):
    """Preallocated keys and values, for `max_length` positions.

    A named tuple, so that `tf.function`, `tf.while_loop` and XLA carry it as it is. Rows and heads are one dimension:
    so XLA writes in place, where with two of them it copies all of a layer, twice a step.

    Attributes:
        keys: one tensor a layer, (batch * kv_heads, max_length, head_dim).
        values: the same for values.
        length: scalar int32, the number of positions cached.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: Tensor

    @classmethod
    def create(cls, config: ModelConfig, batch_size: int, max_length: int, dtype: Any = "float32") -> Self:
        """An empty cache for `batch_size` rows of up to `max_length` positions."""
        layers = range(config.num_hidden_layers)
        shapes = [(batch_size * config.kv_heads_in(layer), max_length, config.head_dim) for layer in layers]
        keys, values = (tuple(ops.zeros(shape, dtype) for shape in shapes) for _ in range(2))
        return cls(keys, values, tf.constant(0, tf.int32))

    @property
    def max_length(self) -> int:
        """The number of positions that there is memory for."""
        return self.keys[0].shape[1]

    def get_seq_length(self) -> Tensor:
        """The number of positions cached."""
        return self.length

    def to_tuple(self, batch: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """All positions as a tuple of pairs, (batch, kv_heads, max_length, head_dim) each."""
        shape = (batch, -1, *self.keys[0].shape[1:])
        return tuple(
            (ops.reshape(k, shape), ops.reshape(v, shape)) for k, v in zip(self.keys, self.values, strict=True)
        )

    def begin_with(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Self:
        """The cache with the keys and values of a tuple of pairs in its first positions."""
        keys, values = (
            tuple(_write_first(*both) for both in zip(memory, side, strict=True))
            for memory, side in zip((self.keys, self.values), zip(*pairs, strict=True), strict=True)
        )
        return KVCache(keys, values, tf.constant(pairs[0][0].shape[2]))

    def reorder(self, rows: Tensor, batch: int) -> Self:
        """A cache whose row i is row `rows[i]` of the `batch` of this one."""

        def chosen(memory: Tensor) -> Tensor:
            heads = memory.shape[0] // batch
            indices = ops.reshape(rows[:, None] * heads + ops.arange(heads, dtype="int32"), (-1,))
            return tf.gather(memory, indices)

        return self._replace(keys=tuple(map(chosen, self.keys)), values=tuple(map(chosen, self.values)))


def _write_first(memory: Tensor, new: Tensor) -> Tensor:
    return ops.slice_update(memory, (0, 0, 0), ops.reshape(new, (memory.shape[0], -1, memory.shape[2])))


def cached_length(past_key_values: Any) -> Any:
    """The number of positions cached, of either form; 0 for None."""
    if past_key_values is None:
        return 0
    return past_key_values.length if isinstance(past_key_values, KVCache) else ops.shape(past_key_values[0][0])[2]


def open_cache(past_key_values: Any, layers: int, new: Any) -> tuple[Sequence[Any], Any, Any]:
    """The cache for one call that adds `new` positions.

    Returns:
        Each layer's past, as `update` takes it; the number of positions cached; and the number of keys that queries
        are compared with, which for a `KVCache` is all that there is memory for.

    Raises:
        InputError: `past_key_values` is no cache, has another number of layers, or has no room.
    """
    if past_key_values is None:
        return [None] * layers, 0, new
    is_object = isinstance(past_key_values, KVCache)
    if not isinstance(past_key_values, (tuple, list)):
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is a {kind}, expected a tuple of pairs or a KVCache")
    found = len(past_key_values.keys if is_object else past_key_values)
    if found != layers:
        raise InputError(f"past_key_values has {found} layers, expected {layers}")
    past = cached_length(past_key_values)
    if not is_object:
        return [(key, value, None) for key, value in past_key_values], past, past + new
    room, end = past_key_values.max_length, static(past + new)
    if end is not None and end > room:
        raise InputError(f"the cache has room for {room} positions, {end} are needed")
    return [(*pair, past) for pair in zip(past_key_values.keys, past_key_values.values, strict=True)], past, room


def update(past: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add key and value (batch, kv_heads, new, head_dim) to a layer's past; return all that are cached then.

    Raises:
        InputError: the cache has other rows or heads.
    """
    if past is None:
        return key, value
    old_key, old_value, start = past
    if start is None:
        return ops.concatenate([old_key, key], 2), ops.concatenate([old_value, value], 2)
    return _write(old_key, key, start), _write(old_value, value, start)


def _write(memory: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Write `new` (batch, kv_heads, new, head_dim) at `start` of one tensor of a `KVCache`; (batch, kv_heads, ...)."""
    batch, heads, length, width = ops.shape(new)
    if None not in (memory.shape[0], static(batch)) and memory.shape[0] != static(batch) * heads:
        raise InputError(f"the cache has {memory.shape[0]} rows times heads, expected {static(batch)} times {heads}")
    new = ops.cast(ops.reshape(new, (batch * heads, length, width)), memory.dtype)
    memory = ops.slice_update(memory, (0, start, 0), new)
    return ops.reshape(memory, (batch, heads, *memory.shape[1:]))


def close_cache(past_key_values: Any, presents: list[tuple[Tensor, Tensor]], new: Any, use_cache: bool) -> Any:
    """The cache that a call returns: of the kind that it was given; where none was, a tuple of pairs if wanted."""
    if isinstance(past_key_values, KVCache):
        shape = (-1, *past_key_values.keys[0].shape[1:])
        keys, values = (tuple(ops.reshape(x, shape) for x in side) for side in zip(*presents, strict=True))
        return KVCache(keys, values, past_key_values.length + new)
    return tuple(presents) if use_cache or past_key_values is not None else None


def padded_left(past_key_values: Any, length: int, batch: int, dtype: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """The positions cached, of either form, as a tuple of pairs with zeros before them, `length` positions in all."""
    cached = int(cached_length(past_key_values))
    pairs = past_key_values.to_tuple(batch) if isinstance(past_key_values, KVCache) else past_key_values
    pad = ((0, 0), (0, 0), (length - cached, 0), (0, 0))
    return tuple(tuple(tf.pad(tf.cast(x, dtype)[:, :, :cached], pad) for x in pair) for pair in pairs)
