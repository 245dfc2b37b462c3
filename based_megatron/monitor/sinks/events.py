"""events.jsonl in the run folder: every step, validation, checkpoint, skip, stop, resume and error."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from based_megatron.monitor.events import append_event
from based_megatron.monitor.sinks.base import RunFacts, Sink
from based_megatron.run_folder.files import EVENTS

SHORT = ("train/", "throughput/", "time/")
"""Sections whose metrics go by their last name: `loss`, not `train/loss`."""


class EventsSink(Sink):
    """One JSON object a line: time (seconds since 1970), step, event, and what belongs to the event."""

    def start(self, run: RunFacts) -> None:
        self._path = run.run_dir / EVENTS

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.event(step, "step", {_field(name): value for name, value in values.items()})

    def steps(self, first_step: int, losses: Sequence[float], grad_norms: Sequence[float]) -> None:
        self.event(first_step + len(losses) - 1, "steps", {"loss": losses, "grad_norm": grad_norms})

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        append_event(self._path, {"time": time.time(), "step": step, "event": name, **fields})

    def flush(self) -> None:
        if self._path.exists():
            with open(self._path, "rb") as stream:
                os.fsync(stream.fileno())


def _field(name: str) -> str:
    section, _, rest = name.partition("/")
    return rest if f"{section}/" in SHORT else name
