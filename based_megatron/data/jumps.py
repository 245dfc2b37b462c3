"""The data that steps of a run train on: that of their own number, until a rollback has stepped over some."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DataJumps:
    """Where the data of a run goes on at another step's than the run's own. Steps are counted from 0."""

    jumps: tuple[tuple[int, int], ...] = ()
    """(step, step whose data it trains on), ascending; later steps go on from there."""

    @classmethod
    def read(cls, pairs: Iterable[Iterable[int]]) -> "DataJumps":
        """From lists, as JSON has them."""
        return cls(tuple((step, data_step) for step, data_step in pairs))

    def data_step(self, step: int) -> int:
        """The step whose data a step trains on."""
        begins = [jump for jump in self.jumps if jump[0] <= step]
        first, data_step = begins[-1] if begins else (0, 0)
        return data_step + step - first

    def steps_of(self, data_step: int) -> list[int]:
        """The steps that train on the data of a step: the inverse of `data_step`, which can have none, or several."""
        begins = [(0, 0), *self.jumps]
        ends = [step for step, _ in self.jumps] + [None]
        steps = [
            (first + data_step - data_first, first, end) for (first, data_first), end in zip(begins, ends, strict=True)
        ]
        return [step for step, first, end in steps if first <= step and (end is None or step < end)]

    def jump(self, step: int, data_step: int) -> "DataJumps":
        """These jumps up to a step, which trains on the data of `data_step`."""
        return DataJumps((*(jump for jump in self.jumps if jump[0] < step), (step, data_step)))
