"""What ranks failed of: a file of each, which `status` and the batch script read, and which of them was first. Needs no PyTorch."""

import re
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from based_megatron.errors import BasedError
from based_megatron.run_folder.whole_file import whole_file

MOST_CHARACTERS = 2000
POLL_SECONDS = 0.2
AFTERMATH = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed ?out|remote process|communicator was aborted|terminated",
    re.IGNORECASE,
)
"""What an error says if it comes of the failure of another rank."""
STOOD_STILL = "this process did not run for"
"""What the note of an error says if its rank was stopped: others then lost it, not it the others."""
_BEGAN = time.time()
"""When this process had hardly begun."""
_LINE = re.compile(
    r"(?P<order>[01]) (?P<time>[\d.]+) (?P<status>\d+) rank (?P<rank>\d+) on (?P<host>\S+): (?P<type>\w+): (?P<message>.*)"
)


@dataclass(frozen=True)
class Failure:
    """What one rank failed of."""

    rank: int
    host: str
    time: float
    """Seconds since 1970."""
    type: str
    message: str
    """In one line."""
    is_final: bool = False
    """Whether a new start would fail the same way."""

    @property
    def is_aftermath(self) -> bool:
        """Whether it comes of the failure of another rank."""
        return not self.is_final and STOOD_STILL not in self.message and bool(AFTERMATH.search(self.message))

    @property
    def line(self) -> str:
        """The line of its file: `ORDER SECONDS STATUS rank R on HOST: TYPE: MESSAGE`.

        Sorted as numbers, the first line is the cause of all others: an aftermath has order 1. Status 2 means a final failure.
        """
        return f"{int(self.is_aftermath)} {self.time:.3f} {2 if self.is_final else 1} {self}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.type}: {self.message}"


def failure_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank:05d}.txt"


def write_failure(folder: Path, rank: int, error: BaseException) -> Failure:
    """Write this rank's file: its line, then the traceback. What this process wrote before stays: that was the cause. Raises OSError."""
    before = read_failure(failure_path(folder, rank))
    if before is not None and before.time >= _BEGAN:
        return before
    text = " ".join("; ".join([*getattr(error, "__notes__", ()), str(error)]).split())[:MOST_CHARACTERS]
    is_final = isinstance(error, BasedError) and not error.may_pass
    failure = Failure(rank, socket.gethostname(), round(time.time(), 3), type(error).__name__, text, is_final)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(failure_path(folder, rank)) as stream:
        stream.write(f"{failure.line}\n\n" + "".join(traceback.format_exception(error)))
    return failure


def read_failure(path: Path) -> Failure | None:
    """What a rank has written; None if it has not."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            found = _LINE.match(stream.readline())
    except OSError:
        return None
    if found is None:
        return None
    rank, seconds, is_final = int(found["rank"]), float(found["time"]), found["status"] == "2"
    return Failure(rank, found["host"], seconds, found["type"], found["message"], is_final)


def read_failures(folder: Path, since: float) -> list[Failure]:
    """What ranks have written since a time, by rank."""
    found = map(read_failure, sorted(folder.glob("rank-*.txt")))
    return [failure for failure in found if failure is not None and failure.time >= since]


def first_cause(failures: Sequence[Failure], hosts: Sequence[str]) -> Failure | None:
    """The failure that all others come of, where they tell; None if there are none. hosts: of each rank.

    If all say that they lost others, and some ranks said nothing, it is those: they were killed, or their node is gone.
    """
    if not failures:
        return None
    own = [failure for failure in failures if not failure.is_aftermath]
    first = min(own or failures, key=lambda failure: failure.time)
    silent = sorted(set(range(len(hosts))) - {failure.rank for failure in failures})
    if own or not silent:
        return first
    more = f" (and {len(silent) - 1} more ranks)" if len(silent) > 1 else ""
    why = f"ended without a word{more}: killed, or its node is gone; rank {first.rank} then lost its connection"
    return Failure(silent[0], hosts[silent[0]], first.time, "Killed", why)


def wait_for_cause(folder: Path, since: float, hosts: Sequence[str], most_seconds: float) -> Failure | None:
    """The first cause, once it is known: when a rank has written one of its own, or all have written, or the time is up."""
    deadline = time.monotonic() + most_seconds
    while True:
        failures = read_failures(folder, since)
        known = len(failures) == len(hosts) or any(not failure.is_aftermath for failure in failures)
        if known or time.monotonic() >= deadline:
            return first_cause(failures, hosts)
        time.sleep(POLL_SECONDS)
