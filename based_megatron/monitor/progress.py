"""What this rank is doing: one phase after another, timed on the host, and read by other threads at any time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

START_UP, BETWEEN = "start-up", "between steps"


@dataclass(frozen=True)
class Beat:
    """A phase as it began."""

    step: int
    """The step that is being done, counted from 1; after it, the last one."""
    phase: str
    """What the rank does: a part of a step (`data`, `forward_backward`, ...), `validation`, `save`, `log`, `stop vote`, ..."""
    since: float
    """time.monotonic() when it began."""


class PhaseTime(NamedTuple):
    """How often a phase has ended, and the seconds of all times together."""

    times: int
    seconds: float


class Progress:
    """The current phase of a rank, and how long its phases have taken.

    The first time of each phase is left out of `longest` once there is another: it compiles and allocates.
    """

    def __init__(self) -> None:
        self.beat = Beat(0, START_UP, time.monotonic())
        """Replaced as a whole, so that another thread never sees half of it."""
        self._longest: dict[str, tuple[int, float]] = {}
        self._ended: dict[str, PhaseTime] = {}

    def enter(self, phase: str, step: int | None = None) -> None:
        """End the phase and begin another one, of the same step unless given."""
        before, now = self.beat, time.monotonic()
        self.beat = Beat(before.step if step is None else step, phase, now)
        seconds = now - before.since
        ended = self._ended.get(before.phase, PhaseTime(0, 0.0))
        self._ended[before.phase] = PhaseTime(ended.times + 1, ended.seconds + seconds)
        times, longest = self._longest.get(before.phase, (0, 0.0))
        self._longest[before.phase] = (times + 1, seconds if times <= 1 else max(longest, seconds))

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """A phase within another, which goes on after it."""
        outer = self.beat.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def longest(self, phase: str) -> float | None:
        """Seconds that the phase has taken at most; None if it has never ended."""
        times, longest = self._longest.get(phase, (0, 0.0))
        return longest if times else None

    def take(self) -> dict[str, PhaseTime]:
        """The phases that have ended since the last call."""
        taken, self._ended = self._ended, {}
        return taken
