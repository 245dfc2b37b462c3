"""The table of contents of a prepared corpus: which token blocks lie where, and with which tokenizer they were made.

    manifest.json        what a corpus is, its shards, and the hashes of
    train.blocks.npy     a row for each block (members.py)

Manifests before version 4 have the blocks as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from based_megatron.data.members import Member, Members
from based_megatron.errors import DataError
from based_megatron.run_folder.whole_file import whole_file

VERSION = 4
READABLE = (1, 2, 3, VERSION)
TABLE_VERSION = 4
"""First version whose blocks are in tables of their own."""
HASHED_VERSION = 3
"""First version whose manifest knows the hashes of the pieces of samples."""
HASHED_BYTES = 1 << 14
"""Bytes of a sample that one of its hashes is of: no more need be read than a sequence and what is around it."""
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
READ_BYTES = 1 << 24


class ShardFiles(Protocol):
    """The shards of a corpus that is not in a folder. All methods raise DataError in one line."""

    @property
    def url(self) -> str:
        """Where the corpus is."""

    def size(self, file: str, /) -> int:
        """Bytes of a shard."""

    def read(self, file: str, begin: int, end: int, /) -> bytes:
        """A part of a shard, or what there is of it."""

    def forget(self, file: str, begin: int, end: int, /) -> None:
        """A part of a shard was not as it should be: it is not to be kept."""

    def fingerprint_now(self) -> str | None:
        """The fingerprint that the corpus has now; None if there is none."""


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a corpus."""

    documents: int
    tokens: int
    members: Sequence[Member]
    """Its blocks; in a Manifest they are Members, one table."""

    @property
    def table(self) -> Members:
        """The blocks as a table."""
        return Members.of(self.members)


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus. `folder` is where it was found; all else is in manifest.json."""

    version: int
    tokenizer_xxh3: str
    """xxh3_128 of tokenizer.json."""
    vocab_size: int
    """Ids of the tokenizer: the largest is vocab_size - 1."""
    dtype: str
    """uint16 or uint32, little endian."""
    eos_id: int
    """Last token of every document."""
    splits: dict[str, Split]
    """train and validation."""
    skipped: dict[str, int]
    """Documents, lines or files of the inputs that were left out, by reason; "unreadable bytes" of damaged files."""
    fingerprint: str
    """xxh3_128 of all of the above: two corpora with one fingerprint hold the same tokens in the same order."""
    folder: Path
    remote: ShardFiles | None = dataclasses.field(default=None, compare=False)
    """Where the shards are, if they are not in the folder."""

    @property
    def place(self) -> str:
        """Where the corpus is, in words: its folder or its URL."""
        return self.remote.url if self.remote else str(self.folder)

    def token_bytes(self, member: Member) -> int:
        """Bytes of a member's token data."""
        return member.tokens * np.dtype(self.dtype).itemsize


def load_manifest(
    path: str | Path, check_hashes: bool = False, share: tuple[int, int] = (0, 1), remote: ShardFiles | None = None
) -> Manifest:
    """Read and check the manifest of a folder written by `based prep` (the folder, or the manifest.json itself).

    Every shard must be there with its full length; `check_hashes` reads them all (see verify).
    share: (number, of how many) of the parts of the shards that this process looks at; other ranks look at the others.
    remote: where the shards are, if they are not in the folder. Raises DataError, in one line.
    """
    path = Path(path)
    path = path if path.name == MANIFEST_NAME else path / MANIFEST_NAME
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"no {MANIFEST_NAME} at {path.parent}: set data.path to a folder written by `based prep`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; write the corpus again with `based prep`") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version not in READABLE:
        raise DataError(f"{path} has version {version!r}, not {VERSION}: write the corpus again with this `based prep`")
    if values.get("fingerprint") != fingerprint(values):
        raise DataError(
            f"{path} does not match its own fingerprint: it is damaged or edited; "
            f"write the corpus again with `based prep`"
        )
    read = _split_of_table if version >= TABLE_VERSION else _split_of_json
    splits = {name: read(path.parent, name, split) for name, split in values["splits"].items()}
    manifest = Manifest(**{**values, "splits": splits, "folder": path.parent, "remote": remote})
    _check_sizes(manifest, share)
    if check_hashes:
        verify(manifest)
    return manifest


def _split_of_json(folder: Path, name: str, values: dict[str, Any]) -> Split:
    members = Members.of(Member(**member) for member in values["members"])
    return Split(values["documents"], values["tokens"], members)


