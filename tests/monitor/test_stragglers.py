import pytest

from based_megatron.monitor.stragglers import LOG_POINTS, Straggler, Stragglers


def rounds(stragglers: Stragglers, *seconds: list[float]) -> list[list[Straggler]]:
    return [stragglers.add(each) for each in seconds]


def test_a_rank_that_stays_slow_is_named_once():
    slow = [2.0, 2.0, 3.0, 2.0]
    *before, named, after = rounds(Stragglers(stages=1), *[slow] * (LOG_POINTS + 1))
    assert before == [[]] * (LOG_POINTS - 1)
    assert named == [Straggler(rank=2, slower=0.5, seconds=3.0, median_seconds=2.0)] and after == []


def test_a_good_log_point_starts_the_count_anew():
    slow, even = [2.0, 2.0, 3.0], [2.0, 2.0, 2.0]
    found = rounds(Stragglers(stages=1), *[slow] * (LOG_POINTS - 1), even, *[slow] * LOG_POINTS)
    assert [len(each) for each in found] == [0] * (2 * LOG_POINTS - 1) + [1]


@pytest.mark.parametrize(("seconds", "named"), [(2.39, 0), (2.41, 1)])
def test_a_little_slower_is_not_slow(seconds, named):
    found = rounds(Stragglers(stages=1), *[[2.0, 2.0, seconds]] * LOG_POINTS)
    assert sum(map(len, found)) == named


def test_stages_have_work_of_their_own():
    """The second stage takes twice the time of the first; only one rank of it is slow."""
    found = rounds(Stragglers(stages=2), *[[1.0, 1.0, 1.0, 2.0, 3.0, 2.0]] * LOG_POINTS)
    assert [straggler.rank for straggler in found[-1]] == [4]
