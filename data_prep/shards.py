"""Writes webdataset shards: tar files whose samples are token blocks with the ends and origins of their documents."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from based_megatron.data.manifest import Member, Split, piece_hashes


class TokenizedDocument(NamedTuple):
    """Ids with eos at the end, and the document's file and record."""

    tokens: np.ndarray
    file: str
    record: int


class Start(NamedTuple):
    """A place in a split at which a shard begins."""

    block: int
    """Blocks before it."""
    document: int
    """Documents that end before it, or there."""
    inside_document: bool
    """Whether a document goes on there."""


FROM_THE_START = Start(0, 0, False)


class SplitWriter:
    """Packs the documents of one split, or of a part of it, into blocks of `block_tokens` (the last is shorter) and blocks into shards."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        block_tokens: int,
        shard_blocks: int,
        start: Start = FROM_THE_START,
    ):
        """start: where the part begins; a part that is not the first begins with a shard."""
        self._folder = folder
        self._split = split
        self._block_tokens = block_tokens
        self._shard_blocks = shard_blocks
        self._buffer = np.empty(block_tokens, dtype)
        self._filled = 0
        self._ends: list[int] = []
        self._origins: list[tuple[str, int]] = []
        self._continued = start.inside_document
        self._first_block = start.block
        self._members: list[Member] = []
        self._shard: _Shard | None = None
        self.documents = start.document
        """Documents of the split up to here."""
        self.tokens = 0
        (folder / split).mkdir(exist_ok=True)

    def add(self, document: TokenizedDocument, goes_on: bool = False) -> None:
        """Append one document; what does not fit into the block goes on in the next.

        goes_on: more of the document follows on the last block of this part.
        """
        self.documents += 1
        self.tokens += len(document.tokens)
        written = 0
        while written < len(document.tokens):
            taken = min(len(document.tokens) - written, self._block_tokens - self._filled)
            self._buffer[self._filled : self._filled + taken] = document.tokens[written : written + taken]
            written += taken
            self._filled += taken
            self._ends.append(self._filled)
            self._origins.append((document.file, document.record))
            if self._filled == self._block_tokens:
                self._write_block(continues=goes_on or written < len(document.tokens))

    def close(self) -> Split:
        """Write the last block and return the table of contents."""
        if self._filled:
            self._write_block(continues=False)
        if self._shard:
            self._shard.close()
        return Split(self.documents, self.tokens, tuple(self._members))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """After an error a shard is still open: close its file, which stays unfinished."""
        if self._shard:
            self._shard.abandon()

    def _write_block(self, continues: bool) -> None:
        number = self._first_block + len(self._members)
        if number % self._shard_blocks == 0:
            if self._shard:
                self._shard.close()
            self._shard = _Shard(self._folder, f"{self._split}/{shard_name(number // self._shard_blocks)}")
        assert self._shard is not None
        first_document = self.documents - len(self._ends)
        docs = {
            "ends": self._ends,
            "first_document": first_document,
            "continued": self._continued,
            "continues": continues,
        }
        member = self._shard.write(f"{number:08d}", self._buffer[: self._filled], docs, self._origins)
        self._members.append(member)
        self._filled, self._ends, self._origins, self._continued = 0, [], [], continues


def shard_name(number: int) -> str:
    """File name of a split's shard."""
    return f"shard-{number:05d}.tar"


class _Shard:
    """One tar file under a temporary name until it is closed."""

    def __init__(self, folder: Path, name: str):
        self._name = name
        self._path = folder / name
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._file = self._temporary.open("w+b")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def write(self, key: str, tokens: np.ndarray, docs: dict[str, Any], origins: list[tuple[str, int]]) -> Member:
        npy = io.BytesIO()
        np.save(npy, tokens)
        payloads = [npy.getvalue(), json.dumps(docs).encode(), json.dumps(origins).encode()]
        begin = self._file.tell()
        tokens_at, docs_at, origins_at = (
            self._add(f"{key}.{ending}", payload)
            for ending, payload in zip(("tokens.npy", "docs.json", "origins.json"), payloads, strict=True)
        )
        hashed_end = self._file.tell()
        hashes, hashes_npy = piece_hashes(self._written(begin, hashed_end)), io.BytesIO()
        np.save(hashes_npy, hashes)
        hashes_at = self._add(f"{key}.hashes.npy", hashes_npy.getvalue())
        end = self._file.tell()
        return Member(
            file=self._name,
            key=key,
            begin=begin,
            end=end,
            offset=tokens_at + len(payloads[0]) - tokens.nbytes,
            docs_offset=docs_at,
            docs_bytes=len(payloads[1]),
            origins_offset=origins_at,
            origins_bytes=len(payloads[2]),
            tokens=len(tokens),
            docs=len(docs["ends"]),
            first_document=docs["first_document"],
            xxh3=xxhash.xxh3_128_hexdigest(self._written(begin, end)),
            hashed_end=hashed_end,
            hashes_offset=hashes_at + len(hashes_npy.getvalue()) - hashes.nbytes,
            hashes_xxh3=xxhash.xxh3_64_hexdigest(hashes.tobytes()),
        )

    def _written(self, begin: int, end: int) -> bytes:
        self._file.seek(begin)
        return self._file.read(end - begin)

    def close(self) -> None:
        with self._file:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._temporary.rename(self._path)

    def abandon(self) -> None:
        """Close the file under its temporary name; it may be closed already."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _add(self, name: str, payload: bytes) -> int:
        """Append a file to the tar and return the offset of its data, behind the one header block of a short name."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        start = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(payload))
        return start
