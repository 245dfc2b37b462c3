"""One owner at a time: who is refused, and who may take over a lock that a killed owner has left, and when."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from based_megatron.errors import ConfigError
from based_megatron.run_folder import lock as module
from based_megatron.run_folder.files import LOCK
from based_megatron.run_folder.lock import Owner, RunLock, check_free, is_gone, process_start, read_owner, this_process

ELSEWHERE = dataclasses.replace(
    this_process(60, {}), host="node7", processes="another boot", job="77", restarts=1, time="2031-05-01T12:00:00+00:00"
)


class Clock:
    """Time that passes only where somebody sleeps, and what happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at.pop(self.now, lambda: None)()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path):
    """make(...) is a lock on the folder `run`, released at the end; `made.lines` is what locks have said."""
    locks: list[RunLock] = []

    def make(me: Owner | None = None, folder: Path = tmp_path, former_job: str | None = None) -> RunLock:
        locks.append(RunLock(folder, me or this_process(60, {}), make.lines.append, former_job))  # type: ignore[attr-defined]
        return locks[-1]

    make.lines = []  # type: ignore[attr-defined]
    yield make
    for lock in locks:
        lock.release()


def write(folder: Path, owner: Owner) -> None:
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(owner)))


def touch(folder: Path) -> None:
    """As its owner does: another time."""
    before = (folder / LOCK).stat().st_mtime_ns
    os.utime(folder / LOCK, ns=(before + 1, before + 1))


def tries(lock: RunLock, most: int = 1000) -> int:
    """How many tries it takes to get the lock."""
    for count in range(1, most + 1):
        if lock.try_take():
            return count
    raise AssertionError("not taken")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hold(folder: Path, taken: object) -> None:
    """In a process of its own: take the lock and keep it."""
    lock = RunLock(folder, this_process(60, {}), print)
    tries(lock)
    taken.set()  # type: ignore[attr-defined]
    signal.pause()


def test_the_lock_says_who_holds_it_and_goes_with_its_owner(make, tmp_path):
    lock = make(this_process(60, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}))
    assert tries(lock) == 1 and names(tmp_path) == [LOCK]
    owner = read_owner(tmp_path)
    assert owner is not None and (owner.pid, owner.job, owner.restarts) == (os.getpid(), "12", 3)
    assert owner.start == process_start(os.getpid()) and not is_gone(owner)
    lock.release()
    assert names(tmp_path) == [] and read_owner(tmp_path) is None


def test_a_second_job_is_refused_and_told_by_whom_also_through_a_link(make, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    tries(make(this_process(60, {"SLURM_JOB_ID": "12"}), run))
    for folder in (run, tmp_path / "link"):
        with pytest.raises(ConfigError, match=rf"{folder} is in use by job 12, process {os.getpid()} on .*: stop that"):
            make(folder=folder).try_take()
        with pytest.raises(ConfigError, match="in use"):
            check_free(folder)
    assert names(run) == [LOCK]


def test_an_owner_that_was_killed_here_is_followed_at_once(make, tmp_path):
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, taken))
    holder.start()
    assert taken.wait(30)
    with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
        make().try_take()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is dead, but its parent has not looked yet
    check_free(tmp_path)
    assert tries(make()) == 2, "one to remove the lock, one to take it"
    assert make.lines == []
    holder.join()


def test_a_process_that_got_the_number_of_a_dead_owner_does_not_count(make, tmp_path):
    me = this_process(60, {})
    write(tmp_path, dataclasses.replace(me, start=me.start - 1))
    assert tries(make()) == 2


def test_the_start_of_a_process_is_read_whatever_its_name_is(tmp_path, monkeypatch):
    stat = "5 (a ) R 1 2 (b) S " + " ".join(map(str, range(4, 53)))
    monkeypatch.setattr(module.Path, "read_text", lambda self: stat)
    assert process_start(5) == 22


def test_an_owner_elsewhere_is_taken_for_gone_after_its_own_time_without_a_sign(make, clock, tmp_path):
    write(tmp_path, dataclasses.replace(ELSEWHERE, stale_seconds=20))
    assert tries(make(this_process(500, {}))) == 22 and clock.now == 20
    (line,) = make.lines
    assert "job 77" in line and "node7" in line and "up to 20 s" in line


