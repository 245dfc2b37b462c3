"""The folder that `based prep` writes, which appears whole, and the workplace next to it, which one process has at a time.

    OUTPUT.tmp/lock       who works here (run_folder/lock.py): the mark without which nothing in the folder is touched
    OUTPUT.tmp/corpus     what is written
    OUTPUT.tmp/replaced   the corpus that it replaces, between two renames

What a killed process has left there is taken over by the next start. Nothing else is ever removed. What is worth keeping between
starts is in OUTPUT.units (unit_store.py), which belongs to whoever has the lock.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from based_megatron.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, blocks_name
from based_megatron.data_prep.tokenizer import TOKENIZER_CONFIG_NAME
from based_megatron.errors import ConfigError, DataError
from based_megatron.run_folder.files import LOCK, RECALL
from based_megatron.run_folder.lock import RunLock, held
from based_megatron.run_folder.whole_file import sync_folder

logger = logging.getLogger(__name__)

LOCK_SECONDS = 60
SPLITS = ("train", "validation")
CORPUS_NAMES = {MANIFEST_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, RECALL, *SPLITS, *map(blocks_name, SPLITS)}
"""All that a prepared corpus holds: RECALL is of the runs that have read it."""


def resolved_output(path: str) -> Path:
    """The place that --output names, behind all links. Raises DataError where no folder can be put in its place."""
    if not path.strip():
        raise DataError("--output is empty: name the folder to write")
    try:
        output = Path(path).resolve()
    except RuntimeError as error:  # a link to itself
        raise DataError(f"--output {path} cannot be resolved: {error}; name another folder") from error
    if os.path.ismount(output):
        raise DataError(f"--output {path} is a mount point, which no other folder can replace: name a folder in it")
    if Path.cwd().is_relative_to(output):
        raise DataError(
            f"--output {path} is the current folder or holds it, and cannot be replaced: name a folder in it"
        )
    return output


class Workplace:
    """The folder OUTPUT.tmp, while this process has its lock."""

    def __init__(self, output: Path, overwrite: bool, lock: RunLock):
        """overwrite: whether a corpus that has the output's name is replaced."""
        folder = workplace_of(output)
        self._output, self._overwrite, self._lock = output, overwrite, lock
        self._replaced = folder / "replaced"
        self.corpus = folder / "corpus"
        """Where the corpus is written."""

    def start(self) -> None:
        """Finish what a killed process has left, and make the corpus's folder. Raises DataError if the output is in the way."""
        if (self.corpus / MANIFEST_NAME).is_file() and _is_free(self._output):
            self.corpus.rename(self._output)
            logger.warning("%s was completed by a `based prep` that was killed: it has its name now", self._output)
        self.clear()
        _check_output(self._output, self._overwrite)
        self.corpus.mkdir()

    def publish(self) -> None:
        """Give the complete corpus its name, in the place of an older one if there is one."""
        for folder in (*(self.corpus / split for split in SPLITS), self.corpus):
            sync_folder(folder)
        if self._lock.lost:
            raise DataError(
                f"{self.corpus.parent} was taken by {self._lock.lost}: let only one process write {self._output}"
            )
        _check_output(self._output, self._overwrite)
        if not _is_free(self._output):
            self._output.rename(self._replaced)
        self.corpus.rename(self._output)
        sync_folder(self._output.parent)

    def clear(self) -> None:
        """Remove what was written and replaced; a corpus that was to be replaced gets its name back if no other has it."""
        if self._lock.lost:
            return
        if self._replaced.exists() and not self._output.exists():
            self._replaced.rename(self._output)
        for folder in (self.corpus, self._replaced):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def workplace(output: Path, overwrite: bool) -> Iterator[Workplace]:
    """The workplace of an output, made and locked, and removed in the end.

    Raises DataError if it or the output is in the way, or if another process works there; OSError.
    """
    folder = workplace_of(output)
    _check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder, LOCK_SECONDS, logger.warning, "wait for it, or change --output") as lock:
            place = Workplace(output, overwrite, lock)
            try:
                place.start()
                yield place
            finally:
                place.clear()
    except ConfigError as error:
        raise DataError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):  # another process is in it
            folder.rmdir()


def workplace_of(output: Path) -> Path:
    """The folder next to an output in which it is written."""
    return output.with_name(output.name + ".tmp")


def units_of(output: Path) -> Path:
    """The folder next to an output with the units that are finished."""
    return output.with_name(output.name + ".units")


def _check_ours(folder: Path) -> None:
    """Raise DataError if something is in the workplace's place that no `based prep` has made."""
    if folder.is_dir() and not folder.is_symlink():
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{LOCK}.")}
        if not names or (LOCK in names and names <= {LOCK, "corpus", "replaced"}):
            return
    elif not folder.exists() and not folder.is_symlink():
        return
    raise DataError(f"{folder} is in the way, and not of a `based prep` that can be told: move it, or change --output")


def _check_output(output: Path, overwrite: bool) -> None:
    if _is_free(output):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(f"{output} exists and is not a prepared corpus: change --output")
    if not overwrite:
        raise DataError(f"{output} already holds a prepared corpus: change --output, or add --overwrite to replace it")
    if others := sorted({entry.name for entry in output.iterdir()} - CORPUS_NAMES):
        raise DataError(
            f"{output} holds {', '.join(others[:3])}, which is not of a prepared corpus and would be lost: "
            f"move it, or change --output"
        )


def _is_free(output: Path) -> bool:
    """True if a folder can take this name without replacing anything."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))
