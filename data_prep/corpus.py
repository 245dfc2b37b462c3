"""Reads documents from files and folders. What cannot be read is counted, warned about and left out; it never ends the run."""

import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Damaged, Format, Skip
from based_megatron.data_prep.formats.registry import known_formats
from based_megatron.errors import DataError

logger = logging.getLogger(__name__)

WARNINGS_PER_REASON = 20


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    file: str
    """Name of the file, below the input folder it was found in and with its name."""
    record: int
    """Number of the document in its file: the line of a .jsonl, the row of a .parquet, from 1."""


class Skips:
    """Counts what is left out of a corpus, by reason, and warns about the first ones of each."""

    def __init__(self, quiet: bool = False, most: int | None = None):
        """most: documents, lines and files that may be left out, empty ones not counted; by default all may."""
        self.counts: Counter[str] = Counter()
        self._quiet, self._most, self._warned = quiet, most, Counter[str]()
        self._total = 0

    def add(self, reason: str, where: str, detail: str, records: int = 1) -> None:
        """Note that so many documents from `where` (file:record) on are skipped. Raises DataError if these are too many."""
        self.counts[reason] += records
        self._total += records
        self._warned[reason] += 1
        if self._most is not None and self._total > self._most:
            raise DataError(
                f"{self._total} skipped, more than the {self._most} of --max-skipped, when {where} was ({reason}: {detail}); "
                f"repair or leave out such files, or raise --max-skipped"
            )
        if not self._quiet and self._warned[reason] <= WARNINGS_PER_REASON:
            last = "; further ones are only counted" if self._warned[reason] == WARNINGS_PER_REASON else ""
            logger.warning("skipped %s (%s): %s%s", where, reason, detail, last)


class Corpus:
    """All documents below the inputs, in a file order that follows from the seed."""

    def __init__(self, config: PrepConfig, formats: Sequence[Format] | None = None):
        """Find the files. Raises DataError for an input that is missing or of an unknown format.

        formats: those to look for; by default all that `based prep` knows.
        """
        self._config = config
        self._formats = known_formats(config) if formats is None else formats
        found = sorted(find_files(config.inputs, self._formats))
        self._files = [(name, path, path.stat().st_size) for name, path in found]
        random.Random(config.seed).shuffle(self._files)
        self.total_bytes = sum(size for _, _, size in self._files)
        self._finished_bytes = 0
        self._current: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as they lie on disk, that the running iteration has passed."""
        return self._finished_bytes + (self._current.tell() if self._current else 0)

    def documents(self, skips: Skips) -> Iterator[Document]:
        """Every readable, non-empty document."""
        self._finished_bytes = 0
        for name, path, size in self._files:
            kind = format_of(name, self._formats)
            read_errors: tuple[type[Exception], ...] = (OSError, EOFError, Damaged, *kind.read_errors)
            passed = 0
            try:
                with path.open("rb") as self._current:
                    for record, text in kind.read(self._current, name, self._config):
                        passed += 1
                        if isinstance(text, Skip):
                            skips.add(text.reason, f"{name}:{record}", text.detail, text.records)
                        elif text.strip():
                            yield Document(text, name, record)
                        else:
                            skips.counts["empty"] += 1  # such as __init__.py: nothing to warn about
            except read_errors as error:
                lost = f"what follows on its first {passed:,} records is lost"
                if isinstance(error, Damaged) and error.byte < size:
                    skips.counts["unreadable bytes"] += size - error.byte
                    lost += f", {size - error.byte:,} of {size:,} bytes"
                skips.add("unreadable", name, f"{lost}: {error}")
            finally:
                self._current = None
            self._finished_bytes += size


def format_of(name: str, formats: Sequence[Format]) -> Format:
    """The first format that holds a file of this name. Raises DataError if there is none."""
    for known in formats:
        if known.holds(name):
            return known
    endings = " ".join(suffix for known in formats for suffix in known.suffixes)
    raise DataError(
        f"{name} has none of the known endings ({endings}): add its own to --suffixes to read it as plain text"
    )


def find_files(inputs: Sequence[str], formats: Sequence[Format]) -> list[tuple[str, Path]]:
    """(name, path) of every file of the inputs; hidden files and folders below an input folder are left out."""
    found: list[tuple[str, Path]] = []
    for entry in inputs:
        root = Path(entry)
        if root.is_file():
            format_of(root.name, formats)
            found.append((root.name, root))
        elif root.is_dir():
            for folder, subfolders, names in os.walk(root, onerror=_unreadable_folder):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                known = [name for name in names if any(kind.holds(name) for kind in formats)]
                paths = (Path(folder) / name for name in known if not name.startswith("."))
                top = Path(root.resolve().name)
                found.extend(((top / path.relative_to(root)).as_posix(), path) for path in paths if path.is_file())
        else:
            raise DataError(f"input {root} does not exist; give files or folders of text")
    return found


def _unreadable_folder(error: OSError) -> None:
    raise DataError(
        f"cannot read the folder {error.filename}: {error.strerror}; leave it out or change its permissions"
    ) from error
