"""The learning rate at points computed by hand."""

import math

import pytest

from based_megatron.config import OptimizerConfig, ScheduleConfig, load_config
from based_megatron.train.schedule import learning_rate

PEAK, LOW, START = 1e-3, 1e-4, 2e-4
SCHEDULE = ScheduleConfig(warmup_steps=10, warmup_lr=START, decay_steps=100, min_lr=LOW)


def rate(step: int, schedule: ScheduleConfig = SCHEDULE, total: int = 500) -> float:
    return learning_rate(step, OptimizerConfig(lr=PEAK), schedule, total)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-4),  # the first step
        (1, 2.8e-4),
        (5, 6e-4),
        (9, 9.2e-4),  # the last of the warmup
        (10, 1e-3),  # the peak; the cosine's clock starts here
        (35, 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way down
        (60, 5.5e-4),  # halfway
        (109, 1e-4 + 9e-4 * (1 + math.cos(0.99 * math.pi)) / 2),
        (110, 1e-4),
        (111, 1e-4),
        (499, 1e-4),
    ],
)
def test_warmup_then_cosine_then_the_floor(step, expected):
    assert rate(step) == pytest.approx(expected, rel=1e-12)


def test_the_cosine_takes_the_rest_of_the_run_unless_told():
    schedule = ScheduleConfig(warmup_steps=10, warmup_lr=START, decay_steps=0, min_lr=LOW)
    assert rate(10, schedule, total=50) == PEAK
    assert rate(30, schedule, total=50) == pytest.approx(5.5e-4)
    assert rate(49, schedule, total=50) > LOW
    assert rate(50, schedule, total=50) == pytest.approx(LOW)


def test_without_warmup_the_first_step_is_the_peak():
    assert rate(0, ScheduleConfig(warmup_steps=0, decay_steps=100, min_lr=LOW)) == PEAK


def test_a_run_of_warmup_alone():
    schedule = ScheduleConfig(warmup_steps=10, warmup_lr=START, decay_steps=0, min_lr=LOW)
    assert rate(9, schedule, total=10) == pytest.approx(9.2e-4)


@pytest.mark.parametrize(
    ("preset", "step", "expected"),
    [
        ("based-360m", 0, 1e-6),
        ("based-360m", 100, 4.005e-4),
        ("based-360m", 200, 8e-4),
        ("based-360m", 10_100, 4.4e-4),
        ("based-360m", 20_000, 8e-5),
        ("based-1b-50b", 1_000, 8e-4),
        ("based-1b-50b", 50_500, 4.4e-4),
        ("based-1b-50b", 100_000, 8e-5),
    ],
)
def test_released_schedules(preset, step, expected):
    config = load_config(preset)
    assert learning_rate(step, config.optimizer, config.schedule, config.train.steps) == pytest.approx(expected)
