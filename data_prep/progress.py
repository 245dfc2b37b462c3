"""How far a `based prep` is: on its terminal, and for `based prep status`, from what it leaves on disk."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from based_megatron.data_prep.tasks import Tell
from based_megatron.data_prep.unit_store import PLAN
from based_megatron.run_folder.whole_file import whole_file


@dataclass(frozen=True)
class Plan:
    """What a start has to do."""

    tasks: int
    begun: float
    """When its first pass began, in seconds since the epoch."""
    units: tuple[tuple[str, int], ...]
    """The key of each unit and the bytes of its pieces."""

    @property
    def bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(unit_bytes for _, unit_bytes in self.units)

    def save(self, folder: Path) -> None:
        """Write it into the folder of finished work. Raises OSError."""
        with whole_file(folder / PLAN) as stream:
            json.dump(dataclasses.asdict(self), stream)


def load_plan(folder: Path) -> Plan | None:
    """The plan in a folder of finished work; None if there is none."""
    try:
        values = json.loads((folder / PLAN).read_bytes())
        return Plan(**{**values, "units": tuple((key, unit_bytes) for key, unit_bytes in values["units"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Progress:
    """Bars on a terminal, one for each stage."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), _TokensPerSecond(), TimeRemainingColumn()
        )

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, description: str, total_bytes: int, finished_bytes: int = 0) -> Iterator[Tell]:
        """A bar, while it is open, and what moves it on."""
        task = self._bars.add_task(description, total=total_bytes, completed=finished_bytes, tokens=0)

        def tell(passed_bytes: int, tokens: int) -> None:
            self._bars.advance(task, passed_bytes)
            self._bars.update(task, tokens=self._bars.tasks[task].fields["tokens"] + tokens)

        yield tell


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens, seconds = task.fields["tokens"], task.elapsed or 0
        return Text(f"{tokens / 1e6:.1f} Mtok, {tokens / seconds / 1e6:.2f} Mtok/s" if tokens and seconds else "")
