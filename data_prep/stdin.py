"""The input `-`: what comes through a pipe, as a file, because it is read more than once."""

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Damaged
from based_megatron.data_prep.formats.compression import decompressed
from based_megatron.errors import DataError

STDIN = "-"


@contextlib.contextmanager
def stdin_as_file(config: PrepConfig) -> Iterator[PrepConfig]:
    """The settings with a file in the place of `-`, in the folder for temporary files, which is there as long as the context.

    What begins with a brace is JSON lines, all else plain text, compressed or not. Raises DataError if nobody writes to standard input, or
    if `-` is given twice; OSError.
    """
    if STDIN not in config.inputs:
        yield config
        return
    if config.inputs.count(STDIN) > 1 or sys.stdin.isatty():
        raise DataError(
            "the input - is standard input, once, and something must be piped into it: zstdcat X | based prep -"
        )
    with tempfile.TemporaryDirectory(prefix="based-prep-") as folder:
        spooled = Path(folder) / "stdin"
        with spooled.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        named = spooled.rename(spooled.with_suffix(".jsonl" if _is_json(spooled) else ".txt"))
        yield dataclasses.replace(config, inputs=tuple(str(named) if name == STDIN else name for name in config.inputs))


def _is_json(path: Path) -> bool:
    with path.open("rb") as raw, contextlib.suppress(Damaged):
        return decompressed(raw).read(1) == b"{"
    return False
