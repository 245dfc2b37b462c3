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
    assert Repeated(interval, times=2, seconds=8.0).seconds_left(step, 100, 0.0) == 4.0 * times_left


def test_nothing_is_known_before_the_first_time():
    assert Repeated(10, 5.0).seconds_left(0, 100, 99.0) == 0.0


def test_steps_and_what_comes_between_them():
    eta = Eta(100, {"save": Repeated(25), "validation": Repeated(50)})
    eta.add({"save": PhaseTime(1, 4.0), "log": PhaseTime(9, 99.0)})
    eta.add({"save": PhaseTime(1, 6.0), "validation": PhaseTime(1, 20.0)})
    assert eta.seconds(50, step_seconds=2.0, other_seconds=0.5) == 50 * 2.5 + 2 * 5.0 + 20.0


def test_saves_by_the_clock_come_while_others_take_their_time():
    """50 steps of 2 s and a validation of 20 s: a save of 5 s each 20 s leaves 15 s for them, so 8 more and one at the end."""
    eta = Eta(100, {"save": Repeated(0, 20.0), "validation": Repeated(50)})
    eta.add({"save": PhaseTime(2, 10.0), "validation": PhaseTime(1, 20.0)})
    assert eta.seconds(50, step_seconds=2.0, other_seconds=0.0) == 100.0 + 20.0 + 9 * 5.0


def test_the_shorter_of_two_intervals_counts():
    assert Repeated(10, 1000.0, times=1, seconds=5.0).seconds_left(0, 100, 200.0) == 10 * 5.0
    assert Repeated(50, 25.0, times=1, seconds=5.0).seconds_left(0, 100, 200.0) == 10 * 5.0
