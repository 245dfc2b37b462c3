"""Who waits for whom when a run hangs: what each rank writes of itself, and what all of it says together. Needs no PyTorch."""

import faulthandler
import json
import linecache
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from based_megatron.monitor.progress import BETWEEN, Beat, Progress
from based_megatron.run_folder.whole_file import whole_file

FLOOR_SECONDS = 120.0
"""No part of a step is a hang before, nor what comes with every step."""
SLOW_FLOOR_SECONDS = 900.0
"""No save, validation, or end of a run is a hang before: file servers stall for minutes, and a save that is ended is lost."""
FIRST_SECONDS = 1800.0
"""Limit of a phase that has never ended: it may compile, allocate, and read what is in no cache."""
MULTIPLE = 10
PARTS_OF_A_STEP = ("data", "forward_backward", "optimizer")
WITH_EVERY_STEP = (*PARTS_OF_A_STEP, BETWEEN, "stop vote", "log")
_WAITING = re.compile(
    r"\b((all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|barrier|gather|scatter|send|recv)\w*|wait|synchronize|item|tolist|cpu)\("
)
"""Calls that wait for other ranks, or for the device, whose queue may wait for them."""
_NAMES_SHOWN = 4


def limit_seconds(progress: Progress, fixed: float) -> float:
    """Seconds after which the phase that a rank is in is a hang; `fixed` where that is above 0."""
    if fixed > 0:
        return fixed
    phase = progress.beat.phase
    longest = progress.longest(phase)
    if longest is None:
        return FIRST_SECONDS
    step_seconds = sum(progress.longest(part) or 0.0 for part in PARTS_OF_A_STEP)
    floor = FLOOR_SECONDS if phase in WITH_EVERY_STEP else SLOW_FLOOR_SECONDS
    return max(floor, MULTIPLE * longest, MULTIPLE * step_seconds)


@dataclass(frozen=True)
class Stuck:
    """One rank that makes no progress, as it says itself."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    seconds: float
    """Since the phase began."""
    time: float
    """Seconds since 1970."""
    where: str
    """The innermost line of the main thread, such as `train/step.py:141 global_sum`."""
    waits: bool
    """Whether that line waits for other ranks or for the device."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Number of the last collective that was begun, by process group."""


def write_stuck(folder: Path, rank: int, beat: Beat, collectives: Mapping[str, int]) -> Stuck:
    """Write this rank's file: what it does in one line of JSON, then the Python stacks of all threads."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    seconds = time.monotonic() - beat.since
    stuck = Stuck(
        rank, socket.gethostname(), os.getpid(), beat.step, beat.phase, seconds, time.time(), _where(frame), _waits(frame),
        dict(collectives),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(stack_path(folder, rank)) as stream:
        stream.write(json.dumps(asdict(stuck)) + "\n\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
    return stuck


def stack_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank:05d}.txt"


def read_stuck(folder: Path, since: float) -> list[Stuck]:
    """What ranks have written since a time, by rank."""
    found = []
    for path in sorted(folder.glob("rank-*.txt")):
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                stuck = Stuck(**json.loads(stream.readline()))
        except (OSError, ValueError, TypeError):
            continue
        if stuck.time >= since:
            found.append(stuck)
    return found


@dataclass(frozen=True)
class Hang:
    """What the ranks say together."""

    behind: list[int]
    """The ranks that the others wait for; none if all wait at the same place."""
    hosts: list[str]
    """Their hosts."""
    message: str


def explain(found: Sequence[Stuck], hosts: Sequence[str]) -> Hang:
    """Name the ranks that the others wait for. hosts: of each rank.

    The first evidence that tells some ranks from the others counts: those that have written nothing; those that wait for nobody;
    those that have not begun a collective in which others wait; those at an earlier step, or in another phase than most.
    """
    silent = sorted(set(range(len(hosts))) - {stuck.rank for stuck in found})
    if silent:
        why = "wrote no stacks: dead, stopped, or without its node"
        return _hang(silent, hosts, why, found)
    last_step = max(stuck.step for stuck in found)
    for odd, why in (
        ([s for s in found if not s.waits], "{} of step {}, at {}"),
        (_absent(found), "not in a collective that others wait in: {} of step {}, at {}"),
        ([s for s in found if s.step < last_step], "behind: {} of step {}, at {}"),
        (_minority(found), "{} of step {}, at {}"),
    ):
        if 0 < len(odd) < len(found):
            first = odd[0]
            return _hang([s.rank for s in odd], hosts, "in " + why.format(first.phase, first.step, first.where), found)
    first = found[0]
    return Hang([], [], f"all {len(found)} ranks wait in {first.phase} of step {first.step}, at {first.where}")


def _hang(ranks: list[int], hosts: Sequence[str], why: str, found: Sequence[Stuck]) -> Hang:
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:_NAMES_SHOWN])
    more = f" and {len(ranks) - _NAMES_SHOWN} more" if len(ranks) > _NAMES_SHOWN else ""
    others = [stuck for stuck in found if stuck.rank not in ranks]
    rest = ""
    if others:
        (phase, step), _ = Counter((stuck.phase, stuck.step) for stuck in others).most_common(1)[0]
        rest = f"; {len(others)} other{'s wait' if len(others) > 1 else ' waits'} in {phase} of step {step}"
    return Hang(ranks, list(dict.fromkeys(hosts[rank] for rank in ranks)), f"{shown}{more} {why}{rest}")


def _absent(found: Sequence[Stuck]) -> list[Stuck]:
    """Ranks that have begun fewer collectives of a process group than another one."""
    most: dict[str, int] = {}
    for stuck in found:
        for group, number in stuck.collectives.items():
            most[group] = max(number, most.get(group, number))
    return [s for s in found if any(number < most[group] for group, number in s.collectives.items())]


def _minority(found: Sequence[Stuck]) -> list[Stuck]:
    (usual, _), *_ = Counter(stuck.phase for stuck in found).most_common()
    return [stuck for stuck in found if stuck.phase != usual]


def _waits(frame: FrameType | None) -> bool:
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        if "/torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    if frame is None:
        return False
    return bool(_WAITING.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)))


def _where(frame: FrameType | None) -> str:
    """The innermost line outside of PyTorch."""
    inner = frame
    while inner is not None and "/torch/" in inner.f_code.co_filename:
        inner = inner.f_back
    inner = inner or frame
    if inner is None:
        return "nowhere"
    path = Path(inner.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{inner.f_lineno} {inner.f_code.co_name}"
