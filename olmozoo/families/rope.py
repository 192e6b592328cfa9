"""Rotary position frequencies (RoFormer, arXiv:2104.09864) for every scaling kind, formed once in NumPy.

A wing computes angles from positions with the three lines of `Rope.frequencies`, in its own framework, since positions
(and with them the length) may be traced there. All that is per model is here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmozoo.errors import ConfigError
from olmozoo.families.config import is_number
from olmozoo.typing import Array

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
FROM_ORIGINAL = ("yarn", "llama3", "longrope")  # kinds that go by the length before the text was stretched


@dataclass(frozen=True)
class Rope:
    """Frequencies of one model, as a pure function of the length (the largest position in a call + 1).

    Attributes:
        inv_freq: head_dim / 2 float64 numbers, radians per position.
        scale: factor on cos and sin (yarn and longrope; else 1).
        length: the length up to which `inv_freq` applies for `dynamic` and `longrope`.
        growth: head_dim / 2 exponents; set for `dynamic` only, where past `length` the frequencies are
            `inv_freq * (1 + factor * (n - length) / length) ** -growth`.
        factor: that factor.
        long_inv_freq: the head_dim / 2 frequencies past `length`; set for `longrope` only.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    length: int = 0
    growth: tuple[float, ...] | None = None
    factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None

    def frequencies(self, length: int) -> Array:
        """The (head_dim / 2,) float64 frequencies for a call whose largest position is `length` - 1."""
        inv_freq = np.asarray(self.inv_freq)
        if self.growth is not None:
            past = max(length - self.length, 0)
            return inv_freq * (1 + self.factor * past / self.length) ** -np.asarray(self.growth)
        if self.long_inv_freq is not None and length > self.length:
            return np.asarray(self.long_inv_freq)
        return inv_freq


def make_rope(theta: float, head_dim: int, max_position_embeddings: int, scaling: dict[str, Any] | None) -> Rope:
    """The frequencies that `rope_theta` and `rope_scaling` ask for.

    Sources: linear (position interpolation, arXiv:2306.15595), dynamic (NTK-aware), yarn (arXiv:2309.00071), longrope
    (arXiv:2402.13753), llama3 (the Llama 3.1 release).

    Raises:
        ConfigError: `scaling` names no known kind, a field of it is missing or cannot be, or the frequencies would not
            be finite.
    """
    try:
        with np.errstate(all="ignore"):  # what comes of it is checked
            rope = _make_rope(theta, head_dim, max_position_embeddings, scaling or {})
        numbers = [*rope.inv_freq, *(rope.growth or ()), *(rope.long_inv_freq or ()), rope.scale]
        if not np.isfinite(numbers).all():
            raise OverflowError("not all frequencies are finite")
    except ConfigError:
        raise
    except (ArithmeticError, ValueError) as error:  # such as a logarithm of 0
        raise ConfigError(
            f"rope_theta {theta} and rope_scaling {scaling} have no finite frequencies: {error}"
        ) from error
    return rope


def _make_rope(theta: float, head_dim: int, max_position_embeddings: int, scaling: dict[str, Any]) -> Rope:
    kind = rope_kind(scaling)
    if head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}, expected an even number: rotary embeddings rotate pairs")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"rope_scaling.partial_rotary_factor is {scaling['partial_rotary_factor']!r}, expected 1.0")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = float(theta) ** -exponents
    original = _number(scaling, "original_max_position_embeddings", max_position_embeddings, least=1)
    if kind == "default":
        return Rope(_tuple(inv_freq))
    if kind == "linear":
        return Rope(_tuple(inv_freq / _factor(scaling)))
    if kind == "dynamic":
        if head_dim < 4:
            raise ConfigError(f"head_dim is {head_dim}, expected at least 4 for dynamic rope_scaling")
        growth = exponents * head_dim / (head_dim - 2)
        return Rope(_tuple(inv_freq), length=max_position_embeddings, growth=_tuple(growth), factor=_factor(scaling))
    if kind == "yarn":
        return _yarn(inv_freq, float(theta), head_dim, original, scaling)
    if kind == "llama3":
        return Rope(_tuple(_llama3(inv_freq, original, scaling)))
    factor = _factor(scaling) if scaling.get("factor") is not None else max_position_embeddings / original
    stretched = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        _tuple(inv_freq / _factors(scaling, "short_factor", head_dim // 2)),
        scale=_number(scaling, "attention_factor", stretched),
        length=int(original),
        long_inv_freq=_tuple(inv_freq / _factors(scaling, "long_factor", head_dim // 2)),
    )


def rope_kind(scaling: dict[str, Any] | None) -> str:
    """The kind that a `rope_scaling` names, by either spelling of the key; `default` for none."""
    if not isinstance(scaling, (dict, type(None))):
        raise ConfigError(f"rope_scaling is {scaling!r}, expected an object or null")
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in KINDS:
        raise ConfigError(f"rope_scaling.rope_type is {kind!r}, expected one of {', '.join(KINDS)}")
    return str(kind)


def _yarn(inv_freq: Array, theta: float, head_dim: int, original: float, scaling: dict[str, Any]) -> Rope:
    """Interpolate the slow frequencies, keep the fast ones, ramp between (section 3.2); scale by section 3.4."""
    factor = _factor(scaling)
    fast = _number(scaling, "beta_fast", 32.0)
    slow = _number(scaling, "beta_slow", 1.0)
    if fast < slow:
        raise ConfigError(f"rope_scaling.beta_fast is {fast}, expected at least beta_slow = {slow}")

    def pair_of(rotations: float) -> float:  # the (fractional) pair that rotates so often over `original` positions
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(fast), pair_of(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    blended = inv_freq / factor * interpolated + inv_freq * (1 - interpolated)

    def log_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    numerator, denominator = _number(scaling, "mscale", 0.0), _number(scaling, "mscale_all_dim", 0.0)
    scale = log_scale(numerator) / log_scale(denominator) if numerator and denominator else log_scale(1.0)
    return Rope(_tuple(blended), scale=_number(scaling, "attention_factor", scale))


def _llama3(inv_freq: Array, original: float, scaling: dict[str, Any]) -> Array:
    """Divide the long waves by `factor`, keep the short ones, blend between."""
    factor = _factor(scaling)
    low = _number(scaling, "low_freq_factor", None)
    high = _number(scaling, "high_freq_factor", None)
    if high <= low:
        raise ConfigError(f"rope_scaling.high_freq_factor is {high}, expected more than low_freq_factor = {low}")
    rotations = original * inv_freq / (2 * math.pi)  # over the original context
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def _tuple(values: Array) -> tuple[float, ...]:
    return tuple(values.tolist())


def _factor(scaling: dict[str, Any]) -> float:
    factor = scaling.get("factor")
    if not is_number(factor) or factor is None or factor <= 1:
        raise ConfigError(f"rope_scaling.factor is {factor!r}, expected a float > 1")
    return float(factor)


def _number(scaling: dict[str, Any], name: str, default: float | None, least: float = 0) -> float:
    value = scaling.get(name)
    value = default if value is None else value
    if value is None or not is_number(value) or value < least:
        raise ConfigError(f"rope_scaling.{name} is {scaling.get(name)!r}, expected a number of at least {least}")
    return float(value)


def _factors(scaling: dict[str, Any], name: str, count: int) -> Array:
    values = scaling.get(name)
    if not isinstance(values, list) or len(values) != count or not all(is_number(v) and v > 0 for v in values):
        raise ConfigError(f"rope_scaling.{name} is {values!r}, expected a list of {count} positive numbers")
    return np.asarray(values, np.float64)
