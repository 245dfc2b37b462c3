"""When a run will end, by the clock on the wall: steps, and what comes between them."""

from collections.abc import Mapping
from dataclasses import dataclass

from based_megatron.monitor.progress import PhaseTime


@dataclass
class Repeated:
    """Something that is done between steps, at an interval and at the end of the run."""

    interval_steps: int
    """0: at the end only."""
    times: int = 0
    seconds: float = 0.0

    def seconds_left(self, step: int, steps: int) -> float:
        """What it will still take after a step, at the mean of the times so far; 0 before the first."""
        if not self.times:
            return 0.0
        at_intervals = steps // self.interval_steps - step // self.interval_steps if self.interval_steps else 0
        at_the_end = step < steps and (not self.interval_steps or steps % self.interval_steps != 0)
        return (at_intervals + at_the_end) * self.seconds / self.times


class Eta:
    """Predicts from the last interval's steps, and from all that this process has done between steps."""

    def __init__(self, steps: int, interval_steps: Mapping[str, int]) -> None:
        """steps: of the whole run. interval_steps: of each phase that is repeated (monitor/progress.py)."""
        self._steps = steps
        self._repeated = {phase: Repeated(interval) for phase, interval in interval_steps.items()}

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
        repeated = sum(job.seconds_left(step, self._steps) for job in self._repeated.values())
        return (self._steps - step) * (step_seconds + other_seconds) + repeated
