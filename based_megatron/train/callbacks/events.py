"""events.jsonl in the run folder: every logged step, validation, checkpoint, skip, stop, resume and error."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from based_megatron.monitor.events import FILE_NAME, append_event
from based_megatron.monitor.flops import parameter_count
from based_megatron.monitor.throughput import Throughput
from based_megatron.train.callbacks.base import StepReport
from based_megatron.train.callbacks.metrics import MetricsLogger, perplexity

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class EventLog(MetricsLogger):
    """One JSON object a line: time (seconds since 1970), step, event, and what belongs to the event."""

    def start(self, trainer: Trainer) -> None:
        self._write(
            trainer,
            "resume" if trainer.step else "start",
            tokens_seen=trainer.tokens_seen,
            world_size=trainer.topology.world_size,
            parameters=parameter_count(trainer.config.model),
        )

    def log(self, trainer: Trainer, report: StepReport, throughput: Throughput | None) -> None:
        self._write(
            trainer,
            "step",
            loss=report.loss,
            grad_norm=report.grad_norm,
            lr=report.lr,
            skipped=report.skipped,
            tokens_seen=trainer.tokens_seen,
            **(dataclasses.asdict(throughput) if throughput else {}),
        )

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        self._write(trainer, "validation", loss=loss, perplexity=perplexity(loss))

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        self._write(trainer, name, **fields)

    def on_end(self, trainer: Trainer) -> None:
        self._write(trainer, "end", tokens_seen=trainer.tokens_seen)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._write(trainer, "error", type=type(error).__name__, message=str(error))

    @staticmethod
    def _write(trainer: Trainer, event: str, **fields: Any) -> None:
        if trainer.topology.is_logger:
            record = {"time": time.time(), "step": trainer.step, "event": event} | fields
            append_event(trainer.run_dir / FILE_NAME, record)
