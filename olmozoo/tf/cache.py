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
        return cls._empty(config, batch_size, [max_length] * config.num_hidden_layers, dtype)

    @classmethod
    def _empty(cls, config: ModelConfig, batch_size: int, slots: list[int], dtype: Any) -> Self:
        """An empty cache with so many slots in each layer."""
        shapes = [(batch_size * config.kv_heads_in(layer), n, config.head_dim) for layer, n in enumerate(slots)]
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
        return self._replace(keys=keys, values=values, length=tf.constant(pairs[0][0].shape[2]))

    def reorder(self, rows: Tensor, batch: int) -> Self:
        """A cache whose row i is row `rows[i]` of the `batch` of this one."""

        def chosen(memory: Tensor) -> Tensor:
            heads = memory.shape[0] // batch
            indices = ops.reshape(rows[:, None] * heads + ops.arange(heads, dtype="int32"), (-1,))
            return tf.gather(memory, indices)

        return self._replace(keys=tuple(map(chosen, self.keys)), values=tuple(map(chosen, self.values)))


class WindowCache(KVCache):
    """A cache that keeps, of a layer with a window, the last positions alone: position p is in slot `p % slots`.

    It is the cache of a compiled loop, with an attention mask as wide as `max_length`. A layer with a window has
    `min(max_length, window + spare)` slots: one call adds at most `spare + 1` positions, and `length` may go back by
    `spare`.
    """

    __slots__ = ()

    @classmethod
    def create(
        cls, config: ModelConfig, batch_size: int, max_length: int, dtype: Any = "float32", spare: int = 0
    ) -> Self:
        """An empty cache for `batch_size` rows of up to `max_length` positions."""
        return cls._empty(config, batch_size, config.cache_slots(max_length, spare), dtype)


def cached_length(past_key_values: Any) -> Any:
    """The number of positions cached, of either form; 0 for None."""
    if past_key_values is None:
        return 0
    return past_key_values.length if isinstance(past_key_values, KVCache) else ops.shape(past_key_values[0][0])[2]


def open_cache(
    past_key_values: Any, windows: Sequence[int | None], new: Any
) -> tuple[Sequence[Any], Any, list[Any], Any]:
    """The cache for one call that adds `new` positions, by a model with so many `windows`, one a layer.

    Returns:
        Each layer's past, as `update` takes it; the number of positions cached; for each layer the number of keys that
        queries are compared with, which for a `KVCache` is all that there is memory for; and `end` of `causal_mask` for
        layers with a window.

    Raises:
        InputError: `past_key_values` is no cache, has another number of layers, or has no room.
    """
    layers = len(windows)
    if past_key_values is None:
        return [None] * layers, 0, [new] * layers, None
    is_object = isinstance(past_key_values, KVCache)
    if not isinstance(past_key_values, (tuple, list)):
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is a {kind}, expected a tuple of pairs or a KVCache")
    found = len(past_key_values.keys if is_object else past_key_values)
    if found != layers:
        raise InputError(f"past_key_values has {found} layers, expected {layers}")
    past = cached_length(past_key_values)
    if not is_object:
        return [(key, value, None) for key, value in past_key_values], past, [past + new] * layers, None
    pairs = list(zip(past_key_values.keys, past_key_values.values, strict=True))
    rooms = [key.shape[1] for key, _ in pairs]
    if isinstance(past_key_values, WindowCache):
        positions = past if static(new) == 1 else past + tf.range(new)
        starts = [past if w is None else positions % n for w, n in zip(windows, rooms, strict=True)]
        return [(*pair, start) for pair, start in zip(pairs, starts, strict=True)], past, rooms, past + new
    end = static(past + new)
    if end is not None and end > rooms[0]:
        raise InputError(f"the cache has room for {rooms[0]} positions, {end} are needed")
    return [(*pair, past) for pair in pairs], past, rooms, None


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
    """Write `new` at `start` of one tensor of a `KVCache`, or each position at its own.

    Args:
        memory: (batch * kv_heads, slots, head_dim).
        new: (batch, kv_heads, new, head_dim).
        start: the slot of the first position, or (new,) the slots of all.

    Returns:
        (batch, kv_heads, slots, head_dim).
    """
    batch, heads, length, width = ops.shape(new)
    if None not in (memory.shape[0], static(batch)) and memory.shape[0] != static(batch) * heads:
        raise InputError(f"the cache has {memory.shape[0]} rows times heads, expected {static(batch)} times {heads}")
    new = ops.cast(ops.reshape(new, (batch * heads, length, width)), memory.dtype)
    if len(start.shape) == 0:
        memory = ops.slice_update(memory, (0, start, 0), new)
    else:

        def write(i: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, ops.slice_update(
                memory, (0, start[i], 0), tf.slice(new, (0, i, 0), (batch * heads, 1, width))
            )

        _, memory = tf.while_loop(lambda i, _: i < length, write, (tf.constant(0), memory))
    return ops.reshape(memory, (batch, heads, *memory.shape[1:]))


def _write_first(memory: Tensor, new: Tensor) -> Tensor:
    """Write `new` (batch, kv_heads, new, head_dim) as the first positions of a tensor; of too many, the last alone."""
    slots, count = memory.shape[1], new.shape[2]
    if count > slots:
        new = tf.roll(new[:, :, -slots:], count % slots, 2)
    return ops.slice_update(memory, (0, 0, 0), ops.reshape(new, (memory.shape[0], -1, memory.shape[2])))


def close_cache(past_key_values: Any, presents: list[tuple[Tensor, Tensor]], new: Any, use_cache: bool) -> Any:
    """The cache that a call returns: of the kind that it was given; where none was, a tuple of pairs if wanted."""
    if isinstance(past_key_values, KVCache):
        keys, values = (tuple(ops.reshape(x, (-1, *x.shape[2:])) for x in side) for side in zip(*presents, strict=True))
        return past_key_values._replace(keys=keys, values=values, length=past_key_values.length + new)
    return tuple(presents) if use_cache or past_key_values is not None else None


def padded_left(past_key_values: Any, length: int, batch: int, dtype: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """The positions cached, of either form, as a tuple of pairs with zeros before them, `length` positions in all."""
    cached = int(cached_length(past_key_values))
    pairs = past_key_values.to_tuple(batch) if isinstance(past_key_values, KVCache) else past_key_values
    pad = ((0, 0), (0, 0), (length - cached, 0), (0, 0))
    return tuple(tuple(tf.pad(tf.cast(x, dtype)[:, :, :cached], pad) for x in pair) for pair in pairs)
