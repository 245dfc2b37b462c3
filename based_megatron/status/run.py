"""How a run is: one value of plain facts, made of the files of its folder."""

import contextlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from based_megatron.config.yaml_files import read_yaml
from based_megatron.errors import BasedError
from based_megatron.run_folder.failures import first_cause, read_failures
from based_megatron.run_folder.files import CONFIG, DONE, ERRORS, EVENTS, HEARTBEAT, HISTORY, LOCK, SBATCH
from based_megatron.run_folder.history import read_history
from based_megatron.run_folder.lock import is_gone, read_owner
from based_megatron.status.record import FIRST_LIMIT_SECONDS, Event, Process, RunRecord

State = Literal["waiting", "starting", "running", "hung", "stopped", "crashed", "done"]
KNOWN_FILES = (EVENTS, CONFIG, HISTORY, LOCK, HEARTBEAT, SBATCH)


@dataclass(frozen=True)
class Save:
    """A checkpoint that was made."""

    step: int
    age_seconds: float
    seconds: float | None
    """Time that training stood still for it."""


@dataclass(frozen=True)
class Restart:
    """A start that was not the first."""

    time: float
    """Seconds since 1970."""
    step: int
    """Where it went on."""
    lost_steps: int
    """Steps that were done before and had to be done again."""
    cause: str
    """What ended the process before."""


@dataclass(frozen=True)
class SlowestRank:
    """The rank whose own work in a step took longest, at the last log point."""

    rank: int
    host: str | None
    seconds: float
    median_seconds: float


@dataclass(frozen=True)
class Straggler:
    """A rank that was slower than the others at several log points in a row."""

    rank: int
    host: str | None
    step: int
    slower: float
    """Its time over the median, minus 1."""


@dataclass(frozen=True)
class RunStatus:
    """The answer of `based status` on one run. What is not known is None."""

    run: str
    state: State
    reason: str
    """Why it is in this state, in words; may be empty."""
    name: str | None = None
    step: int = 0
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    """Mean training loss since the log point before the last."""
    validation_loss: float | None = None
    validation_step: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None
    """Until the end, saves and validation counted; None if the run does not run."""
    elapsed_seconds: float = 0.0
    """Since the first start, or until the last sign of life of a run that has ended."""
    goodput: float | None = None
    """Share of `elapsed_seconds` that computed steps which changed weights and were not lost."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where all of `elapsed_seconds` went."""
    silent_seconds: float | None = None
    """Since the last sign of life."""
    last_save: Save | None = None
    skips: int = 0
    spikes: int = 0
    rollbacks: int = 0
    warnings: int = 0
    last_warning: str | None = None
    restarts: list[Restart] = field(default_factory=list)
    ranks: int | None = None
    hosts: dict[str, int] = field(default_factory=dict)
    """Ranks on each host, in the order of ranks."""
    slowest: SlowestRank | None = None
    stragglers: list[Straggler] = field(default_factory=list)
    """Those of the last start, one for each rank: hosts that the next one may leave out."""
    hang: dict[str, Any] | None = None
    """The event of a hang of the last start."""


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).exists() for name in KNOWN_FILES)


def status_of(run_dir: Path, record: RunRecord, now: float) -> RunStatus:
    """The status of a run at a time (seconds since 1970), after `record.update()`."""
    settings = _settings(run_dir)
    processes, last = record.processes, record.last
    current = processes[-1] if processes else None
    step = current.done_steps if current else 0
    steps = _number(settings, "train", "steps")
    heartbeat = _Heartbeat.read(run_dir, now)
    lock = _Lock.read(run_dir, now)
    state, reason = _state(run_dir, current, heartbeat, lock, step, steps)
    runs = state in ("running", "hung", "starting")
    spent = _time_spent(processes, now if runs else None)
    logged: Event = (current.last_step if current else None) or last.get("step", {})
    hosts = dict(current.start.get("hosts") or {}) if current else {}
    return RunStatus(
        run=str(run_dir),
        state=state,
        reason=reason,
        name=_name(run_dir),
        step=step,
        steps=steps,
        tokens=logged.get("tokens_seen"),
        loss=_float(logged.get("loss_mean", logged.get("loss"))),
        validation_loss=_float(last["validation"]["loss"]) if "validation" in last else None,
        validation_step=last["validation"]["step"] if "validation" in last else None,
        tokens_per_second=logged.get("tokens_per_second"),
        mfu=logged.get("mfu"),
        step_seconds=logged.get("step_seconds"),
        eta_seconds=_eta(logged, step, steps, now) if state == "running" else None,
        elapsed_seconds=sum(spent.values()),
        goodput=spent["steps"] / sum(spent.values()) if sum(spent.values()) else None,
        seconds=spent,
        silent_seconds=_silent(current, heartbeat, now),
        last_save=_last_save(last.get("checkpoint"), now),
        skips=record.counts.get("skip", 0),
        spikes=record.counts.get("spike", 0),
        rollbacks=record.counts.get("rollback", 0),
        warnings=record.counts.get("warning", 0),
        last_warning=last["warning"].get("message") if "warning" in last else None,
        restarts=[_restart(before, after) for before, after in pairwise(processes)],
        ranks=current.start.get("world_size") if current else None,
        hosts=hosts,
        slowest=_slowest(logged, hosts),
        stragglers=_stragglers(record, current),
        hang=dict(current.hang) if current and current.hang else None,
    )


