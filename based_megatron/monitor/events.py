"""events.jsonl: what happened in a run, one JSON object a line. Written by appending only, so a crash costs at most its last line."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FILE_NAME = "events.jsonl"


def open_for_append(path: Path) -> IO[str]:
    """Open an events file to add lines. A last line that a crash has cut is ended first, so that the next one is whole."""
    stream = open(path, "a", encoding="utf-8")
    if stream.tell():
        with open(path, "rb") as tail:
            tail.seek(-1, os.SEEK_END)
            if tail.read(1) != b"\n":
                stream.write("\n")
    return stream


def write_event(stream: IO[str], event: dict[str, Any]) -> None:
    """Append one event and flush it. Infinities and nan, which JSON lacks, become the strings that float() reads."""
    stream.write(json.dumps(_legal(event), allow_nan=False, default=str) + "\n")
    stream.flush()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file in order, without lines that a crash has cut.

    Steps that a resumed run did again occur twice: the later ones count.
    """
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event


def _legal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _legal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_legal(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
