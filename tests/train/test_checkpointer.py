"""When checkpoints are saved, what a failed save does, and what a run starts from; files are stood in for.

Saves run in their thread here too, but a test's step ends after them: what it sees does not depend on the time.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.checkpoint import saver
from based_megatron.checkpoint.ranks import ALONE, Ranks
from based_megatron.checkpoint.store import Kept, step_name
from based_megatron.config import Config, load_config, to_dict
from based_megatron.errors import CheckpointError, ConfigError, TrainingError
from based_megatron.monitor.hub import Metrics
from based_megatron.parallel.sequence.carried import CarriedState, CarriedStates, Past
from based_megatron.train.callbacks import checkpointer as module
from based_megatron.train.callbacks.checkpointer import Checkpointer
from based_megatron.train.guard import Guard
from based_megatron.train.skips import SkipCount

FINGERPRINT = "abc/seed=42"
CPU = torch.device("cpu")
RUN_ID = "f00d"


class Disk:
    """Stands in for the checkpoint package: notes what is saved, loaded and pruned."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict]] = []
        self.loaded: list[tuple[str, bool]] = []
        self.carried: list[str] = []
        self.optimizers: list[Any] = []
        self.pruned: list[tuple[Kept, str]] = []
        self.newest: Path | None = None
        self.latest_step: int | None = None
        self.set_aside_after: int | None = None
        self.state: dict[str, Any] = {}
        self.full = self.locked = False
        self.warning = ""

    def save_checkpoint(self, folder: Path, step: int, fragments: Any, state: dict, ranks: Any) -> Path:
        if self.full:
            raise CheckpointError(f"no room for step {step}")
        self.saved.append((step, state))
        return folder / step_name(step)

    def load_checkpoint(self, path: Path, fragments: Any, *, weights_only: bool, ranks: Any) -> dict:
        self.loaded.append((str(path), weights_only))
        return self.state

    def load_carried(self, path: Path, fragments: Any, ranks: Any) -> None:
        self.carried.append(str(path))

    def after_load(self, engine: Any, optimizer: Any) -> None:
        self.optimizers.append(optimizer)

    def newest_valid(self, folder: Path, warn: Any, ranks: Any, latest_step: int | None = None) -> Path | None:
        self.latest_step = latest_step
        if self.warning:
            warn(self.warning)
        return self.newest

    def set_aside(self, folder: Path, step: int) -> None:
        self.set_aside_after = step

    def prune(self, folder: Path, kept: Kept, saved: Path) -> None:
        if self.locked:
            raise CheckpointError("cannot remove step-1")
        self.pruned.append((kept, saved.name))

    def pruned_by(self) -> list[int]:
        return [int(name.removeprefix("step-")) for _, name in self.pruned]


class FakeTrainer:
    """A trainer at a step, with a log of records."""

    def __init__(self) -> None:
        self.step, self.tokens_seen = 0, 0
        self.topology = SimpleNamespace(world_size=8)
        self.records: list[tuple[str, dict]] = []
        self.skips, self.metrics = SkipCount(), Metrics(torch.device("cpu"))

    def saving(self) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def is_healthy(self) -> bool:
        return not self.skips.in_a_row

    def advice(self, step: int) -> str:
        return f"look at step {step}"

    def record(self, name: str, **fields: Any) -> None:
        self.records.append((name, fields))


@pytest.fixture
def disk(monkeypatch) -> Disk:
    disk = Disk()
    for name in ("load_checkpoint", "load_carried", "after_load", "newest_valid", "set_aside"):
        monkeypatch.setattr(module, name, getattr(disk, name))
    for name in ("save_checkpoint", "prune"):
        monkeypatch.setattr(saver, name, getattr(disk, name))
    monkeypatch.setattr(module, "resolve_checkpoint", lambda path, warn, ranks: path / "newest")
    monkeypatch.setattr(module, "zero_fragments", lambda engine: [])
    monkeypatch.setattr(module, "optimizer_entry", lambda engine: {"name": "adamw", "step": 17})
    monkeypatch.setattr(module, "read_state", lambda path: disk.state)
    monkeypatch.setattr(module.dist, "new_group", lambda backend, timeout: (backend, timeout))
    monkeypatch.setattr(module, "all_ranks", lambda group: ALONE)
    return disk


def config_with(**checkpoint: Any) -> Config:
    config = load_config("tiny")
    return dataclasses.replace(config, run_dir="run", checkpoint=dataclasses.replace(config.checkpoint, **checkpoint))