@dataclass(frozen=True)
class _Heartbeat:
    age_seconds: float
    limit_seconds: float

    @staticmethod
    def read(run_dir: Path, now: float) -> "_Heartbeat | None":
        path = run_dir / HEARTBEAT
        try:
            age, text = now - path.stat().st_mtime, path.read_text()
        except (OSError, UnicodeDecodeError):
            return None
        limit = FIRST_LIMIT_SECONDS
        with contextlib.suppress(ValueError, TypeError, KeyError):
            limit = float(json.loads(text)["limit_seconds"])
        return _Heartbeat(max(0.0, age), limit)


@dataclass(frozen=True)
class _Lock:
    gone: bool
    """Whether its owner has surely ended, or has not touched it for too long."""
    words: str

    @staticmethod
    def read(run_dir: Path, now: float) -> "_Lock | None":
        owner = read_owner(run_dir)
        if owner is None:
            return None
        try:
            age_seconds = now - (run_dir / LOCK).stat().st_mtime
        except FileNotFoundError:
            return None
        return _Lock(is_gone(owner) or age_seconds > owner.stale_seconds, f"process {owner.pid} on {owner.host}")


def _state(
    run_dir: Path,
    current: Process | None,
    heartbeat: _Heartbeat | None,
    lock: _Lock | None,
    step: int,
    steps: int | None,
) -> tuple[State, str]:
    if current is None:
        if lock is None:
            return "waiting", "nothing has started"
        return ("crashed", f"{lock.words} ended before the first step") if lock.gone else ("starting", lock.words)
    end = current.end
    ended = end is not None and (lock is None or lock.gone)
    if end is not None and end["event"] == "error" and ended:
        return "crashed", cause_of(end)
    if end is not None and end["event"] == "stop":
        return "stopped", str(end.get("reason", ""))
    if end is not None and end["event"] == "end" and (steps is None or step >= steps):
        return "done", ""
    if (run_dir / DONE).exists() and (steps is None or step >= steps):
        return "done", ""
    if lock is not None and lock.gone:
        return "crashed", _cause_of_ranks(run_dir, current) or f"{lock.words} is gone without a last word"
    if end is not None and lock is not None:
        return "starting", f"again, after: {cause_of(end) if end['event'] == 'error' else end['event']}"
    if heartbeat is None or heartbeat.age_seconds > heartbeat.limit_seconds:
        silent = heartbeat.age_seconds if heartbeat else 0.0
        limit = heartbeat.limit_seconds if heartbeat else FIRST_LIMIT_SECONDS
        why = f"no sign of life for {silent:.0f} s (limit {limit:.0f} s)"
        if current.hang is not None:
            return "hung", str(current.hang.get("message") or why)
        return ("hung", why) if lock is not None or heartbeat else ("crashed", "no sign of life and no last word")
    if current.hang is not None and float(current.hang["time"]) >= current.last_time:
        return "hung", str(current.hang.get("message", ""))
    return ("running", "") if current.last_step is not None else ("starting", "before the first step")


