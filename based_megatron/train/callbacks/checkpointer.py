"""Saves, prunes and restores checkpoints of a run."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from based_megatron.checkpoint.carried import carried_fragments
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import MODEL, load_carried, load_checkpoint, read_state
from based_megatron.checkpoint.ranks import all_ranks
from based_megatron.checkpoint.saver import Saved, Saver
from based_megatron.checkpoint.store import FOLDER, GOOD, Kept, newest_valid, resolve_checkpoint, set_aside, step_of
from based_megatron.checkpoint.zero import after_load, optimizer_entry, saved_optimizer, zero_fragments
from based_megatron.config import Config, to_dict
from based_megatron.errors import CheckpointError, ConfigError, TrainingError
from based_megatron.monitor.finite import not_finite
from based_megatron.parallel.sequence.carried import CarriedStates, Past
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.guard import GUARD, Guard
from based_megatron.train.identity import check_changes

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


PAST_TOKENS = "past_tokens"
"""Entry of a checkpoint's state: the runs of tokens of each row that its carried states know of. Absent where it has none."""


class Checkpointer(Callback):
    """Saves at intervals of steps and of time, at a stop and at the end, in the background where the host has memory for a copy.

    A failed save is recorded and training goes on, until too many fail in a row; the last one must work. While steps are skipped
    nothing is saved at intervals, and older checkpoints stay: the newest may be from weights that have diverged. Weights that are
    not finite are never saved.
    """

    def __init__(
        self,
        engine: Any,
        config: Config,
        run_id: str,
        data_fingerprint: str,
        guard: Guard,
        device: torch.device,
        carried: CarriedStates | None = None,
    ) -> None:
        self._engine, self._config, self._run_id, self._data_fingerprint = engine, config, run_id, data_fingerprint
        self._guard, self._carried = guard, carried
        self._folder = Path(config.run_dir) / FOLDER
        # Files and objects travel over gloo, so that NCCL's queues hold training alone.
        timeout = timedelta(seconds=config.parallel.timeout_seconds)
        self._ranks, writers = (all_ranks(dist.new_group(backend="gloo", timeout=timeout)) for _ in range(2))
        settings = config.checkpoint
        # A loss that has risen is known to have after so many steps: the run then goes back to before them.
        proven_after_steps = (
            config.guards.window_steps if config.guards.spike != "off" and config.guards.rollback else 0
        )
        kept = Kept(settings.keep_last, settings.keep_every_steps, proven_after_steps)
        self._saver = Saver(self._folder, kept, self._ranks, writers, device)
        self._saved_step, self._failed_in_a_row, self._stood_still_seconds = 0, 0, 0.0
        self._warnings: list[str] = []
        self._loaded: dict[str, Any] | None = None
        self._trainer: Trainer | None = None

    def restore(self) -> tuple[int, int]:
        """(steps done, tokens seen) of the newest valid checkpoint, now loaded; (0, 0) for a new run. Collective."""
        settings = self._config.checkpoint
        found = newest_valid(self._folder, self._warnings.append, self._ranks) if settings.resume else None
        if found is not None:
            return self._resume(found)
        if settings.load:
            path = resolve_checkpoint(Path(settings.load), self._warnings.append, self._ranks)
            state = self._load(path, weights_only=True)
            self._loaded = {"path": str(path), "what": "weights", "of_step": state["step"]}
        return 0, 0

    def go_back(self, latest_step: int) -> tuple[int, int] | None:
        """(steps done, tokens seen) of the newest valid checkpoint of a step up to `latest_step`, now loaded; None if there is none.

        Those of later steps are moved out of the way of a resume, and so is one that is being written. Collective.
        """
        if self._saver.in_flight:
            assert self._trainer is not None
            self._finish(self._trainer)
        passed_over: list[str] = []
        found = newest_valid(self._folder, passed_over.append, self._ranks, latest_step)
        for line in passed_over:
            assert self._trainer is not None
            self._trainer.record("warning", message=line)
        if found is None:
            return None
        self._ranks.on_first(lambda: set_aside(self._folder, step_of(found)))
        return self._resume(found)

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if self._loaded:
            trainer.record("load", **self._loaded)
        if self._config.checkpoint.asynchronous:
            self._warn(self._saver.take_memory(self._fragments()))
        for line in self._warnings:
            trainer.record("warning", message=line)
        self._last_start = time.monotonic()

    def on_gradients(self, trainer: Trainer) -> None:
        self._saver.hold_update()

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        if self._saver.in_flight and self._saver.finished():
            self._finish(trainer)
        interval_steps = self._config.checkpoint.interval_steps
        by_steps = bool(interval_steps) and report.step % interval_steps == 0
        if not (by_steps or self._is_time()):
            return
        if trainer.is_healthy:
            self._start(trainer, waits=not self._saver.asynchronous)
            if not self._saver.asynchronous:
                self._finish(trainer)
        elif by_steps:
            trainer.record("warning", message=f"step {report.step} was skipped: nothing is saved until one is not")

    def settle(self) -> None:
        self._saver.settle()

    def on_end(self, trainer: Trainer) -> None:
        if self._saver.in_flight:
            self._finish(trainer, may_stop=False)
        if trainer.step != self._saved_step:
            self._start(trainer, waits=True)
            self._finish(trainer, must_work=True)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        if (saved := self._saver.settle()) and not saved.error:
            self._tell(trainer, saved)

    def _is_time(self) -> bool:
        """Whether rank 0 says that a save is due; a slow one is not followed by another at once (collective)."""
        interval = self._config.checkpoint.interval_seconds
        if not interval or self._saver.in_flight:
            return False
        waits = self._ranks.rank == 0 and time.monotonic() - self._last_start < interval
        return bool(self._ranks.lowest(int(not waits)))

    def _fragments(self) -> list[Fragment]:
        return zero_fragments(self._engine) + (carried_fragments(self._carried) if self._carried is not None else [])

    def _start(self, trainer: Trainer, waits: bool) -> None:
        """Begin a save, after the end of the one before (collective). waits: until it is written too."""
        with trainer.saving():
            self._start_now(trainer, waits)

    def _start_now(self, trainer: Trainer, waits: bool) -> None:
        started = time.perf_counter()
        if self._saver.in_flight:
            self._finish(trainer)
        self._last_start = time.monotonic()
        fragments = self._fragments()
        self._check_finite(trainer, fragments)
        state: dict[str, Any] = {
            GOOD: trainer.is_healthy,
            "run_id": self._run_id,
            "tokens_seen": trainer.tokens_seen,
            "optimizer": optimizer_entry(self._engine),
            "data_fingerprint": self._data_fingerprint,
            "world_size": trainer.topology.world_size,
            "config": to_dict(self._config),
            GUARD: self._guard.state(),
        }
        if self._carried is not None:
            state[PAST_TOKENS] = self._carried.past.runs
        problem = self._saver.start(trainer.step, fragments, state, prunes=trainer.is_healthy)
        if problem:
            trainer.record("warning", message=problem)
        if waits or not self._saver.asynchronous:
            self._saver.settle()
        self._stood_still_seconds = time.perf_counter() - started
        trainer.metrics.record("time/save_seconds", self._stood_still_seconds, "max")

    def _finish(self, trainer: Trainer, may_stop: bool = True, must_work: bool = False) -> None:
        """Record how the save in flight ended, and wait for it if it has not (collective)."""
        saved = self._saver.finish()
        trainer.metrics.record("time/save_write_seconds", saved.write_seconds, "max")
        if saved.warning:
            trainer.record("warning", step=saved.step, message=saved.warning)
        if not saved.error:
            self._saved_step, self._failed_in_a_row = saved.step, 0
            self._tell(trainer, saved)
            return
        self._failed_in_a_row += 1
        if must_work:
            raise CheckpointError(saved.error)
        trainer.record("warning", step=saved.step, message=saved.error)
        limit = self._config.checkpoint.max_failed_saves
        if may_stop and self._failed_in_a_row >= limit:
            raise CheckpointError(
                f"{limit} saves in a row failed, as many as checkpoint.max_failed_saves allows: {saved.error}"
            )

    def _tell(self, trainer: Trainer, saved: Saved) -> None:
        trainer.record(
            "checkpoint",
            step=saved.step,
            path=str(saved.path),
            seconds=self._stood_still_seconds,
            copy_seconds=saved.copy_seconds,
            write_seconds=saved.write_seconds,
        )

    def _warn(self, line: str) -> None:
        if line:
            self._warnings.append(line)

    def _check_finite(self, trainer: Trainer, fragments: list[Fragment]) -> None:
        """Raises TrainingError if a number to be saved is an infinity or a nan on any rank (collective)."""
        tensors = [
            (fragment.spec.name if kind == MODEL else f"{kind} of {fragment.spec.name}", tensor)
            for fragment in fragments
            for kind, tensor in fragment.tensors.items()
        ]
        found = [name for names in self._ranks.together(lambda: not_finite(tensors)) for name in names]
        if found:
            raise TrainingError(
                f"the weights or states of step {trainer.step} are not finite ({found[0]} is the first of {len(set(found))}) and are not "
                f"saved; {trainer.advice(trainer.step)}"
            )

    def _resume(self, path: Path) -> tuple[int, int]:
        """Take all up that a checkpoint has. Returns its steps and tokens."""
        state = self._load(path, weights_only=False)
        check_changes(self._config, self._data_fingerprint, path, state)
        self._restore_carried(path, state)
        if GUARD in state:
            self._guard.restore(state[GUARD])
        self._saved_step = state["step"]
        return state["step"], state["tokens_seen"]

    def _load(self, path: Path, weights_only: bool) -> dict[str, Any]:
        if not weights_only:
            self._check_optimizer(path)
        fragments = zero_fragments(self._engine)
        state = load_checkpoint(path, fragments, weights_only=weights_only, ranks=self._ranks)
        after_load(self._engine, None if weights_only else saved_optimizer(state))
        return state

    def _check_optimizer(self, path: Path) -> None:
        saved = self._ranks.on_first(lambda: saved_optimizer(read_state(path))["name"])
        if saved != self._config.optimizer.name:
            raise ConfigError(
                f"{path} was trained with optimizer.name {saved}, now {self._config.optimizer.name}: its state does not fit; restore "
                f"the old value, or start a new run_dir from its weights with checkpoint.load"
            )

    def _restore_carried(self, path: Path, state: dict[str, Any]) -> None:
        """Take carried states up where they are of this data and model; else a line says that the run begins without them."""
        if self._carried is None:
            return
        if reason := self._carried_do_not_fit(state):
            self._warnings.append(f"the first step starts without carried states: {path} {reason}")
            return
        load_carried(path, carried_fragments(self._carried), self._ranks)
        self._carried.past = saved_past(state[PAST_TOKENS])

    def _carried_do_not_fit(self, state: dict[str, Any]) -> str | None:
        if PAST_TOKENS not in state:
            return "has none, by data.carry_state=false or an older version"
        if state["data_fingerprint"] != self._data_fingerprint:
            return f"is of other data (fingerprint {state['data_fingerprint']}, now {self._data_fingerprint})"
        saved, now = state["config"]["model"], to_dict(self._config)["model"]
        changes = [f"model.{key} {saved[key]}, now {now[key]}" for key in now if saved.get(key, now[key]) != now[key]]
        return f"was saved with {'; '.join(changes)}" if changes else None


def saved_past(entry: int | list[tuple[int, int]]) -> Past:
    """The past of carried states as a checkpoint has it: runs, or one number of known tokens in older ones."""
    return Past().seen(entry) if isinstance(entry, int) else Past(tuple((known, missing) for known, missing in entry))
