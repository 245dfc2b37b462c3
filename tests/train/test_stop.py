"""A stop that one rank asks for is agreed on by all, at the same question."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from based_megatron.errors import DataError
from based_megatron.train.signals import STOP_SIGNALS, StopSignals
from based_megatron.train.stop import StopVote


def votes(folder: Path, ask: str) -> list[str]:
    """Answers before anybody asks, after rank 1 (or rank 0's file) does, and of a new vote after the stop."""
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        vote = StopVote(folder / "stop")
        vote.forget_last()
        answers = [vote.agreed()]
        dist.barrier()
        if ask in ("stop", "pause") and dist.get_rank() == 0:
            (folder / ask).touch()
        if ask.startswith("SIG") and dist.get_rank() == 1:
            os.kill(os.getpid(), getattr(signal, ask))
        answers.append(vote.agreed())
        vote.honoured()
        return [*answers, StopVote(folder / "stop").agreed()]
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("ask", "reasons"),
    [
        ("SIGTERM", ["another rank", "SIGTERM"]),
        ("SIGUSR2", ["another rank", "SIGUSR2"]),
        ("stop", ["file stop", "another rank"]),
    ],
)
def test_all_ranks_stop_when_one_asks(worker_pool, tmp_path, ask, reasons):
    """The file has another name afterwards: the next start must run."""
    results = worker_pool(2).run(votes, tmp_path, ask)
    assert results == [["", reason, ""] for reason in reasons]
    assert [path.name for path in tmp_path.iterdir()] == (["stopped"] if ask == "stop" else [])


def test_the_pause_file_is_the_launchers_to_remove(worker_pool, tmp_path):
    assert worker_pool(2).run(votes, tmp_path, "pause") == [["", *["file pause"] * 2], ["", *["another rank"] * 2]]
    assert [path.name for path in tmp_path.iterdir()] == ["pause"]


def during_the_start(folder: Path) -> Any:
    """What asks for a stop before the first question, a signal and then a file, and the traces of an earlier stop."""
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signals = StopSignals()
        os.kill(os.getpid(), signal.SIGTERM)
        by_signal = StopVote(folder / "stop", signals)
        (folder / "stopped").touch()
        by_signal.forget_last()
        answers = [by_signal.agreed()]
        (folder / "stop").touch()
        by_file = StopVote(folder / "stop")
        by_file.forget_last()
        return [*answers, by_file.agreed(), sorted(path.name for path in folder.iterdir())]
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_what_asks_for_a_stop_during_the_start_is_not_lost(worker_pool, tmp_path):
    assert worker_pool(1).run(during_the_start, tmp_path) == [["SIGTERM", "file stop", ["stop"]]]


def failing_vote(folder: Path) -> str:
    """What the ranks hear when rank 1 cannot read its data, and a stop is asked for too."""
    (folder / "stop").touch()
    vote = StopVote(folder / "stop", StopSignals())
    try:
        return vote.agreed("shard 7 is damaged" if dist.get_rank() == 1 else "")
    except DataError as error:
        return f"refused: {error}"


def test_all_ranks_hear_of_one_that_cannot_go_on(worker_pool, tmp_path):
    assert worker_pool(2).run(failing_vote, tmp_path) == ["refused: shard 7 is damaged"] * 2
