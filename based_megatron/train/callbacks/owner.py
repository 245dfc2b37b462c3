"""The run folder is this run's own: which of its settings changed, and that no other job has taken it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from based_megatron.errors import TrainingError
from based_megatron.run_folder.lock import RunLock
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.identity import Identity

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Owner(Callback):
    """Records changed settings at the start, and ends the run before it writes in a folder whose lock it has lost."""

    def __init__(self, identity: Identity, lock: RunLock) -> None:
        self._identity, self._lock = identity, lock

    def on_start(self, trainer: Trainer) -> None:
        if self._identity.changes:
            trainer.record("changed_settings", changes=self._identity.changes)

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        if self._lock.lost:
            raise TrainingError(
                f"{trainer.run_dir} was taken by {self._lock.lost} while this process did not touch its lock: this run ends at step "
                f"{trainer.step} without a save; raise train.lock_seconds if the process was only slow"
            )
