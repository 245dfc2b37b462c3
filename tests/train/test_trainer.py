"""The loop with stand-ins for the step, the loader, the callbacks and the stop: who is called, when, with what."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.config import Config, GuardsConfig, load_config
from based_megatron.errors import DataError, TrainingError
from based_megatron.monitor.hub import Metrics
from based_megatron.train.callbacks.base import Callback
from based_megatron.train.guard import NOT_FINITE, Guard
from based_megatron.train.schedule import learning_rate
from based_megatron.train.step import LossSum, OwnWork, Update
from based_megatron.train.trainer import Trainer

STEPS, LIMIT = 4, 3


class FakeStep:
    """Gives the losses and gradient norms it is told to, and notes the learning rate at the time of both calls."""

    def __init__(self, norms: list[float]) -> None:
        self.engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]), gradients=self.gradients)
        self.missed: list[int] = []
        self.norms = iter(norms)
        self.batches: list[list[Any]] = []
        self.rates: list[float] = []

    def accumulate(self, batches: list[Any], own: OwnWork) -> LossSum:
        self.batches.append(batches)
        self.rates.append(self._rate())
        own.begin_own()
        own.end_own()
        return LossSum(torch.tensor(30.0 * len(self.batches)).double(), torch.tensor(10.0).double())

    def update(
        self,
        on_gradients: Callable[[], None],
        judge: Callable[[torch.Tensor], torch.Tensor],
        on_skip: Callable[[], None],
    ) -> Update:
        assert self._rate() == self.rates[-1]
        on_gradients()
        norm = torch.tensor(next(self.norms)).double()
        applied = bool(norm.isfinite() and not judge(norm))
        if not applied:
            on_skip()
        return Update(norm, applied)

    def gradients(self) -> list[tuple[Any, torch.Tensor]]:
        names = {"layers.1.mlp.fc1.weight": math.nan, "embedding.weight": math.inf, "final_norm.weight": 1.0}
        return [(SimpleNamespace(spec=SimpleNamespace(name=n)), torch.tensor([0.5, x])) for n, x in names.items()]

    def miss(self, tokens: int) -> None:
        self.missed.append(tokens)

    def _rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]


class FakeLoader:
    def micro_batches(self, step: int) -> list[Any]:
        return [f"batch of step {step}"]

    def documents(self, step: int) -> list[str]:
        return [f"document of step {step}"]


class FakeStop:
    """Agrees to stop at the given question, counted from 1."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.asked, self.calls = at, 0, list[str]()

    def agreed(self, failure: str) -> str:
        if failure:
            raise DataError(failure)
        self.asked += 1
        return "SIGTERM" if self.asked == self.at else ""

    def forget_last(self) -> None:
        self.calls.append("forget_last")

    def honoured(self) -> None:
        self.calls.append("honoured")


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

    def pre_save(self, trainer: Trainer) -> None:
        self.log.append((self.name + "pre save", trainer.clock.progress.beat.phase))

    def on_end(self, trainer: Trainer) -> None:
        self.log.append((self.name + "end", trainer.step))

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.log.append((self.name + "error", error))


def config_of(interval: int, run_dir: str, **train: Any) -> Config:
    config = load_config("tiny")
    values = {"steps": STEPS, "max_skipped_steps": LIMIT, "global_batch_sequences": 6, **train}
    return dataclasses.replace(
        config,
        run_dir=run_dir,
        monitor=dataclasses.replace(config.monitor, log_interval_steps=interval),
        train=dataclasses.replace(config.train, **values),
        data=dataclasses.replace(config.data, sequence_length_tokens=50),
        schedule=dataclasses.replace(config.schedule, warmup_steps=2, warmup_lr=1e-5),
    )


