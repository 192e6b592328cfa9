"""Key/value caches. A layer adds its keys and values by `update`, as to a cache of Transformers, which serves as well.

Caches of PyTorch change in place, where those of Keras and Flax are values: a layer gets the whole cache here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig


class KVCache:
    """Preallocated keys and values, for `max_length` positions.

    Memory is allocated when a layer's first keys come, on their device and for as many heads: on several devices, a
    layer may be on another one, or have a part of the heads. Until then tensors are on the meta device.

    Args:
        keys: one tensor a layer, (batch, kv_heads, max_length, head_dim).
        values: the same for values.
        length: the number of positions cached.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int = 0) -> None:
        self.keys, self.values = list(keys), list(values)
        self.lengths = [length] * len(self.keys)  # within a call, some layers are ahead of others

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An empty cache for `batch_size` rows of up to `max_length` positions."""
        layers = range(config.num_hidden_layers)
        shapes = [(batch_size, config.kv_heads_in(layer), max_length, config.head_dim) for layer in layers]
        keys, values = ([torch.empty(shape, dtype=dtype, device="meta") for shape in shapes] for _ in range(2))
        return cls(keys, values)

    @property
    def max_length(self) -> int:
        """The number of positions that there is memory for."""
        return self.keys[0].shape[2]

    def get_seq_length(self, layer: int = 0) -> int:
        """The number of positions cached."""
        return self.lengths[layer]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add key and value (batch, kv_heads, new, head_dim) of a layer; return all that are cached then.

        Raises:
            InputError: there is no room, or the cache has other rows or heads.
        """
        self.check_rows(key, layer)
        start = self.lengths[layer]
        end = start + key.shape[2]
        if end > self.max_length:
            raise InputError(f"the cache has room for {self.max_length} positions, {end} are needed")
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        self.lengths[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def check_rows(self, key: Tensor, layer: int) -> None:
        """Raise an InputError unless new keys have the rows and heads of those cached; the first ones allocate."""
        self._allocate(key, layer)
        cached, new = tuple(self.keys[layer].shape[:2]), tuple(key.shape[:2])
        if cached != new:
            raise InputError(f"the cache has {cached} rows and heads, expected {new}")

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer so far."""
        end = self.lengths[layer]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _allocate(self, key: Tensor, layer: int) -> None:
        """Allocate the memory of a layer, if it is not yet, for the rows of the cache and the heads of `key`."""
        if self.keys[layer].is_meta and key.shape[0] == self.keys[layer].shape[0]:
            shape = (key.shape[0], key.shape[1], *self.keys[layer].shape[2:])
            for side in (self.keys, self.values):
                side[layer] = torch.empty(shape, dtype=side[layer].dtype, device=key.device)

    def begin_with(self, cache: Any, length: int, device: torch.device) -> None:
        """Copy another cache to the end of the first `length` positions; zeros before it pad it on the left."""
        for layer, empty in enumerate(self.keys):
            if hasattr(cache, "cached"):
                old_key, old_value = cache.cached(layer)
            else:  # of another library: where nothing is added, it returns what is cached
                none = torch.empty_like(empty[:, :, :0], device=device)
                old_key, old_value = cache.update(none, none, layer)
            self._allocate(old_key, layer)
            key = self.keys[layer]
            if old_key.shape != (shape := (*key.shape[:2], cache.get_seq_length(), key.shape[3])):
                raise InputError(f"past_key_values is {tuple(old_key.shape)} in layer {layer}, expected {shape}")
            left = (0, 0, length - old_key.shape[2], 0)
            self.update(pad(old_key, left), pad(old_value, left), layer)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i by row `rows[i]`."""
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]

    def rewind(self, length: int) -> None:
        """Drop all but the first `length` positions."""
        self.lengths = [length] * len(self.lengths)

    def take(self, positions: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and values at some positions, as a tuple of pairs."""
        return tuple((k[:, :, positions], v[:, :, positions]) for k, v in zip(self.keys, self.values, strict=True))


class WindowCache(KVCache):
    """A cache that keeps, of a layer with a window, the positions that the next query sees and some more.

    `update` returns at least what the new queries see; these are the last of all keys, as `attention` takes them. When
    the memory of such a layer is full, what the window sees moves to its front.

    Args:
        windows: the window of each layer, or None.
        spare: positions beyond a window; what is cached can be rewound by so many.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, spare: int, dtype: torch.dtype | None = None
    ) -> None:
        slots = config.cache_slots(max_length, spare)
        shapes = [(batch_size, config.kv_heads_in(layer), n, config.head_dim) for layer, n in enumerate(slots)]
        super().__init__(*([torch.empty(shape, dtype=dtype, device="meta") for shape in shapes] for _ in range(2)))
        self.windows, self.limit = config.windows, max_length
        self.firsts = [0] * len(shapes)  # the positions that memory begins with

    @property
    def max_length(self) -> int:
        """See `KVCache.max_length`; layers with a window have memory for fewer."""
        return self.limit

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `KVCache.update`; of a layer with a window, the last keys alone are returned."""
        self.check_rows(key, layer)
        memory, new, room = (self.keys[layer], self.values[layer]), (key, value), self.keys[layer].shape[2]
        used = self.lengths[layer] - self.firsts[layer]
        end = used + key.shape[2]
        self.lengths[layer] += key.shape[2]
        if end <= room:
            for old, x in zip(memory, new, strict=True):
                old[:, :, used:end] = x
            return memory[0][:, :, :end], memory[1][:, :, :end]
        window = self.windows[layer]
        if window is None:
            raise InputError(f"the cache has room for {room} positions, {end} are needed")
        kept = min(used, window - 1)
        both = [
            torch.cat([old[:, :, used - kept : used], x.to(old.dtype)], 2) for old, x in zip(memory, new, strict=True)
        ]
        stored = min(both[0].shape[2], room)
        for old, x in zip(memory, both, strict=True):
            old[:, :, :stored] = x[:, :, -stored:]
        self.firsts[layer] = self.lengths[layer] - stored
        return both[0], both[1]

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer that are kept, the last ones."""
        end = self.lengths[layer] - self.firsts[layer]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class StaticCache(KVCache):
    """A cache whose every use has the same shapes, as `torch.compile` wants: attention sees all of its positions.

    A mask (batch, max_length) says which of them are real, and `positions` where the next keys go. A layer that keeps a
    window alone has position p in slot `p % slots`.

    Args:
        cache: the cache whose memory, and what is in it, this one takes over.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache.keys, cache.values, cache.get_seq_length())
        self.limit = cache.max_length
        self.positions = torch.tensor([self.lengths[0]])
        for layer in range(len(self.keys)):
            used = cache.cached(layer)[0].shape[2]
            first = self.lengths[layer] - used
            for side in (self.keys, self.values):
                side[layer][:, :, used:] = 0  # a weight of 0 times memory that was never written might be NaN
                if first:
                    side[layer] = side[layer].roll(first, 2)
                # So CUDA graphs use the memory where it is. Not public; see
                # test_a_static_cache_is_at_a_static_address.
                torch._dynamo.mark_static_address(side[layer])

    def reorder(self, rows: Tensor) -> None:
        """See `KVCache.reorder`; the memory stays where it is, or CUDA graphs would not be used."""
        for side in (self.keys, self.values):
            for tensor in side:
                tensor.copy_(tensor.index_select(0, rows))

    @property
    def max_length(self) -> int:
        """See `KVCache.max_length`; layers with a window have memory for fewer."""
        return self.limit

    def get_seq_length(self, layer: int = 0) -> Tensor:
        """The number of positions before `positions`, a scalar."""
        return self.positions[0]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write key and value (batch, kv_heads, new, head_dim) of a layer at `positions`; return all of the layer."""
        slots = self.positions % self.keys[layer].shape[2]
        self.keys[layer].index_copy_(2, slots, key.to(self.keys[layer].dtype))
        self.values[layer].index_copy_(2, slots, value.to(self.values[layer].dtype))
        return self.keys[layer], self.values[layer]


