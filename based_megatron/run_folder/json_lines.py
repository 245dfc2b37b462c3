"""Files of one JSON object a line. Append only: a crash costs at most the last line."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_line(path: Path, values: dict[str, Any], *, durable: bool = False) -> None:
    """Add one line to the file. If a crash has cut the last line, it is ended first, so that the new one is whole.

    durable: return only when the line would survive the machine.
    Infinities and nan, which JSON lacks, become strings that float() reads; what else JSON lacks becomes its str().
    """
    line = json.dumps(legal(values), allow_nan=False, default=str).encode() + b"\n"
    with open(path, "ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file in order, without lines that a crash has cut."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(values, dict):
                yield values


def legal(value: Any) -> Any:
    """A value that JSON can hold: infinities and nan, which it lacks, become strings that float() reads."""
    if isinstance(value, dict):
        return {key: legal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [legal(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
