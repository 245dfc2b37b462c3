"""The second pass: shards out of finished units, in the order of the documents' keys.

units                   runs, sorted by key
bins                    equal ranges of keys, about BIN_TOKENS each; a first look at all rows counts their documents and tokens, which
                        says where in the split each bin begins
shards                  each is written by one task out of the bins that it overlaps, whatever the others do
buckets                 neighbouring documents of a shard, about BUCKET_TOKENS together, whose tokens are in memory at a time
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from based_megatron.data.manifest import Member
from based_megatron.data_prep.duplicates import without
from based_megatron.data_prep.run_files import KEY_BITS, Run, runs_of
from based_megatron.data_prep.shards import SplitWriter, Start, TokenizedDocument, shard_name
from based_megatron.data_prep.tasks import Tell
from based_megatron.data_prep.unit_store import FinishedUnit, SplitCount
from based_megatron.run_folder.whole_file import whole_file

BIN_TOKENS = 1 << 20
BUCKET_TOKENS = 1 << 25
"""Tokens that a task holds at a time, in the writing of a shard: 128 MiB of uint32."""


@dataclass(frozen=True)
class Sizes:
    """What the shards of a corpus look like."""

    dtype: str
    block_tokens: int
    shard_blocks: int


@dataclass(frozen=True)
class Shard:
    """A shard to write."""

    split: str
    number: int
    begin: int
    """Its first token in the split."""
    end: int
    """The token after its last one."""
    keys: tuple[int, int]
    """The range of keys, from the first to before the last, of the bins that hold it."""
    tokens_before: int
    """Tokens of the split before these bins."""
    documents_before: int
    """Documents of the split before these bins."""

    @property
    def file(self) -> str:
        """Its name, below the folder of the corpus."""
        return f"{self.split}/{shard_name(self.number)}"


def order_key(units: Sequence[FinishedUnit], sizes: Sizes, left_out: np.ndarray) -> str:
    """Key of the shards that these units give without the documents of some keys."""
    content = [sorted(unit.key for unit in units), dataclasses.astuple(sizes), xxhash.xxh3_128_hexdigest(left_out.data)]
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def plan_shards(
    units: Sequence[FinishedUnit], folder: Path, split: str, sizes: Sizes, left_out: np.ndarray
) -> tuple[list[Shard], SplitCount]:
    """The shards of a split, and what is in them.

    folder: that of the units' folders; left_out: keys of documents that are not written, sorted.
    """
    most = sum(unit.splits[split].tokens for unit in units)
    bits = max(0, math.ceil(math.log2(most / BIN_TOKENS))) if most else 0
    tokens_before, documents_before = np.zeros((2, 2**bits + 1), np.int64)
    for _, run in runs_of(units, folder, split):
        rows = without(run.rows, left_out)
        bins = (rows["key"] >> np.uint64(KEY_BITS - bits)).astype(np.int64) if bits else np.zeros(len(rows), int)
        documents_before[1:] += np.bincount(bins, minlength=2**bits)
        # Sums in float64 are exact up to 2^53.
        tokens_before[1:] += np.bincount(bins, rows["tokens"], 2**bits).astype(np.int64)
    tokens_before, documents_before = np.cumsum(tokens_before), np.cumsum(documents_before)
    total = int(tokens_before[-1])
    shards = []
    for number, begin in enumerate(range(0, total, sizes.block_tokens * sizes.shard_blocks)):
        end = min(begin + sizes.block_tokens * sizes.shard_blocks, total)
        first = int(np.searchsorted(tokens_before, begin, "right")) - 1
        last = int(np.searchsorted(tokens_before, end, "left"))
        keys = first << (KEY_BITS - bits), last << (KEY_BITS - bits)
        shards.append(Shard(split, number, begin, end, keys, int(tokens_before[first]), int(documents_before[first])))
    return shards, SplitCount(int(documents_before[-1]), total)


@dataclass(frozen=True)
class WriteShards:
    """Writes shards of one order into a folder."""

    units: tuple[FinishedUnit, ...]
    unit_folder: Path
    """The folder with the units' folders."""
    output: Path
    sizes: Sizes
    left_out: Path
    """File with the sorted keys of documents that are not written."""

    @cached_property
    def _left_out(self) -> np.ndarray:
        return np.load(self.left_out)

    @cached_property
    def _names(self) -> list[str]:
        """All names of files, sorted: a number for each, whatever unit it is in."""
        return sorted({piece.name for unit in self.units for piece in unit.pieces})

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._names)}

    def bytes_of(self, shard: Shard) -> int:
        """Bytes of a shard's tokens."""
        return (shard.end - shard.begin) * np.dtype(self.sizes.dtype).itemsize

    def __call__(self, shard: Shard, tell: Tell) -> tuple[Shard, tuple[Member, ...]]:
        """Write a shard and the file that lists its blocks. Raises OSError."""
        documents = _Documents(self, shard)
        sizes = self.sizes
        start = Start(shard.begin // sizes.block_tokens, documents.first_document, documents.inside_document)
        dtype = np.dtype(sizes.dtype)
        with SplitWriter(self.output, shard.split, dtype, sizes.block_tokens, sizes.shard_blocks, start) as writer:
            for document, goes_on in documents.read(dtype):
                writer.add(document, goes_on)
            members = tuple(writer.close().members)
        with whole_file(_blocks_path(self.output, shard), durable=True) as stream:
            json.dump([dataclasses.asdict(member) for member in members], stream)
        tell(self.bytes_of(shard), shard.end - shard.begin)
        return shard, members


class _Documents:
    """The documents of a shard, in order."""

    def __init__(self, work: WriteShards, shard: Shard):
        self._work = work
        self._runs: list[Run] = []
        parts = []
        for unit, run in runs_of(work.units, work.unit_folder, shard.split):
            rows = without(run.between(*shard.keys), work._left_out)
            if len(rows):
                numbers = np.array([work._numbers[piece.name] for piece in unit.pieces])
                parts.append((rows, np.full(len(rows), len(self._runs)), numbers[rows["piece"]]))
                self._runs.append(run)
        rows, runs, files = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((rows["record"], files, rows["key"]))
        ends = shard.tokens_before + np.cumsum(rows["tokens"][order], dtype=np.int64)
        begins = ends - rows["tokens"][order]
        inside = (ends > shard.begin) & (begins < shard.end)
        self._rows, self._run, self._file = rows[order][inside], runs[order][inside], files[order][inside]
        # Tokens at the document's begin and end that are not in this shard, but in those next to it.
        self._before = np.maximum(shard.begin - begins[inside], 0)
        self._behind = np.maximum(ends[inside] - shard.end, 0)
        self._first = self._rows["offset"].astype(np.int64) + self._before
        self._end = (self._rows["offset"] + self._rows["tokens"]).astype(np.int64) - self._behind
        self.first_document = shard.documents_before + int((ends <= shard.begin).sum())
        self.inside_document = bool(self._before[0])

    def read(self, dtype: np.dtype) -> Iterator[tuple[TokenizedDocument, bool]]:
        """Each document, as far as it is in the shard, and whether it goes on in the next."""
        bucket_of = np.cumsum(self._rows["tokens"], dtype=np.int64) // BUCKET_TOKENS
        for _, bucket in itertools.groupby(range(len(bucket_of)), key=bucket_of.__getitem__):
            yield from self._read_bucket(np.array(list(bucket)), dtype)

    def _read_bucket(self, bucket: np.ndarray, dtype: np.dtype) -> Iterator[tuple[TokenizedDocument, bool]]:
        # In a run, the documents of a range of keys lie next to each other.
        stretches = {}
        for run in np.unique(self._run[bucket]):
            inside = bucket[self._run[bucket] == run]
            begin, end = int(self._first[inside[0]]), int(self._end[inside[-1]])
            stretches[int(run)] = begin, self._runs[run].tokens(begin, end, dtype)
        for i in bucket:
            begin, tokens = stretches[int(self._run[i])]
            name = self._work._names[self._file[i]]
            part = tokens[self._first[i] - begin : self._end[i] - begin]
            yield TokenizedDocument(part, name, int(self._rows["record"][i])), bool(self._behind[i])


def blocks_of(output: Path, shard: Shard) -> tuple[Member, ...] | None:
    """The blocks of a shard; None if it is not written yet."""
    if not (output / shard.file).is_file() or not _blocks_path(output, shard).is_file():
        return None
    return tuple(Member(**member) for member in json.loads(_blocks_path(output, shard).read_bytes()))


def _blocks_path(output: Path, shard: Shard) -> Path:
    return output / f"{shard.file}.blocks"
