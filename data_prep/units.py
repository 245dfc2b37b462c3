"""Units of work: pieces of the inputs, `--unit-bytes` together, that one task tokenizes at a time; finished ones are kept."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from based_megatron.data.batches import batches
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import Document, DocumentReader, Skips
from based_megatron.data_prep.output import SPLITS
from based_megatron.data_prep.pieces import Digest, Piece, digest, is_unchanged
from based_megatron.data_prep.run_files import RUN_TOKENS, RunBuilder, document_key
from based_megatron.data_prep.tasks import Tell
from based_megatron.data_prep.tokenizer import Encoder, load_tokenizer
from based_megatron.data_prep.unit_store import FinishedUnit, SplitCount, UnitStore, write_unit
from based_megatron.errors import DataError

BATCH_CHARACTERS = 1 << 20
VERSION = 1
"""Version of the files of units and of the order of documents: units of another one are made again."""


Place = tuple[str, str, int, int, int, int]


@dataclass(frozen=True)
class Unit:
    """Pieces to tokenize."""

    key: str
    """xxh3_128 of the pieces' content and places, and of the options."""
    options: str
    """Key of the settings that tokens depend on."""
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its pieces, as they lie on disk."""
        return sum(piece.bytes for piece in self.pieces)


def options_key(config: PrepConfig, tokenizer_xxh3: str) -> str:
    """Key of all that changes the documents of a unit, their tokens, or their order."""
    options = {
        "version": VERSION,
        "tokenizer": tokenizer_xxh3,
        "eos": config.eos_token,
        "text_key": config.text_key,
        "separator": config.separator,
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(options, sort_keys=True).encode())


def digested(pieces: Sequence[Piece], digests: Sequence[Digest]) -> list[Piece]:
    """The pieces with their content, and with the numbers of records in front of them."""
    known: list[Piece] = []
    for piece, found in zip(pieces, digests, strict=True):
        last = known[-1] if known else None
        first = last.first_record + (last.records or 0) if last and piece.begin and last.path == piece.path else 0
        records = found.lines if piece.records is None else piece.records
        known.append(dataclasses.replace(piece, content=found.content, records=records, first_record=first))
    return known


def remembered_digests(units: Iterable[FinishedUnit]) -> dict[Place, Digest]:
    """What finished units know of pieces, which holds as long as their files are not written to."""
    return {place_of(piece): Digest(piece.content, piece.records or 0) for unit in units for piece in unit.pieces}


def place_of(piece: Piece) -> Place:
    """Where a piece lies, with its file's size and time of writing."""
    return piece.name, piece.path, piece.begin, piece.end, piece.size_bytes, piece.mtime_ns


def as_units(
    pieces: Sequence[Piece], options: str, finished: Mapping[str, FinishedUnit], unit_bytes: int
) -> tuple[list[FinishedUnit], list[Unit]]:
    """All pieces, as units that are finished and units to do."""
    left = {_identity(piece): piece for piece in pieces}
    kept = []
    for unit in finished.values():
        identities = [_identity(piece) for piece in unit.pieces]
        if unit.options == options and all(identity in left for identity in identities):
            kept.append(unit)
            for identity in identities:
                del left[identity]
    return kept, [Unit(_unit_key(group, options), options, group) for group in groups(left.values(), unit_bytes)]


def _identity(piece: Piece) -> tuple[str, int, int, str, int]:
    """What a piece's documents depend on, besides the options."""
    return piece.name, piece.begin, piece.end, piece.content, piece.first_record


def _unit_key(pieces: Sequence[Piece], options: str) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([options, *map(_identity, pieces)]).encode())


