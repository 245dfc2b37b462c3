"""The list of a checkpoint's files with their sizes and hashes, by which a damaged checkpoint is found."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
METADATA = ".metadata"
STATE = "state.json"
_READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    size_bytes: int
    xxh3: str


def seal_file(path: Path) -> FileEntry:
    """Flush a written file to the disk and describe it."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return FileEntry(path.name, path.stat().st_size, _hash(path))


def write_durably(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_manifest(folder: Path, entries: list[FileEntry]) -> None:
    """Write the manifest; a checkpoint is complete when it has one and its name does not end in .tmp."""
    files = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def read_manifest(folder: Path) -> list[FileEntry]:
    """Entries of the manifest; raises OSError or ValueError if it cannot be read or is not one."""
    try:
        entries = [FileEntry(**entry) for entry in json.loads((folder / MANIFEST).read_text())["files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"it has no list of files: {error!r}") from error
    listed = {entry.name for entry in entries if isinstance(entry.name, str)}
    if len(listed) < len(entries) or any(Path(name).name != name for name in listed):
        raise ValueError("its list of files has something else than names, or one twice")
    if missing := {METADATA, STATE} - listed:
        raise ValueError(f"it does not list {' and '.join(sorted(missing))}")
    return entries


def listed(folder: Path) -> tuple[list[FileEntry], list[str]]:
    """Entries of the manifest, or what is wrong with it in one short phrase."""
    try:
        return read_manifest(folder), []
    except (OSError, ValueError) as error:
        return [], [f"{MANIFEST} is unreadable ({error})"]


def problems(folder: Path, entries: Sequence[FileEntry]) -> list[str]:
    """Faults of these files of a checkpoint, one short phrase each."""
    return [problem for entry in entries if (problem := _problem(folder, entry))]


def missing_bytes(folder: Path, entries: Sequence[FileEntry]) -> list[str]:
    """Files of a checkpoint that are not there or have another size, one short phrase each; their bytes are not read."""
    return [problem for entry in entries if (problem := _wrong_size(folder, entry))]


def is_as_written(folder: Path, name: str) -> bool:
    """Whether one file of a checkpoint is whole."""
    try:
        entries = [entry for entry in read_manifest(folder) if entry.name == name]
    except (OSError, ValueError):
        return False
    return bool(entries) and _problem(folder, entries[0]) is None


def _wrong_size(folder: Path, entry: FileEntry) -> str | None:
    try:
        size_bytes = (folder / entry.name).stat().st_size
    except OSError as error:
        return f"{entry.name} cannot be read ({error.strerror})"
    return (
        None if size_bytes == entry.size_bytes else f"{entry.name} has {size_bytes} bytes instead of {entry.size_bytes}"
    )


def _problem(folder: Path, entry: FileEntry) -> str | None:
    if wrong := _wrong_size(folder, entry):
        return wrong
    try:
        found = _hash(folder / entry.name)
    except OSError as error:
        return f"{entry.name} cannot be read ({error.strerror})"
    return None if found == entry.xxh3 else f"{entry.name} has hash {found} instead of {entry.xxh3}"


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
