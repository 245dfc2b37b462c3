"""Runs: tokenized documents of a unit, sorted by split and by their keys, so that a range of keys is one stretch of the file.

    NUMBER.docs.npy     one row a document (DOCUMENT)
    NUMBER.tokens       their tokens, one after another

A unit has one run, or several where all its tokens would not fit into memory. The order of a corpus is the order of the keys of its
documents: it depends on the seed and on where a document comes from, and on nothing else.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from based_megatron.data_prep.unit_store import FinishedUnit

DOCUMENT = np.dtype(
    [
        ("key", "<u8"),  # the document's place in the corpus
        ("text", "<u8"),  # xxh3_64 of its text
        ("offset", "<u8"),  # its first token in the file
        ("record", "<u8"),
        ("tokens", "<u4"),
        ("piece", "<u4"),  # number of the piece in the unit
    ]
)
KEY_BITS = 64
RUN_TOKENS = 1 << 25
"""Tokens that are sorted in memory: 128 MiB of uint32, twice."""


def document_key(seed: int, file: str, record: int) -> int:
    """The place of a document in the order of its corpus, among all 64-bit numbers."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{file}\0{record}".encode("utf-8", "surrogatepass"))


class RunBuilder:
    """Documents of a unit until they are written as a run."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._held_out: list[bool] = []
        self._tokens: list[np.ndarray] = []
        self.tokens = 0

    def add(self, tokens: np.ndarray, key: int, text: int, piece: int, record: int, held_out: bool) -> None:
        """Take a document in. text: xxh3_64 of its text; held_out: it is of the validation split."""
        self._rows.append((key, text, 0, record, len(tokens), piece))
        self._held_out.append(held_out)
        self._tokens.append(tokens)
        self.tokens += len(tokens)

    def write(self, folder: Path, number: int) -> int:
        """Write all documents as a run. Returns how many of them are of the training split. Raises OSError."""
        rows, held_out = np.array(self._rows, DOCUMENT), np.array(self._held_out)
        order = np.lexsort((rows["record"], rows["piece"], rows["key"], held_out))
        rows = rows[order]
        rows["offset"] = np.cumsum(rows["tokens"], dtype=np.uint64) - rows["tokens"]
        with tokens_path(folder, number).open("wb") as stream:
            for chosen in order:
                stream.write(self._tokens[chosen].data)
            stream.flush()
            os.fsync(stream.fileno())
        with rows_path(folder, number).open("wb") as stream:
            np.save(stream, rows)
            stream.flush()
            os.fsync(stream.fileno())
        return len(rows) - int(held_out.sum())


def rows_path(folder: Path, number: int) -> Path:
    """File of a run's rows."""
    return folder / f"{number:05d}.docs.npy"


def tokens_path(folder: Path, number: int) -> Path:
    """File of a run's tokens."""
    return folder / f"{number:05d}.tokens"


class Run:
    """A run's documents of one split."""

    def __init__(self, folder: Path, number: int, train: int, split: str):
        """train: how many of its documents are of the training split. Raises OSError, ValueError."""
        rows = np.load(rows_path(folder, number), mmap_mode="r")
        self.rows: np.ndarray = rows[:train] if split == "train" else rows[train:]
        self._tokens_path = tokens_path(folder, number)

    def between(self, first_key: int, end_key: int) -> np.ndarray:
        """Rows of the documents with keys in [first_key, end_key)."""
        keys = self.rows["key"]
        begin = bisect.bisect_left(keys, first_key, key=int)
        return np.array(self.rows[begin : bisect.bisect_left(keys, end_key, lo=begin, key=int)])

    def tokens(self, first: int, end: int, dtype: np.dtype) -> np.ndarray:
        """Tokens of the file in [first, end). Raises OSError."""
        found = np.fromfile(self._tokens_path, dtype, end - first, offset=first * dtype.itemsize)
        if len(found) < end - first:
            raise OSError(f"{self._tokens_path} is cut off")
        return found


def runs_of(units: Sequence[FinishedUnit], folder: Path, split: str) -> Iterator[tuple[FinishedUnit, Run]]:
    """All runs of units, whose folders are in a folder, with their units."""
    for unit in units:
        for number, train in enumerate(unit.runs):
            yield unit, Run(folder / unit.key, number, train, split)
