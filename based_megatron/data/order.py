"""The order of the sequences of a source: a new permutation each epoch, in constant memory, with no index to build."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

FEISTEL_ROUNDS = 6
CACHED_PERMUTATIONS = 1024


class Permutation:
    """A bijection of range(size), chosen by a key: a Feistel network over a power of four, with cycle walking."""

    def __init__(self, size: int, key: str):
        """`size` at least 1; any two keys give unrelated permutations."""
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        keys = [xxhash.xxh3_64_intdigest(f"{key}/{i}".encode()) for i in range(FEISTEL_ROUNDS)]
        self.column = np.array([size, half_bits, (1 << half_bits) - 1, *keys], np.uint64)
        """All that a permutation is: its size, the bits of half a position, their mask, and the keys of rounds."""

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Image of an array of positions below size; int64."""
        return permuted(self.column[:, None], positions)

    def inverse(self, images: np.ndarray) -> np.ndarray:
        """Positions of an array of images; int64."""
        return _walk(self.column[:, None], images, _network_backwards)


def permuted(columns: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Images of positions, each under the permutation of its own column, or all under that of the only one; int64."""
    return _walk(columns, positions, _network)


def _walk(
    columns: np.ndarray, positions: np.ndarray, step: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    values = step(columns, positions.astype(np.uint64))
    # Following the cycle of an outer permutation until it re-enters the range is itself a permutation of the range.
    while (outside := values >= columns[0]).any():
        values[outside] = step(columns[:, outside] if columns.shape[1] > 1 else columns, values[outside])
    return values.astype(np.int64)


def _network(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    _, half_bits, half_mask, *keys = columns
    left, right = values >> half_bits, values & half_mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & half_mask)
    return (left << half_bits) | right


def _network_backwards(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    _, half_bits, half_mask, *keys = columns
    left, right = values >> half_bits, values & half_mask
    for key in reversed(keys):
        left, right = right ^ (_mix(left ^ key) & half_mask), left
    return (left << half_bits) | right


def shuffled_together(
    which: np.ndarray, numbers: np.ndarray, sizes: Sequence[int], seed: int, sources: Sequence[str]
) -> np.ndarray:
    """Sequences at places in the endless streams of several sources, in one pass.

    Number n of a source is place n % size of its permutation of epoch n // size.

    Args:
        which: int64 index of the source of each number.
        numbers: int64 places in the streams of their sources.
        sizes: sequences of each source, at least 1.
        seed: data.seed.
        sources: what identifies each source (the fingerprint of its manifest).
    """
    epochs, places = np.divmod(numbers, np.array(sizes, np.int64)[which])
    pairs = list(zip(which.tolist(), epochs.tolist(), strict=True))
    known = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    columns = np.array([_epoch(sizes[source], seed, sources[source], epoch).column for source, epoch in known])
    if len(known) == 1:
        return permuted(columns.T, places)
    each = np.array([known[pair] for pair in pairs], np.int64)
    return permuted(columns.reshape(-1, 3 + FEISTEL_ROUNDS)[each].T.astype(np.uint64), places)


def number_of(sequence: int, epoch: int, size: int, seed: int, source: str) -> int:
    """Place in the endless stream at which an epoch reads a sequence: the inverse of `shuffled_together` for one source."""
    return epoch * size + int(_epoch(size, seed, source, epoch).inverse(np.array([sequence]))[0])


@functools.lru_cache(CACHED_PERMUTATIONS)
def _epoch(size: int, seed: int, source: str, epoch: int) -> Permutation:
    return Permutation(size, f"{seed}/{source}/{epoch}")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (64 bit): every input bit reaches every output bit. Products wrap on purpose."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
