"""history.jsonl: who a run is, and one entry for each of its starts."""

import dataclasses
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from based_megatron import __version__
from based_megatron.run_folder.files import HISTORY
from based_megatron.run_folder.json_lines import append_line, read_lines

LIBRARIES = ("torch", "megatron-core", "deepspeed")
GIT_SECONDS = 10


@dataclass(frozen=True)
class Start:
    """One start of a run, written once it has been accepted and its checkpoint is loaded."""

    start: int
    """1 for the first."""
    run_id: str
    """Made at the first start, and the same ever after; checkpoints hold it too."""
    run_name: str
    time: str
    """UTC, in ISO format."""
    command: list[str]
    config: dict[str, Any]
    """Every setting."""
    changes: dict[str, list[Any]]
    """Settings that differ from those of the checkpoint that the start goes on from: [then, now]."""
    git_commit: str | None
    """Commit of the code with `-dirty` where files differ from it; None for code that is in no repository."""
    versions: dict[str, str]
    hosts: list[str]
    """One for each node, in the order of ranks."""
    ranks: int
    job: str | None
    """Number of the SLURM job."""
    from_step: int
    """Steps that were done before."""


def new_run_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex


def read_history(run_dir: Path) -> list[Start]:
    """The starts of a run, first to last; none for a folder without a history. Raises OSError if it cannot be read."""
    path = run_dir / HISTORY
    lines = read_lines(path) if path.exists() else ()
    return [start for line in lines if (start := _start(line)) is not None]


def append_start(run_dir: Path, start: Start) -> None:
    """Add an entry to the history. Raises OSError."""
    append_line(run_dir / HISTORY, dataclasses.asdict(start))


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of this package and of libraries; by default of those that decide what a run computes."""
    found = {"based-megatron": __version__}
    for name in libraries:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that tracks a folder, with `-dirty` where files differ from it; None if there is none."""
    tracked = _git(folder, "ls-files", "--", ".")
    return (_git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None) if tracked else None


def _start(line: dict[str, Any]) -> Start | None:
    """The entry that a line holds; None for one of another version, or one that was damaged."""
    names = {field.name for field in dataclasses.fields(Start)}
    kinds = {"start": int, "run_id": str, "config": dict, "from_step": int}
    if not names <= line.keys() or not all(isinstance(line[name], kind) for name, kind in kinds.items()):
        return None
    return Start(**{name: line[name] for name in names})


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
