"""Reads documents from files and folders. What cannot be read is counted, warned about and left out; it never ends the run."""

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.files import InputFile, find_files
from based_megatron.data_prep.formats.base import Damaged, Format, Skip
from based_megatron.data_prep.formats.compression import decompressed
from based_megatron.data_prep.formats.registry import known_formats
from based_megatron.data_prep.output import workplace_of
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
        """Find the files. Raises DataError for an input that is missing, of an unknown format, or does not fit the settings.

        formats: those to look for; by default all that `based prep` knows.
        """
        self._config = config
        output = Path(config.output).resolve()
        self._files = find_files(config.inputs, formats or known_formats(config), (output, workplace_of(output)))
        for file in self._files:
            self._check(file)
        random.Random(config.seed).shuffle(self._files)
        self.total_bytes = sum(file.size_bytes for file in self._files)
        self._finished_bytes = 0
        self._current: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as they lie on disk, that the running iteration has passed."""
        return self._finished_bytes + (self._current.tell() if self._current else 0)

    def documents(self, skips: Skips) -> Iterator[Document]:
        """Every readable, non-empty document."""
        self._finished_bytes = 0
        for file in self._files:
            name, kind, size = file.name, file.kind, file.size_bytes
            read_errors: tuple[type[Exception], ...] = (OSError, EOFError, Damaged, *kind.read_errors)
            passed = 0
            try:
                with file.path.open("rb") as self._current:
                    content = decompressed(self._current) if kind.compressible else self._current
                    for record, text in kind.read(content, name, self._config):
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

    def _check(self, file: InputFile) -> None:
        if file.kind.check:
            with contextlib.suppress(OSError, *file.kind.read_errors), file.path.open("rb") as raw:
                file.kind.check(raw, file.name, self._config)