def groups(pieces: Iterable[Piece], group_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces in their order, as many together as are not more than group_bytes."""
    return map(tuple, batches(pieces, lambda piece: piece.bytes, group_bytes))


@dataclass(frozen=True)
class ReadPieces:
    """Reads the bytes of pieces."""

    def __call__(self, pieces: Sequence[Piece], tell: Tell) -> list[tuple[Place, Digest]]:
        """Where each piece lies, and its digest."""
        found = []
        for piece in pieces:
            found.append((place_of(piece), digest(piece)))
            tell(piece.bytes, 0)
        return found


@dataclass(frozen=True)
class TokenizeUnits:
    """Tokenizes units into the folder of finished ones."""

    config: PrepConfig
    units: Path
    """The folder of a UnitStore."""
    tokenizer: Path
    """Folder with the tokenizer."""

    @cached_property
    def _encoder(self) -> Encoder:
        return load_tokenizer(str(self.tokenizer))

    def __call__(self, unit: Unit, tell: Tell) -> FinishedUnit:
        """Tokenize a unit. Raises DataError if its files are written to meanwhile; OSError."""
        with UnitStore(self.units).new("units", unit.key) as folder:
            writer = _UnitWriter(folder, self.config)
            skips = Skips(quiet=True)
            reader = DocumentReader(self.config, skips)
            told_bytes = 0
            for number, piece in enumerate(unit.pieces):
                for batch in batches(reader.documents(piece), lambda document: len(document.text), BATCH_CHARACTERS):
                    ids = self._encoder.encode([document.text for document in batch])
                    for document, tokens in zip(batch, ids, strict=True):
                        writer.add(document, tokens, number)
                    tell(reader.bytes_read - told_bytes, sum(map(len, ids)))
                    told_bytes = reader.bytes_read
                if not is_unchanged(piece):
                    raise DataError(f"{piece.path} was written to while it was read: start again when it is complete")
            tell(unit.bytes - told_bytes, 0)
            finished = writer.close(unit, skips)
            write_unit(folder, finished)
        return finished


class _UnitWriter:
    """The documents of a unit, written as runs."""

    def __init__(self, folder: Path, config: PrepConfig):
        self._folder, self._config = folder, config
        self._run = RunBuilder()
        self._runs: list[int] = []
        self._documents, self._tokens = Counter[str](), Counter[str]()
        self._text_bytes = 0
        self._begun = time.monotonic()

    def add(self, document: Document, tokens: np.ndarray, piece: int) -> None:
        text = document.text.encode()
        text_hash = xxhash.xxh3_64_intdigest(text)
        held_out = is_held_out(text_hash, self._config.validation_fraction)
        key = document_key(self._config.seed, document.file, document.record)
        self._run.add(tokens, key, text_hash, piece, document.record, held_out)
        split = "validation" if held_out else "train"
        self._documents[split] += 1
        self._tokens[split] += len(tokens)
        self._text_bytes += len(text)
        if self._run.tokens >= RUN_TOKENS:
            self._write()

    def close(self, unit: Unit, skips: Skips) -> FinishedUnit:
        """Write what is left, and say what the unit has."""
        if self._run.tokens:
            self._write()
        return FinishedUnit(
            key=unit.key,
            options=unit.options,
            pieces=unit.pieces,
            runs=tuple(self._runs),
            splits={name: SplitCount(self._documents[name], self._tokens[name]) for name in SPLITS},
            counts=dict(sorted(skips.counts.items())),
            skipped=skips.total,
            events=tuple(skips.events),
            text_bytes=self._text_bytes,
            seconds=time.monotonic() - self._begun,
        )

    def _write(self) -> None:
        self._runs.append(self._run.write(self._folder, len(self._runs)))
        self._run = RunBuilder()


def is_held_out(text_xxh3: int, fraction: float) -> bool:
    """True if a document belongs to the validation split: the xxh3_64 of its text lies in the first `fraction` of the range."""
    return text_xxh3 < fraction * 2.0**64


def is_validation(text: str, fraction: float) -> bool:
    """True if a document of this text belongs to the validation split."""
    return is_held_out(xxhash.xxh3_64_intdigest(text.encode()), fraction)
