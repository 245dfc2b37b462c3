import pytest

from based_megatron.monitor.eta import Eta, Repeated
from based_megatron.monitor.progress import PhaseTime


@pytest.mark.parametrize(
    ("interval", "step", "times_left"),
    [
        (10, 0, 10),
        (10, 9, 10),
        (10, 10, 9),
        (10, 95, 1),
        (10, 100, 0),
        (30, 90, 1),
        (30, 89, 2),
        (30, 100, 0),
        (0, 50, 1),
        (0, 100, 0),
    ],
)
def test_what_is_left_of_an_interval(interval, step, times_left):
    """Times left of 100 steps: once more at the end, where that is no multiple of the interval."""
    assert Repeated(interval, times=2, seconds=8.0).seconds_left(step, 100) == 4.0 * times_left


def test_nothing_is_known_before_the_first_time():
    assert Repeated(10).seconds_left(0, 100) == 0.0


def test_steps_and_what_comes_between_them():
    eta = Eta(100, {"save": 25, "validation": 50})
    eta.add({"save": PhaseTime(1, 4.0), "log": PhaseTime(9, 99.0)})
    eta.add({"save": PhaseTime(1, 6.0), "validation": PhaseTime(1, 20.0)})
    assert eta.seconds(50, step_seconds=2.0, other_seconds=0.5) == 50 * 2.5 + 2 * 5.0 + 20.0
