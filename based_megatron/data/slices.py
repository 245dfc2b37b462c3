"""Slices of held-out tokens: what recall could do for the loss of each, by how rare its bigram is and how far back it stood.

The bigram of a position is its token and the next one, which is its label. A position is a repeat if its bigram stands earlier in
the same document and the same sequence; the distance is that to the latest such place. A repeat whose bigram is rare in the
training tokens is an AR hit (associative recall): little but the context can tell the label (Zoology, arXiv 2312.04927; JRT,
arXiv 2407.05483, appendix B.4).

Legend: S tokens of a whole sequence.
"""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

NO_SLICE = 255
"""The number of positions whose loss is in no slice."""
MOST_SLICES = 64
COUNT_STARTS = (1, 10, 100, 1000)
"""Least training counts of bins; one more, before them, holds what does not occur in the training tokens."""
DISTANCE_ENDS = (16, 64, 512)
"""Largest distances of bins; the window of the model is one more."""
FIRST, COMMON = "first", "common"
RARE_PER_TOKEN = 1250 / 10.5e9
"""Training count of a bigram, for each training token, up to which Zoology calls it rare."""


@dataclass(frozen=True)
class Slices:
    """The slices that tokens of validation sequences and of probes are in, by number."""

    rare_count: float
    """Largest training count of a bigram whose repeats are AR hits."""
    distance_ends: tuple[int, ...]
    """Largest distance of each bin of AR hits but the last, ascending."""
    probes: tuple[str, ...] = ()
    """Names of synthetic tasks, which have a slice each."""

    @property
    def counts(self) -> list[str]:
        """Names of the bins by training count."""
        inner = [f"{low}-{high - 1}" for low, high in pairwise(COUNT_STARTS)]
        return ["0", *inner, f"{COUNT_STARTS[-1]}_up"]

    @property
    def distances(self) -> list[str]:
        """Names of the bins by distance."""
        starts = [1, *(end + 1 for end in self.distance_ends)]
        inner = [f"{low}-{high}" for low, high in zip(starts, self.distance_ends, strict=False)]
        return [*inner, f"{starts[-1]}_up"]

    @property
    def kinds(self) -> list[str]:
        """What a position can be within a bin of counts: the first of its bigram, a common repeat, an AR hit by distance."""
        return [FIRST, COMMON, *self.distances]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(bin of counts, kind) of each slice of validation tokens, in the order of their numbers; the probes come after them."""
        return list(product(self.counts, self.kinds))

    def of_tokens(self, distances_S: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
        """uint8 number of each position's slice.

        distances_S: as `repeat_distances` gives them. counts_S: occurrences of each bigram in the training tokens, scaled or not.
        """
        # A scaled count may lie between 0 and 1.
        bins_S = np.maximum(np.searchsorted(COUNT_STARTS, counts_S, side="right"), counts_S > 0)
        hits_S = 2 + np.searchsorted(self.distance_ends, distances_S, side="left")
        kinds_S = np.where(distances_S == 0, 0, np.where(counts_S > self.rare_count, 1, hits_S))
        ids_S = bins_S * len(self.kinds) + kinds_S
        return np.where(distances_S < 0, NO_SLICE, ids_S).astype(np.uint8)

    def of_probe(self, name: str) -> int:
        """The number of a probe's slice."""
        return len(self.keys) + self.probes.index(name)


def slices_of(training_tokens: int, rare_count: int, window: int, probes: tuple[str, ...] = ()) -> Slices:
    """The slices for a training split of so many tokens.

    rare_count: of these tokens; 0 takes Zoology's share of them. window: previous keys that a sliding window sees.
    """
    rare = float(rare_count) or max(1.0, RARE_PER_TOKEN * training_tokens)
    return Slices(rare, tuple(sorted({*DISTANCE_ENDS, window} - {0})), probes)


def bigrams_of(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """One integer for each two neighbours: uint32 if all fit into it, else int64."""
    dtype = np.dtype(np.uint32 if vocab_size**2 <= 2**32 else np.int64)
    wide = tokens.astype(dtype)
    return wide[:-1] * dtype.type(vocab_size) + wide[1:]


def repeat_distances(bigrams_S: np.ndarray, document_starts: np.ndarray) -> np.ndarray:
    """int64 distance from each position to the latest earlier one with its bigram in the same document.

    0 for the first of a bigram; -1 where the bigram crosses into another document: it is none of either.
    document_starts: places in the S + 1 tokens at which documents begin, ascending from 0.
    """
    S = len(bigrams_S)
    documents_S = np.searchsorted(document_starts, np.arange(S), side="right")
    order = np.argsort(
        bigrams_S, kind="stable"
    )  # equal ones stay in the order of their positions, and so of their documents
    same = (np.diff(bigrams_S[order]) == 0) & (np.diff(documents_S[order]) == 0)
    distances_S = np.zeros(S, np.int64)
    distances_S[order[1:]] = np.where(same, np.diff(order), 0)
    distances_S[document_starts[1:] - 1] = -1
    return distances_S
