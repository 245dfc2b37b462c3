"""Which rank failed first, by what each of them has left."""

import socket

import pytest

from based_megatron.run_folder.failures import (
    Failure,
    failure_path,
    first_cause,
    read_failures,
    wait_for_cause,
    write_failure,
)

HOSTS = ["a", "a", "b", "b"]
LOST = "Connection closed by peer [10.0.0.3]:1234"


def failure(rank: int, time: float, message: str) -> Failure:
    return Failure(rank, HOSTS[rank], time, "RuntimeError", message)


def test_the_first_that_is_no_aftermath():
    found = [failure(0, 1.0, LOST), failure(1, 3.0, "no memory"), failure(2, 2.0, "CUDA error"), failure(3, 4.0, LOST)]
    assert first_cause(found, HOSTS) == found[2]


def test_a_rank_that_said_nothing_was_killed():
    found = [failure(0, 2.0, LOST), failure(1, 1.0, LOST), failure(3, 3.0, LOST)]
    cause = first_cause(found, HOSTS)
    assert cause is not None and (cause.rank, cause.host, cause.time) == (2, "b", 1.0)
    assert "ended without a word: killed" in cause.message and "rank 1 then lost its connection" in cause.message


def test_a_rank_that_has_not_spoken_is_not_blamed_for_the_error_of_another():
    found = [failure(0, 1.0, "out of memory")]
    assert first_cause(found, HOSTS) == found[0]


def test_if_all_lost_each_other_the_first_counts():
    found = [failure(rank, 10.0 - rank, LOST) for rank in range(4)]
    assert first_cause(found, HOSTS) == found[3]
    assert first_cause([], HOSTS) is None


@pytest.mark.parametrize(
    ("message", "aftermath"),
    [
        (LOST, True),
        ("NCCL communicator was aborted on rank 1", True),
        ("Read from socket failed: Connection reset by peer", True),
        ("Timed out waiting 600000ms for recv", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("3 steps in a row had no finite gradient", False),
    ],
)
def test_errors_that_come_of_others_are_known(message, aftermath):
    assert failure(0, 1.0, message).is_aftermath is aftermath


def test_what_a_rank_writes_is_read_back(tmp_path):
    try:
        raise ValueError("no\nmore " + "x" * 3000)
    except ValueError as error:
        written = write_failure(tmp_path / "errors", 7, error)
    assert written.message.startswith("no more x") and len(written.message) == 2000
    assert (written.rank, written.host, written.type) == (7, socket.gethostname(), "ValueError")
    assert read_failures(tmp_path / "errors", since=written.time) == [written]
    assert read_failures(tmp_path / "errors", since=written.time + 1) == []
    text = failure_path(tmp_path / "errors", 7).read_text()
    assert "test_what_a_rank_writes_is_read_back" in text and "Traceback" in text
    failure_path(tmp_path / "errors", 8).write_text("no JSON")
    assert len(read_failures(tmp_path / "errors", 0)) == 1


def test_the_wait_ends_when_all_have_spoken_or_the_time_is_up(tmp_path):
    assert wait_for_cause(tmp_path, 0.0, HOSTS, most_seconds=0.0) is None
    for rank in range(4):
        write_failure(tmp_path, rank, RuntimeError(LOST))
    cause = wait_for_cause(tmp_path, 0.0, HOSTS, most_seconds=1e9)
    assert cause is not None and cause.rank == 0
