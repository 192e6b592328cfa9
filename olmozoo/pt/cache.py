"""Key/value caches. Both kinds have the `update` and `get_seq_length` of Transformers' caches, which serve as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from olmozoo.errors import InputError
from olmozoo.families.base import ModelConfig


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
            InputError: there is no room.
        """
        start = self.lengths[layer]
        end = start + key.shape[2]
        if end > self.max_length:
            raise InputError(f"the cache holds {self.max_length} positions, {end} were asked of it")
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        self.lengths[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


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
    if not hasattr(past_key_values, "update"):
        raise InputError(f"past_key_values is a {type(past_key_values).__name__}, expected a tuple of pairs or a cache")
    return past_key_values


def close_cache(cache: Any) -> Any:
    """What a call returns for the cache it was given: the kind that went in."""
    return tuple(cache.pairs) if isinstance(cache, TupleCache) else cache