def make(
    norms: list[float] | None = None,
    stop: FakeStop | None = None,
    start: tuple[int, int] = (0, 0),
    callbacks: list[Callback] | None = None,
    interval: int = 1,
    run_dir: str = "run",
    checkpoints: Sequence[int] = (),
    guards: GuardsConfig | None = None,
    **train: Any,
) -> tuple[Trainer, FakeStep, list[tuple]]:
    log: list[tuple] = []
    step = FakeStep([1.0] * 20 if norms is None else norms)
    topology = SimpleNamespace(device=torch.device("cpu"))
    config = dataclasses.replace(config_of(interval, run_dir, **train), guards=guards or GuardsConfig())
    guard = Guard(config, torch.device("cpu"))
    states = {0: guard.state()}

    def go_back(latest_step: int) -> tuple[int, int] | None:
        found = max((step for step in checkpoints if step <= latest_step), default=None)
        if found is None:
            return None
        guard.restore(states[0])
        return found, 300 * found

    trainer = Trainer(
        config,
        topology,  # type: ignore[arg-type]
        step,  # type: ignore[arg-type]
        FakeLoader(),
        Metrics(torch.device("cpu")),
        callbacks if callbacks is not None else [Witness(log)],
        stop or FakeStop(),  # type: ignore[arg-type]
        guard,
        go_back,
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
    assert names(log) == ["a start", "b start", "a step", "b step", "b end", "a end"], (
        "the end comes in the opposite order"
    )


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
    assert (first.step, float(first.loss), float(first.grad_norm), first.tokens) == (1, 3.0, 2.5, 300)
    assert (second.step, float(second.loss), float(second.grad_norm)) == (2, 6.0, 3.5)
    seconds = trainer.clock.take()
    total = seconds.pop("total")
    assert set(seconds) == {"data", "forward_backward", "own", "optimizer"}
    assert 0 <= seconds.pop("own") <= seconds["forward_backward"]
    assert 0 < total == pytest.approx(sum(seconds.values()), abs=1e-6)


def test_a_resumed_run_goes_on_where_it_was():
    trainer, step, log = make(start=(3, 900))
    assert trainer.fit() is True
    assert step.batches == [["batch of step 3"]] and log[0] == ("start", 3)
    assert (trainer.step, trainer.tokens_seen) == (4, 1200)


def test_a_finished_run_takes_no_step():
    trainer, step, log = make(start=(STEPS, 1200))
    assert trainer.fit() is True
    assert step.batches == [] and names(log) == ["start", "end"]


def test_an_agreed_stop_ends_the_run_before_the_next_step():
    stop = FakeStop(at=3)
    trainer, _, log = make(stop=stop)
    assert trainer.fit() is False
    assert names(log) == ["start", "step", "step", "stop", "end"]
    assert log[3] == ("stop", {"reason": "SIGTERM"}) and stop.calls == ["forget_last", "honoured"]


def test_a_stop_before_the_first_step_takes_none():
    trainer, step, log = make(stop=FakeStop(at=1))
    assert trainer.fit() is False
    assert names(log) == ["start", "stop", "end"] and step.batches == []


def test_a_rank_that_cannot_read_tells_the_others_before_it_raises():
    trainer, step, log = make()
    read = trainer.loader.micro_batches

    def damaged(number: int) -> list[Any]:
        if number == 2:
            raise DataError("shard 7 is damaged")
        return read(number)

    trainer.loader.micro_batches = damaged  # type: ignore[method-assign]
    with pytest.raises(DataError, match="shard 7 is damaged"):
        trainer.fit()
    assert len(step.batches) == 2 and names(log)[-1] == "error"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("interval", [1, 4])
def test_a_skipped_step_is_recorded_at_once(bad, interval):
    trainer, _, log = make(norms=[1.0, bad, 1.0, 1.0], interval=interval, run_dir="my run")
    trainer.fit()
    assert names(log) == ["start", "step", "skip", "step", "step", "step", "end"]
    fields = dict(log[2][1])
    assert str(fields.pop("grad_norm")) == str(bad)
    assert fields == {
        "step": 2,
        "loss": 6.0,
        "reason": NOT_FINITE,
        "in_a_row": 1,
        "parameters": ["embedding.weight", "layers.1.mlp.fc1.weight"],
        "documents": ["document of step 1"],
        "look": "based data at --run 'my run' --data-step 2",
    }
    assert (trainer.step, trainer.tokens_seen) == (STEPS, STEPS * 300), "its tokens were seen"
    assert (trainer.skips.in_a_row, trainer.skips.total) == (0, 1)


@pytest.mark.parametrize("interval", [1, 100])
def test_too_many_skipped_steps_in_a_row_end_the_run(interval):
    trainer, step, log = make(norms=[math.nan] * 20, steps=20, interval=interval)
    with pytest.raises(TrainingError, match=r"3 steps in a row .*step 3.*optimizer\.lr"):
        trainer.fit()
    assert len(step.batches) == LIMIT
    assert [(fields["step"], fields["in_a_row"]) for name, fields in log if name == "skip"] == [(1, 1), (2, 2), (3, 3)]
    assert names(log)[-1] == "error" and "end" not in names(log)


def test_too_many_skipped_steps_go_back_and_step_over_their_data():
    """To a checkpoint of before the first of them; one from which nothing good came is passed over the next time."""
    norms = [1.0, 1.0, *[math.nan] * LIMIT, *[math.nan] * LIMIT, *[1.0] * 9]
    trainer, step, log = make(norms, checkpoints=[1, 2, 5], steps=6)
    assert trainer.fit() is True
    numbers = [int(batches[0].removeprefix("batch of step ")) for batches in step.batches]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 7, *range(8, 13)]
    first, second = (fields for name, fields in log if name == "rollback")
    assert (first["step"], first["to_step"], first["rollbacks"], first["skipped_data_steps"]) == (5, 2, 1, 3)
    assert first["data_jumps"] == ((2, 5),) and "3 steps in a row were skipped up to step 5" in first["reason"]
    assert (second["step"], second["to_step"], second["rollbacks"], second["skipped_data_steps"]) == (5, 1, 2, 7)
    assert second["data_jumps"] == ((1, 8),)
    assert step.missed == [3 * 50, 7 * 50], "tokens of each row"
    reports = [report for name, report in log if name == "step"]
    assert [report.step for report in reports] == [1, 2, 3, 4, 3, 4, 2, 3, 4, 5, 6]
    assert trainer.tokens_seen == 300 + 5 * 300 and trainer.skips.total == 0


