"""JSON lines, and the JSON documents that go by the same endings: the text of a record stands under `--text-key`."""

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format, Record, Skip, Stretch
from based_megatron.data_prep.formats.compression import is_compressed


def read_lines(raw: Iterable[bytes], name: str, config: PrepConfig) -> Iterator[Record]:
    """One record for each line that is not blank; blank lines are counted in the numbers."""
    for number, line in enumerate(raw, start=1):
        if line.strip():
            yield number, _text_of_line(line, config.text_key)


def cut_at_lines(raw: BinaryIO, stretch_bytes: int) -> list[Stretch]:
    """Stretches that end behind the first line break at or after each multiple of stretch_bytes; none of a compressed file."""
    if is_compressed(raw):
        return []
    size, borders = raw.seek(0, io.SEEK_END), [0]
    while borders[-1] + stretch_bytes < size:
        raw.seek(borders[-1] + stretch_bytes - 1)
        raw.readline()
        borders.append(raw.tell())
    if borders[-1] < size:
        borders.append(size)
    return [Stretch(begin, end, None) for begin, end in itertools.pairwise(borders)]


def read_stretch_of_lines(raw: BinaryIO, begin: int, end: int, config: PrepConfig) -> Iterator[Record]:
    """One record for each line between two bytes of a file."""
    raw.seek(begin)
    yield from read_lines(_lines_until(raw, end), "", config)


def _lines_until(raw: BinaryIO, end: int) -> Iterator[bytes]:
    while raw.tell() < end and (line := raw.readline()):
        yield line


def read_json(raw: BinaryIO, name: str, config: PrepConfig) -> Iterator[Record]:
    """JSON lines if the first line is an object by itself; else one document, a record or a list of records, which is held in memory."""
    first = next(raw, b"").removeprefix(codecs.BOM_UTF8)
    if first.strip().startswith(b"{") and first.strip().endswith(b"}"):
        yield from read_lines(itertools.chain([first], raw), name, config)
        return
    try:
        values = json.loads(first + raw.read())
    except (ValueError, RecursionError) as error:
        yield 1, Skip("malformed", f"neither JSON lines nor one JSON document: {error}")
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        yield number, _text(value, config.text_key)


def _text_of_line(line: bytes, text_key: str) -> str | Skip:
    try:
        value = json.loads(line)
    except UnicodeError as error:
        return Skip("undecodable", str(error))
    except ValueError as error:
        return Skip("malformed", f"not JSON: {error}")
    except RecursionError:
        return Skip("malformed", f"no text under {text_key!r} in this record")
    return _text(value, text_key)


def _text(value: Any, text_key: str) -> str | Skip:
    """The text of a record. A key with points leads into objects, unless the record has it as it is."""
    for key in [text_key] if isinstance(value, dict) and text_key in value else text_key.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        return Skip("malformed", f"no text under {text_key!r} in this record")
    try:
        value.encode()  # a lone surrogate such as \ud800 is legal JSON but no text
    except UnicodeError as error:
        return Skip("undecodable", str(error))
    return value


JSONL = Format(
    (".jsonl", ".ndjson"), read_lines, compressible=True, cut=cut_at_lines, read_stretch=read_stretch_of_lines
)
JSON = Format((".json",), read_json, compressible=True)
