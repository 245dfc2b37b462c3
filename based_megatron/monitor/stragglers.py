"""Ranks that are slower than the others, by their own work in a step: what they do before they wait for ranks with other data."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

SLOWER = 0.2
"""Share above the median from which a rank is slow."""
LOG_POINTS = 5
"""Log points in a row that make a slow rank a straggler."""


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow at several log points in a row."""

    rank: int
    slower: float
    """Its seconds over the median, minus 1, at the last one."""
    seconds: float
    median_seconds: float


class Stragglers:
    """Compares the ranks of a pipeline stage, which have the same work."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._slow: dict[int, int] = {}
        """Log points in a row at which a rank was slow."""

    def add(self, seconds: Sequence[float]) -> list[Straggler]:
        """Note the seconds of a step of each rank; returns those that are stragglers from now on."""
        found, ranks_of_stage = [], len(seconds) // self._stages
        for first in range(0, len(seconds), ranks_of_stage):
            ranks = range(first, first + ranks_of_stage)
            usual = median(seconds[rank] for rank in ranks)
            for rank in ranks:
                is_slow = seconds[rank] > (1 + SLOWER) * usual
                self._slow[rank] = self._slow.get(rank, 0) + 1 if is_slow else 0
                if self._slow[rank] == LOG_POINTS:
                    found.append(Straggler(rank, seconds[rank] / usual - 1, seconds[rank], usual))
        return found
