"""The order of the sequences of a source: a new permutation each epoch, in constant memory, with no index to build."""

from collections.abc import Callable

import numpy as np
import xxhash

FEISTEL_ROUNDS = 6


class Permutation:
    """A bijection of range(size), chosen by a key: a Feistel network over a power of four, with cycle walking."""

    def __init__(self, size: int, key: str):
        """`size` at least 1; any two keys give unrelated permutations."""
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = [np.uint64(xxhash.xxh3_64_intdigest(f"{key}/{i}".encode())) for i in range(FEISTEL_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Image of an array of positions below size; uint64 to int64."""
        return self._walk(positions, self._network)

    def inverse(self, images: np.ndarray) -> np.ndarray:
        """Positions of an array of images; uint64 to int64."""
        return self._walk(images, self._network_backwards)

    def _walk(self, positions: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        values = step(positions.astype(np.uint64))
        # Following the cycle of an outer permutation until it re-enters the range is itself a permutation of the range.
        while (outside := values >= self.size).any():
            values[outside] = step(values[outside])
        return values.astype(np.int64)

    def _network_backwards(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in reversed(self._round_keys):
            left, right = right ^ (_mix(left ^ key) & self._half_mask), left
        return (left << self._half_bits) | right

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def shuffled(numbers: np.ndarray, size: int, seed: int, source: str) -> np.ndarray:
    """Sequence of the source at each place of its endless stream.

    Number n is place n % size of the permutation of epoch n // size.

    Args:
        numbers: int64 places in the stream of this source.
        size: sequences of the source, at least 1.
        seed: data.seed.
        source: identifies the source (the fingerprint of its manifest).
    """
    epochs = numbers // size
    sequences = np.empty_like(numbers)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        sequences[chosen] = _epoch(size, seed, source, epoch)(numbers[chosen] % size)
    return sequences


def number_of(sequence: int, epoch: int, size: int, seed: int, source: str) -> int:
    """Place in the endless stream at which an epoch reads a sequence: the inverse of `shuffled`, with its arguments."""
    return epoch * size + int(_epoch(size, seed, source, epoch).inverse(np.array([sequence]))[0])


def _epoch(size: int, seed: int, source: str, epoch: int) -> Permutation:
    return Permutation(size, f"{seed}/{source}/{epoch}")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (64 bit): every input bit reaches every output bit. Products wrap on purpose."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
