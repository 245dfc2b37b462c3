"""Plain text and source code: a file is one document, or a .txt file is cut at the lines of `--separator`."""

from collections.abc import Iterator
from typing import BinaryIO

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format, Record, bare_name, decoded


def plain_text(suffixes: tuple[str, ...]) -> Format:
    """The format of files with these endings."""
    return Format(tuple(suffix.lower() for suffix in suffixes), read_text, compressible=True)


def read_text(raw: BinaryIO, name: str, config: PrepConfig) -> Iterator[Record]:
    """The whole file, or its parts."""
    if bare_name(name).endswith(".txt") and config.separator is not None:
        for number, part in enumerate(_separated(raw, config.separator.encode()), start=1):
            yield number, decoded(part)
    else:
        yield 1, decoded(raw.read())


def _separated(raw: BinaryIO, separator: bytes) -> Iterator[bytes]:
    part: list[bytes] = []
    for line in raw:
        if line.strip() != separator:
            part.append(line)
        elif part:
            yield b"".join(part)
            part = []
    if part:
        yield b"".join(part)