def make(config: Config) -> Checkpointer:
    return checkpointer_of(config, guard_of(config))


def guard_of(config: Config) -> Guard:
    return Guard(config, CPU)


def checkpointer_of(config: Config, guard: Guard, carried: CarriedStates | None = None) -> Checkpointer:
    return Checkpointer(None, config, RUN_ID, FINGERPRINT, guard, CPU, carried)


def train(
    callback: Checkpointer, steps: int, disk: Disk | None = None, full_at: int = 0, skipped: Sequence[int] = ()
) -> FakeTrainer:
    """Run the hooks of so many steps."""
    trainer: Any = FakeTrainer()
    callback.on_start(trainer)
    for step in range(1, steps + 1):
        trainer.step, trainer.tokens_seen = step, 100 * step
        trainer.skips.in_a_row = int(step in skipped)
        if disk is not None:
            disk.full = step == full_at
        callback.post_step(trainer, SimpleNamespace(step=step))  # type: ignore[arg-type]
        callback.settle()
    callback.on_end(trainer)
    return trainer


def steps_of(disk: Disk) -> list[int]:
    return [step for step, _ in disk.saved]


def saved_state(**changes: Any) -> dict[str, Any]:
    values = to_dict(load_config("tiny"))
    state = {"step": 6, "tokens_seen": 600, "adam_step": 5, "data_fingerprint": FINGERPRINT, "config": values}
    return {"kinds": ["model", "exp_avg"], **state, **changes}


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [(3, 7, [3, 6, 7]), (3, 6, [3, 6]), (0, 4, [4]), (1, 2, [1, 2])],
)
def test_it_saves_at_every_interval_and_once_at_the_end(disk, interval, steps, expected):
    train(make(config_with(interval_steps=interval)), steps)
    assert steps_of(disk) == expected


def test_what_is_saved_beside_the_tensors(disk):
    config = config_with(interval_steps=0)
    train(make(config), 2)
    assert disk.saved[0][1] == {
        "good": True,
        "run_id": RUN_ID,
        "tokens_seen": 200,
        "optimizer": {"name": "adamw", "step": 17},
        "data_fingerprint": FINGERPRINT,
        "world_size": 8,
        "config": to_dict(config),
        "guard": guard_of(config).state(),
    }


def test_a_failed_save_is_told_and_training_goes_on(disk):
    trainer = train(make(config_with(interval_steps=2)), 4, disk, full_at=2)
    assert steps_of(disk) == [4]
    assert trainer.records[0] == ("warning", {"step": 2, "message": "no room for step 2"})


def test_a_failed_interval_is_made_up_for_at_the_end(disk):
    callback, trainer = make(config_with(interval_steps=4)), FakeTrainer()
    disk.full, trainer.step = True, 4
    callback.post_step(trainer, SimpleNamespace(step=4))  # type: ignore[arg-type]
    disk.full = False
    callback.on_end(trainer)  # type: ignore[arg-type]
    assert steps_of(disk) == [4]


def test_the_last_save_must_work(disk):
    callback, trainer = make(config_with(interval_steps=0)), FakeTrainer()
    disk.full, trainer.step = True, 4
    with pytest.raises(CheckpointError, match="no room for step 4"):
        callback.on_end(trainer)  # type: ignore[arg-type]


def test_nothing_is_saved_or_pruned_while_steps_are_skipped(disk):
    trainer = train(make(config_with(interval_steps=2)), 8, skipped=[3, 4, 5, 6])
    assert steps_of(disk) == [2, 8] and disk.pruned_by() == [2, 8]
    warnings = [fields["message"] for name, fields in trainer.records if name == "warning"]
    assert [message.partition(" was skipped")[0] for message in warnings] == ["step 4", "step 6"]


def test_a_run_that_ends_on_a_skipped_step_is_saved_and_keeps_the_others(disk):
    """No weight changed since the last good step, but it may have been the one that diverged."""
    train(make(config_with(interval_steps=2)), 4, skipped=[3, 4])
    assert steps_of(disk) == [2, 4] and disk.pruned_by() == [2]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("others", [[], ["on another rank"]])
