"""What ranks failed of: a file of each, and which of them was first. Needs no PyTorch."""

import json
import os
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from based_megatron.process import AFTERMATH

MOST_CHARACTERS = 2000
POLL_SECONDS = 0.2


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

    @property
    def is_aftermath(self) -> bool:
        """Whether it comes of the failure of another rank."""
        return bool(AFTERMATH.search(self.message))

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.type}: {self.message}"


def failure_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank:05d}.txt"


def write_failure(folder: Path, rank: int, error: BaseException) -> Failure:
    """Write this rank's file: one line of JSON, then the traceback. Raises OSError."""
    message = " ".join(str(error).split())[:MOST_CHARACTERS]
    failure = Failure(rank, socket.gethostname(), time.time(), type(error).__name__, message)
    folder.mkdir(parents=True, exist_ok=True)
    path = failure_path(folder, rank)
    new = path.with_suffix(".new")
    text = "".join(traceback.format_exception(error))
    new.write_text(f"{json.dumps(asdict(failure))}\n\n{text}", encoding="utf-8", errors="replace")
    os.replace(new, path)
    return failure


def read_failures(folder: Path, since: float) -> list[Failure]:
    """What ranks have written since a time, by rank."""
    found = []
    for path in sorted(folder.glob("rank-*.txt")):
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                failure = Failure(**json.loads(stream.readline()))
        except (OSError, ValueError, TypeError):
            continue
        if failure.time >= since:
            found.append(failure)
    return found


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
