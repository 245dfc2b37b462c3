"""Files that are written whole or not at all, and folders whose names last."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: Path, *, durable: bool = False, binary: bool = False) -> Iterator[IO[Any]]:
    """A stream of text or bytes that takes the place of a file in the end; the file stays as it is if that fails. Raises OSError.

    durable: all is on the disk before the file has its name, so that no loss of power leaves an empty one.
    """
    # Runs that share a corpus may write the same file at the same time.
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    text = {} if binary else {"encoding": "utf-8", "errors": "replace"}
    try:
        with new.open("wb" if binary else "w", **text) as stream:  # type: ignore[call-overload]
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk: files and renames survive a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
