"""The learning rate of a step, and the bound of clipping: AI2's schedules, in Python floats.

With the step or the tokens so far c, including this step's; the end T; the warmup w; the peak b; and the last value
e = alpha_f * b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmozoo.training.config import SchedulerConfig


def _cosine(c: float, total: float, w: float, b: float, e: float) -> float:
    return e if c >= total else e + (b - e) * (1 + math.cos(math.pi * (c - w) / (total - w))) / 2


def _linear(c: float, total: float, w: float, b: float, e: float) -> float:
    return e if c >= total else b - (b - e) * (c - w) / (total - w)


def _inverse_sqrt(c: float, total: float, w: float, b: float, e: float) -> float:
    return b * math.sqrt(w / max(w, c))


def _envelope(c: float, total: float, w: float, b: float, e: float) -> float:
    if c >= total:
        return e
    part = (c - w) / (total - w)
    return e + (1 - part) * (b - e) * (1 + math.cos(math.pi * part)) / 2


def _constant(c: float, total: float, w: float, b: float, e: float) -> float:
    return b


def _highest(c: float, total: float, w: float, b: float, e: float) -> float:
    return max(_cosine(c, total, w, b, e), _inverse_sqrt(c, total, w, b, e))


SCHEDULES: dict[str, Callable[[float, float, float, float, float], float]] = {
    "cosine_with_warmup": _cosine,
    "linear_with_warmup": _linear,
    "inverse_sqrt_with_warmup": _inverse_sqrt,
    "max_scheduler": _highest,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "cosine_linear_envelope": _envelope,
}


def learning_rate(
    scheduler: SchedulerConfig, peak: float, current: int, total: int, bolted_on: int | None = None
) -> float:
    """The learning rate of a step.

    Args:
        scheduler: the schedule.
        peak: the highest learning rate.
        current: the step, from 1; or the tokens seen, including this step's.
        total: steps or tokens of the run; `scheduler.t_max` takes precedence.
        bolted_on: where a second warmup starts; see `SchedulerConfig.bolt_on_warmup`.
    """
    if bolted_on is not None:
        end = bolted_on + scheduler.t_warmup
        if current < bolted_on:
            return 0.0
        if current < end:
            return learning_rate(scheduler, peak, end, total) * (current - bolted_on) / (end - bolted_on)
    warmup = scheduler.t_warmup
    if scheduler.name != "constant" and current < warmup:
        return scheduler.warmup_min_lr + (peak - scheduler.warmup_min_lr) * current / warmup
    end = total if scheduler.t_max is None else scheduler.t_max
    return SCHEDULES[scheduler.name](current, end, warmup, peak, scheduler.alpha_f * peak)


def clipping_norm(scheduler: SchedulerConfig, bound: float | None, current: int) -> float | None:
    """The bound of a step's clipping; `current` as in `learning_rate`."""
    if bound is None or scheduler.grad_clip_warmup_steps is None or scheduler.grad_clip_warmup_factor is None:
        return bound
    return bound * scheduler.grad_clip_warmup_factor if current <= scheduler.grad_clip_warmup_steps else bound
