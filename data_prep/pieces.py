"""Pieces of the inputs: whole files, and stretches of big ones whose format can be cut."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from based_megatron.data_prep.files import InputFile

READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Piece:
    """A file or a stretch of it, which one task reads."""

    name: str
    """The file's name, as origins have it."""
    path: str
    """Absolute: a task may run in another folder."""
    begin: int
    """First byte."""
    end: int
    """Byte after the last."""
    is_whole: bool
    """Whether it is a whole file."""
    size_bytes: int
    """Size of the whole file."""
    mtime_ns: int
    """When the file was last written, in ns since the epoch: what is known of a piece holds until the file changes."""
    records: int | None = 0
    """Records of a stretch; None: one a line."""
    first_record: int = 0
    """Records of the file before this piece."""
    content: str = ""
    """xxh3_128 of its bytes; empty before they were read."""

    @property
    def bytes(self) -> int:
        """Bytes of the piece."""
        return self.end - self.begin


def whole(file: InputFile) -> Piece:
    """A file as one piece."""
    return Piece(file.name, str(file.path.absolute()), 0, file.size_bytes, True, file.size_bytes, file.mtime_ns)


def pieces_of(file: InputFile, piece_bytes: int) -> list[Piece]:
    """A file as pieces of about so many bytes, if its format can be cut and it is longer than that."""
    if file.kind.cut and file.size_bytes > piece_bytes:
        # What cannot be read now is for the reader to report.
        with contextlib.suppress(OSError, *file.kind.read_errors), file.path.open("rb") as raw:
            stretches = file.kind.cut(raw, piece_bytes)
            if len(stretches) > 1:
                size, time = file.size_bytes, file.mtime_ns
                return [
                    Piece(file.name, str(file.path.absolute()), begin, end, False, size, time, records)
                    for begin, end, records in stretches
                ]
    return [whole(file)]


@dataclass(frozen=True)
class Digest:
    """What reading a piece's bytes tells of it."""

    content: str
    """xxh3_128."""
    lines: int


def digest(piece: Piece) -> Digest:
    """Read a piece's bytes, as far as they can be read: what cannot is for the reader to report."""
    hashed, lines = xxhash.xxh3_128(), 0
    with contextlib.suppress(OSError):
        for part in _bytes_of(piece):
            hashed.update(part)
            lines += 0 if piece.records is not None else part.count(b"\n")
    return Digest(hashed.hexdigest(), lines)


def is_unchanged(piece: Piece) -> bool:
    """Whether the file is still the one that the piece was cut from."""
    try:
        stat = Path(piece.path).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (piece.size_bytes, piece.mtime_ns)


def _bytes_of(piece: Piece) -> Iterator[bytes]:
    with Path(piece.path).open("rb") as raw:
        raw.seek(piece.begin)
        left = piece.bytes
        while left > 0 and (part := raw.read(min(left, READ_BYTES))):
            yield part
            left -= len(part)
