"""The source that each sequence of a mixture comes from, as a pure function of the sequence's number."""

from collections.abc import Sequence

import numpy as np

from based_megatron.errors import ConfigError

# Divisible by 1 to 12, 14 to 16, 18, 20, 25, 50 and 100, so that the usual weights are met exactly in every period.
PERIOD = 277_200


class Mixture:
    """A periodic schedule over sources.

    Weights are met exactly in each period (rounded to 1 / PERIOD) and nearly so in every window. The j-th place of a
    source that has c of the period's places is due at (j + 1/2) / c of the period, and places are taken in the order in
    which they are due. This is the Sainte-Lague (Webster) sequence: each prefix has the apportionment of its length.
    """

    def __init__(self, weights: Sequence[float]):
        """One positive weight per source. Raises ConfigError for one that is not."""
        for i, weight in enumerate(weights):
            if not 0 < weight < float("inf"):
                raise ConfigError(
                    f"data.sources[{i}].weight is {weight} but must be above 0; "
                    f"leave the source out or raise its weight"
                )
        self._counts = np.maximum(_round_to_sum(np.asarray(weights, np.float64), PERIOD), 1)
        self._counts[self._counts.argmax()] += (
            PERIOD - self._counts.sum()
        )  # gives back what tiny sources were lifted by
        source = np.repeat(np.arange(len(weights)), self._counts)
        first = np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        number = np.arange(PERIOD) - first
        order = np.argsort((number + 0.5) / self._counts[source], kind="stable")
        self._source, self._number = source[order], number[order]

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source's own stream) of each global sequence number; int64."""
        periods, places = np.divmod(numbers, PERIOD)
        source = self._source[places]
        return source, periods * self._counts[source] + self._number[places]


def split_counts(weights: Sequence[float], available: Sequence[int], total: int) -> list[int]:
    """Share `total` by weight over sources that can give at most `available`; what one lacks, the others give."""
    left, shares = list(available), [0] * len(weights)
    total = min(total, sum(available))
    while total:
        active = [i for i, count in enumerate(left) if count]
        counts = _round_to_sum(np.array([weights[i] for i in active], np.float64), total)
        for i, count in zip(active, counts.tolist(), strict=True):
            given = min(count, left[i])
            shares[i], left[i], total = shares[i] + given, left[i] - given, total - given
    return shares


def _round_to_sum(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to weights with the given sum, by largest remainder; int64."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts
