"""Streams cut into what is worked on at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """The items in their order, as many together as have a size of `most` or less, or one that has more."""
    batch: list[T] = []
    taken = 0
    for item in items:
        if batch and taken + size(item) > most:
            yield batch
            batch, taken = [], 0
        batch.append(item)
        taken += size(item)
    if batch:
        yield batch
