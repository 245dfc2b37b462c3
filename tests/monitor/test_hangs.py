"""What ranks that make no progress write, and what it says together."""

import dataclasses
import os
import socket
import threading
import time
from typing import Any

import pytest

from based_megatron.monitor import hangs
from based_megatron.monitor.hangs import Stuck, explain, limit_seconds, read_stuck, stack_path, write_stuck
from based_megatron.monitor.progress import Beat, Progress

HOSTS = ["a", "a", "b", "b"]


def stuck(rank: int, **changes: Any) -> Stuck:
    """A rank that waits in the update of step 12."""
    usual = Stuck(rank, HOSTS[rank], 1, 12, "optimizer", 130.0, 1e9, "x/deepspeed.py:1 step", True, {"0 world": 7})
    return dataclasses.replace(usual, **changes)


def everyone(*odd: Stuck) -> list[Stuck]:
    return [next((s for s in odd if s.rank == rank), stuck(rank)) for rank in range(4)]


def test_a_rank_that_wrote_nothing_is_what_the_others_wait_for():
    hang = explain([stuck(0), stuck(1), stuck(3)], HOSTS)
    assert (hang.behind, hang.hosts) == ([2], ["b"])
    assert hang.message == (
        "rank 2 on b wrote no stacks: dead, stopped, or without its node; 3 others wait in optimizer of step 12"
    )


def test_a_rank_that_waits_for_nobody():
    hang = explain(everyone(stuck(1, phase="data", step=13, waits=False, where="data/reader.py:9 read")), HOSTS)
    assert hang.behind == [1] and hang.hosts == ["a"]
    assert (
        hang.message
        == "rank 1 on a in data of step 13, at data/reader.py:9 read; 3 others wait in optimizer of step 12"
    )


def test_a_rank_that_has_not_begun_a_collective():
    hang = explain(everyone(stuck(3, collectives={"0 world": 6})), HOSTS)
    assert hang.behind == [3] and "not in a collective that others wait in" in hang.message


def test_groups_that_a_rank_is_not_in_say_nothing_of_it():
    found = [stuck(0, collectives={"0 world": 7, "1 tensor": 90}), stuck(1), stuck(2, phase="data"), stuck(3)]
    assert explain(found, HOSTS).behind == [2]


def test_a_rank_at_an_earlier_step_and_one_in_another_phase():
    assert explain(everyone(stuck(0, step=11)), HOSTS).behind == [0]
    assert explain(everyone(stuck(2, phase="save")), HOSTS).behind == [2]


def test_all_ranks_at_one_place():
    hang = explain(everyone(), HOSTS)
    assert hang.behind == [] and hang.message.startswith("all 4 ranks wait in optimizer of step 12")


def test_many_ranks_are_counted():
    hang = explain([stuck(0)], ["a", *["b"] * 9])
    assert hang.behind == list(range(1, 10)) and "rank 4 on b and 5 more wrote no stacks" in hang.message
    assert hang.message.endswith("; 1 other waits in optimizer of step 12")


def test_the_limit_comes_of_measured_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("based_megatron.monitor.progress.time.monotonic", lambda: now[0])
    progress = Progress()

    def step(*seconds: float) -> None:
        for part, passed in zip(("data", "forward_backward", "optimizer"), seconds, strict=True):
            progress.enter(part)
            now[0] += passed
        progress.enter("between steps")

    assert limit_seconds(progress, 0) == hangs.FIRST_SECONDS, "nothing has ended yet"
    for _ in range(2):
        step(1.0, 10.0, 3.0)
    assert limit_seconds(progress, 0) == 10 * 14.0, "a vote may have to wait for a whole step"
    with progress.inside("save"):
        assert limit_seconds(progress, 0) == hangs.FIRST_SECONDS, "the first save may take long"
        now[0] += 100.0
    with progress.inside("save"):
        assert limit_seconds(progress, 0) == 10 * 100.0
        now[0] += 1.0
    with progress.inside("validation"):
        now[0] += 1.0
    with progress.inside("validation"):
        assert limit_seconds(progress, 0) == hangs.SLOW_FLOOR_SECONDS, "a file server may stall"
        assert limit_seconds(progress, 3.5) == 3.5
    short = Progress()
    for _ in range(4):
        short.enter("data")
    assert limit_seconds(short, 0) == hangs.FLOOR_SECONDS


def test_a_rank_writes_its_stacks_while_it_is_stuck(tmp_path):
    """The thread writes, the main thread is named."""
    beat = Beat(12, "data", time.monotonic() - 60)
    before = time.time()
    thread = threading.Thread(target=write_stuck, args=(tmp_path / "stacks", 3, beat, {"0 world": 5}))
    thread.start()
    thread.join()
    (found,) = read_stuck(tmp_path / "stacks", since=before)
    assert (found.rank, found.step, found.phase, found.pid) == (3, 12, "data", os.getpid())
    assert found.host == socket.gethostname() and 60 <= found.seconds < 120 and found.collectives == {"0 world": 5}
    text = stack_path(tmp_path / "stacks", 3).read_text()
    assert "test_a_rank_writes_its_stacks_while_it_is_stuck" in text and "write_stuck" in text
    assert [path.name for path in (tmp_path / "stacks").iterdir()] == ["rank-00003.txt"]


def test_only_what_was_written_about_this_hang_is_read(tmp_path):
    write_stuck(tmp_path, 0, Beat(1, "data", time.monotonic()), {})
    (tmp_path / "rank-00001.txt").write_text("not ours")
    assert read_stuck(tmp_path, since=time.time() + 1) == []
    assert [s.rank for s in read_stuck(tmp_path, since=0)] == [0]


class Frame:
    def __init__(self, file: str, line: int = 1, back: "Frame | None" = None) -> None:
        self.f_code = type("Code", (), {"co_filename": file, "co_name": "f"})
        self.f_lineno, self.f_back = line, back


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("x = loss.item()", True),
        ("work.wait()", True),
        ("dist.all_reduce(x)", True),
        ("time.sleep(9)", False),
        ("items(x)", False),
    ],
)
def test_a_line_that_waits_is_known_by_its_call(tmp_path, line, waits):
    file = tmp_path / "x.py"
    file.write_text(line + "\n")
    ours = Frame(str(file))
    assert hangs._waits(ours) is waits  # type: ignore[arg-type]
    assert hangs._waits(Frame("/site/torch/_tensor.py", back=ours)) is waits  # type: ignore[arg-type]
    assert hangs._waits(Frame("/site/torch/distributed/c10d.py", back=ours)) is True  # type: ignore[arg-type]
    assert hangs._where(Frame("/site/torch/_tensor.py", back=ours)) == f"{tmp_path.name}/x.py:1 f"  # type: ignore[arg-type]