def test_weights_that_are_not_finite_are_not_saved(disk, monkeypatch, bad, others):
    """One line names the first of them, on every rank."""
    here = torch.tensor([1.0, bad if not others else 1.0])
    fragments = [named("good", torch.ones(3)), named("empty", torch.ones(0)), named("bad", here), named("worse", here)]
    monkeypatch.setattr(module, "zero_fragments", lambda engine: fragments)
    callback = make(config_with(interval_steps=2, asynchronous=False))
    callback._ranks = SimpleNamespace(together=lambda action: [action(), others])  # type: ignore[assignment]
    first = others[0] if others else "bad"
    line = rf"weights or states of step 2 are not finite \({first} is the first.*look at step 2"
    with pytest.raises(TrainingError, match=line):
        train(callback, 2)
    assert disk.saved == []


def named(name: str, weights: torch.Tensor) -> Any:
    return SimpleNamespace(spec=SimpleNamespace(name=name), tensors={"model": weights})


def test_the_time_of_saves_is_a_metric(disk):
    trainer = train(make(config_with(interval_steps=2)), 4)
    ((_, fields), *_) = [record for record in trainer.records if record[0] == "checkpoint"]
    assert 0 < fields["seconds"] < 60
    assert 0 < trainer.metrics.collect()["time/save_seconds"] < 60


def test_older_ones_are_pruned_after_each_save(disk):
    train(make(config_with(interval_steps=2, keep_last=5, keep_every_steps=10)), 4)
    assert disk.pruned_by() == [2, 4] and disk.pruned[0][0] == Kept(last=5, every_steps=10, proven_after_steps=128)


def test_one_rank_prunes(disk, monkeypatch):
    monkeypatch.setattr(module, "all_ranks", lambda group: Ranks(rank=1))
    train(make(config_with(interval_steps=2)), 4)
    assert steps_of(disk) == [2, 4] and disk.pruned == []


def test_a_failed_pruning_is_told_alone(disk):
    disk.locked = True
    trainer = train(make(config_with(interval_steps=0)), 1)
    assert [name for name, _ in trainer.records] == ["warning", "checkpoint"]


def seconds_of(disk: Disk, monkeypatch, times: Sequence[float], **settings: Any) -> list[int]:
    """Steps of the saves of a run whose start and steps end at these seconds of rank 0's clock."""
    callback, trainer = make(config_with(interval_steps=0, **settings)), FakeTrainer()
    clock = SimpleNamespace(now=times[0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: 0.0))
    callback.on_start(trainer)  # type: ignore[arg-type]
    for step, clock.now in enumerate(times[1:], start=1):
        trainer.step = step
        callback.post_step(trainer, SimpleNamespace(step=step))  # type: ignore[arg-type]
        callback.settle()
    return steps_of(disk)


def test_it_saves_by_time_counted_from_the_start_of_the_save_before(disk, monkeypatch):
    assert seconds_of(disk, monkeypatch, [0, 9, 10, 12, 19, 25, 34, 35], interval_seconds=10) == [2, 5, 7]


def test_a_save_by_steps_puts_off_the_next_one_by_time(disk, monkeypatch):
    assert seconds_of(disk, monkeypatch, [0, 8, 10, 17, 18]) == []
    callback = make(config_with(interval_steps=1, interval_seconds=10))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0, perf_counter=lambda: 0.0))
    train(callback, 1)
    assert callback._last_start == 100.0


@pytest.mark.parametrize(("lowest", "saved"), [(0, []), (1, [1])])
def test_the_clock_of_rank_0_counts(disk, monkeypatch, lowest, saved):
    """Another rank says that a save is due, whatever its own clock, and all do what rank 0 says."""
    votes: list[int] = []
    callback, trainer = make(config_with(interval_steps=0, interval_seconds=1e9)), FakeTrainer()
    callback.on_start(trainer)  # type: ignore[arg-type]
    callback._ranks = SimpleNamespace(  # type: ignore[assignment]
        rank=1, lowest=lambda vote: votes.append(vote) or lowest, together=lambda action: [action()]
    )
    trainer.step = 1
    callback.post_step(trainer, SimpleNamespace(step=1))  # type: ignore[arg-type]
    callback.settle()
    assert votes == [1] and steps_of(disk) == saved


