"""Where the time of steps goes, measured without waiting for the device."""

import time

import torch

from based_megatron.monitor.progress import BETWEEN, Progress

Moment = float | torch.cuda.Event


class StepClock:
    """Adds up the seconds of each part of a step, and says in `progress` which one it is.

    A GPU runs behind the host: its marks are events in its queue, and their times are read at log points only.
    """

    def __init__(self, device: torch.device) -> None:
        self.progress = Progress()
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Moment]] = []
        self._own: list[Moment] = []

    def begin(self, part: str, step: int | None = None) -> None:
        """Begin a part, which ends the one before; the first part of a step says its number."""
        self._mark(part)
        self.progress.enter(part, step)

    def end(self) -> None:
        """End the last part of a step."""
        self._mark("")
        self.progress.enter(BETWEEN)

    def begin_own(self) -> None:
        """Begin, inside a part, what this rank computes before it waits for ranks with other data."""
        self._own.append(self._now())

    def end_own(self) -> None:
        """End it."""
        self._own.append(self._now())

    def take(self) -> dict[str, float]:
        """Seconds of each part, of all as `total`, and of `own` work, since the last call, and start over. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = {"total": 0.0}
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                passed = _seconds(begin, end)
                seconds[part] = seconds.get(part, 0.0) + passed
                seconds["total"] += passed
        seconds["own"] = sum(_seconds(begin, end) for begin, end in zip(self._own[::2], self._own[1::2], strict=False))
        self._marks, self._own = [], []
        return seconds

    def _mark(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000
