"""When a run will end, by the clock on the wall: steps, and what comes between them."""

from collections.abc import Mapping
from dataclasses import dataclass

from based_megatron.monitor.progress import PhaseTime


@dataclass
class Repeated:
    """Something that is done between steps, at intervals and at the end of the run."""

    interval_steps: int
    """0: not by the number of the step."""
    interval_seconds: float = 0.0
    """From one beginning to the next; 0: not by the clock."""
    times: int = 0
    seconds: float = 0.0

    def seconds_left(self, step: int, steps: int, other_seconds: float) -> float:
        """What it will still take after a step, at the mean of the times so far; 0 before the first.

        other_seconds: until the end of the run without it.
        """
        if not self.times:
            return 0.0
        mean = self.seconds / self.times
        at_intervals = steps // self.interval_steps - step // self.interval_steps if self.interval_steps else 0
        if self.interval_seconds > mean:
            at_intervals = max(at_intervals, int(other_seconds / (self.interval_seconds - mean)))
        at_the_end = step < steps and (not self.interval_steps or steps % self.interval_steps != 0)
        return (at_intervals + at_the_end) * mean


class Eta:
    """Predicts from the last interval's steps, and from all that this process has done between steps."""

    def __init__(self, steps: int, repeated: Mapping[str, Repeated]) -> None:
        """steps: of the whole run. repeated: phases that are, by name (monitor/progress.py)."""
        self._steps, self._repeated = steps, repeated

    def add(self, phases: Mapping[str, PhaseTime]) -> None:
        """Note phases that have ended."""
        for phase, job in self._repeated.items():
            if phase in phases:
                job.times += phases[phase].times
                job.seconds += phases[phase].seconds

    def seconds(self, step: int, step_seconds: float, other_seconds: float) -> float:
        """Seconds from the end of `step` to the end of the run.

        other_seconds: what a step costs besides its own time and that of the repeated phases.
        """
        left = (self._steps - step) * (step_seconds + other_seconds)
        # Those by the clock last, which come more often the longer the others take.
        for job in sorted(self._repeated.values(), key=lambda job: job.interval_seconds):
            left += job.seconds_left(step, self._steps, left)
        return left
