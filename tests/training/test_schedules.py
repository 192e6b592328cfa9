"""Every schedule against values written from its formula."""

import math

import pytest

from olmozoo.training.config import SchedulerConfig
from olmozoo.training.schedules import SCHEDULES, clipping_norm, learning_rate

PEAK = 8e-4


def rate(name, current, total=100, bolted_on=None, **fields):
    return learning_rate(SchedulerConfig(name=name, **fields), PEAK, current, total, bolted_on)


@pytest.mark.parametrize(
    ("name", "current", "expected"),
    [
        ("cosine_with_warmup", 40, PEAK * (0.25 + 0.75 * (0.5 + 0.5 * math.cos(math.pi / 3)))),
        ("cosine_with_warmup", 99, PEAK * (0.25 + 0.75 * math.cos(math.pi * 89 / 90 / 2) ** 2)),
        ("cosine_with_warmup", 100, PEAK / 4),
        ("cosine_with_warmup", 500, PEAK / 4),
        ("linear_with_warmup", 55, PEAK * 0.625),
        ("linear_with_warmup", 100, PEAK / 4),
        ("linear_with_warmup", 101, PEAK / 4),
        ("inverse_sqrt_with_warmup", 40, PEAK / 2),
        ("inverse_sqrt_with_warmup", 1000, PEAK / 10),
        ("max_scheduler", 40, PEAK * (0.25 + 0.75 * 0.75)),
        ("max_scheduler", 99, PEAK / math.sqrt(9.9)),
        ("constant", 1, PEAK),
        ("constant", 1000, PEAK),
        ("constant_with_warmup", 10, PEAK),
        ("constant_with_warmup", 1000, PEAK),
        ("cosine_linear_envelope", 40, PEAK * (0.25 + 2 / 3 * 0.75 * 0.75)),
        ("cosine_linear_envelope", 100, PEAK / 4),
    ],
)
def test_values(name, current, expected):
    assert rate(name, current, t_warmup=10, alpha_f=0.25) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant"}))
def test_the_warmup_is_a_line_from_its_start_to_the_peak(name):
    rates = [rate(name, step, t_warmup=4, warmup_min_lr=2e-4) for step in range(1, 5)]
    assert rates == pytest.approx([3.5e-4, 5e-4, 6.5e-4, 8e-4])
    assert rate(name, 1, t_warmup=4) == pytest.approx(2e-4)  # from 0, and the first step is not at 0


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_t_max_goes_before_the_duration(name):
    assert rate(name, 30, total=100, t_warmup=10, t_max=50) == rate(name, 30, total=50, t_warmup=10)


def test_a_linear_run_to_zero_ends_at_exactly_zero():
    assert rate("linear_with_warmup", 100, alpha_f=0.0) == 0.0
    assert rate("linear_with_warmup", 99, alpha_f=0.0) > 0


def test_a_second_warmup_rises_from_zero_to_the_schedule():
    fields = {"t_warmup": 10, "alpha_f": 0.25}
    reached = rate("linear_with_warmup", 50, **fields)
    assert rate("linear_with_warmup", 39, bolted_on=40, **fields) == 0
    assert rate("linear_with_warmup", 40, bolted_on=40, **fields) == 0
    assert rate("linear_with_warmup", 43, bolted_on=40, **fields) == pytest.approx(0.3 * reached)
    assert rate("linear_with_warmup", 50, bolted_on=40, **fields) == reached
    assert rate("linear_with_warmup", 60, bolted_on=40, **fields) == rate("linear_with_warmup", 60, **fields)


def test_clipping_warms_up():
    warm = SchedulerConfig(grad_clip_warmup_steps=3, grad_clip_warmup_factor=10.0)
    assert [clipping_norm(warm, 0.5, step) for step in (1, 3, 4)] == [5.0, 5.0, 0.5]
    assert clipping_norm(warm, None, 1) is None
    assert clipping_norm(SchedulerConfig(), 0.5, 1) == 0.5
