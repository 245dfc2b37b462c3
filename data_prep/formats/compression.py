"""Compressed files, read so that damage costs what lies behind it and nothing before it.

Such a file is a chain of members (frames, in zstd). Libraries that read across them take an end inside of one for the end of the file, or
drop what they had decompressed before an error; here every member says for itself whether it is whole.
"""

import bz2
import io
import lzma
import re
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


def _xz_stream() -> Any:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ)


MEMBERS: dict[bytes, Callable[[], Any]] = {
    rb"\x1f\x8b\x08": _gzip_member,
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": _zstd_frame,
    rb"BZh[1-9](\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)": bz2.BZ2Decompressor,
    rb"\xfd7zXZ\x00": _xz_stream,
}
"""What decompresses one member of a file that begins with a match of the pattern. No text begins so."""
MAGIC_BYTES = 10
ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError)
"""What decompressors raise; that of bz2 an OSError."""


def decompressed(raw: BinaryIO) -> BinaryIO:
    """The content of an open file, compressed or not, whatever its name says. Reading it raises Damaged."""
    new_member = _decompressor(raw)
    return io.BufferedReader(_Parts(_parts(raw, new_member))) if new_member else raw


def is_compressed(raw: BinaryIO) -> bool:
    """Whether what is in an open file begins as a compressed one, whatever its name says."""
    return _decompressor(raw) is not None


def _decompressor(raw: BinaryIO) -> Callable[[], Any] | None:
    magic = raw.read(MAGIC_BYTES)
    raw.seek(0)
    return next((member for pattern, member in MEMBERS.items() if re.match(pattern, magic)), None)


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
