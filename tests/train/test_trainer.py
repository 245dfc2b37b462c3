"""The loop with stand-ins for the step, the loader, the callbacks and the stop: who is called, when, with what."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.config import Config, load_config
from based_megatron.errors import TrainingError
from based_megatron.train.callbacks.base import Callback
from based_megatron.train.schedule import learning_rate
from based_megatron.train.step import LossSum
from based_megatron.train.trainer import Trainer

STEPS, LIMIT = 4, 3


class FakeStep:
    """Gives the losses and gradient norms it is told to, and notes the learning rate at the time of both calls."""

    def __init__(self, norms: list[float]) -> None:
        self.engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]))
        self.norms = iter(norms)
        self.batches: list[list[Any]] = []
        self.rates: list[float] = []

    def accumulate(self, batches: list[Any]) -> LossSum:
        self.batches.append(batches)
        self.rates.append(self._rate())
        return LossSum(total=30.0 * len(self.batches), tokens=10)

    def update(self) -> float:
        assert self._rate() == self.rates[-1]
        return next(self.norms)

    def _rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]


class FakeLoader:
    def micro_batches(self, step: int) -> list[Any]:
        return [f"batch of step {step}"]


class FakeStop:
    """Agrees to stop at the given question, counted from 1."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.asked, self.cleared = at, 0, 0

    def agreed(self, device: torch.device) -> str:
        self.asked += 1
        return "SIGTERM" if self.asked == self.at else ""

    def clear(self) -> None:
        self.cleared += 1


class Witness(Callback):
    """Notes every hook in a log that several may share."""

    def __init__(self, log: list[tuple], name: str = "") -> None:
        self.log, self.name = log, name

    def on_start(self, trainer: Trainer) -> None:
        self.log.append((self.name + "start", trainer.step))

    def post_step(self, trainer: Trainer, report: Any) -> None:
        self.log.append((self.name + "step", report))

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        self.log.append((self.name + "validation", loss))

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        self.log.append((self.name + name, fields))

    def on_end(self, trainer: Trainer) -> None:
        self.log.append((self.name + "end", trainer.step))

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.log.append((self.name + "error", error))


def config_of(**train: Any) -> Config:
    config = load_config("tiny")
    values = {"steps": STEPS, "max_skipped_steps": LIMIT, "global_batch_sequences": 6, **train}
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, **values),
        data=dataclasses.replace(config.data, sequence_length_tokens=50),
        schedule=dataclasses.replace(config.schedule, warmup_steps=2, warmup_lr=1e-5),
    )


def make(
    norms: list[float] | None = None,
    stop: FakeStop | None = None,
    start: tuple[int, int] = (0, 0),
    callbacks: list[Callback] | None = None,
    **train: Any,
) -> tuple[Trainer, FakeStep, list[tuple]]:
    log: list[tuple] = []
    step = FakeStep([1.0] * 20 if norms is None else norms)
    topology = SimpleNamespace(device=torch.device("cpu"))
    trainer = Trainer(
        config_of(**train),
        topology,  # type: ignore[arg-type]
        step,  # type: ignore[arg-type]
        FakeLoader(),
        callbacks if callbacks is not None else [Witness(log)],
        stop or FakeStop(),  # type: ignore[arg-type]
        start,
    )
    return trainer, step, log


def names(log: list[tuple]) -> list[str]:
    return [name for name, _ in log]


def test_hooks_come_in_order():
    trainer, _, log = make()
    assert trainer.fit() is True
    assert names(log) == ["start", "step", "step", "step", "step", "end"]


def test_callbacks_are_told_in_their_order():
    log: list[tuple] = []
    trainer, _, _ = make(callbacks=[Witness(log, "a "), Witness(log, "b ")], steps=1)
    trainer.fit()
    assert names(log) == ["a start", "b start", "a step", "b step", "a end", "b end"]


def test_every_step_trains_on_its_own_batches():
    trainer, step, _ = make()
    trainer.fit()
    assert step.batches == [[f"batch of step {i}"] for i in range(STEPS)]


def test_the_rate_of_a_step_is_set_before_it():
    trainer, step, log = make()
    trainer.fit()
    config = trainer.config
    expected = [learning_rate(i, config.optimizer, config.schedule, STEPS) for i in range(STEPS)]
    assert step.rates == expected and step.rates[0] == 1e-5
    assert [report.lr for name, report in log if name == "step"] == expected


def test_the_report_of_a_step():
    trainer, _, log = make(norms=[2.5, 3.5], steps=2)
    trainer.fit()
    first, second = (report for name, report in log if name == "step")
    assert (first.step, first.loss, first.grad_norm, first.skipped, first.tokens) == (1, 3.0, 2.5, False, 300)
    assert (second.step, second.loss, second.grad_norm) == (2, 6.0, 3.5)
    assert set(first.seconds) == {"total", "data", "forward_backward", "optimizer"}
    parts = sum(first.seconds.values()) - first.seconds["total"]
    assert 0 <= parts == pytest.approx(first.seconds["total"], abs=1e-6)


def test_a_resumed_run_goes_on_where_it_was():
    trainer, step, log = make(start=(3, 900))
    assert trainer.fit() is True
    assert step.batches == [["batch of step 3"]] and log[0] == ("start", 3)
    assert (trainer.step, trainer.tokens_seen) == (4, 1200)


def test_a_finished_run_takes_no_step():
    trainer, step, log = make(start=(STEPS, 1200))
    assert trainer.fit() is True
    assert step.batches == [] and names(log) == ["start", "end"]


def test_an_agreed_stop_ends_the_run_after_the_step():
    stop = FakeStop(at=2)
    trainer, _, log = make(stop=stop)
    assert trainer.fit() is False
    assert names(log) == ["start", "step", "step", "stop", "end"]
    assert log[3] == ("stop", {"reason": "SIGTERM"}) and stop.cleared == 1


def test_a_stop_at_the_last_step_is_a_finished_run():
    trainer, _, _ = make(stop=FakeStop(at=STEPS))
    assert trainer.fit() is True


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_skipped_step_is_told_and_counts(bad):
    trainer, _, log = make(norms=[1.0, bad, 1.0, 1.0])
    trainer.fit()
    assert names(log) == ["start", "step", "skip", "step", "step", "step", "end"]
    assert log[2][1]["in_a_row"] == 1
    assert [report.skipped for name, report in log if name == "step"] == [False, True, False, False]
    assert trainer.step == STEPS


def test_too_many_skipped_steps_in_a_row_end_the_run():
    trainer, step, log = make(norms=[math.nan] * 20, steps=20)
    with pytest.raises(TrainingError, match=r"3 steps in a row .*step 3.*optimizer\.lr"):
        trainer.fit()
    assert len(step.batches) == LIMIT
    assert [fields["in_a_row"] for name, fields in log if name == "skip"] == [1, 2, 3]
    assert names(log)[-1] == "error" and "end" not in names(log)


def test_a_good_step_starts_the_count_anew():
    trainer, _, _ = make(norms=[math.nan, math.nan, 1.0, math.nan, math.nan, 1.0], steps=6)
    assert trainer.fit() is True


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_an_error_is_told_and_raised(error):
    class Fails(Callback):
        def post_step(self, trainer: Trainer, report: Any) -> None:
            raise error

    log: list[tuple] = []
    trainer, _, _ = make(callbacks=[Witness(log), Fails()])
    with pytest.raises(type(error)):
        trainer.fit()
    assert log[-1] == ("error", error) and "end" not in names(log)


def test_callbacks_hear_of_records_and_validations():
    trainer, _, log = make()
    trainer.record("sample", text="x", prompt="y")
    trainer.validated(2.5)
    assert log == [("sample", {"text": "x", "prompt": "y"}), ("validation", 2.5)]
