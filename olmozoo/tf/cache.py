"""Key/value caches. Both kinds are plain structures of tensors, and using one gives a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf
from keras import ops

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.tf.layers import static

Tensor = tf.Tensor


class KVCache(NamedTuple):
    """Keys and values in memory set aside once, for `max_length` positions.

    A named tuple, so that `tf.function`, `tf.while_loop` and XLA carry it as it is. Rows and heads are one dimension:
    so XLA writes in place, where with two of them it copies all of a layer, twice a step.

    Attributes:
        keys: one tensor a layer, (batch * kv_heads, max_length, head_dim).
        values: the same for values.
        length: scalar int32, the number of positions held.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, max_length: int, dtype: Any) -> Self:
        """A cache that holds nothing yet."""
        heads = [config.kv_heads_in(layer) for layer in range(config.num_hidden_layers)]
        keys, values = (
            tuple(ops.zeros((batch_size * kv_heads, max_length, config.head_dim), dtype) for kv_heads in heads)
            for _ in range(2)
        )
        return cls(keys, values, tf.constant(0, tf.int32))

    @property
    def max_length(self) -> int:
        """The most positions it can hold."""
        return self.keys[0].shape[1]

    def get_seq_length(self) -> Tensor:
        """The number of positions held."""
        return self.length

    def to_tuple(self, batch: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """All places in the legacy form, (batch, kv_heads, max_length, head_dim) each."""
        shape = (batch, -1, *self.keys[0].shape[1:])
        return tuple(
            (ops.reshape(k, shape), ops.reshape(v, shape)) for k, v in zip(self.keys, self.values, strict=True)
        )

    def begin_with(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Self:
        """The cache with the keys and values of a legacy form in its first places."""
        layers = zip(self.keys, self.values, pairs, strict=True)
        new = [(_put_first(keys, key), _put_first(values, value)) for keys, values, (key, value) in layers]
        keys, values = zip(*new, strict=True)
        return KVCache(keys, values, tf.constant(pairs[0][0].shape[2]))

    def reorder(self, rows: Tensor, batch: int) -> Self:
        """A cache whose row i is row `rows[i]` of the `batch` of this one."""

        def chosen(held: Tensor) -> Tensor:
            heads = held.shape[0] // batch
            places = ops.reshape(rows[:, None] * heads + ops.arange(heads), (-1,))
            return tf.gather(held, places)

        return self._replace(keys=tuple(map(chosen, self.keys)), values=tuple(map(chosen, self.values)))


def _put_first(held: Tensor, new: Tensor) -> Tensor:
    return ops.slice_update(held, (0, 0, 0), ops.reshape(new, (held.shape[0], -1, held.shape[2])))


def extend(past: tuple[Tensor, ...] | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add key and value (batch, kv_heads, new, head_dim) to what one layer holds; all that it holds then, so shaped."""
    if past is None:
        return key, value
    old_key, old_value, *length = past
    if length:
        return write(old_key, key, *length), write(old_value, value, *length)
    return ops.concatenate([old_key, key], 2), ops.concatenate([old_value, value], 2)  # the legacy form grows


def write(held: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Put `new` (batch, kv_heads, new, head_dim) at `start` of one tensor of a `KVCache`; (batch, kv_heads, ...).

    Raises:
        InputError: the cache is of other rows or heads.
    """
    batch, heads, length, width = ops.shape(new)
    if None not in (held.shape[0], static(batch)) and held.shape[0] != static(batch) * heads:
        raise InputError(f"the cache is of {held.shape[0]} rows times heads, expected {static(batch)} times {heads}")
    new = ops.cast(ops.reshape(new, (batch * heads, length, width)), held.dtype)
    held = ops.slice_update(held, (0, start, 0), new)
    return ops.reshape(held, (batch, heads, *held.shape[1:]))


def cache_lengths(past_key_values: Any, new: Any) -> tuple[Any, Any]:
    """The positions held before `new` ones are added, and the keys that queries meet then."""
    if isinstance(past_key_values, KVCache):
        return past_key_values.length, past_key_values.max_length
    past = 0 if past_key_values is None else ops.shape(past_key_values[0][0])[2]
    return past, past + new


def open_cache(past_key_values: Any, layers: int, new: Any) -> Sequence[tuple[Tensor, ...] | None]:
    """What each layer holds: (key, value), those and the length for a `KVCache`, or None.

    Raises:
        InputError: `past_key_values` is no cache, has another number of layers, or no room for `new` positions.
    """
    if past_key_values is None:
        return [None] * layers
    if not isinstance(past_key_values, (tuple, list)):
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is a {kind}, expected a tuple of pairs or a KVCache")
    cache = past_key_values
    pasts = [(*pair, cache.length) for pair in zip(*cache[:2], strict=True)] if isinstance(cache, KVCache) else cache
    if len(pasts) != layers:
        raise InputError(f"past_key_values has {len(pasts)} layers, expected {layers}")
    if isinstance(cache, KVCache):
        end = static(cache.length + new)
        if end is not None and end > cache.max_length:
            raise InputError(f"the cache holds {cache.max_length} positions, {end} were asked of it")
    return pasts


def close_cache(past_key_values: Any, presents: list[tuple[Tensor, Tensor]], use_cache: bool, new: Any) -> Any:
    """What a call returns: a cache of the kind that went in; where none went in, the legacy form, if one is wanted."""
    if isinstance(past_key_values, KVCache):
        shape = (-1, *past_key_values.keys[0].shape[1:])
        keys, values = (tuple(ops.reshape(x, shape) for x in side) for side in zip(*presents, strict=True))
        return KVCache(keys, values, past_key_values.length + new)
    return tuple(presents) if use_cache or past_key_values is not None else None
