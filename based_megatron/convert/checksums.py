"""SHA256SUMS of an export: the hashes of its files, in the form that `sha256sum --check` reads too."""

import hashlib
from pathlib import Path

from based_megatron.errors import CheckpointError

NAME = "SHA256SUMS"
CARD = "README.md"
"""The model card has no hash: it is made to be edited."""
READ_SUFFIXES = {".py", ".json", ".safetensors", ".bin"}
"""Files that transformers may read or run: one that is not listed was put there later."""


def write_checksums(folder: Path) -> None:
    """Write the hashes of all files of a folder but its card. Raises OSError."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (NAME, CARD))
    (folder / NAME).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")


def damage(folder: Path) -> list[str]:
    """What is not as it was written, one short phrase each. Raises CheckpointError for a folder without a list of hashes."""
    listed = _read(folder)
    wrong = [fault for name, digest in listed.items() if (fault := _fault(folder / name, digest))]
    strays = (path.name for path in sorted(folder.iterdir()) if path.suffix in READ_SUFFIXES)
    return wrong + [f"{name} is not listed in {NAME}" for name in strays if name not in listed]


def _read(folder: Path) -> dict[str, str]:
    """The hash of each file by its name."""
    path = folder / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): give a folder that `based export` has written") from error
    listed: dict[str, str] = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if len(digest) != 64 or not separator or Path(name).name != name:
            raise CheckpointError(f"{path} has a line that is no hash and name: {line[:80]!r}; copy the folder again")
        listed[name] = digest
    return listed


def _fault(path: Path, digest: str) -> str | None:
    try:
        found = _sha256(path)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if found == digest else f"{path.name} is not as it was written"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
