"""From files and folders to documents. What cannot be read is counted, said and left out; it never ends the run."""

import gzip
import io
import json
import logging
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

from based_megatron.data_prep.config import PrepConfig
from based_megatron.errors import DataError

logger = logging.getLogger(__name__)

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
PARQUET_BATCH_ROWS = 1024
WARNINGS_PER_REASON = 20
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException)


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

    def __init__(self, quiet: bool = False):
        self.counts: Counter[str] = Counter()
        self.quiet = quiet

    def add(self, reason: str, where: str, detail: str) -> None:
        """Note that the document at `where` (file:record) is skipped."""
        self.counts[reason] += 1
        if not self.quiet and self.counts[reason] <= WARNINGS_PER_REASON:
            last = "; further ones are only counted" if self.counts[reason] == WARNINGS_PER_REASON else ""
            logger.warning("skipped %s (%s): %s%s", where, reason, detail, last)


class Corpus:
    """All documents below the inputs, in a file order that follows from the seed."""

    def __init__(self, config: PrepConfig):
        """Find the files. Raises DataError for an input that is missing or of an unknown kind."""
        self._config = config
        self._files = [(name, path, path.stat().st_size) for name, path in sorted(find_files(config))]
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
            try:
                with path.open("rb") as self._current:
                    for record, text in self._read(name, self._current, skips):
                        if text.strip():
                            yield Document(text, name, record)
                        else:
                            skips.counts["empty"] += 1  # such as __init__.py: nothing to warn about
            except READ_ERRORS as error:
                skips.add("unreadable", name, f"the rest of this file cannot be read: {error}")
            finally:
                self._current = None
            self._finished_bytes += size

    def _read(self, name: str, raw: BinaryIO, skips: Skips) -> Iterator[tuple[int, str]]:
        lower = name.lower()
        if lower.endswith(PARQUET_SUFFIXES):
            records = _parquet_rows(name, raw, self._config.text_key)
        elif lower.endswith(JSONL_SUFFIXES):
            yield from _jsonl_texts(name, _decompressed(lower, raw), self._config.text_key, skips)
            return
        elif lower.endswith(".txt") and self._config.separator is not None:
            records = _separated_parts(raw, self._config.separator.encode())
        else:
            records = iter([(1, raw.read())])
        for record, data in records:
            if data is None:
                skips.add("malformed", f"{name}:{record}", f"no {self._config.text_key!r} in this row")
                continue
            try:
                yield record, data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                skips.add("undecodable", f"{name}:{record}", f"not UTF-8 at byte {error.start}")


def find_files(config: PrepConfig) -> list[tuple[str, Path]]:
    """(name, path) of every file of the inputs; hidden files and folders below an input folder are left out."""
    known = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES, *(suffix.lower() for suffix in config.suffixes))
    found: list[tuple[str, Path]] = []
    for entry in config.inputs:
        root = Path(entry)
        if root.is_file():
            if not root.name.lower().endswith(known):
                raise DataError(
                    f"{root} has none of the known endings: add its own to --suffixes to read it as plain text"
                )
            found.append((root.name, root))
        elif root.is_dir():
            for folder, subfolders, names in os.walk(root, onerror=_unreadable_folder):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                paths = (
                    Path(folder) / name for name in names if not name.startswith(".") and name.lower().endswith(known)
                )
                top = Path(root.resolve().name)
                found.extend(((top / path.relative_to(root)).as_posix(), path) for path in paths if path.is_file())
        else:
            raise DataError(f"input {root} does not exist; give files or folders of text")
    return found


def _unreadable_folder(error: OSError) -> None:
    raise DataError(
        f"cannot read the folder {error.filename}: {error.strerror}; leave it out or change its permissions"
    ) from error


def _decompressed(lower_name: str, raw: BinaryIO) -> BinaryIO:
    if lower_name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if lower_name.endswith(".zst"):
        # Public corpora are often compressed with --long=31 and are chains of frames.
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        return io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))  # type: ignore[arg-type]
    return raw


def _jsonl_texts(name: str, lines: BinaryIO, text_key: str, skips: Skips) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            text = json.loads(line)[text_key]
            text.encode()  # a lone surrogate such as \ud800 is legal JSON but no text
        except UnicodeError as error:
            skips.add("undecodable", where, str(error))
        except ValueError as error:
            skips.add("malformed", where, f"not JSON: {error}")
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError):
            skips.add("malformed", where, f"no text under {text_key!r} in this line")
        else:
            yield number, text


def _parquet_rows(name: str, raw: BinaryIO, text_key: str) -> Iterator[tuple[int, bytes | None]]:
    parquet = pyarrow.parquet.ParquetFile(raw)
    columns = parquet.schema_arrow.names
    if text_key not in columns:
        raise DataError(f"{name} has no column {text_key!r}, only {', '.join(columns)}: set --text-key")
    row = 0
    for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
        for value in batch.column(0).cast(pyarrow.large_binary()):
            row += 1
            yield row, value.as_py()


def _separated_parts(raw: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes]]:
    part: list[bytes] = []
    number = 0
    for line in raw:
        if line.strip() != separator:
            part.append(line)
        elif part:
            number += 1
            yield number, b"".join(part)
            part = []
    if part:
        yield number + 1, b"".join(part)