def _cause_of_ranks(run_dir: Path, current: Process) -> str:
    """What a rank has said of its failure, where the logging rank has not: it may have been killed."""
    hosts = [host for host, ranks in (current.start.get("hosts") or {}).items() for _ in range(ranks)]
    failures = read_failures(run_dir / ERRORS, float(current.start["time"]))
    return str(first_cause(failures, hosts) or "")


def cause_of(end: Event | None) -> str:
    """What ended a process, in one line."""
    if end is None:
        return "killed without a last word"
    if end["event"] == "stop":
        return f"stopped: {end.get('reason', '')}"
    if end["event"] == "end":
        return "ended"
    where = f"rank {end['rank']}" + (f" on {end['host']}" if end.get("host") else "") + ": " if "rank" in end else ""
    message = " ".join(str(end.get("message", "")).split())
    return f"{where}{end.get('type', 'error')}: {message:.300}"


def _restart(before: Process, after: Process) -> Restart:
    cause = cause_of(before.end)
    if before.end is None and before.hang is not None:
        cause = f"hung: {before.hang.get('message', '')}"
    lost = max(0, before.done_steps - after.from_step)
    return Restart(after.began, after.from_step, lost, cause)


def _time_spent(processes: list[Process], now: float | None) -> dict[str, float]:
    """Seconds of each part since the first start; until `now`, or until the last event if it is None."""
    parts = dict.fromkeys(("steps", "save", "validation", "data", "skipped", "lost", "start_up", "down", "other"), 0.0)
    for i, process in enumerate(processes):
        for name, seconds in process.seconds().items():
            parts[name if name in parts else "other"] += seconds
        if i + 1 == len(processes):
            continue
        after = processes[i + 1]
        lost = max(0, process.done_steps - after.from_step) * process.step_seconds()
        lost = min(lost, parts["steps"])
        parts["steps"] -= lost
        parts["lost"] += lost
        parts["down"] += max(0.0, after.began - process.last_time)
    if processes and now is not None:
        # What has happened since the last event is not known yet: steps, most likely, if there were any.
        process = processes[-1]
        parts["steps" if process.last_step else "start_up"] += max(0.0, now - process.last_time)
    return parts


def _silent(current: Process | None, heartbeat: _Heartbeat | None, now: float) -> float | None:
    ages = [heartbeat.age_seconds] if heartbeat else []
    if current is not None:
        ages.append(max(0.0, now - current.last_time))
    return min(ages) if ages else None


def _eta(logged: Event, step: int, steps: int | None, now: float) -> float | None:
    if "eta_seconds" in logged:
        return max(0.0, float(logged["eta_seconds"]) - (now - float(logged["time"])))
    if steps is None or "step_seconds" not in logged:
        return None
    return (steps - step) * float(logged["step_seconds"]) / max(0.01, float(logged.get("goodput", 1.0)))


def _last_save(event: Event | None, now: float) -> Save | None:
    if event is None:
        return None
    seconds = event.get("seconds")
    return Save(int(event["step"]), max(0.0, now - float(event["time"])), seconds)


def _slowest(logged: Event, hosts: dict[str, int]) -> SlowestRank | None:
    if "slowest_rank" not in logged:
        return None
    rank = int(logged["slowest_rank"])
    return SlowestRank(rank, host_of(rank, hosts), logged["own_seconds_slowest"], logged["own_seconds_median"])


def host_of(rank: int, hosts: dict[str, int]) -> str | None:
    """The host of a rank; None if it is not known."""
    for host, ranks in hosts.items():
        if rank < ranks:
            return host
        rank -= ranks
    return None


def _stragglers(record: RunRecord, current: Process | None) -> list[Straggler]:
    if current is None:
        return []
    found = {
        int(event["rank"]): Straggler(int(event["rank"]), event.get("host"), int(event["step"]), float(event["slower"]))
        for event in record.straggling
        if event["time"] >= current.start["time"]
    }
    return list(found.values())


def _settings(run_dir: Path) -> dict[str, Any]:
    """The values of config.yaml as they are there: those of an older version may have other keys."""
    try:
        return read_yaml(run_dir / CONFIG)
    except BasedError:
        return {}


def _name(run_dir: Path) -> str | None:
    """The name of the run, where its history has one."""
    with contextlib.suppress(OSError):
        if history := read_history(run_dir):
            return history[-1].run_name
    return None


def _number(settings: dict[str, Any], section: str, key: str) -> int | None:
    values = settings.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int) else None


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
