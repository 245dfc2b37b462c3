"""A file whose time tells the launcher that the run is alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from based_megatron.train.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer

FILE_NAME = "heartbeat"


class Heartbeat(Callback):
    """Touches run_dir/heartbeat at every sign of life: a hung or lost rank stops it, as all ranks step together."""

    def on_start(self, trainer: Trainer) -> None:
        self._beat(trainer)

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        self._beat(trainer)

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        self._beat(trainer)

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        self._beat(trainer)

    @staticmethod
    def _beat(trainer: Trainer) -> None:
        if trainer.topology.is_logger:
            (trainer.run_dir / FILE_NAME).touch()
