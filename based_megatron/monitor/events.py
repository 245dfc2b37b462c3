"""events.jsonl: what happened in a run, one JSON object a line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from based_megatron.run_folder.files import EVENTS as FILE_NAME
from based_megatron.run_folder.json_lines import append_line as append_event
from based_megatron.run_folder.json_lines import read_lines

__all__ = ["FILE_NAME", "append_event", "read_events"]


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file in order, without lines that a crash has cut.

    Steps that a resumed run did again occur twice: the later ones count.
    """
    yield from read_lines(path)
