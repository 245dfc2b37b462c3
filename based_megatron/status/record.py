"""What events.jsonl says of a run, read on from where the last look ended.

Nearly all of a long file are steps; of them the last one before each other event is parsed, which has the sums of all before it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KIND = re.compile(rb'"event": "(\w+)"')
_KIND_BYTES = 200
"""The kind of an event stands at the beginning of its line."""
_BLOCK_BYTES = 1 << 22
WALL = "wall_seconds/"
FIRST_LIMIT_SECONDS = 1800.0

Event = Mapping[str, Any]


@dataclass
class Process:
    """One start of a run, up to the next one."""

    start: Event
    last_step: Event | None = None
    """Its last log point."""
    done_steps: int = 0
    """The last step that is known to be done."""
    last_time: float = 0.0
    """Time of its last event."""
    end: Event | None = None
    """Its last word: stop, end or error."""
    hang: Event | None = None
    stops: list[Event] = field(default_factory=list)

    @property
    def began(self) -> float:
        """When the process itself began, seconds since 1970."""
        return self.start["time"] - float(self.start.get("process_seconds", 0.0))

    @property
    def from_step(self) -> int:
        return int(self.start["step"])

    def seconds(self) -> dict[str, float]:
        """Where its time went: all until its last event, by the parts of `wall_seconds`."""
        last, whole = self.last_step, max(0.0, self.last_time - self.began)
        if last is None:
            return {"start_up": whole}
        parts = {name.removeprefix(WALL): float(value) for name, value in last.items() if name.startswith(WALL)}
        if not parts and "step_seconds" in last:  # an older version
            parts = {"steps": (int(last["step"]) - self.from_step) * float(last["step_seconds"])}
        elif not parts:
            parts = {"start_up": float(last["time"]) - self.began}
        parts["other"] = parts.get("other", 0.0) + max(0.0, whole - sum(parts.values()))
        return parts

    def step_seconds(self) -> float:
        """Mean time of a step that changed weights."""
        measured = self.done_steps - self.from_step - 1
        return self.seconds().get("steps", 0.0) / measured if measured > 0 else 0.0


class RunRecord:
    """The events of a run so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()

    def update(self) -> None:
        """Read what was added since the last call; all of it if the file is another one. No file is an empty one."""
        try:
            with open(self._path, "rb") as stream:
                size = stream.seek(0, 2)
                if size < self._offset:
                    self._reset()
                stream.seek(self._offset)
                while block := stream.read(_BLOCK_BYTES):
                    self._read(block)
        except FileNotFoundError:
            self._reset()
        self._settle()

    def _reset(self) -> None:
        self._offset = 0
        self._cut = b""
        """The beginning of a line whose end is not there yet."""
        self._step_line = self._steps_line = b""
        self.processes: list[Process] = []
        self.last: dict[str, Event] = {}
        """The last event of each kind."""
        self.counts: dict[str, int] = {}
        self.straggling: list[Event] = []

    def _read(self, block: bytes) -> None:
        self._offset += len(block)
        *lines, self._cut = (self._cut + block).split(b"\n")
        for line in lines:
            found = _KIND.search(line, 0, _KIND_BYTES)
            if found is None:
                continue
            if found[1] == b"step":
                self._step_line = line
            elif found[1] == b"steps":
                self._steps_line = line
            else:
                self._settle()
                if event := _parsed(line):
                    self._add(str(event["event"]), event)

    def _settle(self) -> None:
        """Parse the last step."""
        for line in filter(None, (self._step_line, self._steps_line)):
            event = _parsed(line)
            if event is None or not self.processes:
                continue
            process = self.processes[-1]
            process.done_steps = max(process.done_steps, int(event["step"]))
            process.last_time = max(process.last_time, float(event["time"]))
            if event["event"] == "step":
                process.last_step = self.last["step"] = event
        self._step_line = self._steps_line = b""

    def _add(self, kind: str, event: Event) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.last[kind] = event
        if kind in ("start", "resume"):
            self.processes.append(Process(event, done_steps=int(event["step"])))
        if not self.processes:
            return
        process = self.processes[-1]
        process.last_time = max(process.last_time, float(event["time"]))
        if kind in ("stop", "end", "error"):
            # The end of a stopped run is no news, and an error that follows another is a consequence.
            process.end = process.end or event
        elif kind == "hang":
            process.hang = event
        elif kind == "rollback":
            process.done_steps = int(event.get("to_step", event["step"]))
        elif kind == "straggler":
            self.straggling.append(event)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None if a crash has cut it, or if it is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = (
        isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("time"), (int, float))
    )
    return event if whole else None
