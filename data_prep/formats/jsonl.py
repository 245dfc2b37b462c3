"""JSON lines, plain or compressed with gzip or zstd: the text of a line stands under `--text-key`."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format, Record, Skip


def read_lines(raw: BinaryIO, name: str, config: PrepConfig) -> Iterator[Record]:
    """One record for each line that is not blank; blank lines are counted in the numbers."""
    for number, line in enumerate(_decompressed(raw, name.lower()), start=1):
        if line.strip():
            yield number, _text(line, config.text_key)


def _text(line: bytes, text_key: str) -> str | Skip:
    try:
        text = json.loads(line)[text_key]
        text.encode()  # a lone surrogate such as \ud800 is legal JSON but no text
    except UnicodeError as error:
        return Skip("undecodable", str(error))
    except ValueError as error:
        return Skip("malformed", f"not JSON: {error}")
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return Skip("malformed", f"no text under {text_key!r} in this line")
    return text


def _decompressed(raw: BinaryIO, lower_name: str) -> BinaryIO:
    if lower_name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if lower_name.endswith(".zst"):
        # Public corpora are often compressed with --long=31 and are chains of frames.
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        return io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))  # type: ignore[arg-type]
    return raw


JSONL = Format((".jsonl", ".jsonl.gz", ".jsonl.zst"), read_lines, (zlib.error, zstandard.ZstdError))
