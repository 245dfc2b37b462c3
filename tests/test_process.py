"""What a rank owes its launcher, with real processes: it ends with it, and leaves the cause of its failure."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from based_megatron import cli, process
from based_megatron.errors import CheckpointError, ConfigError, DataError, TrainingError
from based_megatron.run_folder import failures

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel ends a process with its parent on Linux only"
)

CHILD = """
import os, sys, time
from based_megatron.process import end_with, end_with_torchrun
{call}
print(os.getpid(), flush=True)
time.sleep(60)
"""
PYTHON = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"]
SHELL = ["sh", "-c", f'{sys.executable} -c "$0"; exit 0']


def start(call: str, parent: list[str] = PYTHON, **environment: str) -> tuple[subprocess.Popen, int]:
    """A parent whose child makes the call; the parent, and the child's number once it has, or 0 if it has ended."""
    line = [*parent, CHILD.format(call=call)]
    started = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    assert started.stdout
    with started.stdout as stdout:
        return started, int(stdout.readline() or 0)


def ends(pid: int, within_seconds: float = 20) -> bool:
    """Whether a process ends in time; one that does not is killed."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.02)
                continue
        return True
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.parametrize("call", ["end_with(os.getppid())", "end_with_torchrun()"])
def test_a_child_ends_when_its_parent_is_killed(call):
    parent, child = start(call, TORCHELASTIC_RUN_ID="1")
    assert child
    parent.kill()
    assert ends(child)
    parent.wait()


def test_a_child_whose_parent_is_gone_ends_at_once():
    """Another process has adopted it; 1 stands for it here."""
    parent, child = start("end_with(1)")
    assert child == 0 and parent.wait(20) == 0


def test_a_rank_that_something_else_than_python_has_adopted_ends_at_once():
    """Its agent was a Python program: the parent that it sees is an init."""
    shell, child = start("end_with_torchrun()", SHELL, TORCHELASTIC_RUN_ID="1")
    assert child == 0 and shell.wait(20) == 0


def test_what_torchrun_did_not_start_lives_its_own_life():
    parent, child = start("end_with_torchrun()")
    parent.kill()
    assert not ends(child, within_seconds=0.3)
    parent.wait()


@pytest.fixture
def fail(tmp_path, monkeypatch):
    """A function that runs `based train` on a rank which fails with an error; returns the line it leaves."""
    monkeypatch.setenv(process.CAUSES, str(tmp_path))
    monkeypatch.setattr(failures.time, "time", lambda: 12.3456)
    monkeypatch.setattr(process, "FIRST_WORD_SECONDS", 0.0)

    def run(error: BaseException, rank: str = "2") -> str:
        def fails(argv: list[str]) -> None:
            raise error

        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(cli, "_function", lambda name: fails)
        with contextlib.suppress(type(error)):
            assert cli.main(["train"]) == 2
        return failures.failure_path(tmp_path, int(rank)).read_text().splitlines()[0]

    return run


def test_a_rank_leaves_the_cause_of_its_failure(fail):
    assert (
        fail(ConfigError("change\n  lr"), "2") == f"0 12.346 2 rank 2 on {socket.gethostname()}: ConfigError: change lr"
    )
    assert fail(ValueError("no"), "11") == f"0 12.346 1 rank 11 on {socket.gethostname()}: ValueError: no"


@pytest.mark.parametrize(
    ("error", "status"),
    [(TrainingError, "2"), (ConfigError, "2"), (DataError, "1"), (CheckpointError, "1"), (OSError, "1")],
)
def test_only_what_stays_wrong_is_final(fail, error, status):
    """A disk that failed may be back at the next start; settings are not changed by one."""
    assert fail(error("no")).split()[2] == status


@pytest.mark.parametrize(
    ("error", "priority"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:2"), "1"),
        (RuntimeError("Timed out waiting 20000ms for recv operation to complete"), "1"),
        (RuntimeError("NCCL communicator: remote process exited or there was a network error"), "1"),
        (CheckpointError("rank 1: [Errno 32] Broken pipe"), "1"),
        (ConfigError("parallel.timeout_seconds is too low: a collective timed out"), "0"),
        (RuntimeError("CUDA out of memory"), "0"),
    ],
    ids=str,
)
def test_the_aftermath_of_another_ranks_failure_comes_last(fail, error, priority):
    assert fail(error).split()[0] == priority


def test_a_cause_that_cannot_be_left_is_no_failure_of_its_own(fail, tmp_path, monkeypatch, capsys):
    failures.failure_path(tmp_path, 2).mkdir()
    with contextlib.suppress(IsADirectoryError):
        fail(ConfigError("no"))
    errors = capsys.readouterr().err
    assert "based rank 2: error: no\n" in errors and "the cause could not be left" in errors


def test_without_a_launcher_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.delenv(process.CAUSES, raising=False)
    monkeypatch.chdir(tmp_path)
    process.leave_cause(ConfigError("no"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "ended_with"), [("0", []), ("3", [2])])
def test_rank_0_speaks_for_ranks_that_are_refused_with_it(monkeypatch, rank, ended_with):
    """Its launcher ends the others, which leave with the same code before they have said anything."""
    ended: list[int] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(process.os, "_exit", ended.append)
    monkeypatch.setattr(process.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    process.let_rank_0_speak(2)
    assert ended == ended_with and signal.getsignal(signal.SIGTERM) is before


def test_what_one_rank_alone_is_refused_for_it_says_itself(fail, capsys):
    """`fail` waits for no rank 0."""
    fail(ConfigError("no such folder on this node"), "2")
    assert "based rank 2: error: no such folder on this node" in capsys.readouterr().err
