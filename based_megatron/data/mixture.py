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
        """weights: one for each source, finite and at least 0; those of 0 have no places. Raises ConfigError if all are 0."""
        shares = np.asarray(weights, np.float64)
        if not (shares.any() and (shares >= 0).all() and np.isfinite(shares).all()):
            raise ConfigError(
                f"weights {list(weights)} must be finite, at least 0, and some above it; change data.sources"
            )
        self._counts = np.maximum(_round_to_sum(shares, PERIOD), shares > 0)
        self._counts[self._counts.argmax()] += (
            PERIOD - self._counts.sum()
        )  # gives back what tiny sources were lifted by
        source = np.repeat(np.arange(len(weights)), self._counts)
        first = np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        number = np.arange(PERIOD) - first
        order = np.argsort((number + 0.5) / self._counts[source], kind="stable")
        self._source, self._number = source[order], number[order]

    @property
    def shares(self) -> tuple[int, ...]:
        """The weights as small whole numbers: two mixtures with the same shares are the same."""
        return tuple((self._counts // np.gcd.reduce(self._counts)).tolist())

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source's own stream) of each global sequence number; int64."""
        periods, places = np.divmod(numbers, PERIOD)
        source = self._source[places]
        return source, periods * self._counts[source] + self._number[places]

    def taken(self, length: int) -> np.ndarray:
        """int64 [sources] sequences of each among the first `length`."""
        periods, rest = divmod(length, PERIOD)
        return periods * self._counts + np.bincount(self._source[:rest], minlength=len(self._counts))

    def place(self, source: int, number: int) -> int:
        """The global number of a source's own sequence: the inverse of `locate`. The source has a weight."""
        periods, rest = divmod(number, int(self._counts[source]))
        return periods * PERIOD + int(np.flatnonzero(self._source == source)[rest])


def split_counts(weights: Sequence[float], available: Sequence[int], total: int) -> list[int]:
    """Share `total` by weight over sources that can give at most `available`; what one lacks, the others give, but for weights of 0."""
    left = [count if weight else 0 for count, weight in zip(available, weights, strict=True)]
    shares, total = [0] * len(weights), min(total, sum(left))
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
