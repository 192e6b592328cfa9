"""Key/value caches. Both kinds have the `update` and `get_seq_length` of Transformers' caches, which serve as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig


class KVCache:
    """Keys and values in memory set aside once, for `max_length` positions.

    Args:
        config: gives the number of layers and the shape of a layer.
        batch_size: rows.
        max_length: the most positions it can hold.
        dtype: of the keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layers = range(config.num_hidden_layers)
        shapes = [(batch_size, config.kv_heads_in(layer), max_length, config.head_dim) for layer in layers]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.lengths = [0] * len(shapes)
        self.max_length = max_length

    def get_seq_length(self, layer: int = 0) -> int:
        """The number of positions held."""
        return self.lengths[layer]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add key and value (batch, kv_heads, new, head_dim) of a layer; all that it holds then.

        Raises:
            InputError: there is no room, or the cache is of other rows or heads.
        """
        held, new = tuple(self.keys[layer].shape[:2]), tuple(key.shape[:2])
        if held != new:
            raise InputError(f"the cache is of {held} rows and heads, expected {new}")
        start = self.lengths[layer]
        end = start + key.shape[2]
        if end > self.max_length:
            raise InputError(f"the cache holds {self.max_length} positions, {end} were asked of it")
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        self.lengths[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Self:
        """The legacy form as a cache, which has no room for more."""
        cache = cls.__new__(cls)
        cache.keys, cache.values = ([pair[side] for pair in pairs] for side in range(2))
        cache.max_length = pairs[0][0].shape[2]
        cache.lengths = [cache.max_length] * len(pairs)
        return cache

    def fill(self, held: Any, length: int) -> None:
        """Take over what another cache holds, as the last of the first `length` positions; before it is padding."""
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            nothing = key[:, :, :0]
            old_key, old_value = held.update(nothing, nothing, layer)
            if old_key.shape != (shape := (*key.shape[:2], held.get_seq_length(), key.shape[3])):
                raise InputError(f"past_key_values is {tuple(old_key.shape)} in layer {layer}, expected {shape}")
            start = length - old_key.shape[2]
            key[:, :, :start] = 0
            value[:, :, :start] = 0
            key[:, :, start:length] = old_key
            value[:, :, start:length] = old_value
            self.lengths[layer] = length

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` is now."""
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]

    def rewind(self, length: int) -> None:
        """Forget what is past the first `length` positions."""
        self.lengths = [length] * len(self.lengths)

    def take(self, places: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and values at some positions, in the legacy form."""
        return tuple((k[:, :, places], v[:, :, places]) for k, v in zip(self.keys, self.values, strict=True))


class StaticCache(KVCache):
    """A cache whose every use has the same shapes, as `torch.compile` wants: attention sees all of its positions.

    What of it counts is for a mask (batch, 1, seq, max_length) to say; `places` says where the next keys go.
    """

    def __init__(self, cache: KVCache) -> None:
        self.__dict__.update(cache.__dict__)
        self.places = torch.zeros(0, dtype=torch.long)
        for tensor in (*self.keys, *self.values):
            tensor[:, :, self.lengths[0] :] = 0  # what is not written yet meets a weight of 0, and must not be NaN
            torch._dynamo.mark_static_address(tensor)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put key and value (batch, kv_heads, new, head_dim) of a layer at `places`; all of the layer."""
        self.keys[layer].index_copy_(2, self.places, key.to(self.keys[layer].dtype))
        self.values[layer].index_copy_(2, self.places, value.to(self.values[layer].dtype))
        return self.keys[layer], self.values[layer]


class TupleCache:
    """The legacy form as a cache: a tuple of (key, value) pairs that grow by concatenation."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.pairs = [tuple(pair) for pair in pairs]

    def get_seq_length(self, layer: int = 0) -> int:
        """The number of positions held."""
        return self.pairs[layer][0].shape[2] if layer < len(self.pairs) else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add key and value (batch, kv_heads, new, head_dim) of a layer; all that it holds then."""
        if layer == len(self.pairs):
            self.pairs.append((key, value))
        else:
            old_key, old_value = self.pairs[layer]
            self.pairs[layer] = (torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2))
        return self.pairs[layer]


def open_cache(past_key_values: Any, use_cache: bool, layers: int) -> Any:
    """The cache for one call: an object as it is, a legacy tuple wrapped, a new one if wanted, or None.

    Raises:
        InputError: `past_key_values` is no cache, or has another number of layers.
    """
    if past_key_values is None:
        return TupleCache() if use_cache else None
    if isinstance(past_key_values, (tuple, list)):
        if len(past_key_values) != layers:
            raise InputError(f"past_key_values has {len(past_key_values)} layers, expected {layers}")
        return TupleCache(past_key_values)
    if isinstance(past_key_values, KVCache) and len(past_key_values.keys) != layers:
        raise InputError(f"past_key_values has {len(past_key_values.keys)} layers, expected {layers}")
    if not hasattr(past_key_values, "update"):
        raise InputError(f"past_key_values is a {type(past_key_values).__name__}, expected a tuple of pairs or a cache")
    return past_key_values


def close_cache(cache: Any) -> Any:
    """What a call returns for the cache it was given: the kind that went in."""
    return tuple(cache.pairs) if isinstance(cache, TupleCache) else cache