def test_an_owner_elsewhere_that_touches_its_lock_is_not_followed(make, clock, tmp_path):
    write(tmp_path, ELSEWHERE)
    clock.at[59.0] = lambda: touch(tmp_path)
    with pytest.raises(ConfigError, match=r"in use by job 77, process .* on node7 since 2031"):
        tries(make())
    assert clock.now == 59 and read_owner(tmp_path) == ELSEWHERE


def test_another_clock_does_not_make_a_lock_old(make, clock, tmp_path):
    """What was touched long ago by our clock may be touched now."""
    write(tmp_path, ELSEWHERE)
    os.utime(tmp_path / LOCK, (1.0, 1.0))
    clock.at[1.0] = lambda: touch(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        tries(make())


def test_a_lock_that_is_given_back_meanwhile_is_taken(make, clock, tmp_path):
    write(tmp_path, ELSEWHERE)
    clock.at[3.0] = (tmp_path / LOCK).unlink
    assert tries(make()) == 4


@pytest.mark.parametrize(
    ("environment", "former", "at_once"),
    [
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}, None, True),
        ({"SLURM_JOB_ID": "78"}, "77", True),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, None, False),
        ({"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "2"}, None, False),
        ({}, None, False),
    ],
    ids=["requeued", "submitted by it", "a second step of the job", "another job", "no job"],
)
def test_a_job_goes_on_from_its_former_start_at_once(make, clock, tmp_path, environment, former, at_once):
    write(tmp_path, ELSEWHERE)
    assert tries(make(this_process(60, environment), former_job=former)) == (2 if at_once else 62)


@pytest.mark.parametrize("content", ["", '{"host": "node7"', '{"host": "node7"}', "[]"])
def test_a_lock_that_does_not_name_its_owner_is_watched(make, clock, tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    assert tries(make()) == 62
    assert "an owner that its lock does not name" in make.lines[0]


def test_of_two_starts_that_remove_one_stale_lock_the_slower_puts_the_new_one_back(make, tmp_path):
    write(tmp_path, ELSEWHERE)
    slow, fast = make(), make()
    stale = (tmp_path / LOCK).read_bytes()
    fast._remove(stale)
    tries(fast)
    new = (tmp_path / LOCK).read_bytes()
    slow._remove(stale)
    assert (tmp_path / LOCK).read_bytes() == new and names(tmp_path) == [LOCK]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def fast_beats(monkeypatch) -> None:
    monkeypatch.setattr(module, "BEATS", 6000)


def test_an_owner_touches_its_lock_and_puts_it_back_if_it_is_removed(make, fast_beats, tmp_path):
    tries(make())
    os.utime(tmp_path / LOCK, (1.0, 1.0))
    wait_for(lambda: (tmp_path / LOCK).stat().st_mtime > 1.0)
    (tmp_path / LOCK).unlink()
    wait_for((tmp_path / LOCK).exists)


def test_an_owner_learns_that_its_lock_was_taken_and_leaves_it(make, fast_beats, tmp_path):
    lock = make()
    tries(lock)
    assert lock.lost == ""
    write(tmp_path / "..", ELSEWHERE)
    os.replace(tmp_path / ".." / LOCK, tmp_path / LOCK)
    wait_for(lambda: lock.lost != "")
    assert lock.lost.startswith("job 77, process")
    lock.release()
    assert read_owner(tmp_path) == ELSEWHERE


def test_of_many_starts_at_once_one_gets_the_lock(make, tmp_path):
    locks = [make(dataclasses.replace(this_process(60, {}), host=f"node{i}")) for i in range(16)]
    barrier, taken = threading.Barrier(len(locks)), []

    def start(lock: RunLock) -> None:
        barrier.wait()
        try:
            if lock.try_take():
                taken.append(lock)
        except ConfigError:
            pass

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    owner = read_owner(tmp_path)
    assert owner is not None and owner.host == taken[0]._me.host