@pytest.mark.parametrize("asynchronous", [True, False])
def test_failed_saves_in_a_row_stop_the_run(disk, asynchronous):
    callback = make(config_with(interval_steps=1, max_failed_saves=3, asynchronous=asynchronous))
    trainer: Any = FakeTrainer()
    callback.on_start(trainer)
    outcomes = [True, True, False, True, True, True]
    with pytest.raises(
        CheckpointError, match=r"3 saves in a row failed.*checkpoint\.max_failed_saves.*no room for step 6"
    ):
        for step, disk.full in enumerate([*outcomes, False], start=1):
            trainer.step = step
            callback.post_step(trainer, SimpleNamespace(step=step))  # type: ignore[arg-type]
            callback.settle()
    assert steps_of(disk) == [3]
    warnings = [fields["step"] for name, fields in trainer.records if name == "warning"]
    assert warnings == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_seconds_of_a_save_are_told_apart(disk, asynchronous):
    trainer = train(make(config_with(interval_steps=0, asynchronous=asynchronous)), 1)
    ((_, fields),) = [record for record in trainer.records if record[0] == "checkpoint"]
    assert fields["step"] == 1 and fields["path"] == str(Path("run/checkpoints/step-00000001"))
    assert 0 < fields["write_seconds"] <= fields["seconds"] < 60, "the last save is waited for"
    assert (fields["copy_seconds"] > 0) == asynchronous


def test_a_save_with_skips_before_it_is_not_good(disk):
    train(make(config_with(interval_steps=2)), 4, skipped=[3, 4])
    assert [(step, state["good"]) for step, state in disk.saved] == [(2, True), (4, False)]


def test_without_host_memory_training_waits_for_saves_and_one_line_says_so(disk, monkeypatch):
    monkeypatch.setattr(saver, "available_bytes", lambda: -1)
    callback = make(config_with(interval_steps=1))
    trainer: Any = FakeTrainer()
    callback.on_start(trainer)
    trainer.step = 1
    callback.post_step(trainer, SimpleNamespace(step=1))  # type: ignore[arg-type]
    assert steps_of(disk) == [1] and [name for name, _ in trainer.records] == ["warning", "checkpoint"]
    assert "checkpoint.asynchronous=false" in trainer.records[0][1]["message"]


def test_an_error_of_training_waits_for_the_save_in_flight(disk):
    callback, trainer = make(config_with(interval_steps=1)), FakeTrainer()
    callback.on_start(trainer)  # type: ignore[arg-type]
    trainer.step = 1
    callback.post_step(trainer, SimpleNamespace(step=1))  # type: ignore[arg-type]
    callback.on_error(trainer, RuntimeError())  # type: ignore[arg-type]
    assert steps_of(disk) == [1]


def test_a_new_run_starts_from_nothing(disk):
    assert make(config_with()).restore() == (0, 0)
    assert disk.loaded == []


def test_a_run_goes_on_from_its_newest_checkpoint(disk):
    disk.newest, disk.state, disk.warning = Path("run/step-6"), saved_state(), "step-8 is damaged"
    callback = make(config_with(load="other"))
    assert callback.restore() == (6, 600)
    assert disk.loaded == [("run/step-6", False)] and disk.optimizers == [{"name": "adamw", "step": 5}]
    trainer: Any = FakeTrainer()
    trainer.step = 6
    callback.on_start(trainer)
    callback.on_end(trainer)
    assert trainer.records == [("warning", {"message": "step-8 is damaged"})], "it is saved already"
    assert disk.saved == []


def test_weights_of_another_run_start_a_new_one(disk):
    """With a fresh optimizer, from step 0."""
    disk.state = saved_state()
    callback, trainer = make(config_with(load="other", interval_steps=0)), FakeTrainer()
    assert callback.restore() == (0, 0)
    assert disk.loaded == [("other/newest", True)] and disk.optimizers == [None]
    callback.on_start(trainer)  # type: ignore[arg-type]
    assert trainer.records == [("load", {"path": "other/newest", "what": "weights", "of_step": 6})]


def test_resume_can_be_turned_off(disk):
    disk.newest, disk.state = Path("run/step-6"), saved_state()
    assert make(config_with(resume=False)).restore() == (0, 0)
    assert disk.loaded == []


def test_settings_of_another_run_are_refused(disk):
    """Those of the checkpoint that is loaded, which may be an older one than the newest."""
    disk.newest, disk.state = Path("run/step-6"), saved_state()
    config = config_with()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_sequences=32))
    with pytest.raises(ConfigError, match=r"train\.global_batch_sequences 16 -> 32"):
        make(config).restore()


