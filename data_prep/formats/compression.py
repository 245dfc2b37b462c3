"""Compressed files, read so that damage costs what lies behind it and nothing before it.

Such a file is a chain of members (frames, in zstd). Libraries that read across them take an end inside of one for the end of the file, or
drop what they had decompressed before an error; here every member says for itself whether it is whole.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

from based_megatron.data_prep.formats.base import Damaged

READ_BYTES = 1 << 14
"""Compressed bytes that are decompressed at a time: no more good ones are lost in front of damage."""
MAX_ZSTD_WINDOW = 2**31
"""Public corpora are often compressed with --long=31."""


def _gzip_member() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()


COMPRESSIONS: dict[str, Callable[[], Any]] = {".gz": _gzip_member, ".zst": _zstd_frame}
"""By the ending of a file: what decompresses one member of it."""
ERRORS = (zlib.error, zstandard.ZstdError)


def decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    """The content of an open file of this name, which is the file itself if it is not compressed. Reading it raises Damaged."""
    for ending, new_member in COMPRESSIONS.items():
        if name.lower().endswith(ending):
            return io.BufferedReader(_Parts(_parts(raw, new_member)))  # type: ignore[return-value]
    return raw


def _parts(raw: BinaryIO, new_member: Callable[[], Any]) -> Iterator[bytes]:
    compressed = _behind_padding(raw, b"")
    while compressed:
        member = new_member()
        while not member.eof:
            if not compressed:
                raise Damaged("it is cut off: its last part has no end", raw.tell())
            begin = raw.tell() - len(compressed)
            try:
                part = member.decompress(compressed)
            except ERRORS as error:
                raise Damaged(str(error), begin) from error
            yield part
            compressed = member.unused_data if member.eof else raw.read(READ_BYTES)
        compressed = _behind_padding(raw, compressed)


def _behind_padding(raw: BinaryIO, compressed: bytes) -> bytes:
    """What follows on zeros, which tapes and xz put between members and no member begins with; empty at the end of the file."""
    while not (compressed := compressed.lstrip(b"\0")) and (compressed := raw.read(READ_BYTES)):
        pass
    return compressed


class _Parts(io.RawIOBase):
    """A stream of the parts of a content."""

    def __init__(self, parts: Iterator[bytes]):
        self._parts = parts
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is left of one part; 0 is the end."""
        while not self._ready and (part := next(self._parts, None)) is not None:
            self._ready = memoryview(part)
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken
