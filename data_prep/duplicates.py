"""Documents whose text is in the corpus already: of those with one hash, the first in the order of the corpus stays."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from based_megatron.data_prep.output import SPLITS
from based_megatron.data_prep.run_files import KEY_BITS, Run, runs_of
from based_megatron.data_prep.unit_store import FinishedUnit

DOCUMENTS_AT_A_TIME = 1 << 24
"""Documents that are compared in memory, 16 bytes each: of more, those are whose hashes lie in one part of the range."""


def duplicates(units: Sequence[FinishedUnit], folder: Path) -> np.ndarray:
    """Keys of the documents to leave out, sorted, as uint64.

    folder: that of the units' folders. Texts count as one if their xxh3_64 is one: of forty corpora of a billion different texts, about one
    loses a document by it. Raises OSError.
    """
    documents = sum(unit.splits[split].documents for unit in units for split in SPLITS)
    parts = -(-documents // DOCUMENTS_AT_A_TIME)
    bounds = [(part << KEY_BITS) // parts for part in range(parts)] + [(1 << KEY_BITS)]
    found = [_duplicates_between(units, folder, first, end - 1) for first, end in itertools.pairwise(bounds)]
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.uint64)


def without(rows: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Rows, sorted by key, without the documents with these keys, sorted too."""
    if not len(rows):
        return rows
    begin, end = np.searchsorted(left_out, rows["key"][[0, -1]])
    return rows[~np.isin(rows["key"], left_out[begin : end + 1])] if len(left_out) else rows


def _duplicates_between(units: Sequence[FinishedUnit], folder: Path, first: int, last: int) -> np.ndarray:
    """Keys of the duplicates whose hashes lie in a part of the range."""
    parts = []
    for split in SPLITS:
        for _, run in runs_of(units, folder, split):
            parts.append(_hashes(run, first, last))
    texts, keys = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((keys, texts))
    texts, keys = texts[order], keys[order]
    return keys[1:][texts[1:] == texts[:-1]]


def _hashes(run: Run, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of texts in a range, both ends included, and the keys of their documents."""
    texts = np.array(run.rows["text"])
    inside = (texts >= np.uint64(first)) & (texts <= np.uint64(last))
    return texts[inside], np.array(run.rows["key"])[inside]
