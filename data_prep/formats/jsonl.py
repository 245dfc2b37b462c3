"""JSON lines, plain or compressed with gzip or zstd: the text of a line stands under `--text-key`."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format, Record, Skip
from based_megatron.data_prep.formats.compression import decompressed


def read_lines(raw: BinaryIO, name: str, config: PrepConfig) -> Iterator[Record]:
    """One record for each line that is not blank; blank lines are counted in the numbers."""
    for number, line in enumerate(decompressed(raw, name), start=1):
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


JSONL = Format((".jsonl", ".jsonl.gz", ".jsonl.zst"), read_lines)
