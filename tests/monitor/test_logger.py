"""When metrics are collected and what of them reaches the sinks."""

import dataclasses
import math

import pytest
import torch

from based_megatron.config import MonitorConfig
from based_megatron.monitor.sinks.base import Sink
from based_megatron.train.callbacks.logger import Logger


class Notes(Sink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: dict[int, dict] = {}
        self.events: list[tuple[int, str, dict]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.closed = 0

    def log(self, step, values):
        self.logged[step] = dict(values)

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
        "train/grad_norm": 2.0,
        "train/perplexity": math.e,
        "train/lr": 1e-3,
        "train/skipped": False,
        "train/tokens_seen": 512,
    }, "the first step of a process compiles: its time is not measured"
    assert (fourth["train/loss"], fourth["train/grad_norm"], fourth["train/tokens_seen"]) == (0.25, 8.0, 2048)
    assert fourth["throughput/tokens_per_second"] == 256.0
    assert fourth["throughput/tokens_per_second_per_device"] == 64.0
    parts = ("step", "data", "forward_backward", "optimizer")
    assert [fourth[f"time/{part}_seconds"] for part in parts] == [2.0, 0.5, 1.0, 0.25]
    assert fourth["time/step_seconds_slowest"] == fourth["time/step_seconds_fastest"] == 2.0


def test_what_was_recorded_anywhere_is_logged_once(make_trainer):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    trainer.metrics.record("mine", torch.tensor(3.0))
    trainer.run([logger], until=2)
    assert notes.logged[1]["mine"] == 3.0 and "mine" not in notes.logged[2]


def test_every_hook_has_its_event(make_trainer):
    trainer, notes = make_trainer(step=7), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    logger.on_validation(trainer, 2.0)
    logger.on_event(trainer, "checkpoint", {"path": "x"})
    logger.on_event(trainer, "skip", {"step": 5, "in_a_row": 1})
    logger.on_end(trainer)
    logger.on_error(trainer, ValueError("no more data"))
    parameters = notes.events[0][2].pop("parameters")
    assert parameters > 1000
    assert notes.events == [
        (7, "resume", {"tokens_seen": 3584, "world_size": 4}),
        (7, "validation", {"loss": 2.0, "perplexity": math.exp(2.0)}),
        (7, "checkpoint", {"path": "x"}),
        (5, "skip", {"in_a_row": 1}),
        (7, "end", {"tokens_seen": 3584}),
    ], "a sink that is closed hears of nothing"
    assert notes.closed == 1


def test_an_error_closes_the_sinks(make_trainer):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    logger.on_error(trainer, ValueError("no more data"))
    assert notes.events[-1] == (0, "error", {"type": "ValueError", "message": "no more data"}) and notes.closed == 1
    assert notes.events[0][1] == "start"


def test_samples_are_texts_too(make_trainer):
    trainer, notes = make_trainer(step=6), Notes()
    logger = Logger([notes])
    logger.on_start(trainer)
    logger.on_event(trainer, "sample", {"prompt": "import ", "text": "os"})
    assert notes.events[-1][1] == "sample" and notes.texts == [(6, "sample/import ", "import |os")]


def test_skipped_steps_are_marked_and_are_no_goodput(make_trainer, report):
    trainer, notes = make_trainer(), Notes()
    logger = Logger([notes])
    trainer.run([logger], until=3)
    trainer.skips.in_a_row = 2
    logger.on_event(trainer, "skip", {"step": 3})
    logger.on_event(trainer, "skip", {"step": 4})
    trainer.step = 4
    trainer.clock.step(4)
    logger.post_step(trainer, report(4))
    assert notes.logged[4]["train/skipped"] is True
    assert notes.logged[4]["throughput/goodput"] == 0.0
    assert notes.logged[2]["throughput/goodput"] == 1.0, "the clock of this test runs ahead of the wall"


@pytest.mark.parametrize("is_logger", [True, False])
def test_all_ranks_collect_and_one_writes(make_trainer, is_logger):
    """A rank that did not collect would leave the others waiting."""
    trainer = make_trainer(is_logger=is_logger)
    trainer.run([Logger([])], until=2)
    assert trainer.metrics.collect() == {}
