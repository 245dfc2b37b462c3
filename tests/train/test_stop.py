"""A stop that one rank asks for is agreed on by all, at the same question."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from based_megatron.train.stop import StopVote


def votes(folder: Path, ask: str) -> list[str]:
    """Answers before anybody asks, after rank 1 (or rank 0's file) does, and after a clear with a new vote."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        vote = StopVote(folder / "stop")
        answers = [vote.agreed()]
        dist.barrier()
        if ask == "file" and dist.get_rank() == 0:
            (folder / "stop").touch()
        if ask != "file" and dist.get_rank() == 1:
            os.kill(os.getpid(), getattr(signal, ask))
        answers.append(vote.agreed())
        vote.clear()
        return [*answers, StopVote(folder / "stop").agreed()]
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("ask", "reasons"),
    [
        ("SIGTERM", ["another rank", "SIGTERM"]),
        ("SIGUSR2", ["another rank", "SIGUSR2"]),
        ("file", ["file stop", "another rank"]),
    ],
)
def test_all_ranks_stop_when_one_asks(worker_pool, tmp_path, ask, reasons):
    """The file is gone afterwards: the next start must run."""
    results = worker_pool(2).run(votes, tmp_path, ask)
    assert results == [["", reason, ""] for reason in reasons]
    assert not (tmp_path / "stop").exists()


def late_signal(folder: Path) -> Any:
    """A signal after the handlers are set and before the first question."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        vote = StopVote(folder / "stop")
        os.kill(os.getpid(), signal.SIGTERM)
        vote.clear()
        return vote.agreed()
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_a_signal_during_the_start_is_not_lost(worker_pool, tmp_path):
    assert worker_pool(1).run(late_signal, tmp_path) == ["SIGTERM"]
