"""How a status looks: a page for one run, a table for several, and JSON."""

import dataclasses
import json
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from based_megatron.monitor.words import duration, human
from based_megatron.run_folder.json_lines import legal
from based_megatron.status.run import RunStatus

COLORS = {"running": "green", "done": "green", "hung": "red", "crashed": "red", "stopped": "yellow"}
PARTS = {
    "save": "saves",
    "validation": "validation",
    "data": "data",
    "lost": "lost steps",
    "down": "down",
    "start_up": "start-up",
    "skipped": "skipped",
    "other": "other",
}
RESTARTS_SHOWN = 5


def page(status: RunStatus) -> RenderableType:
    """Everything about one run."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    for name, value in _rows(status).items():
        if value:
            rows.add_row(name, Text(value))
    head = Text.assemble((status.run, "bold"), "  ", (status.state, COLORS.get(status.state, "")))
    return Group(head, rows)


def table(statuses: Sequence[RunStatus]) -> RenderableType:
    """One line for each run."""
    rows = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "loss", "tok/s", "MFU", "good", "ETA", "saved", "skips", "starts"):
        rows.add_column(
            name, no_wrap=name != "run", overflow="fold", justify="left" if name in ("run", "state") else "right"
        )
    for status in statuses:
        save = status.last_save
        rows.add_row(
            Text(status.name or status.run.rstrip("/").rpartition("/")[2] or status.run),
            Text(status.state, COLORS.get(status.state, "")),
            _steps(status),
            _digits(status.loss),
            human(status.tokens_per_second) if status.tokens_per_second else "",
            _percent(status.mfu),
            _percent(status.goodput),
            duration(status.eta_seconds) if status.eta_seconds is not None else "",
            duration(save.age_seconds) if save else "",
            str(status.skips or ""),
            str(1 + len(status.restarts) if status.ranks else ""),
        )
    return rows


def json_line(status: RunStatus) -> str:
    """One JSON object; infinities and nan are strings that float() reads."""
    return json.dumps(legal(dataclasses.asdict(status)), allow_nan=False)


def _rows(status: RunStatus) -> dict[str, str]:
    return {
        "why": status.reason,
        "step": _step(status),
        "loss": _loss(status),
        "speed": _speed(status),
        "ends": _end(status),
        "goodput": _goodput(status),
        "last save": _save(status),
        "guards": _guards(status),
        "restarts": _restarts(status),
        "ranks": _ranks(status),
        "slowest": _slowest(status),
        "stragglers": "; ".join(
            f"rank {s.rank} on {s.host or '?'}, {s.slower:.0%} slower at step {s.step:,}" for s in status.stragglers
        ),
        "warning": status.last_warning or "",
    }


def _step(status: RunStatus) -> str:
    share = f" ({status.step / status.steps:.1%})" if status.steps else ""
    tokens = f", {human(status.tokens)} tokens" if status.tokens else ""
    of = f" of {status.steps:,}" if status.steps else ""
    return f"{status.step:,}{of}{share}{tokens}"


def _loss(status: RunStatus) -> str:
    parts = [] if status.loss is None else [f"{status.loss:.4f} in training"]
    if status.validation_loss is not None:
        parts.append(f"{status.validation_loss:.4f} in validation at step {status.validation_step:,}")
    return ", ".join(parts)


def _speed(status: RunStatus) -> str:
    if status.tokens_per_second is None:
        return ""
    mfu = f", MFU {status.mfu:.1%}" if status.mfu is not None else ""
    return f"{human(status.tokens_per_second)} tokens/s{mfu}, {status.step_seconds:.3g} s a step"


def _end(status: RunStatus) -> str:
    if status.eta_seconds is None:
        return ""
    at = time.strftime("%a %H:%M", time.localtime(time.time() + status.eta_seconds))
    return f"in {duration(status.eta_seconds)} ({at}), saves and validation counted"


def _goodput(status: RunStatus) -> str:
    if status.goodput is None:
        return ""
    rest = [
        f"{words} {status.seconds[part] / status.elapsed_seconds:.1%}"
        for part, words in PARTS.items()
        if status.seconds[part] >= 0.0005 * status.elapsed_seconds
    ]
    return f"{status.goodput:.1%} of {duration(status.elapsed_seconds)}" + (f"; {', '.join(rest)}" if rest else "")


def _save(status: RunStatus) -> str:
    save = status.last_save
    if save is None:
        return "none" if status.step else ""
    took = f", training stood still for {save.seconds:.2g} s" if save.seconds is not None else ""
    return f"step {save.step:,}, {duration(save.age_seconds)} ago{took}"


def _guards(status: RunStatus) -> str:
    counts = {
        "skipped steps": status.skips,
        "spikes": status.spikes,
        "rollbacks": status.rollbacks,
        "warnings": status.warnings,
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _restarts(status: RunStatus) -> str:
    lines = [
        f"{time.strftime('%m-%d %H:%M', time.localtime(restart.time))} at step {restart.step:,}"
        + (f" ({restart.lost_steps:,} steps lost)" if restart.lost_steps else "")
        + f" after: {restart.cause}"
        for restart in status.restarts[-RESTARTS_SHOWN:]
    ]
    hidden = len(status.restarts) - len(lines)
    return "\n".join([f"{hidden} earlier ones"] * bool(hidden) + lines)


def _ranks(status: RunStatus) -> str:
    if not status.ranks:
        return ""
    return f"{status.ranks} on {len(status.hosts)} hosts" if len(status.hosts) > 1 else str(status.ranks)


def _slowest(status: RunStatus) -> str:
    slowest = status.slowest
    if slowest is None or status.ranks == 1:
        return ""
    more = slowest.seconds / slowest.median_seconds - 1 if slowest.median_seconds else 0.0
    return f"rank {slowest.rank} on {slowest.host or '?'}: {slowest.seconds:.3g} s a step, {more:.0%} above the median"


def _steps(status: RunStatus) -> str:
    return f"{status.step}/{status.steps}" if status.steps else str(status.step)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