def test_the_state_of_another_optimizer_is_refused(disk):
    disk.newest, disk.state = Path("run/step-6"), saved_state(optimizer={"name": "muon", "step": 5})
    with pytest.raises(ConfigError, match=r"optimizer\.name muon, now adamw.*checkpoint\.load"):
        make(config_with()).restore()
    assert disk.loaded == []


@pytest.mark.parametrize(
    ("saved", "expected"),
    [([[64, 8], [32, 0]], Past(((64, 8), (32, 0)))), (384, Past(((384, 0),)))],
    ids=["runs", "older"],
)
def test_the_known_past_of_carried_states_is_saved_and_restored(disk, saved, expected):
    carried = CarriedStates({row: CarriedState(past=Past(((192, 0),))) for row in (0, 4)}, {})
    config = config_with(interval_steps=0)
    train(checkpointer_of(config, guard_of(config), carried), 3)
    assert disk.saved[0][1]["past_tokens"] == ((192, 0),)
    disk.newest, disk.state = Path("run/step-6"), saved_state(past_tokens=saved)
    checkpointer_of(config, guard_of(config), carried).restore()
    assert disk.carried == ["run/step-6"]
    assert [state.past for state in carried.by_row.values()] == [expected] * 2


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({}, "has none"),
        ({"past_tokens": 64, "model": {"rotary_base": 500.0}}, "model.rotary_base 500.0, now 10000.0"),
    ],
)
def test_carried_states_that_do_not_fit_are_told_and_left(disk, saved, expected):
    """Among them keys that were turned by other angles, in tensors of the same shape."""
    disk.newest, disk.state = Path("run/step-6"), saved_state(**saved)
    disk.state["config"]["model"] |= disk.state.pop("model", {})
    carried = CarriedStates({0: CarriedState()}, {})
    config = config_with(allow_changed=("model",))
    callback = checkpointer_of(config, guard_of(config), carried)
    assert callback.restore() == (6, 600)
    ((_, told),) = train(callback, 0).records[:1]
    assert "the first step starts without carried states: run/step-6" in told["message"] and expected in told["message"]
    assert disk.carried == [] and carried.past == Past()


def test_a_run_that_carries_nothing_asks_for_nothing(disk):
    disk.newest, disk.state = Path("run/step-6"), saved_state(past_tokens=64)
    assert make(config_with()).restore() == (6, 600)
    assert disk.carried == []


def test_a_run_goes_back_to_a_checkpoint_and_to_what_the_guard_knew_then(disk):
    config = config_with(interval_steps=2)
    guard = guard_of(config)
    callback = checkpointer_of(config, guard)
    assert callback.go_back(7) is None and disk.latest_step == 7
    guard.settle(1, *torch.ones(2), applied=False)
    disk.newest, disk.state = Path("run/step-00000006"), saved_state(guard=guard.state())
    guard.settle(2, *torch.ones(2), applied=False)
    assert callback.go_back(7) == (6, 600)
    assert disk.loaded == [("run/step-00000006", False)] and disk.set_aside_after == 6
    assert guard.skips == SkipCount(1, 1)


def test_a_run_that_goes_back_tells_of_damaged_checkpoints_on_the_way(disk, monkeypatch):
    callback, trainer = make(config_with(interval_steps=8)), FakeTrainer()
    callback.on_start(trainer)  # type: ignore[arg-type]
    disk.newest, disk.state = Path("run/step-00000006"), saved_state()
    found = module.newest_valid

    def damaged(folder, warn, *more):
        warn("step 7 is damaged")
        return found(folder, warn, *more)

    monkeypatch.setattr(module, "newest_valid", damaged)
    assert callback.go_back(7) == (6, 600)
    assert ("warning", {"message": "step 7 is damaged"}) in trainer.records


def test_a_run_that_goes_back_ends_the_save_in_flight_first(disk):
    """It is told, and what is saved then is the step that the run has gone back to."""
    callback, trainer = make(config_with(interval_steps=8)), FakeTrainer()
    callback.on_start(trainer)  # type: ignore[arg-type]
    trainer.step = 8
    callback.post_step(trainer, SimpleNamespace(step=8))  # type: ignore[arg-type]
    disk.newest, disk.state = Path("run/step-00000006"), saved_state()
    assert callback.go_back(7) == (6, 600)
    assert [fields["step"] for name, fields in trainer.records if name == "checkpoint"] == [8]
    trainer.step = 8
    callback.on_end(trainer)  # type: ignore[arg-type]
    assert steps_of(disk) == [8, 8], "step 8 after the rollback is another one"
