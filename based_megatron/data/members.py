"""The token blocks of a split as one table: a row of about 116 bytes for each, so that millions of them load at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import xxhash

COLUMNS = {
    "file": "<u4", "key": "S", "begin": "<u8", "end": "<u8", "offset": "<u8", "docs_offset": "<u8", "docs_bytes": "<u4",
    "origins_offset": "<u8", "origins_bytes": "<u4", "tokens": "<u4", "docs": "<u4", "first_document": "<u8", "xxh3": "V16",
    "hashed_end": "<u8", "hashes_offset": "<u8", "hashes_xxh3": "<u8",
}  # fmt: skip
"""The type of each field of a Member in a table: `file` is a place in a list of names, and keys are as wide as the longest."""


@dataclass(frozen=True)
class Member:
    """One token block: the webdataset sample `key` of one shard. All offsets are bytes in the tar file."""

    file: str
    """Shard, relative to the manifest's folder."""
    key: str
    """Sample key: `<key>.tokens.npy` is the block, `<key>.docs.json` has the ends of its documents, `<key>.origins.json` the
    input files they come from, and `<key>.hashes.npy` the xxh3_64 of every HASHED_BYTES before itself, from `begin` on."""
    begin: int
    """First byte of the sample, tar header included."""
    end: int
    """Byte after the sample, padding included."""
    offset: int
    """First byte of token data, after the npy header."""
    docs_offset: int
    """First byte of `<key>.docs.json`."""
    docs_bytes: int
    """Length of `<key>.docs.json`."""
    origins_offset: int
    """First byte of `<key>.origins.json`."""
    origins_bytes: int
    """Length of `<key>.origins.json`."""
    tokens: int
    """Tokens of the block."""
    docs: int
    """Documents that have tokens in the block."""
    first_document: int
    """Number, within the split, of the first of them."""
    xxh3: str
    """xxh3_128 of the bytes from begin to end."""
    hashed_end: int = 0
    """Byte after those that have hashes; 0 if there are none."""
    hashes_offset: int = 0
    """First byte of the hashes, after the npy header."""
    hashes_xxh3: str = ""
    """xxh3_64 of the hashes: pieces that match them are what this manifest was written for. Empty before version 3."""


class Members(Sequence[Member]):
    """The token blocks of a split, in order."""

    def __init__(self, files: Sequence[str], table: np.ndarray):
        """files: names of shards. table: a row for each block, with the COLUMNS. Raises ValueError if it has others."""
        self.files, self._table = tuple(files), table
        keys = table.dtype["key"].itemsize if "key" in (table.dtype.names or ()) else 0
        if table.dtype != row_type(keys):
            raise ValueError(f"its columns are {table.dtype}")
        if len(table) and int(table["file"].max()) >= len(self.files):
            raise ValueError(f"it has shard {table['file'].max()}, of {len(self.files)}")

    @classmethod
    def of(cls, members: Iterable[Member]) -> Members:
        """A table of these members."""
        if isinstance(members, Members):
            return members
        members = list(members)
        files = list(dict.fromkeys(member.file for member in members))
        places = {file: place for place, file in enumerate(files)}
        width = max((len(member.key.encode()) for member in members), default=1)
        table = np.empty(len(members), row_type(width))
        for name in COLUMNS:
            values: Any = (getattr(member, name) for member in members)
            table[name] = [_packed(name, value, places) for value in values]
        return cls(files, table)

    @classmethod
    def joined(cls, parts: Sequence[Members]) -> Members:
        """The members of several tables, one after another; no shard may be in two of them."""
        tables = [part._table.copy() for part in parts]
        for table, first in zip(tables, np.cumsum([0, *(len(part.files) for part in parts)]), strict=False):
            table["file"] += np.uint32(first)
        # numpy gives keys the width of the longest.
        return cls([file for part in parts for file in part.files], np.concatenate(tables))

    @classmethod
    def read(cls, files: Sequence[str], path: Path) -> Members:
        """The table of an .npy file. Raises ValueError for what is no table of members; OSError."""
        with path.open("rb") as stream:
            return cls(files, np.lib.format.read_array(stream, allow_pickle=False))

    def write(self, stream: IO[bytes]) -> None:
        """Write the table as an .npy file, with the same bytes for the same members."""
        np.save(stream, self._table)

    @property
    def xxh3(self) -> str:
        """xxh3_128 of the rows."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self._table).view(np.uint8).data)

    def column(self, name: str) -> np.ndarray:
        """int64 [members] values of a field that is a number."""
        return self._table[name].astype(np.int64)

    def needed_bytes(self) -> np.ndarray:
        """int64 [files] least size of each shard: where its last sample ends."""
        sizes = np.zeros(len(self.files), np.int64)
        np.maximum.at(sizes, self._table["file"], self.column("end"))
        return sizes

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, number: int) -> Member: ...

    @overload
    def __getitem__(self, number: slice) -> Members: ...

    def __getitem__(self, number: int | slice) -> Member | Members:
        if isinstance(number, slice):
            return Members(self.files, self._table[number])
        file, key, *numbers = self._table[number].item()
        values = dict(zip(list(COLUMNS)[2:], numbers, strict=True))
        values["xxh3"] = values["xxh3"].hex()
        values["hashes_xxh3"] = (
            f"{values['hashes_xxh3']:016x}" if values["hashed_end"] and values["hashes_xxh3"] else ""
        )
        return Member(file=self.files[file], key=key.decode(), **values)

    def __iter__(self) -> Iterator[Member]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Members) and self.files == other.files and np.array_equal(self._table, other._table)

    def __hash__(self) -> int:
        return hash((self.files, len(self)))


def row_type(key_bytes: int) -> np.dtype:
    """The type of a row of a table whose longest key has so many bytes."""
    return np.dtype([(name, f"S{key_bytes}" if name == "key" else kind) for name, kind in COLUMNS.items()])


def _packed(name: str, value: Any, places: dict[str, int]) -> Any:
    if name == "file":
        return places[value]
    if name == "key":
        return value.encode()
    if name == "xxh3":
        return bytes.fromhex(value)
    return int(value or "0", 16) if name == "hashes_xxh3" else value
