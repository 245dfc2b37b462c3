"""The command `based status`: how runs are, from their files alone. Needs no PyTorch."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, RenderableType
from rich.live import Live

from based_megatron.errors import ConfigError
from based_megatron.run_folder.files import EVENTS
from based_megatron.status.record import RunRecord
from based_megatron.status.report import json_line, page, table
from based_megatron.status.run import KNOWN_FILES, RunStatus, is_run, status_of


@dataclass(frozen=True)
class StatusOptions:
    """Say how runs are, while they run and after: state, step, loss, speed, when it ends, where time went, restarts and why."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders: one gives a page, several a table."""
    watch: bool = False
    """Look again and again, until Ctrl-C."""
    json: bool = False
    """Print one JSON object a line for each run."""
    interval_seconds: float = 2.0
    """Seconds between looks of --watch."""


def main(argv: Sequence[str]) -> int:
    """Print how the runs are; returns the exit code. Raises ConfigError if none of the folders is that of a run."""
    options = tyro.cli(StatusOptions, prog="based status", args=list(argv))
    runs = [run for run in options.runs if is_run(run)]
    if not runs:
        raise ConfigError(
            f"{options.runs[0] if options.runs else Path()} is no run folder: it has none of {', '.join(KNOWN_FILES)}"
        )
    for other in sorted(set(options.runs) - set(runs)):
        print(f"{other} is no run folder and is left out", file=sys.stderr)
    records = [(run, RunRecord(run / EVENTS)) for run in runs]
    if options.json:
        for status in _look(records):
            print(json_line(status))
        return 0
    if not options.watch:
        Console().print(_shown(_look(records)))
        return 0
    try:
        with Live(_shown(_look(records)), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(max(0.1, options.interval_seconds))
                live.update(_shown(_look(records)), refresh=True)
    except KeyboardInterrupt:
        return 0


def _look(records: Sequence[tuple[Path, RunRecord]]) -> list[RunStatus]:
    for _, record in records:
        record.update()
    return [status_of(run, record, time.time()) for run, record in records]


def _shown(statuses: Sequence[RunStatus]) -> RenderableType:
    return page(statuses[0]) if len(statuses) == 1 else table(statuses)
