"""The contract of a file format: what its file says, and what its reader yields."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from based_megatron.data_prep.config import PrepConfig

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
"""Endings of compressed files, behind that of their format."""


class Skip(NamedTuple):
    """Why a record has no text: `reason` is a word that is counted ("malformed"), `detail` goes into the warning."""

    reason: str
    detail: str
    records: int = 1
    """Records that it stands for, from the one that it is yielded with on."""


class Damaged(Exception):
    """The rest of a file cannot be read."""

    def __init__(self, reason: str, byte: int):
        """byte: where the part begins that is lost, in the file as it lies on the disk; its length if that was cut."""
        super().__init__(reason)
        self.byte = byte


Record = tuple[int, str | Skip]
"""A document's number in its file, from 1, and its text, or why there is none."""


class Stretch(NamedTuple):
    """Bytes of a file whose records can be read without those before them."""

    begin: int
    end: int
    records: int | None
    """Records in it; None for one a line, which whoever reads the bytes can count."""


@dataclass(frozen=True)
class Format:
    """A kind of file with documents in it."""

    suffixes: tuple[str, ...]
    """Endings of its files, in lower case: `(".jsonl", ".jsonl.gz")`."""
    read: Callable[[BinaryIO, str, PrepConfig], Iterator[Record]]
    """The records of an open file. The name of the file and the settings of `based prep` come along, for what depends on them.

    The reader takes from the file in order, so that progress can be shown as bytes read. What is wrong with one record it yields
    as a Skip; what makes the rest of the file unreadable it raises (Damaged, `read_errors`, OSError or EOFError); a setting that does
    not fit is a DataError, which ends the run.
    """
    read_errors: tuple[type[Exception], ...] = ()
    """Errors of the library that reads the format: the rest of the file is skipped and counted as unreadable."""

    compressible: bool = False
    """Whether its files may be compressed, with one more ending (COMPRESSED): the reader then gets what is in them."""
    check: Callable[[BinaryIO, str, PrepConfig], None] | None = None
    """Raises DataError for an open file that does not fit the settings: it is called for all files before any work begins. What
    cannot be read is left to the reader."""
    cut: Callable[[BinaryIO, int], list[Stretch]] | None = None
    """An open file as stretches of about so many bytes, or an empty list if it must be read as a whole."""
    read_stretch: Callable[[BinaryIO, int, int, PrepConfig], Iterator[Record]] | None = None
    """The records between two bytes of an open file, as `cut` gave them, numbered from 1."""

    def holds(self, name: str) -> bool:
        """True if a file of this name is of this format."""
        return (bare_name(name) if self.compressible else name.lower()).endswith(self.suffixes)


def bare_name(name: str) -> str:
    """A file's name in lower case, without the ending of its compression."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def decoded(data: bytes) -> str | Skip:
    """Text from UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skip("undecodable", f"not UTF-8 at byte {error.start}")
