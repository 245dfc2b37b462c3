"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replaced(path: Path, durable: bool = False) -> Iterator[TextIO]:
    """A stream whose text takes the place of a file in the end; the file stays as it is if that fails. Raises OSError.

    durable: the text is on the disk before the file has its name, so that no loss of power leaves an empty one.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", encoding="utf-8", errors="replace") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
