"""The watchdog: the heartbeat, and a run in which one rank is stuck."""

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from based_megatron.monitor.events import read_events
from based_megatron.monitor.hangs import FIRST_SECONDS, read_stuck
from based_megatron.monitor.progress import Progress
from based_megatron.run_folder.failures import write_failure
from based_megatron.train.callbacks import watchdog as module
from based_megatron.train.callbacks.watchdog import Watchdog, grace_seconds
from based_megatron.train.trainer import Trainer
from support.runs import events, train_in_pool


def make(tmp_path: Path, rank: int = 0, **options: Any) -> tuple[Watchdog, Progress]:
    """A watchdog whose thread does nothing: a test looks in its place."""
    dog, progress = Watchdog(["a", "a"], **options), Progress()
    dog._watch = lambda: None  # type: ignore[method-assign]
    trainer: Any = SimpleNamespace(
        run_dir=tmp_path, topology=SimpleNamespace(rank=rank), clock=SimpleNamespace(progress=progress)
    )
    dog.on_start(trainer)
    return dog, progress


def heartbeat(tmp_path: Path) -> dict[str, Any]:
    (line,) = (tmp_path / "heartbeat").read_text().splitlines()
    return json.loads(line)


def test_the_heartbeat_says_what_the_run_does_and_when_it_is_overdue(tmp_path):
    dog, progress = make(tmp_path)
    first = heartbeat(tmp_path)
    assert first.pop("time").endswith("+00:00")
    assert first == {"step": 0, "phase": "start-up", "limit_seconds": FIRST_SECONDS + 60}
    progress.enter("data", step=7)
    dog.look()
    assert (heartbeat(tmp_path)["step"], heartbeat(tmp_path)["phase"]) == (7, "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat"]


def test_it_beats_only_while_there_is_progress(tmp_path):
    dog, progress = make(tmp_path)
    os.utime(tmp_path / "heartbeat", (0, 0))
    dog.look()
    assert (tmp_path / "heartbeat").stat().st_mtime == 0
    progress.enter("data")
    dog.look()
    assert (tmp_path / "heartbeat").stat().st_mtime > 0


def test_other_ranks_leave_the_heartbeat_alone(tmp_path):
    dog, progress = make(tmp_path, rank=1)
    progress.enter("data")
    dog.look()
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_waits_until_the_stacks_are_written():
    limits = (3.0, 120.0, 1800.0)
    assert [grace_seconds(limit) for limit in limits] == [2.0, 30.0, 30.0]


@pytest.mark.parametrize(("rank", "tells"), [(0, True), (1, False)])
def test_the_lowest_rank_that_has_written_tells(tmp_path, monkeypatch, rank, tells):
    """Rank 0 has written too; each rank writes once, and tells after the others had time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    dogs = [make(tmp_path, rank=r, hang_seconds=100.0)[0] for r in (0, rank)]
    for dog in dogs:
        dog.look()
    assert read_stuck(tmp_path / "stacks", 0) == []
    now[0] += 101.0
    for dog in dogs:
        dog.look()
    assert [s.rank for s in read_stuck(tmp_path / "stacks", 0)] == sorted({0, rank})
    dogs[1].look()
    assert not (tmp_path / "events.jsonl").exists()
    now[0] += grace_seconds(100.0)
    for _ in range(3):
        dogs[1].look()
    hangs = list(read_events(tmp_path / "events.jsonl")) if tells else []
    assert (tmp_path / "events.jsonl").exists() == tells
    assert [(event["event"], event["behind"]) for event in hangs] == [("hang", [1])] * tells


def test_progress_after_a_hang_ends_it(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    dog, progress = make(tmp_path, hang_seconds=100.0)
    now[0] += 101.0
    dog.look()
    progress.beat = module.Beat(2, "data", now[0])
    now[0] += 99.0
    dog.look()
    assert not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("gap_seconds", "later_seconds", "says"), [(17.0, 1.0, True), (9.0, 1.0, False), (17.0, 61.0, False)]
)
def test_a_rank_that_was_stopped_says_so_when_it_fails(tmp_path, monkeypatch, gap_seconds, later_seconds, says):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    dog, _ = make(tmp_path)
    now[0] += gap_seconds
    dog._tick()
    for _ in range(int(later_seconds)):
        now[0] += 1.0
        dog._tick()
    error = RuntimeError("Connection closed by peer")
    dog.on_error(SimpleNamespace(), error)  # type: ignore[arg-type]
    failure = write_failure(tmp_path, 0, error)
    assert ("did not run for 17 s" in failure.message) == says and failure.is_aftermath != says


def stuck_job(*job: Any) -> None:
    """A job whose rank 1 takes 5 s to read the batch of step 3."""
    read = Trainer._read

    def slow(trainer: Trainer) -> Any:
        if trainer.topology.rank == 1 and trainer.step == 2:
            real = trainer.loader.micro_batches

            def read_slowly(step: int) -> Any:
                time.sleep(5.0)
                return real(step)

            trainer.loader.micro_batches = read_slowly  # type: ignore[method-assign]
        else:
            trainer.loader.__dict__.pop("micro_batches", None)
        return read(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_read", slow)
        train_in_pool(*job)


def test_a_rank_that_is_stuck_is_named_while_the_others_wait(worker_pool, corpus, tmp_path, caplog):
    job = ("--monitor.hang-seconds", "1.5", "--train.steps", "4", "--validation.interval-steps", "0")
    worker_pool(2).run(stuck_job, tmp_path, corpus, *job, "--checkpoint.interval-steps", "0")
    first, second = read_stuck(tmp_path / "stacks", 0)
    assert (second.rank, second.step, second.phase, second.waits) == (1, 3, "data", False)
    assert first.phase == "stop vote" and first.waits and first.step == 3 and first.collectives
    (hang,) = events(tmp_path, "hang")
    assert hang["behind"] == [1] and hang["step"] == 3
    assert (
        "in data of step 3, at train/test_watchdog.py" in hang["message"]
        and "1 other waits in stop vote" in hang["message"]
    )
    assert "read_slowly" in (tmp_path / "stacks" / "rank-00001.txt").read_text()
    assert math.isfinite(events(tmp_path, "step")[-1]["loss"]), "a hang that ends is no end of the run"
    tool = pytest.importorskip(
        "torch.distributed.flight_recorder.fr_trace", reason="the oldest PyTorch has no such tool"
    )
    tool.main(["--prefix", "gloo-", str(tmp_path / "stacks")])
    assert "missing ranks: {1}" in caplog.text, "it reads what the flight recorder kept"
