"""The table of contents of a prepared corpus: which token blocks lie where, and with which tokenizer they were made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from based_megatron.errors import DataError
from based_megatron.run_folder.whole_file import whole_file

VERSION = 3
READABLE = (1, 2, VERSION)
HASHED_VERSION = 3
"""First version whose manifest knows the hashes of the pieces of samples."""
HASHED_BYTES = 1 << 14
"""Bytes of a sample that one of its hashes is of: no more need be read than a sequence and what is around it."""
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
READ_BYTES = 1 << 24


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


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a corpus."""

    documents: int
    tokens: int
    members: tuple[Member, ...]


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

    def token_bytes(self, member: Member) -> int:
        """Bytes of a member's token data."""
        return member.tokens * np.dtype(self.dtype).itemsize


def load_manifest(path: str | Path, check_hashes: bool = False) -> Manifest:
    """Read and check the manifest of a folder written by `based prep` (the folder, or the manifest.json itself).

    Every shard must be there with its full length; `check_hashes` reads them all (see verify).
    Raises DataError, in one line.
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
    splits = {
        name: Split(**{**split, "members": tuple(Member(**member) for member in split["members"])})
        for name, split in values["splits"].items()
    }
    manifest = Manifest(**{**values, "splits": splits, "folder": path.parent})
    _check_sizes(manifest)
    if check_hashes:
        verify(manifest)
    return manifest


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


def make_manifest(**values: Any) -> Manifest:
    """A Manifest of these fields with its version and fingerprint filled in."""
    manifest = Manifest(version=VERSION, fingerprint="", **values)
    return dataclasses.replace(manifest, fingerprint=fingerprint(_to_json(manifest)))


def save_manifest(manifest: Manifest) -> None:
    """Write manifest.json into the manifest's folder, whole or not at all."""
    with whole_file(manifest.folder / MANIFEST_NAME, durable=True) as stream:
        json.dump(_to_json(manifest), stream, indent=1)


def verify(manifest: Manifest) -> None:
    """Read every byte of every sample, and the tokenizer.

    Raises DataError for the first that differs from its recorded hash.
    """
    check_tokenizer_file(manifest)
    for split in manifest.splits.values():
        for member in split.members:
            path = manifest.folder / member.file
            if hash_range(path, member.begin, member.end) != member.xxh3:
                raise DataError(
                    f"{path} is damaged: sample {member.key} (bytes {member.begin} to {member.end}) does not match its "
                    f"recorded hash; write the corpus again with `based prep`"
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


def _to_json(manifest: Manifest) -> dict[str, Any]:
    values = dataclasses.asdict(manifest)
    del values["folder"]
    return json.loads(json.dumps(values))


def _check_sizes(manifest: Manifest) -> None:
    needed_bytes: dict[str, int] = {}
    for split in manifest.splits.values():
        for member in split.members:
            needed_bytes[member.file] = max(needed_bytes.get(member.file, 0), member.end)
    for file, needed in needed_bytes.items():
        path = manifest.folder / file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"shard {path} of the manifest cannot be read: {error.strerror}; restore it or write the corpus again"
            ) from error
        if size < needed:
            raise DataError(
                f"shard {path} is truncated: {size} bytes, the manifest needs {needed}; "
                f"restore it or write the corpus again"
            )


def piece_hashes(data: bytes) -> np.ndarray:
    """uint64 xxh3_64 of every HASHED_BYTES of a sample."""
    view = memoryview(data)
    pieces = (view[first : first + HASHED_BYTES] for first in range(0, len(view), HASHED_BYTES))
    return np.array([xxhash.xxh3_64_intdigest(piece) for piece in pieces], "<u8")


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
