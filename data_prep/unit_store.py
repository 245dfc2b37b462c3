"""The folder OUTPUT.units: what a start need not do again.

    units.json            the mark without which nothing in the folder is touched
    tokenizers/KEY/       tokenizers that were trained
    units/KEY/            finished units: documents of some pieces of the inputs, tokenized and sorted (run_files.py)
    shards/KEY/           finished shards of one order of units
    jobs/                 lists of jobs that an executor of datatrove works on
    plan.json             what the running or last start has to do, for `based prep status`

All is written under a temporary name first, so that what has its name is whole. Whoever has the output's lock has this folder.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from based_megatron.data_prep.corpus import SkipEvent
from based_megatron.data_prep.output import SPLITS
from based_megatron.data_prep.pieces import Piece
from based_megatron.errors import DataError
from based_megatron.run_folder.whole_file import sync_folder, whole_file

MARK = "units.json"
PLAN = "plan.json"
VERSION = 1
UNIT_NAME = "unit.json"
JOBS = "jobs"
FOLDERS = ("tokenizers", "units", "shards")


@dataclass(frozen=True)
class SplitCount:
    """What a unit has of a split."""

    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class FinishedUnit:
    """What is known of a unit that is tokenized."""

    key: str
    options: str
    """Key of all settings that its tokens depend on."""
    pieces: tuple[Piece, ...]
    runs: tuple[int, ...]
    """For each run, how many of its documents are of the training split: they come first."""
    splits: dict[str, SplitCount]
    counts: dict[str, int]
    """What was skipped, by reason."""
    skipped: int
    """What was skipped, empty documents not counted."""
    events: tuple[SkipEvent, ...]
    text_bytes: int
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes of its pieces, as they lie on disk."""
        return sum(piece.bytes for piece in self.pieces)


class UnitStore:
    """The folder of finished work next to an output."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self) -> None:
        """Make the folder, or remove what killed tasks left half done in it. Raises DataError if another's is in the way."""
        mark = self.folder / MARK
        if self.folder.exists() and not mark.is_file() and any(self.folder.iterdir()):
            raise DataError(
                f"{self.folder} is in the way, and not of a `based prep` that can be told: move it, or change --output"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(mark) as stream:
            json.dump({"version": VERSION}, stream)
        for name in FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)
            for left in (self.folder / name).glob(".*.new"):
                shutil.rmtree(left, ignore_errors=True)

    def path(self, kind: str, key: str) -> Path:
        """Where a thing of this kind (FOLDERS) has its place."""
        return self.folder / kind / key

    @contextlib.contextmanager
    def new(self, kind: str, key: str) -> Iterator[Path]:
        """A folder to fill, which gets its place when it is whole; if another task was faster, that one's stays."""
        place = self.path(kind, key)
        temporary = place.with_name(f".{key}.{os.uname().nodename}.{os.getpid()}.new")
        temporary.mkdir()
        try:
            yield temporary
            sync_folder(temporary)
            try:
                temporary.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def finished(self) -> dict[str, FinishedUnit]:
        """All finished units by their keys; what is no unit of this version is removed."""
        units = {}
        for path in sorted((self.folder / "units").iterdir()):
            if (unit := read_unit(path)) is not None:
                units[unit.key] = unit
            else:
                shutil.rmtree(path, ignore_errors=True)
        return units

    def keep_only(self, units: Collection[str], tokenizers: Collection[str], shards: Collection[str]) -> None:
        """Remove what is not of these keys."""
        for name, kept in zip(FOLDERS, (tokenizers, units, shards), strict=True):
            for path in (self.folder / name).iterdir():
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder and all that is of us in it."""
        for name in (*FOLDERS, JOBS):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (PLAN, MARK):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something of others is in it
            self.folder.rmdir()

    def remove_if_empty(self) -> None:
        """Remove the folder if there is nothing in it that is worth keeping."""
        with contextlib.suppress(FileNotFoundError):
            if not any(path for name in FOLDERS for path in (self.folder / name).iterdir()):
                self.remove()


def write_unit(folder: Path, unit: FinishedUnit) -> None:
    """Write unit.json. Raises OSError."""
    with whole_file(folder / UNIT_NAME, durable=True) as stream:
        json.dump(dataclasses.asdict(unit), stream)


def read_unit(folder: Path) -> FinishedUnit | None:
    """The unit in a folder; None if there is none of this version."""
    try:
        values: dict[str, Any] = json.loads((folder / UNIT_NAME).read_bytes())
        return FinishedUnit(
            **{
                **values,
                "pieces": tuple(Piece(**piece) for piece in values["pieces"]),
                "runs": tuple(values["runs"]),
                "splits": {name: SplitCount(**values["splits"][name]) for name in SPLITS},
                "events": tuple(SkipEvent(**event) for event in values["events"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
