"""Random `kill -9` of the ranks of a job that saves at every step in the background: nothing is lost, every curve is the same.

`BASED_TEST_KILLS=200` sets their number. `pytest -s` prints the counts.
"""

import faulthandler
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from based_megatron.checkpoint.ranks import ALONE
from based_megatron.checkpoint.store import newest_valid, step_of
from support.pool import fork_context, free_port
from support.runs import _based, command, events, losses

KILLS = int(os.environ.get("BASED_TEST_KILLS", "30"))
RANKS, STEPS = 2, 60
LAUNCHER_SHARE = 0.03
"""Kills of a real launcher, whose ranks start as interpreters of their own: these take long."""
SETTINGS = (
    f"--train.steps {STEPS} --checkpoint.interval-steps 1 --checkpoint.keep-last 2 --validation.interval-steps 0 "
    "--parallel.zero-stage 1 --parallel.timeout-seconds 60 --monitor.no-tensorboard"
).split()


def be_rank(rank: int, port: int) -> None:
    """What a launcher tells a rank; SIGUSR1 asks it where it is."""
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def start_ranks(run_dir: Path, data: Path) -> list[BaseProcess]:
    """The ranks of a job, forked from what has imported everything."""
    run_dir.mkdir(parents=True, exist_ok=True)
    port, arguments = free_port(), command(run_dir, data, *SETTINGS)[3:]
    ranks = []
    for rank in range(RANKS):
        output = run_dir.with_name(f"{run_dir.name}-rank{rank}.err")
        ranks.append(fork_context().Process(target=_based, args=(arguments, output, partial(be_rank, rank, port))))
        ranks[-1].start()
    return ranks


def finish(ranks: list[BaseProcess], seconds: float = 90) -> list[int | None]:
    """Exit codes; a rank that outlives the others by so much has hung."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        if rank.pid and rank.is_alive():
            os.kill(rank.pid, signal.SIGUSR1)
            time.sleep(1)
        rank.kill()
        rank.join()
    return codes


def starts(run_dir: Path) -> int:
    """Steps and starts that the log knows of: more of them after a start say that it trains."""
    path = run_dir / "events.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def wait_until(condition, alive, seconds: float = 120) -> bool:
    """Whether it came true before the job ended by itself."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not alive():
            return False
        assert time.monotonic() < deadline, "the job does not train"
        time.sleep(0.002)
    return True


def kill_ranks(run_dir: Path, data: Path, chance: random.Random) -> str:
    """Start the job, and kill some of it at a random moment after its first step; what was killed, empty if it ended before."""
    victim, before = chance.choice(["rank 0", "rank 1", "all ranks"]), starts(run_dir)
    ranks = start_ranks(run_dir, data)
    trains = wait_until(lambda: starts(run_dir) > before, lambda: any(rank.is_alive() for rank in ranks))
    time.sleep(chance.uniform(0, 1.5))
    if not trains or not all(rank.is_alive() for rank in ranks):
        assert finish(ranks) == [0] * RANKS
        return ""
    for number, rank in enumerate(ranks):
        if victim in (f"rank {number}", "all ranks"):
            rank.kill()
    saving = bool(list((run_dir / "checkpoints").glob("*.tmp")))
    codes = finish(ranks)
    stacks = [run_dir.with_name(f"{run_dir.name}-rank{rank}.err").read_text() for rank in range(RANKS)]
    assert None not in codes, f"a rank hangs after the other was killed: {stacks[codes.index(None)][-5000:]}"
    return victim + (", a save in flight" if saving else "")


def kill_launcher(run_dir: Path, data: Path, chance: random.Random) -> str:
    """Start the job with `based launch local`, and kill that: its ranks die with it; what was killed, or nothing."""
    before = starts(run_dir)
    with open(run_dir.with_name(f"{run_dir.name}-launcher.err"), "w") as output:
        launcher = subprocess.Popen(command(run_dir, data, *SETTINGS, nproc=RANKS), stdout=output, stderr=output)
        trains = wait_until(lambda: starts(run_dir) > before, lambda: launcher.poll() is None, seconds=300)
        time.sleep(chance.uniform(0, 1.5))
        if not trains or launcher.poll() is not None:
            assert launcher.wait(120) == 0
            return ""
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    gone = time.monotonic() + 60
    while (last := starts(run_dir)) is not None:
        time.sleep(2)
        if starts(run_dir) == last:
            return "launcher"
        assert time.monotonic() < gone, "ranks train on after their launcher was killed"
    return ""


def killed(run_dir: Path, data: Path, chance: random.Random, left: int) -> Iterator[str]:
    """Kill and restart a run until it is done, or killed as often as is left; then let it end."""
    while left and not (run_dir / "done").exists():
        kill = kill_launcher if chance.random() < LAUNCHER_SHARE else kill_ranks
        if what := kill(run_dir, data, chance):
            committed = max((event["step"] for event in events(run_dir, "checkpoint")), default=0)
            found = newest_valid(run_dir / "checkpoints", lambda line: None, ALONE)
            assert committed == 0 or (found is not None and step_of(found) >= committed), "a checkpoint was lost"
            left -= 1
            yield what
    if not (run_dir / "done").exists():
        assert finish(start_ranks(run_dir, data), seconds=180) == [0] * RANKS


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_job_killed_at_random_ends_as_one_that_never_was(corpus, tmp_path):
    whole = tmp_path / "whole"
    assert finish(start_ranks(whole, corpus), seconds=300) == [0] * RANKS
    expected = losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))
    counts: Counter[str] = Counter()
    runs = 0
    while counts.total() < KILLS:
        run_dir = tmp_path / f"run{runs}"
        counts.update(killed(run_dir, corpus, random.Random(1000 + runs), KILLS - counts.total()))
        assert losses(run_dir) == expected, f"run {runs} has another curve"
        runs += 1
    print(f"\n{counts.total()} kills of {runs} runs, every curve bit for bit: {dict(counts)}")
    assert any("in flight" in what for what in counts) or KILLS < 20