def _split_of_table(folder: Path, name: str, values: dict[str, Any]) -> Split:
    path = folder / blocks_name(name)
    try:
        members = Members.read(values["files"], path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; restore it or write the corpus again") from error
    if members.xxh3 != values["blocks_xxh3"]:
        raise DataError(
            f"{path} does not match the hash that {MANIFEST_NAME} has of it: it is damaged, or of another corpus; "
            f"restore it or write the corpus again"
        )
    return Split(values["documents"], values["tokens"], members)


def blocks_name(split: str) -> str:
    """The file, next to the manifest, with the blocks of a split."""
    return f"{split}.blocks.npy"


def fingerprint(values: dict[str, Any]) -> str:
    """xxh3_128 over the content of a manifest, without its own fingerprint."""
    content = {key: value for key, value in values.items() if key != "fingerprint"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def fingerprint_at(folder: Path) -> str | None:
    """The fingerprint that the manifest of a folder has now; None if there is none to read."""
    try:
        return json.loads((folder / MANIFEST_NAME).read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_manifest(*, splits: dict[str, Split], **values: Any) -> Manifest:
    """A Manifest of these fields with its version and fingerprint filled in."""
    tables = {name: dataclasses.replace(split, members=split.table) for name, split in splits.items()}
    manifest = Manifest(version=VERSION, fingerprint="", splits=tables, **values)
    return dataclasses.replace(manifest, fingerprint=fingerprint(_head(manifest)))


def save_manifest(manifest: Manifest) -> None:
    """Write the tables and, when they are on the disk, manifest.json into the manifest's folder; each whole or not at all."""
    for name, split in manifest.splits.items():
        with whole_file(manifest.folder / blocks_name(name), durable=True, binary=True) as stream:
            split.table.write(stream)
    with whole_file(manifest.folder / MANIFEST_NAME, durable=True) as stream:
        json.dump(_head(manifest), stream, indent=1)


def _head(manifest: Manifest) -> dict[str, Any]:
    """What manifest.json says."""
    values = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    del values["folder"], values["remote"]
    values["splits"] = {
        name: {
            "documents": split.documents,
            "tokens": split.tokens,
            "files": list(split.table.files),
            "blocks_xxh3": split.table.xxh3,
        }
        for name, split in manifest.splits.items()
    }
    return values


def verify(manifest: Manifest) -> None:
    """Read every byte of every sample, and the tokenizer.

    Raises DataError for the first that differs from its recorded hash.
    """
    check_tokenizer_file(manifest)
    for split in manifest.splits.values():
        for member in split.members:
            if _hash(manifest, member) != member.xxh3:
                raise DataError(
                    f"{manifest.place}/{member.file} is damaged: sample {member.key} (bytes {member.begin} to {member.end}) does not "
                    f"match its recorded hash; write the corpus again with `based prep`"
                )


def check_tokenizer(manifest: Manifest, vocab_size: int) -> None:
    """Raise DataError unless a model of `vocab_size` entries fits, and tokenizer.json is the one of these tokens."""
    if vocab_size < manifest.vocab_size:
        raise DataError(
            f"model.vocab_size {vocab_size} is smaller than the {manifest.vocab_size} entries of the tokenizer of "
            f"{manifest.folder}; set model.vocab_size to {manifest.vocab_size}"
        )
    check_tokenizer_file(manifest)


def check_tokenizer_file(manifest: Manifest) -> None:
    """Raise DataError unless the tokenizer.json next to the manifest has the recorded hash."""
    path = manifest.folder / TOKENIZER_NAME
    try:
        found = xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; put back the tokenizer that the corpus was made with"
        ) from error
    if found != manifest.tokenizer_xxh3:
        raise DataError(
            f"{path} is not the tokenizer of this corpus: its hash is {found}, the manifest says "
            f"{manifest.tokenizer_xxh3}; put the right tokenizer.json back or write the corpus again with `based prep`"
        )


def _check_sizes(manifest: Manifest, share: tuple[int, int]) -> None:
    number, parts = share
    for split in manifest.splits.values():
        needed_bytes = split.table.needed_bytes().tolist()
        for file, needed in list(zip(split.table.files, needed_bytes, strict=True))[number::parts]:
            _check_size(manifest, file, needed)


def _check_size(manifest: Manifest, file: str, needed_bytes: int) -> None:
    path = f"{manifest.place}/{file}"
    try:
        size = manifest.remote.size(file) if manifest.remote else (manifest.folder / file).stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {path} of the manifest cannot be read: {error.strerror}; restore it or write the corpus again"
        ) from error
    if size < needed_bytes:
        raise DataError(
            f"shard {path} is truncated: {size} bytes, the manifest needs {needed_bytes}; "
            f"restore it or write the corpus again"
        )


def piece_hashes(data: bytes) -> np.ndarray:
    """uint64 xxh3_64 of every HASHED_BYTES of a sample."""
    view = memoryview(data)
    pieces = (view[first : first + HASHED_BYTES] for first in range(0, len(view), HASHED_BYTES))
    return np.array([xxhash.xxh3_64_intdigest(piece) for piece in pieces], "<u8")


def _hash(manifest: Manifest, member: Member) -> str:
    if manifest.remote is None:
        return hash_range(manifest.folder / member.file, member.begin, member.end)
    digest = xxhash.xxh3_128()
    for begin in range(member.begin, member.end, READ_BYTES):
        digest.update(manifest.remote.read(member.file, begin, min(begin + READ_BYTES, member.end)))
    return digest.hexdigest()


def hash_range(path: Path, begin: int, end: int) -> str:
    """xxh3_128 of a part of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(begin)
        left = end - begin
        while left and (piece := file.read(min(left, READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
