"""The mixture of a run whose weights change: phases, in each of which sources take turns by the weights of that time.

number --phase--> place in the phase --mixture--> source, its number in the phase --+ what phases before took--> number in its stream
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from based_megatron.data.mixture import Mixture
from based_megatron.errors import DataError

ENDLESS = 2**62
"""More sequences than any run reads."""


@dataclass(frozen=True)
class Phase:
    """The sequences from `start` on, until the next phase starts."""

    start: int
    mixture: Mixture
    taken: np.ndarray
    """int64 [sources] sequences of each in the phases before."""


class Phases:
    """The source of each sequence of a run, and its number within that source's own stream: a pure function of the weights."""

    def __init__(self, changes: Sequence[tuple[int, Sequence[float]]], limits: Sequence[int | None]):
        """changes: (first sequence, weight of each source), ascending from 0. limits: the most that each source gives; None is no limit."""
        self._limits = np.array([ENDLESS if limit is None else limit for limit in limits], np.int64)
        self._phases, self.end = self._build(changes)
        """`end` is the number of the first sequence that no source is left for; ENDLESS if there is none such."""
        self._starts = np.array([phase.start for phase in self._phases], np.int64)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source's own stream) of each sequence; int64. Raises DataError for one after the end."""
        if numbers.max(initial=0) >= self.end:
            raise DataError(
                f"sequence {numbers.max()} is after the last of the data: with max_epochs, data.sources have {self.end}; lower "
                f"train.steps, or raise max_epochs or the weights of data.schedule"
            )
        phases = np.searchsorted(self._starts, numbers, side="right") - 1
        sources, own = np.empty_like(numbers), np.empty_like(numbers)
        for place in np.unique(phases):
            chosen, phase = phases == place, self._phases[place]
            sources[chosen], within = phase.mixture.locate(numbers[chosen] - phase.start)
            own[chosen] = within + phase.taken[sources[chosen]]
        return sources, own

    def number(self, source: int, own: int) -> int | None:
        """The sequence of the run that is a source's own: the inverse of `locate`; None if the run never comes to it."""
        for phase, stop in zip(self._phases, [*self._starts[1:].tolist(), self.end], strict=True):
            if phase.mixture.shares[source]:
                number = phase.start + phase.mixture.place(source, own - int(phase.taken[source]))
                if number < stop:
                    return number
        return None

    def taken(self, number: int) -> np.ndarray:
        """int64 [sources] sequences of each among those before `number`."""
        phase = self._phases[int(np.searchsorted(self._starts, number, side="right")) - 1]
        return phase.taken + phase.mixture.taken(number - phase.start)

    @property
    def shares(self) -> list[tuple[int, tuple[int, ...]]]:
        """(first sequence, share of each source) of every phase: all that decides the order."""
        return [(phase.start, phase.mixture.shares) for phase in self._phases]

    def used_up(self) -> list[int | None]:
        """The number of sequences of the run after which each source has given all that it may; None if it never has."""
        borders = [number for number in [*self._starts[1:].tolist(), self.end] if number < ENDLESS]
        taken = [(number, self.taken(number) >= self._limits) for number in borders]
        return [next((number for number, full in taken if full[source]), None) for source in range(len(self._limits))]

    def _build(self, changes: Sequence[tuple[int, Sequence[float]]]) -> tuple[list[Phase], int]:
        phases: list[Phase] = []
        taken = np.zeros(len(self._limits), np.int64)
        stops = [start for start, _ in changes[1:]] + [ENDLESS]
        for (start, weights), stop in zip(changes, stops, strict=True):
            while start < stop:
                left = np.where(taken < self._limits, weights, 0)
                if not left.any():
                    return phases, start
                mixture = Mixture(left.tolist())
                phases.append(Phase(start, mixture, taken))
                following = min([stop, *(start + place for place in self._ends(mixture, left, taken))])
                taken = taken + mixture.taken(following - start) if following < ENDLESS else taken
                start = following
        return phases, ENDLESS

    def _ends(self, mixture: Mixture, weights: np.ndarray, taken: np.ndarray) -> Iterator[int]:
        """Places in a phase at which a source would be due that has no sequence left."""
        for source in np.flatnonzero((weights > 0) & (self._limits < ENDLESS)).tolist():
            yield mixture.place(source, int(self._limits[source] - taken[source]))
