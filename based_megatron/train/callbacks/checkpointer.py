"""Saves, prunes and restores checkpoints of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from based_megatron.checkpoint.carried import carried_fragments
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import MODEL, load_carried, load_checkpoint, read_state
from based_megatron.checkpoint.ranks import Ranks, all_ranks
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import FOLDER, newest_valid, prune, resolve_checkpoint, set_aside, step_of
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
    """Saves at every interval, at a stop and at the end. A failed save is recorded and training goes on; the last one must work.

    While steps are skipped nothing is saved at intervals, and older checkpoints stay: the newest may be from weights that have
    diverged. Weights that are not finite are never saved.
    """

    def __init__(
        self,
        engine: Any,
        config: Config,
        run_id: str,
        data_fingerprint: str,
        guard: Guard,
        carried: CarriedStates | None = None,
    ) -> None:
        self._engine, self._config, self._run_id, self._data_fingerprint = engine, config, run_id, data_fingerprint
        self._guard, self._carried = guard, carried
        self._folder = Path(config.run_dir) / FOLDER
        # Files and objects travel over gloo, so that NCCL's queues hold training alone.
        self._ranks: Ranks = all_ranks(dist.new_group(backend="gloo"))
        self._saved_step = -1
        self._warnings: list[str] = []

    def restore(self) -> tuple[int, int]:
        """(steps done, tokens seen) of the newest valid checkpoint, now loaded; (0, 0) for a new run. Collective."""
        settings = self._config.checkpoint
        found = newest_valid(self._folder, self._warnings.append, self._ranks) if settings.resume else None
        if found is not None:
            return self._resume(found)
        if settings.load:
            self._load(resolve_checkpoint(Path(settings.load), self._warnings.append, self._ranks), weights_only=True)
        return 0, 0

    def go_back(self, latest_step: int) -> tuple[int, int] | None:
        """(steps done, tokens seen) of the newest valid checkpoint of a step up to `latest_step`, now loaded; None if there is none.

        Those of later steps are moved out of the way of a resume. Collective.
        """
        warnings: list[str] = []
        found = newest_valid(self._folder, warnings.append, self._ranks, latest_step)
        if found is None:
            return None
        self._ranks.on_first(lambda: set_aside(self._folder, step_of(found)))
        return self._resume(found)

    def on_start(self, trainer: Trainer) -> None:
        for line in self._warnings:
            trainer.record("warning", message=line)

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        interval_steps = self._config.checkpoint.interval_steps
        if interval_steps and report.step % interval_steps == 0:
            if trainer.skips.in_a_row:
                trainer.record("warning", message=f"step {report.step} was skipped: nothing is saved until one is not")
                return
            try:
                self._save(trainer)
            except CheckpointError as error:
                trainer.record("warning", message=str(error))

    def on_end(self, trainer: Trainer) -> None:
        if trainer.step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        with trainer.saving():
            self._save_now(trainer)

    def _save_now(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        fragments = zero_fragments(self._engine)
        if self._carried is not None:
            fragments += carried_fragments(self._carried)
        self._check_finite(trainer, fragments)
        state: dict[str, Any] = {
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
        path = save_checkpoint(self._folder, trainer.step, fragments, state, self._ranks)
        self._saved_step = trainer.step
        if self._ranks.rank == 0 and not trainer.skips.in_a_row:
            self._prune(trainer, path)
        seconds = time.perf_counter() - started
        trainer.metrics.record("time/save_seconds", seconds, "max")
        trainer.record("checkpoint", path=str(path), seconds=seconds)

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

    def _prune(self, trainer: Trainer, saved: Path) -> None:
        try:
            prune(self._folder, self._config.checkpoint.keep_last, saved)
        except CheckpointError as error:
            trainer.record("warning", message=str(error))

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
        saved = self._ranks.together(lambda: saved_optimizer(read_state(path))["name"])[0]
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
