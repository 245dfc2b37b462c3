"""The positions of the contiguous slices of a sequence."""

from collections.abc import Sequence


def even_bounds(length: int, size: int, multiple: int = 1) -> tuple[int, ...]:
    """First positions of `size` slices, and `length`.

    Slices are multiples of `multiple`, which divides the length, and differ by one such at most: the longer ones come first.
    """
    share, longer = divmod(length // multiple, size)
    return tuple(multiple * (rank * share + min(rank, longer)) for rank in range(size + 1))


def slice_of(bounds: Sequence[int], rank: int) -> slice:
    """Positions of a rank's slice."""
    return slice(bounds[rank], bounds[rank + 1])