def test_so_many_rollbacks_and_no_more():
    trainer, _, log = make(
        [math.nan] * 99, checkpoints=[0], guards=GuardsConfig(max_rollbacks=2), start=(4, 0), steps=9
    )
    with pytest.raises(TrainingError, match=r"steps in a row.*optimizer\.lr.*--data-step"):
        trainer.fit()
    assert names(log).count("rollback") == 1, "nothing is before step 0"
    bad_then_good = [*[math.nan] * LIMIT, 1.0] * 9
    trainer, _, log = make(bad_then_good, checkpoints=[0], guards=GuardsConfig(max_rollbacks=2), steps=9)
    with pytest.raises(TrainingError, match=r"after 2 rollbacks"):
        trainer.fit()
    assert [fields["data_jumps"] for name, fields in log if name == "rollback"] == [((0, 3),), ((0, 7),)]


def test_nobody_goes_back_where_it_is_turned_off():
    trainer, _, log = make([math.nan] * 9, checkpoints=[0], guards=GuardsConfig(rollback=False), steps=9)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.fit()
    assert "rollback" not in names(log)


@pytest.mark.parametrize("saved", [None, 2])
def test_the_error_names_the_newest_checkpoint_and_a_command_that_works(tmp_path, saved):
    run_dir = tmp_path / "my run"
    trainer, _, _ = make(norms=[1.0, *[math.nan] * 20], steps=20, run_dir=str(run_dir))
    if saved:
        folder = run_dir / "checkpoints" / f"step-{saved:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    with pytest.raises(TrainingError) as error:
        trainer.fit()
    message = str(error.value)
    assert ("the newest checkpoint is step 2" if saved else "no checkpoint was saved") in message
    assert f"`based data at --run '{run_dir}' --data-step 2`" in message, "step 2 was the first to be skipped"
    assert "\n" not in message


def test_gradients_are_seen_before_each_step_is_done():
    class Sees(Callback):
        def on_gradients(self, trainer: Trainer) -> None:
            log.append(("gradients", trainer.step))

    log: list[tuple] = []
    trainer, _, _ = make(steps=2, callbacks=[Sees(), Witness(log)])
    trainer.fit()
    assert names(log) == ["start", "gradients", "step", "gradients", "step", "end"]
    assert [step for name, step in log if name == "gradients"] == [0, 1]


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


def test_callbacks_hear_of_a_save_before_it():
    trainer, _, log = make()
    with trainer.saving():
        log.append(("saving", trainer.clock.progress.beat.phase))
    assert log == [("pre save", "start-up"), ("saving", "save")]


def test_the_phase_of_a_rank_is_known_at_any_time():
    phases: list[tuple[str, int, str]] = []
    trainer, step, _ = make(steps=2)

    def note(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            beat = trainer.clock.progress.beat
            phases.append((name, beat.step, beat.phase))
            return real(*args)

        return noted

    trainer.loader.micro_batches = note("batches", trainer.loader.micro_batches)  # type: ignore[method-assign]
    step.accumulate, step.update = note("accumulate", step.accumulate), note("update", step.update)  # type: ignore[method-assign]
    trainer.stop.agreed = note("vote", trainer.stop.agreed)  # type: ignore[method-assign]
    trainer.fit()
    of_a_step = [
        ("batches", "data"),
        ("vote", "stop vote"),
        ("accumulate", "forward_backward"),
        ("update", "optimizer"),
    ]
    assert phases == [(name, step, phase) for step in (1, 2) for name, phase in of_a_step]
