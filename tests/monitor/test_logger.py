"""When metrics are collected and what of them reaches the sinks."""

import dataclasses
import math
import socket

import pytest
import torch

from based_megatron.config import CheckpointConfig, MonitorConfig, ValidationConfig
from based_megatron.monitor import throughput
from based_megatron.monitor.progress import PhaseTime
from based_megatron.monitor.sinks.base import Sink
from based_megatron.run_folder.failures import write_failure
from based_megatron.train.callbacks.logger import Logger


class Notes(Sink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: dict[int, dict] = {}
        self.events: list[tuple[int, str, dict]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.each_step: list[tuple[int, list[float], list[float]]] = []
        self.closed = self.flushed = 0

    def log(self, step, values):
        self.logged[step] = dict(values)

    def steps(self, first_step, losses, grad_norms):
        self.each_step.append((first_step, list(losses), list(grad_norms)))

    def flush(self):
        self.flushed += 1

    def event(self, step, name, fields):
        self.events.append((step, name, dict(fields)))

    def text(self, step, name, text):
        self.texts.append((step, name, text))

    def close(self):
        self.closed += 1


def test_log_points_are_the_first_each_interval_and_the_last(make_trainer):
    trainer, notes = make_trainer(), Notes()
    trainer.run([Logger([notes])], until=10)
    assert list(notes.logged) == [1, 2, 4, 6, 8, 10]


def test_the_last_step_is_logged_between_intervals(make_trainer):
    trainer, notes = make_trainer(step=8), Notes()
    trainer.config = dataclasses.replace(trainer.config, monitor=MonitorConfig(log_interval_steps=4))
    trainer.run([Logger([notes])], until=10)
    assert list(notes.logged) == [10]


def test_values_of_a_log_point(make_trainer):
    trainer, notes = make_trainer(), Notes()
    trainer.run([Logger([notes])], until=4)
    first, fourth = notes.logged[1], notes.logged[4]
    assert first.pop("memory/rss_gib") > 0
    assert first == {
        "train/loss": 1.0,
        "train/loss_mean": 1.0,
        "train/loss_max": 1.0,
        "train/grad_norm_max": 2.0,
        "train/grad_norm": 2.0,
        "train/perplexity": math.e,
        "train/lr": 1e-3,
        "train/skipped": False,
        "train/skipped_steps": 0,
        "train/rollbacks": 0,
        "train/tokens_seen": 512,
    }, "the first step of a process compiles: its time is not measured"
    assert (fourth["train/loss"], fourth["train/grad_norm"], fourth["train/tokens_seen"]) == (0.25, 8.0, 2048)
    assert fourth["throughput/tokens_per_second"] == 256.0
    assert fourth["throughput/tokens_per_second_per_device"] == 64.0
    parts = ("step", "data", "forward_backward", "own", "optimizer")
    assert [fourth[f"time/{part}_seconds"] for part in parts] == [2.0, 0.5, 1.0, 1.25, 0.25]
    assert (fourth["time/own_seconds_slowest"], fourth["time/slowest_rank"]) == (1.25, 0)
    assert fourth["time/step_seconds_slowest"] == fourth["time/step_seconds_fastest"] == 2.0


def test_what_was_recorded_anywhere_is_logged_once(make_trainer):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    trainer.metrics.record("mine", torch.tensor(3.0))
    trainer.run([logger], until=2)
    assert notes.logged[1]["mine"] == 3.0 and "mine" not in notes.logged[2]


def test_every_hook_has_its_event(make_trainer):
    trainer, notes = make_trainer(step=7), Notes()
    logger = Logger([notes], hosts=["a", "a", "b", "b"])
    logger.on_start(trainer)
    logger.on_validation(trainer, 2.0)
    logger.on_event(trainer, "checkpoint", {"path": "x"})
    logger.on_event(trainer, "skip", {"step": 5, "in_a_row": 1})
    logger.on_end(trainer)
    logger.on_error(trainer, ValueError("no more data"))
    assert notes.events[0][2].pop("parameters") > 1000 and notes.events[0][2].pop("process_seconds") > 0
    assert notes.events == [
        (7, "resume", {"tokens_seen": 3584, "world_size": 4, "data_jumps": (), "hosts": {"a": 2, "b": 2}}),
        (7, "validation", {"loss": 2.0, "perplexity": math.exp(2.0)}),
        (7, "checkpoint", {"path": "x"}),
        (5, "skip", {"in_a_row": 1}),
        (7, "end", {"tokens_seen": 3584, "skipped_steps": 0}),
    ], "a sink that is closed hears of nothing"
    assert notes.closed == 1


def test_an_error_closes_the_sinks(make_trainer):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    logger.on_error(trainer, ValueError("no more data"))
    step, name, fields = notes.events[-1]
    assert (step, name, fields.pop("host")) == (0, "error", socket.gethostname()) and notes.closed == 1
    assert fields == {"rank": 0, "type": "ValueError", "message": "no more data"}
    assert "ValueError: no more data" in (trainer.run_dir / "errors" / "rank-00000.txt").read_text()
    assert notes.events[0][1] == "start"


def test_samples_are_texts_too(make_trainer):
    trainer, notes = make_trainer(step=6), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    logger.on_event(trainer, "sample", {"prompt": "import ", "text": "os"})
    assert notes.events[-1][1] == "sample" and notes.texts == [(6, "sample/import ", "import |os")]


@pytest.fixture
def wall(monkeypatch) -> list[float]:
    """The time on the wall, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_skipped_steps_are_marked_and_are_no_goodput(make_trainer, report, wall):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    for step in (1, 2, 3, 4):
        trainer.step = step
        trainer.clock.step(step)
        wall[0] += 2.0
        if step == 4:
            trainer.skips.in_a_row = 2
            for skipped in (3, 4):
                logger.on_event(trainer, "skip", {"step": skipped})
        logger.post_step(trainer, report(step))
    assert notes.logged[4]["train/skipped"] is True
    assert notes.logged[4]["throughput/goodput"] == 0.0
    assert notes.logged[2]["throughput/goodput"] == 0.75, "of 2 s, 0.5 s waited for data"


def test_every_step_is_kept(make_trainer):
    """Spikes between log points are in the record, and the largest in the metrics."""
    trainer, notes = make_trainer(), Notes()
    trainer.config = dataclasses.replace(trainer.config, monitor=MonitorConfig(log_interval_steps=5))
    trainer.run([Logger([notes])], until=10)
    assert notes.each_step == [
        (1, [1.0], [2.0]),
        (2, [1 / 2, 1 / 3, 1 / 4, 1 / 5], [4.0, 6.0, 8.0, 10.0]),
        (6, [1 / 6, 1 / 7, 1 / 8, 1 / 9, 1 / 10], [12.0, 14.0, 16.0, 18.0, 20.0]),
    ]
    fifth = notes.logged[5]
    assert fifth["train/loss_mean"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert (fifth["train/loss_max"], fifth["train/grad_norm_max"], fifth["train/loss"]) == (0.5, 10.0, 0.2)


def test_a_nan_between_log_points_is_the_largest(make_trainer, report):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    for step, loss in enumerate([1.0, 1.0, math.nan, 1.0], start=1):
        trainer.step = step
        logger.post_step(trainer, dataclasses.replace(report(step), loss=torch.tensor(loss, dtype=torch.float64)))
    assert notes.logged[4]["train/loss_max"] == math.inf and math.isnan(notes.logged[4]["train/loss_mean"])


def test_a_save_between_log_points_has_all_of_its_steps_in_the_log(make_trainer, report):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    trainer.run([logger], until=3)
    assert notes.each_step[-1][0] == 2, "step 3 is still on the device"
    logger.pre_save(trainer)
    assert notes.each_step[-1] == (3, [1 / 3], [6.0]) and notes.flushed == 1
    trainer.step = 4
    logger.post_step(trainer, report(4))
    assert notes.each_step[-1] == (4, [1 / 4], [8.0])
    assert notes.logged[4]["train/loss_max"] == 1 / 3, "what was written before a save is part of the interval"


def test_the_error_of_a_run_is_that_of_the_rank_that_failed_first(make_trainer, tmp_path):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes], hosts=["a", "b", "c"])
    logger.on_start(trainer)
    write_failure(tmp_path / "errors", 2, ValueError("no more data"))
    write_failure(tmp_path / "errors", 1, RuntimeError("Connection closed by peer"))
    logger.on_error(trainer, RuntimeError("Connection closed by peer"))
    fields = notes.events[-1][2]
    assert (fields["rank"], fields["type"], fields["message"]) == (2, "ValueError", "no more data")


@pytest.mark.parametrize("end", ["on_end", "on_error"])
def test_the_last_steps_are_written_however_a_run_ends(make_trainer, end):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    trainer.run([logger], until=3)
    getattr(logger, end)(trainer, *([ValueError("lost")] if end == "on_error" else []))
    assert notes.each_step[-1] == (3, [1 / 3], [6.0]) and notes.closed == 1


def test_a_broken_device_is_not_asked(make_trainer):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    trainer.run([logger], until=3)
    trainer.device = torch.device("cuda", 0)
    logger.on_error(trainer, RuntimeError("CUDA error"))
    assert notes.each_step[-1][0] == 2


def test_steps_that_are_done_again_are_written_as_such(make_trainer, report):
    trainer, notes = make_trainer(), Notes()
    trainer.config = dataclasses.replace(trainer.config, monitor=MonitorConfig(log_interval_steps=9))
    logger = Logger([notes])
    trainer.run([logger], until=5)
    logger.post_step(trainer, report(3))
    logger.post_step(trainer, report(9))
    assert [first for first, *_ in notes.each_step] == [1, 2, 3, 9]


def test_the_eta_counts_saves_and_validation(make_trainer, report, wall):
    """10 steps of 2 s; a validation of 10 s at steps 4 and 8 and at the end, a save of 30 s at 3, 6, 9 and the end; a log takes 1 s."""
    trainer, notes = make_trainer(), Notes()
    trainer.config = dataclasses.replace(
        trainer.config,
        validation=ValidationConfig(interval_steps=4),
        checkpoint=CheckpointConfig(interval_steps=3),
        monitor=MonitorConfig(log_interval_steps=1),
    )
    logger = Logger([notes])
    logger.on_start(trainer)
    costs = {4: ("validation", 10.0), 3: ("save", 30.0)}
    for step in range(1, 7):
        trainer.step = step
        trainer.clock.step(step)
        wall[0] += 100.0 if step == 1 else 2.0
        logger.post_step(trainer, report(step))
        wall[0] += 1.0
        if step in costs:
            phase, seconds = costs[step]
            trainer.clock.progress._ended[phase] = PhaseTime(1, seconds)
            wall[0] += seconds
    eta = {step: values.get("time/eta_seconds") for step, values in notes.logged.items()}
    assert eta[1] is None and eta[2] == 8 * 2.0 + 8 * 1.0, "what nothing is known of costs nothing"
    assert eta[4] == 6 * 3.0 + 3 * 30.0, "saves at 6, 9 and at the end are known, the validation at 4 comes after"
    assert eta[5] == 5 * 3.0 + 3 * 30.0 + 2 * 10.0
    assert notes.logged[6]["wall_seconds/save"] == 30.0 and notes.logged[6]["wall_seconds/validation"] == 10.0
    assert notes.logged[6]["wall_seconds/steps"] == 5 * 1.5 and notes.logged[6]["wall_seconds/data"] == 5 * 0.5
    assert notes.logged[6]["wall_seconds/other"] == 5.0


def test_a_rank_that_stays_slow_is_an_event_with_its_host(make_trainer):
    trainer, notes = make_trainer(), Notes()
    trainer.config = dataclasses.replace(trainer.config, monitor=MonitorConfig(log_interval_steps=1))
    trainer.metrics.each_rank = lambda mine: [mine, 1.25 * mine, mine, 3 * mine]
    trainer.run([Logger([notes], hosts=["a", "a", "b", "c"])], until=8)
    (event,) = [event for event in notes.events if event[1] == "straggler"]
    assert event == (
        6,
        "straggler",
        {"rank": 3, "host": "c", "slower": 3 / 1.125 - 1, "seconds": 3.75, "median_seconds": 1.40625},
    ), "the first step is not measured"
    assert notes.logged[8]["time/slowest_rank"] == 3 and notes.logged[8]["time/own_seconds_slowest"] == 3.75
    assert notes.logged[8]["time/own_seconds_median"] == 1.40625


@pytest.mark.parametrize("is_logger", [True, False])
def test_all_ranks_collect_and_one_writes(make_trainer, is_logger):
    """A rank that did not collect would leave the others waiting."""
    trainer = make_trainer(is_logger=is_logger)
    trainer.run([Logger([])], until=2)
    assert trainer.metrics.collect() == {}