class TupleCache:
    """A tuple of (key, value) pairs, one a layer, as a cache; they grow by concatenation."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.pairs = [tuple(pair) for pair in pairs]

    def get_seq_length(self, layer: int = 0) -> int:
        """The number of positions cached."""
        return self.pairs[layer][0].shape[2] if layer < len(self.pairs) else 0

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer so far."""
        return self.pairs[layer]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add key and value (batch, kv_heads, new, head_dim) of a layer; return all that are cached then."""
        if layer == len(self.pairs):
            self.pairs.append((key, value))
        else:
            old_key, old_value = self.pairs[layer]
            self.pairs[layer] = (torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2))
        return self.pairs[layer]


def open_cache(past_key_values: Any, layers: int, use_cache: bool) -> Any:
    """The cache for one call: an object as it is, a tuple of pairs wrapped, a new one if wanted, or None.

    Raises:
        InputError: `past_key_values` is no cache, or has another number of layers.
    """
    if past_key_values is None:
        return TupleCache() if use_cache else None
    cache: TupleCache | KVCache
    if isinstance(past_key_values, (tuple, list)):
        found, cache = len(past_key_values), TupleCache(past_key_values)
    elif isinstance(past_key_values, KVCache):
        found, cache = len(past_key_values.keys), past_key_values
    elif hasattr(past_key_values, "update"):
        return past_key_values
    else:
        raise InputError(f"past_key_values is a {type(past_key_values).__name__}, expected a tuple of pairs or a cache")
    if found != layers:
        raise InputError(f"past_key_values has {found} layers, expected {layers}")
    return cache


def close_cache(cache: Any) -> Any:
    """The cache that a call returns: of the kind that it was given."""
    return tuple(cache.pairs) if isinstance(cache, TupleCache) else cache


def cached_length(cache: Any) -> int:
    """The number of positions cached, of any form; 0 for None."""
    if isinstance(cache, tuple):
        return int(cache[0][0].shape[2])
    return 0 if cache is None else cache.get_seq_length()


def key_slots(cache: Any, new: int, layer: int, window: int | None) -> tuple[int, Any]:
    """The number of keys that a layer's queries are compared with in a call that adds `new` positions.

    And `end` of `causal_mask`, for a layer with a window.
    """
    if not isinstance(cache, StaticCache):
        return cached_length(cache) + new, None
    return cache.keys[layer].shape[2], None if window is None else cache.get_seq_length() + new
