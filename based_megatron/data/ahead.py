"""Fetches the parts of remote shards that the next steps read, before they do."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from based_megatron.data.sources import Sources
from based_megatron.errors import BasedError

STEPS_AHEAD = 8
THREADS = 32
"""A thread waits for one part at a time."""


class Ahead:
    """The order is known, so what a rank needs in the next steps is read into the cache of its node by threads that wait for it."""

    def __init__(self, sources: Sources, read: Callable[[int, int], object]):
        """read: the tokens and documents of (source, sequence), of which only the bytes matter."""
        self._sources, self._read = sources, read
        self._pool = ThreadPoolExecutor(THREADS, "fetch")
        self._asked = range(0)

    def fetch(self, step: int, numbers_of: Callable[[int], np.ndarray]) -> None:
        """Fetch for the steps after a step. numbers_of: the sequences that a step reads here."""
        wanted = range(step + 1, step + 1 + STEPS_AHEAD)
        for ahead in wanted:
            if ahead not in self._asked:
                self._pool.submit(self._fetch_step, numbers_of(ahead))
        self._asked = wanted

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_step(self, numbers: np.ndarray) -> None:
        with contextlib.suppress(BasedError, RuntimeError):  # who reads it will say so; the pool is closed
            for source, sequence in self._sources.locate(numbers):
                self._pool.submit(self._fetch_sequence, source, sequence)

    def _fetch_sequence(self, source: int, sequence: int) -> None:
        with contextlib.suppress(BasedError):
            self._read(source, sequence)
