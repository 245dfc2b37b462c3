"""Reads documents from files and folders. What cannot be read is counted, warned about and left out; it never ends the run."""

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.files import InputFile, find_files, format_of
from based_megatron.data_prep.formats.base import Damaged, Format, Record, Skip
from based_megatron.data_prep.formats.compression import decompressed
from based_megatron.data_prep.formats.registry import known_formats
from based_megatron.data_prep.output import units_of, workplace_of
from based_megatron.data_prep.pieces import Piece, whole
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


@dataclass(frozen=True)
class SkipEvent:
    """What one warning is about."""

    reason: str
    where: str
    detail: str
    records: int


class Skips:
    """Counts what is left out of a corpus, by reason, and warns about the first ones of each."""

    def __init__(self, quiet: bool = False, most: int | None = None):
        """most: documents, lines and files that may be left out, empty ones not counted; by default all may."""
        self.counts: Counter[str] = Counter()
        self.events: list[SkipEvent] = []
        """The first of each reason, for whoever merges these counts into those of a corpus."""
        self._quiet, self._most, self._noted = quiet, most, Counter[str]()
        self._total = 0

    def add(self, reason: str, where: str, detail: str, records: int = 1) -> None:
        """Note that so many documents from `where` (file:record) on are skipped. Raises DataError if these are too many."""
        self.counts[reason] += records
        self._total += records
        self._check(SkipEvent(reason, where, detail, records))
        self._note(SkipEvent(reason, where, detail, records))

    def merge(self, counts: Mapping[str, int], events: Sequence[SkipEvent], skipped: int) -> None:
        """Add what was left out of a unit: `skipped` of it count towards the most. Raises DataError if these are too many."""
        self.counts.update(counts)
        self._total += skipped
        if events:
            self._check(events[-1])
        for event in events:
            self._note(event)

    @property
    def total(self) -> int:
        """Documents, lines and files that were left out, empty ones not counted."""
        return self._total

    def _check(self, last: SkipEvent) -> None:
        if self._most is not None and self._total > self._most:
            raise DataError(
                f"{self._total} skipped, more than the {self._most} of --max-skipped, when {last.where} was ({last.reason}: "
                f"{last.detail}); repair or leave out such files, or raise --max-skipped"
            )

    def _note(self, event: SkipEvent) -> None:
        self._noted[event.reason] += 1
        if self._noted[event.reason] > WARNINGS_PER_REASON:
            return
        self.events.append(event)
        if not self._quiet:
            last = "; further ones are only counted" if self._noted[event.reason] == WARNINGS_PER_REASON else ""
            logger.warning("skipped %s (%s): %s%s", event.where, event.reason, event.detail, last)


class DocumentReader:
    """Reads the documents of one piece after another."""

    def __init__(self, config: PrepConfig, skips: Skips, formats: Sequence[Format] | None = None):
        """formats: those to read; by default all that `based prep` knows."""
        self._config, self._skips = config, skips
        self._formats = formats or known_formats(config)
        self._finished_bytes = 0
        self._current: tuple[BinaryIO, int] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as they lie on disk, that have been passed."""
        if self._current is None:
            return self._finished_bytes
        raw, begin = self._current
        return self._finished_bytes + raw.tell() - begin

    def documents(self, piece: Piece) -> Iterator[Document]:
        """Every readable, non-empty document of a piece."""
        name, kind = piece.name, format_of(piece.name, self._formats)
        read_errors: tuple[type[Exception], ...] = (OSError, EOFError, Damaged, *kind.read_errors)
        passed = 0
        try:
            with Path(piece.path).open("rb") as raw:
                self._current = raw, piece.begin
                for number, text in _records(raw, piece, kind, self._config):
                    passed += 1
                    record = piece.first_record + number
                    if isinstance(text, Skip):
                        self._skips.add(text.reason, f"{name}:{record}", text.detail, text.records)
                    elif text.strip():
                        yield Document(text, name, record)
                    else:
                        self._skips.counts["empty"] += 1  # such as __init__.py: nothing to warn about
        except read_errors as error:
            lost = f"what follows on its first {passed:,} records is lost"
            if isinstance(error, Damaged) and error.byte < piece.end:
                self._skips.counts["unreadable bytes"] += piece.end - error.byte
                lost += f", {piece.end - error.byte:,} of {piece.end:,} bytes"
            self._skips.add("unreadable", name, f"{lost}: {error}")
        finally:
            self._current = None
        self._finished_bytes += piece.end - piece.begin


class Corpus:
    """All documents below the inputs, in a file order that follows from the seed."""

    def __init__(self, config: PrepConfig, formats: Sequence[Format] | None = None):
        """Find the files. Raises DataError for an input that is missing, of an unknown format, or does not fit the settings.

        formats: those to look for; by default all that `based prep` knows.
        """
        self._config = config
        self.formats = formats or known_formats(config)
        output = Path(config.output).resolve()
        self.files = find_files(config.inputs, self.formats, (output, workplace_of(output), units_of(output)))
        """The files, in order of their names."""
        for file in self.files:
            self._check(file)
        self.total_bytes = sum(file.size_bytes for file in self.files)
        self._reader: DocumentReader | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as they lie on disk, that the running iteration has passed."""
        return self._reader.bytes_read if self._reader else 0

    def documents(self, skips: Skips) -> Iterator[Document]:
        """Every readable, non-empty document, of files in an order that follows from the seed."""
        self._reader = DocumentReader(self._config, skips, self.formats)
        files = list(self.files)
        random.Random(self._config.seed).shuffle(files)
        for file in files:
            yield from self._reader.documents(whole(file))

    def _check(self, file: InputFile) -> None:
        if file.kind.check:
            with contextlib.suppress(OSError, *file.kind.read_errors), file.path.open("rb") as raw:
                file.kind.check(raw, file.name, self._config)


def _records(raw: BinaryIO, piece: Piece, kind: Format, config: PrepConfig) -> Iterator[Record]:
    if not piece.is_whole:
        assert kind.read_stretch is not None
        return kind.read_stretch(raw, piece.begin, piece.end, config)
    return kind.read(decompressed(raw) if kind.compressible else raw, piece.name, config)
