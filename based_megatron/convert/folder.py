"""Output folders that appear whole or not at all."""

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from based_megatron.errors import CheckpointError

PARTIAL = ".partial"
"""What follows the name of an output while it is being written."""
ENDINGS = (signal.SIGTERM, signal.SIGHUP)


def check_new(output: Path) -> None:
    """Raise CheckpointError if an output is there already."""
    if output.exists():
        raise CheckpointError(f"{output} exists already: choose another --output, or remove it")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes the name `output` when the block succeeds, and is removed when it fails or its process is asked to end.

    It lies in `output`.partial until then. A process that is killed leaves that; the next one to write the output replaces it.
    Raises CheckpointError if `output` exists, cannot be written or is being written by another process.
    """
    check_new(output)
    partial = output.with_name(output.name + PARTIAL)
    try:
        with _ends_by_exceptions(), _held(partial):
            folder = partial / output.name
            shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
            folder.mkdir()
            yield folder
            folder.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}; free some space or choose another --output") from error


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """A folder for this process alone, removed in the end; its lock ends with the process, however that ends."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False  # another process writes there, or has just ended
        if not is_ours:
            raise CheckpointError(f"{partial} is being written by another process: choose another --output, or wait")
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def _ends_by_exceptions() -> Iterator[None]:
    """Signals that ask this process to end raise SystemExit meanwhile, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _exit) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
