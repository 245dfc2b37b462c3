import pytest

from based_megatron.monitor import progress as module
from based_megatron.monitor.progress import Beat, PhaseTime, Progress


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, which a test sets."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_seconds_of_phases(now):
    progress = Progress()
    for phase, begins in (("data", 110.0), ("forward", 111.0), ("data", 115.0), ("end", 118.0)):
        now[0] = begins
        progress.enter(phase)
    assert progress.take() == {"start-up": PhaseTime(1, 10.0), "data": PhaseTime(2, 4.0), "forward": PhaseTime(1, 4.0)}
    assert progress.take() == {}


def test_a_phase_inside_another(now):
    progress = Progress()
    progress.enter("between", step=7)
    now[0] = 101.0
    with progress.inside("save"):
        assert progress.beat == Beat(7, "save", 101.0)
        now[0] = 104.0
    assert progress.beat == Beat(7, "between", 104.0)
    assert progress.take()["save"] == PhaseTime(1, 3.0)


def test_an_error_ends_the_phase_too(now):
    progress = Progress()
    with pytest.raises(OSError), progress.inside("save"):
        raise OSError
    assert progress.beat.phase == "start-up"


def test_the_first_time_of_a_phase_counts_until_there_is_another(now):
    """It compiles and allocates."""
    progress = Progress()
    longest = []
    for seconds in (50.0, 2.0, 3.0, 1.0):
        progress.enter("forward")
        now[0] += seconds
        progress.enter("")
        longest.append(progress.longest("forward"))
    assert longest == [50.0, 2.0, 3.0, 3.0]
    assert progress.longest("save") is None
