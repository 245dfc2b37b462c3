"""events.jsonl: what happened in a run, one JSON object a line. Append only: a crash costs at most the last line."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "events.jsonl"


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Add one line to the file. If a crash has cut the last line, it is ended first, so that the new one is whole.

    Infinities and nan, which JSON lacks, become strings that float() reads; what else JSON lacks becomes its str().
    """
    line = json.dumps(_legal(event), allow_nan=False, default=str).encode() + b"\n"
    with open(path, "ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)


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


def each_step(events: Iterable[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step, the last word on each, from the events `steps`."""
    found: dict[int, tuple[float, float]] = {}
    for event in events:
        if event.get("event") == "steps":
            first_step = event["step"] - len(event["loss"]) + 1
            pairs = zip(map(float, event["loss"]), map(float, event["grad_norm"]), strict=True)
            found.update(enumerate(pairs, start=first_step))
    return found


def _legal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _legal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_legal(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
