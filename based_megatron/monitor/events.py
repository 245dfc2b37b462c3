"""events.jsonl: what happened in a run, one JSON object a line."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from based_megatron.run_folder.json_lines import append_line as append_event
from based_megatron.run_folder.json_lines import read_lines

__all__ = ["append_event", "each_step", "read_events"]


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file in order, without lines that a crash has cut.

    Steps that a resumed run did again occur twice: the later ones count.
    """
    yield from read_lines(path)


def each_step(events: Iterable[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step, the last word on each, from the events `steps`."""
    found: dict[int, tuple[float, float]] = {}
    for event in events:
        if event.get("event") == "steps":
            first_step = event["step"] - len(event["loss"]) + 1
            pairs = zip(map(float, event["loss"]), map(float, event["grad_norm"]), strict=True)
            found.update(enumerate(pairs, start=first_step))
    return found
